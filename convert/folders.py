"""Finds the weights in a folder, as diffusers, accelerate and transformers name them.

| written by | files |
|---|---|
| diffusers' models | `config.json`, `diffusion_pytorch_model[.VARIANT].safetensors` or `.bin`, or shards and an `.index.json` |
| accelerate | `model.safetensors` or `pytorch_model.bin`, beside `optimizer.bin`, `random_states_0.pkl` and the like |
| diffusers' pipelines | `model_index.json`, and the network's folder `transformer/` |

Of several, full precision comes before a variant (fp16, bf16), safetensors before pickles; an EMA comes before all.
"""

import dataclasses
import pathlib
import re

from convert.checkpoint import Checkpoint, read_json
from convert.weight_files import open_weights
from convert.wrappers import is_ema
from vq4dit_jax.errors import InputError

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_NAME = re.compile(
    rf"(?P<stem>{'|'.join(_STEMS)})(\.(?P<variant>[\w-]+))?\.(?P<kind>safetensors|bin)(?P<index>\.index(\.(?P<tag>[\w-]+))?\.json)?"
)
_SHARD = re.compile(r"-\d+-of-\d+")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_NO_WEIGHTS = (
    "optimizer",
    "scheduler",
    "sampler",
    "scaler",
    "random_states",
    "rng",
    "training_args",
    "custom_checkpoint",
)


def open_folder(path: pathlib.Path) -> Checkpoint:
    """The checkpoint in a model's folder or in a pipeline's, with its config."""
    folder = _network(path)
    file = _weights(folder)
    if file is None:
        raise InputError(
            f"{folder}: no weights in it; {_STEMS[0]}.safetensors, {_STEMS[1]}.safetensors, {_STEMS[2]}.bin or an "
            ".index.json of one of them is wanted"
        )
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    checkpoint = dataclasses.replace(open_weights(file), config=config)
    return dataclasses.replace(checkpoint, path=path) if file.suffix == ".json" else checkpoint


def _network(path: pathlib.Path) -> pathlib.Path:
    inner = path / "transformer"
    if (path / "model_index.json").is_file() and inner.is_dir():
        return inner
    for folder in (path, inner):
        if (folder / "config.json").is_file() or (folder.is_dir() and _weights(folder) is not None):
            return folder
    raise InputError(
        f"{path}: no config.json and no weights in it or in its transformer/; the folder of a model in diffusers' or "
        "accelerate's layout is wanted, or a file of weights"
    )


def _weights(folder: pathlib.Path) -> pathlib.Path | None:
    """The file of weights or the index to read; InputError where several are as good."""
    files = [f for f in sorted(folder.iterdir()) if f.is_file() and not _SHARD.search(f.name)]
    named = [(_rank(match), f) for f in files if (match := _NAME.fullmatch(f.name))]
    if named:
        return min(named)[1]
    others = [f for f in files if f.suffix in _SUFFIXES and not f.name.startswith(_NO_WEIGHTS)]
    if len(others) > 1:
        names = ", ".join(f.name for f in others[:5])
        raise InputError(
            f"{folder}: several files of weights ({names}) and nothing says which is wanted; give one file"
        )
    return others[0] if others else None


def _rank(match: re.Match) -> tuple[int, int, int, bool]:
    variant = match["variant"] or match["tag"] or ""
    precision = 0 if is_ema(variant) else 1 if variant in ("", "fp32") else 3 if "ema" in variant else 2
    return precision, match["kind"] == "bin", _STEMS.index(match["stem"]), match["index"] is None
