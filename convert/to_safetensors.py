"""Writes a facebookresearch/DiT checkpoint in 16 bits, same names, as safetensors: readable without torch.

    python -m convert.to_safetensors IN.pt OUT.safetensors --dtype=float16 --num-heads=6 \
        --origin="trained on ..." --licence=Apache-2.0
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence

import ml_dtypes
import numpy as np

from convert.facebook import FACEBOOK, metadata
from convert.layout import read_finite
from convert.load import describe
from vq4dit_jax.errors import InputError
from vq4dit_jax.files import atomic_path

_DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def to_safetensors(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    dtype: str = "float16",
    variant: str | None = None,
    num_heads: int | None = None,
    num_classes: int | None = None,
    origin: str | None = None,
    licence: str | None = None,
) -> None:
    """Checks `source` as `load_pretrained` does and writes its tensors to `target`.

    The metadata of `target` has what shapes do not tell: `num_heads`, `num_classes` of a table without a null row, a
    SiT's `model`, `prediction` and `path_type`; and where given `origin` and `licence`. A REPA is written as a SiT, and int8
    weights (`convert.convrot`) as dense ones.
    """
    from safetensors.numpy import save_file

    checkpoint, layout, model, notes = describe(source, variant, num_heads=num_heads, num_classes=num_classes)
    if layout is not FACEBOOK:
        raise InputError(f"{source}: {layout.name} layout; only {FACEBOOK.name} checkpoints are rewritten")
    names = (name for rule in layout.rules for name in rule.names(model.depth))
    tensors = {name: np.ascontiguousarray(read_finite(checkpoint, name, _DTYPES[dtype])) for name in names}
    told = {**metadata(model), "origin": origin, "licence": licence}
    with atomic_path(target) as partial:
        save_file(tensors, partial, metadata={key: value for key, value in told.items() if value is not None})
        partial.chmod(0o644)  # save_file lets only the owner read
    for note in notes:
        print(f"{checkpoint.path}: {note}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m convert.to_safetensors", description=__doc__.split("\n")[0])
    parser.add_argument("source", type=pathlib.Path, help="checkpoint with facebookresearch/DiT's names")
    parser.add_argument("target", type=pathlib.Path, help="safetensors file to write")
    parser.add_argument("--dtype", choices=_DTYPES, default="float16")
    parser.add_argument(
        "--variant", help="DiT-XL/2, SiT-XL/2, ..., or DiT or SiT; needed where nothing in the file tells"
    )
    parser.add_argument("--num-heads", type=int, help="attention heads; needed unless the variant is a published one")
    parser.add_argument("--num-classes", type=int, help="classes, without the null label")
    parser.add_argument("--origin", help="where the weights come from, for the metadata")
    parser.add_argument("--licence", help="licence of the weights, for the metadata")
    try:
        to_safetensors(**vars(parser.parse_args(arguments)))
    except (InputError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
