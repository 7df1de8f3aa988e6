"""Which parameters of the networks that we know are quantized, from what they say of themselves."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from vq4dit_jax.errors import InputError
from vq4dit_jax.networks.dit import ROLES
from vq4dit_jax.networks.network import Role, Stack
from vq4dit_jax.qarray.rules import BITS, KEEP, Rule
from vq4dit_jax.qarray.spec import Spec, VQSpec
from vq4dit_jax.qarray.tree import flatten

_BLOCKS = Stack("blocks", 0, ROLES)


def codebooks(bits: float | int) -> Callable[[Role], VQSpec]:
    """The codebooks of these bits, as many for a Linear as its role says. Raises InputError for bits that have no codebook."""
    if isinstance(bits, bool) or bits not in BITS:
        raise InputError(f"bits={bits}: wanted one of {', '.join(map(str, BITS))}; or give rules=")
    codewords, length = BITS[bits]
    return lambda role: VQSpec(codewords, length, groups=role.codebooks)


def stack_rules(stacks: Sequence[Stack], spec_of: Callable[[Role], Spec]) -> tuple[Rule, ...]:
    """Every Linear that has a role, as `spec_of` says."""
    return tuple(
        (rf"{re.escape(stack.path)}/\d+/{role.pattern}", spec_of(role)) for stack in stacks for role in stack.roles
    )


def dit_rules(bits: float | int | Callable[[Role], Spec]) -> tuple[Rule, ...]:
    """Every Linear of a DiT's blocks by `codebooks` of these bits, or as a function of its role says; all else is kept."""
    kept = ((r"blocks/\d+/.*bias", KEEP), (r"(pos_embed|[xty]_embedder/.*|final_layer/.*)", KEEP))
    return (*stack_rules((_BLOCKS,), bits if callable(bits) else codebooks(bits)), *kept)


def rules_for(params: Any, bits: float | int) -> tuple[Rule, ...]:
    """The rules of the network that a tree is of; InputError for one that we do not know."""
    inside = [path.removeprefix("blocks/") for path in flatten(params) if path.startswith("blocks/")]
    for role in ROLES:
        if not any(re.fullmatch(role.pattern, path) for path in inside):
            raise InputError(
                f"these are not the parameters of a DiT (blocks/{role.pattern} is missing); for a network of your own give "
                "rules=[(regular expression, VQSpec(256, 4)), ..., (r'.*', KEEP)]"
            )
    return dit_rules(bits)
