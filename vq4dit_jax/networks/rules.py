"""Which parameters of the networks that we know are quantized."""

from typing import Any

from vq4dit_jax.errors import InputError
from vq4dit_jax.qarray.rules import BITS, KEEP, Rule
from vq4dit_jax.qarray.spec import VQSpec
from vq4dit_jax.qarray.tree import flatten

_DIT = {f"blocks/{name}/kernel" for name in ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2", "adaLN_modulation/1")}


def dit_rules(bits: float | int) -> tuple[Rule, ...]:
    """Every Linear of a DiT's blocks, q, k and v with a codebook each; all else is kept."""
    if isinstance(bits, bool) or bits not in BITS:
        raise InputError(f"bits={bits}: wanted one of {', '.join(map(str, BITS))}; or give rules=")
    codewords, length = BITS[bits]
    return (
        (r"blocks/\d+/attn/qkv/kernel", VQSpec(codewords, length, groups=3)),
        (r"blocks/\d+/(attn/proj|mlp/fc[12]|adaLN_modulation/1)/kernel", VQSpec(codewords, length)),
        (r"blocks/\d+/.*bias", KEEP),
        (r"(pos_embed|[xty]_embedder/.*|final_layer/.*)", KEEP),
    )


def rules_for(params: Any, bits: float | int) -> tuple[Rule, ...]:
    """The rules of the network that a tree is of; InputError for one that we do not know."""
    paths = flatten(params)
    if set(paths) >= _DIT:
        return dit_rules(bits)
    raise InputError(
        f"these are not the parameters of a DiT ({min(_DIT - set(paths))} is missing); for a network of your own give "
        "rules=[(regular expression, VQSpec(256, 4)), ..., (r'.*', KEEP)]"
    )
