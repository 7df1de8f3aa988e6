"""Parameter trees that hold quantized leaves: walking, replacing, decoding, counting."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from vq4dit_jax.errors import InputError
from vq4dit_jax.qarray.base import Kernel, QuantizedArray, is_quantized
from vq4dit_jax.qarray.parts import from_parts, is_parts, parts_of, stack_length

Params = Any
"""Nested mappings with names whose leaves are arrays, `QuantizedArray`s or `Parts`; `flatten` refuses others."""


class Slot(NamedTuple):
    """A leaf of a tree, or one part of it.

    Attributes:
      path: '/'-joined names.
      start: the first block of a part; None where the leaf is whole.
      leaf: an array or a `QuantizedArray`.
    """

    path: str
    start: int | None
    leaf: Any

    def cut(self, whole: Any) -> Any:
        """The blocks of this slot from an array that has all of them (the teacher's kernel at `path`, say)."""
        return whole if self.start is None else whole[self.start : self.start + stack_length(self.leaf)]


def flatten(params: Params) -> dict[str, Any]:
    """'/'-joined paths to leaves, in the order of the tree.

    Raises InputError for a tree that is no mapping with names, and for a node that is no leaf, by its path.
    """
    out: dict[str, Any] = {}
    if isinstance(params, Mapping):
        _collect(params, "", out)
    if not out:
        raise InputError(
            f"params is a {type(params).__name__}{' of nothing' if isinstance(params, Mapping) else ''}; "
            "wanted nested dicts of arrays with names, as Flax makes them"
        )
    return out


def _collect(node: Mapping[Any, Any], prefix: str, out: dict[str, Any]) -> None:
    for name, child in node.items():
        if not isinstance(name, str) or "/" in name:
            raise InputError(
                f"params has the key {name!r} {f'under {prefix[:-1]}' if prefix else 'at its top'}; wanted nested dicts of "
                "arrays with names, as Flax makes them, and no '/' in a name"
            )
        if isinstance(child, Mapping):
            _collect(child, f"{prefix}{name}/", out)
        elif isinstance(child, Kernel) or is_parts(child) or _is_array(child):
            out[prefix + name] = child
        else:
            raise InputError(
                f"parameter {prefix}{name} is a {type(child).__name__}; wanted an array, a quantized leaf, or Parts of them"
            )


def _is_array(node: Any) -> bool:
    """Arrays, tracers and shapes, of numbers."""
    return hasattr(node, "shape") and hasattr(node, "dtype") and getattr(node.dtype, "kind", "V") not in "OSU"


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`, as nested dicts."""
    return flax.traverse_util.unflatten_dict(dict(flat), sep="/")


def walk(params: Params) -> Iterator[Slot]:
    """Every leaf, and every part of those that are in parts, in order."""
    for path, leaf in flatten(params).items():
        for start, part in parts_of(leaf):
            yield Slot(path, start, part)


def map_slots(fn: Callable[[Slot], Any], params: Params) -> dict[str, Any]:
    """The tree with `fn(slot)` in the place of each slot's leaf."""
    out: dict[str, list[Any]] = {}
    for slot in walk(params):
        out.setdefault(slot.path, []).append(fn(slot))
    return unflatten({path: from_parts(parts) for path, parts in out.items()})


def replace(params: Params, nodes: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with other leaves (or `Parts`) at these paths; InputError for a path that it does not have."""
    flat = flatten(params)
    if unknown := sorted(set(nodes) - set(flat)):
        raise InputError(f"there is no parameter {unknown[0]}; the tree has {', '.join(list(flat)[:4])}, ...")
    return unflatten(flat | dict(nodes))


def map_leaves(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` to which a quantized leaf is one leaf; parts are walked."""
    return jax.tree.map(fn, tree, *rest, is_leaf=is_quantized)


def map_quantized(fn: Callable[[QuantizedArray], Any], tree: Any) -> Any:
    """The tree (or leaf) with `fn(leaf)` for every quantized leaf, all else as it is."""
    return map_leaves(lambda leaf: fn(leaf) if is_quantized(leaf) else leaf, tree)


def at_time(params: Params, done: Callable[[], Any]) -> Params:
    """The tree whose leaves are those of a time, `done()` of the way from noise to data; itself where none has times."""
    if not any(is_quantized(leaf) and leaf.has_times for leaf in jax.tree.leaves(params, is_leaf=is_quantized)):
        return params
    now = done()
    return map_quantized(lambda leaf: leaf.at(now), params)


def quantized_paths(params: Params) -> list[str]:
    """Paths of the leaves that are quantized, in whole or in part, in order."""
    return list(dict.fromkeys(slot.path for slot in walk(params) if is_quantized(slot.leaf)))


def restack(params: Params, leaves: Iterator[QuantizedArray]) -> dict[str, Any]:
    """The tree with other matrices of the same kinds and shapes, which come in the order of `matrices`; in the types that
    its own have."""

    def one(slot: Slot) -> Any:
        own = slot.leaf
        if not is_quantized(own):
            return own
        new = list(itertools.islice(leaves, math.prod(own.stack)))
        return jax.tree.map(lambda old, *a: jax.device_put(np.stack(a).reshape(old.shape).astype(old.dtype)), own, *new)

    return map_slots(one, params)


def matrices(params: Params) -> Iterator[tuple[str, int | None, QuantizedArray]]:
    """(path of the leaf, number of the block, the matrix without stack axes) of every quantized matrix, in order; the block
    is None for a leaf that is no stack. Arrays are on the host, where cutting a stack compiles no program."""
    for path, start, leaf in walk(params):
        if not is_quantized(leaf):
            continue
        host = jax.tree.map(np.asarray, leaf)
        if host.stack:
            yield from ((path, (start or 0) + i, host.block(i)) for i in range(host.stack[0]))
        else:
            yield path, None, host


def block_path(path: str, block: int | None, stacked: Sequence[str] = ("blocks",)) -> str:
    """The path that rules match: that of the leaf, with the number of its block after the prefix of its stack.

    Raises InputError for a block of a leaf that lies under none of the prefixes.
    """
    if block is None:
        return path
    prefix = stack_of(path, stacked)
    if prefix is None:
        raise InputError(
            f"{path} is a stack of blocks under none of {', '.join(stacked) or 'no prefix'}; name it: stacked="
        )
    return f"{prefix}/{block}/{path[len(prefix) + 1 :]}"


def stack_of(path: str, stacked: Sequence[str]) -> str | None:
    """The prefix that a leaf is stacked under; None for a leaf that is no stack."""
    return next((prefix for prefix in stacked if path.startswith(prefix + "/")), None)


def _dense(leaf: Any, dtype: Any) -> Any:
    return jnp.swapaxes(leaf.decode(dtype), -1, -2) if is_quantized(leaf) else leaf


def dequantize(params: Params, dtype: Any = None) -> Any:
    """The same tree with dense kernels (*stack, I, O), in `dtype`; None: in the leaf's own, parts in float32.

    Of any quantized leaves, packed or soft (differentiable), also inside `jax.jit`: what makes a module that knows
    arrays alone run with quantized parameters. Rounding of activations is lost.
    """
    return jax.tree.map(lambda leaf: _whole(leaf, dtype), params, is_leaf=_is_node)


def _is_node(node: Any) -> bool:
    return is_quantized(node) or is_parts(node)


def _whole(leaf: Any, dtype: Any) -> Any:
    if not is_parts(leaf):
        return _dense(leaf, dtype)
    wide = dtype or jnp.float32
    return jnp.concatenate([jnp.asarray(_dense(part, wide), wide) for part in leaf])


def densify(params: Params) -> Params:
    """Where leaves are in parts, all of them decoded to whole stacks (float32), else the same tree: a compiler then sees one
    block, and not every run of equal ones. For calibration and measures; it takes a dense model's memory. Leaves that round
    their activations stay, because a dense kernel does not."""
    nodes = jax.tree.leaves(params, is_leaf=_is_node)
    if not any(map(is_parts, nodes)):
        return params
    kept = lambda leaf: leaf if rounds_activations(leaf) else _whole(leaf, jnp.float32)
    return jax.tree.map(kept, params, is_leaf=_is_node)


def rounds_activations(leaf: Any) -> bool:
    """Whether a leaf, or a part of it, says itself that what it reads is rounded."""
    return any(is_quantized(part) and part.activation_bits is not None for _, part in parts_of(leaf))


def dense_shapes(params: Params) -> dict[str, tuple[int, ...]]:
    """Path of each leaf -> its shape with dense kernels (*stack, I, O)."""

    def shape(leaf: Any) -> tuple[int, ...]:
        return (*leaf.stack, *reversed(leaf.matrix)) if is_quantized(leaf) else tuple(leaf.shape)

    out: dict[str, tuple[int, ...]] = {}
    for path, start, leaf in walk(params):
        found = shape(leaf)
        if start:
            length, *rest = out[path]
            if rest != list(found[1:]):
                raise InputError(f"{path}: its parts are of matrices {tuple(rest)} and {found[1:]}; wanted equal ones")
            found = (length + found[0], *rest)
        out[path] = found
    return out


def random_params(shapes: Any, key: jax.Array, scale: float = 0.02) -> Any:
    """Normal(0, scale^2) leaves of the given shapes: no trained model, but one whose timing and sizes are real."""
    leaves, treedef = jax.tree.flatten(shapes)
    # numpy's, because jax compiles a program for every shape.
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    return treedef.unflatten([jnp.asarray(scale * rng.standard_normal(s.shape, np.float32), s.dtype) for s in leaves])


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes of a (quantized) tree, packed.

    `quantized_parameters` are the weights that quantized leaves stand for; `assignment_bytes` are those of their codes,
    `codebook_bytes` of their tables: codebooks, scales and zero points. `other_bytes` are those of all other leaves.
    """

    parameters: int
    quantized_parameters: int
    assignment_bytes: int
    codebook_bytes: int
    other_bytes: int

    @property
    def bits_per_quantized_weight(self) -> float:
        return 8 * (self.assignment_bytes + self.codebook_bytes) / max(1, self.quantized_parameters)


def sizes(params: Params) -> Sizes:
    """Counts bytes; works on shapes alone. Raises InputError as `flatten` does."""
    leaves = [slot.leaf for slot in walk(params)]
    costs = [leaf.cost() for leaf in leaves if is_quantized(leaf)]
    other = [leaf for leaf in leaves if not is_quantized(leaf)]
    count = lambda a: math.prod(a.shape)
    quantized = sum(cost.weights for cost in costs)
    return Sizes(
        parameters=quantized + sum(map(count, other)),
        quantized_parameters=quantized,
        assignment_bytes=sum(cost.code_bytes for cost in costs),
        codebook_bytes=sum(cost.table_bytes for cost in costs),
        other_bytes=sum(count(a) * np.dtype(a.dtype).itemsize for a in other),
    )
