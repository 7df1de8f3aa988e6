"""Which parameters are quantized, and how: rules over paths, and k-means initialisation of the leaves they pick."""

import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from vq4dit_jax.codebook.kmeans import kmeans
from vq4dit_jax.codebook.packing import packed_bytes
from vq4dit_jax.errors import InputError
from vq4dit_jax.qarray.soft import SoftVQArray
from vq4dit_jax.qarray.vq import VQArray, from_codes

Params = Any
"""Nested dicts of arrays with names, as Flax makes them; `_flatten` refuses others."""


@dataclasses.dataclass(frozen=True)
class VQSpec:
    """K codewords of length d for each of `groups` equal groups of output rows; log2(K)/d bits a weight."""

    codewords: int
    subvector: int
    groups: int = 1

    def for_shape(self, rows: int, columns: int) -> "VQSpec":
        """K = min(K, 2^floor(log2(O*S/4))) for a group of O rows, so that a small layer is not all codebook."""
        subvectors = rows // self.groups * (columns // self.subvector)
        limit = 2 ** max(0, math.floor(math.log2(max(1, subvectors / 4))))
        return dataclasses.replace(self, codewords=min(self.codewords, limit))


KEEP = None
Rule = tuple[str, VQSpec | None]
"""A regular expression that must match a whole path such as `blocks/3/attn/qkv/kernel`, and what to do with it."""

BITS: dict[float | int, tuple[int, int]] = {1: (256, 8), 1.5: (64, 4), 2: (256, 4), 3: (64, 2), 4: (256, 2)}
"""bits a weight -> (K, d)"""


def dit_rules(bits: float | int) -> tuple[Rule, ...]:
    """Every Linear of a DiT's blocks, q, k and v with a codebook each; all else is kept."""
    if bits not in BITS:
        raise InputError(f"bits={bits}: wanted one of {', '.join(map(str, BITS))}; or give rules=")
    codewords, length = BITS[bits]
    return (
        (r"blocks/\d+/attn/qkv/kernel", VQSpec(codewords, length, groups=3)),
        (r"blocks/\d+/(attn/proj|mlp/fc[12]|adaLN_modulation/1)/kernel", VQSpec(codewords, length)),
        (r"blocks/\d+/.*bias", KEEP),
        (r"(pos_embed|[xty]_embedder/.*|final_layer/.*)", KEEP),
    )


def spec_of(path: str, rules: Sequence[Rule]) -> VQSpec | None:
    """First match wins; a path that no rule matches is an InputError."""
    for pattern, spec in rules:
        if re.fullmatch(pattern, path):
            return spec
    raise InputError(f"no rule matches parameter {path}; add one, such as (r'.*', KEEP) at the end")


@dataclasses.dataclass(frozen=True)
class Part:
    """Consecutive blocks [start, stop) of a stacked leaf that share a spec; an unstacked leaf has start = stop = None."""

    path: str
    spec: VQSpec | None
    start: int | None = None
    stop: int | None = None


def plan(params: Params, rules: Sequence[Rule], stacked: Sequence[str] | None = None) -> dict[str, list[Part]]:
    """Path of each leaf -> its parts, in order. Works on shapes alone (`jax.eval_shape`).

    Leaves under a `stacked` prefix have a leading axis over blocks; block i of leaf `blocks/x` has the path `blocks/i/x`.
    Left out, `blocks` is such a prefix where its leaves are stacks, as in a `DiT`.
    """
    flat = _flatten(params)
    stacked = _stacks(flat) if stacked is None else stacked
    out: dict[str, list[Part]] = {}
    tried: list[str] = []
    for path, leaf in flat.items():
        prefix = next((s for s in stacked if path.startswith(s + "/")), None)
        if prefix is None:
            spec = spec_of(path, rules)
            tried.append(path)
            out[path] = [Part(path, spec and _fit(path, spec, leaf.shape))]
            continue
        parts: list[Part] = []
        for i in range(leaf.shape[0]):
            one = f"{prefix}/{i}/{path[len(prefix) + 1 :]}"
            spec = spec_of(one, rules)
            tried.append(one)
            spec = spec and _fit(one, spec, leaf.shape[1:])
            if parts and parts[-1].spec == spec:
                parts[-1] = dataclasses.replace(parts[-1], stop=i + 1)
            else:
                parts.append(Part(path, spec, i, i + 1))
        out[path] = parts
    for pattern, spec in rules:
        if spec and not any(re.fullmatch(pattern, path) for path in tried):
            raise InputError(
                f"rule {pattern!r} quantizes nothing: it matches no parameter whole; there are {', '.join(tried[:8])}, ..."
            )
    return out


def _flatten(params: Params) -> dict[str, Any]:
    """'/'-joined paths to leaves."""
    flat = flax.traverse_util.flatten_dict(params) if isinstance(params, Mapping) else None
    if not flat or not all(isinstance(name, str) for path in flat for name in path):
        raise InputError(
            f"params is a {type(params).__name__}; wanted nested dicts of arrays with names, as Flax makes them"
        )
    return {"/".join(path): leaf for path, leaf in flat.items()}


def _stacks(flat: Mapping[str, Any]) -> tuple[str, ...]:
    """("blocks",) where the leaves under it share a leading axis and kernels have three; () elsewhere."""
    shapes = [leaf.shape for path, leaf in flat.items() if path.startswith("blocks/")]
    stacked = all(shapes) and len({shape[0] for shape in shapes}) == 1 and max(map(len, shapes)) >= 3
    return ("blocks",) if stacked else ()


def _fit(path: str, spec: VQSpec, shape: tuple[int, ...]) -> VQSpec:
    if len(shape) != 2:
        raise InputError(
            f"parameter {path} has shape {shape}; only kernels (I, O) can be quantized, let a rule keep it"
        )
    columns, rows = shape
    if columns % spec.subvector or rows % spec.groups:
        raise InputError(
            f"parameter {path} has {columns} inputs and {rows} outputs; wanted multiples of d={spec.subvector} "
            f"and of groups={spec.groups}; give it a rule of its own"
        )
    return spec.for_shape(rows, columns)


def quantize(
    params: Params,
    bits: float | int = 2,
    *,
    key: jax.Array,
    rules: Sequence[Rule] | None = None,
    stacked: Sequence[str] | None = None,
    codebook_dtype: Any = jnp.float32,
    max_iterations: int = 100,
    on_leaf: Callable[[str], None] = lambda path: None,
) -> dict[str, Any]:
    """k-means only (step 1 of the method): the same tree with `VQArray` leaves where rules say so.

    Args:
      params: nested dicts of arrays; ours, or those of any Flax module with kernels (I, O).
      bits: of a `DiT`; not read where `rules` are given.
      key: of the k-means seeds.
      rules: (regular expression, VQSpec or KEEP), see `Rule`; first match wins.
      stacked: prefixes under which leaves have a leading axis over blocks, see `plan`; () for none.
      codebook_dtype: in which codebooks are stored.
      max_iterations: of Lloyd's algorithm.
      on_leaf: is called after each quantized leaf.

    A leaf whose blocks differ in their spec becomes a tuple of leaves over consecutive blocks.

    Raises InputError where a path has no rule, a rule with a VQSpec no path, a shape does not fit or a weight is not
    finite.
    """
    flat = _flatten(params)
    out = {}
    for path, parts in plan(params, dit_rules(bits) if rules is None else rules, stacked).items():
        leaf_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        leaves = []
        for part in parts:
            whole = flat[path] if part.spec is None else np.asarray(flat[path])
            kernel = whole if part.start is None else whole[part.start : part.stop]
            if part.spec is None:
                leaves.append(kernel)
                continue
            part_key = leaf_key if not part.start else jax.random.fold_in(leaf_key, part.start)
            leaves.append(_quantize_kernel(kernel, part, part_key, codebook_dtype, max_iterations))
        if any(part.spec for part in parts):
            on_leaf(path)
        out[path] = leaves[0] if len(leaves) == 1 else tuple(leaves)
    return flax.traverse_util.unflatten_dict(out, sep="/")


def _quantize_kernel(kernel: np.ndarray, part: Part, key: jax.Array, dtype: Any, max_iterations: int) -> VQArray:
    spec = part.spec
    weight = np.swapaxes(np.asarray(kernel, np.float32), -1, -2)
    *stack, rows, columns = weight.shape
    if not np.isfinite(weight).all():
        raise InputError(f"parameter {part.path} holds NaN or infinity; the checkpoint is damaged")
    problems = weight.reshape(math.prod(stack) * spec.groups, -1, spec.subvector)
    result = kmeans(problems, spec.codewords, key, max_iterations=max_iterations)
    codebook = jnp.asarray(result.codebook, dtype)
    codes = np.asarray(result.assignments).reshape(*stack, rows, columns // spec.subvector)
    return from_codes(codebook.reshape(*stack, spec.groups, spec.codewords, spec.subvector), codes)


def map_leaves(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` over the parts of a quantized tree: a `VQArray` is one leaf, a tuple of parts is walked."""
    return jax.tree.map(fn, tree, *rest, is_leaf=lambda node: isinstance(node, VQArray))


def matrices(packed: Params) -> Iterator[tuple[str, int | None, VQArray]]:
    """(path of the leaf, number of the block, the matrix without stack axes) of every quantized matrix, in order; the block is
    None for a leaf that is no stack. Arrays are on the host, where cutting a stack compiles no program."""
    for path, leaf in _flatten(packed).items():
        parts, start = leaf if isinstance(leaf, tuple) else (leaf,), 0
        for part in parts:
            length = jax.tree.leaves(part)[0].shape[0]
            if isinstance(part, VQArray):
                host = jax.tree.map(np.asarray, part)
                if part.stack:
                    yield from ((path, start + i, jax.tree.map(lambda a, i=i: a[i], host)) for i in range(length))
                else:
                    yield path, None, host
            start += length


def block_path(path: str, block: int | None) -> str:
    """The path that rules match: that of the leaf with the number of its block after the first name."""
    prefix, _, rest = path.partition("/")
    return path if block is None else f"{prefix}/{block}/{rest}"


def dequantize(params: Params, dtype: Any = None) -> Any:
    """The same tree with dense kernels (*stack, I, O), in `dtype`; None: in the codebooks', mixed stacks in float32.

    Packed (`VQArray`) and soft leaves (`SoftVQArray`, differentiable), also inside `jax.jit`: what makes a module
    that knows arrays alone run with quantized parameters.
    """

    def dense(leaf: Any) -> Any:
        if not isinstance(leaf, VQArray | SoftVQArray):
            return leaf
        kernel = jnp.swapaxes(leaf.decode(), -1, -2)
        return kernel if dtype is None else kernel.astype(dtype)

    def join(leaf: Any) -> Any:
        if not isinstance(leaf, tuple):
            return dense(leaf)
        return jnp.concatenate([dense(part).astype(dtype or jnp.float32) for part in leaf])

    return jax.tree.map(join, params, is_leaf=lambda node: isinstance(node, VQArray | SoftVQArray | tuple))


def joined(params: Params) -> Params:
    """Where leaves are in parts, all of them decoded to whole stacks (float32), else the same tree: a compiler then sees one
    block, and not every run of equal ones. For calibration and measures; it takes a dense model's memory."""
    return (
        dequantize(params, jnp.float32)
        if any(isinstance(leaf, tuple) for leaf in _flatten(params).values())
        else params
    )


def random_params(shapes: Any, key: jax.Array, scale: float = 0.02) -> Any:
    """Normal(0, scale^2) leaves of the given shapes: no trained model, but one whose timing and sizes are real."""
    leaves, treedef = jax.tree.flatten(shapes)
    # numpy's, because jax compiles a program for every shape.
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    return treedef.unflatten([jnp.asarray(scale * rng.standard_normal(s.shape, np.float32), s.dtype) for s in leaves])


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes of a (quantized) tree by kind, packed; `quantized_parameters` are the weights that codes stand for."""

    parameters: int
    quantized_parameters: int
    assignment_bytes: int
    codebook_bytes: int
    other_bytes: int

    @property
    def bits_per_quantized_weight(self) -> float:
        return 8 * (self.assignment_bytes + self.codebook_bytes) / max(1, self.quantized_parameters)


def sizes(params: Any) -> Sizes:
    """Counts bytes; works on shapes alone."""
    leaves = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, VQArray))
    packed = [leaf for leaf in leaves if isinstance(leaf, VQArray)]
    other = [leaf for leaf in leaves if not isinstance(leaf, VQArray)]
    size = lambda a: math.prod(a.shape)
    quantized = sum(leaf.num_weights for leaf in packed)
    return Sizes(
        parameters=quantized + sum(map(size, other)),
        quantized_parameters=quantized,
        assignment_bytes=sum(size(leaf.assignments) for leaf in packed),
        codebook_bytes=sum(size(leaf.codebook) * leaf.codebook.dtype.itemsize for leaf in packed),
        other_bytes=sum(size(a) * np.dtype(a.dtype).itemsize for a in other),
    )


def abstract_quantized(
    params: Any, rules: Sequence[Rule], stacked: Sequence[str] | None = None, codebook_dtype: Any = jnp.float32
) -> dict[str, Any]:
    """The shapes of `quantize`'s result from the shapes of its input."""
    flat = _flatten(params)
    out = {}
    for path, parts in plan(params, rules, stacked).items():
        leaves = []
        for part in parts:
            shape = flat[path].shape if part.start is None else (part.stop - part.start, *flat[path].shape[1:])
            if part.spec is None:
                leaves.append(jax.ShapeDtypeStruct(shape, flat[path].dtype))
                continue
            *stack, columns, rows = shape
            k, d, g = part.spec.codewords, part.spec.subvector, part.spec.groups
            codes = jax.ShapeDtypeStruct(
                (*stack, rows, packed_bytes(columns // d, pallas_kernels.code_bits(k))), jnp.uint8
            )
            leaves.append(VQArray(jax.ShapeDtypeStruct((*stack, g, k, d), codebook_dtype), codes, (rows, columns)))
        out[path] = leaves[0] if len(leaves) == 1 else tuple(leaves)
    return flax.traverse_util.unflatten_dict(out, sep="/")
