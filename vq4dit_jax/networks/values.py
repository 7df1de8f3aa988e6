"""Values rotated head by head: equal parameters whose attention leaves rows that are easier to round, at no cost.

    softmax(q k^T) v W^T = (softmax(q k^T) v Q) (W Q)^T,      Q: a regular Hadamard matrix in groups inside each head, Q Q^T = 1

Attention averages v over tokens and touches no feature, so Q stands in the rows of v of the product that makes it, and in the
inputs of the Linear that reads the averages. (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456, section 4, has it for Llama.)
"""

from typing import Any

import jax.numpy as jnp

from vq4dit_jax.errors import InputError
from vq4dit_jax.integer import hadamard
from vq4dit_jax.networks.network import Network, Stack
from vq4dit_jax.qarray.tree import flatten, replace


def rotate_values(network: Network, params: Any) -> Any:
    """`params`, dense, with the values of every stack that has roles for them rotated; the network computes the same.

    A role's `values` names the Linear (kernel (*stack, I, 3D), q, k and v in turn) whose last D outputs are the values of
    the D inputs that the role's own Linear reads. Raises InputError for a stack without `heads`, and for heads of a width
    that no regular Hadamard matrix divides.
    """
    flat, changed = flatten(params), {}
    for stack in network.stacks:
        for role in (role for role in stack.roles if role.values):
            reader, maker = f"{stack.path}/{role.pattern}", f"{stack.path}/{role.values}"
            width = flat[reader].shape[-2]
            group = _group(stack, width)
            changed[reader] = _rotated(flat[reader].swapaxes(-1, -2), group).swapaxes(-1, -2)
            for path in (maker, maker.rpartition("/")[0] + "/bias"):
                if path in flat:
                    rest = flat[path][..., :-width]
                    changed[path] = jnp.concatenate([rest, _rotated(flat[path][..., -width:], group)], -1)
    return replace(params, changed)


def _group(stack: Stack, width: int) -> int:
    """Features of a group: the largest that divides a head's."""
    if not stack.heads or width % stack.heads:
        raise InputError(
            f"stack {stack.path}: heads={stack.heads} with {width} values; wanted the number of heads that attention has, to "
            "rotate the values inside each; or viditq.rotate_values=False"
        )
    group = hadamard.largest_group(width // stack.heads, hadamard.HEAD_GROUPS)
    if not group:
        raise InputError(
            f"stack {stack.path}: heads of {width // stack.heads} values; wanted a multiple of "
            f"{min(hadamard.HEAD_GROUPS)}, to rotate them; or viditq.rotate_values=False"
        )
    return group


def _rotated(a: Any, group: int) -> Any:
    """a Q along the last axis, in the dtype of a."""
    wide = jnp.asarray(a)
    return hadamard.rotate(wide.astype(jnp.float32), group).astype(wide.dtype)
