"""Which parameters are quantized, and how: rules over paths, and the plan that they make for a tree."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from vq4dit_jax.errors import InputError
from vq4dit_jax.qarray.parts import from_parts
from vq4dit_jax.qarray.spec import Spec
from vq4dit_jax.qarray.tree import Params, flatten, stack_of, unflatten

KEEP = None
Rule = tuple[str, Spec | None]
"""A regular expression that must match a whole path such as `blocks/3/attn/qkv/kernel`, and what to do with it."""

BITS: dict[float | int, tuple[int, int]] = {1: (256, 8), 1.5: (64, 4), 2: (256, 4), 3: (64, 2), 4: (256, 2)}
"""bits a weight -> (K, d)"""


def check(rules: Any) -> None:
    """InputError for what is no list of rules."""
    if isinstance(rules, str) or not isinstance(rules, Sequence):
        raise InputError(f"rules={rules!r:.80}: wanted a list of (regular expression, spec or KEEP)")
    for rule in rules:
        if not isinstance(rule, Sequence) or len(rule) != 2 or not isinstance(rule[0], str):
            raise InputError(f"rule {rule!r:.80}: wanted (regular expression, spec or KEEP)")
        pattern, spec = rule
        if spec is not None and not isinstance(spec, Spec):
            raise InputError(f"rule {pattern!r} has {spec!r:.80}; wanted a spec, such as VQSpec(256, 4), or KEEP")
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"rule {pattern!r} is no regular expression ({error})") from None


def spec_of(path: str, rules: Sequence[Rule]) -> Spec | None:
    """First match wins; a path that no rule matches is an InputError."""
    for pattern, spec in rules:
        if re.fullmatch(pattern, path):
            return spec
    raise InputError(f"no rule matches parameter {path}; add one, such as (r'.*', KEEP) at the end")


@dataclasses.dataclass(frozen=True)
class Part:
    """Consecutive blocks [start, stop) of a stacked leaf that share a spec; a leaf that is no stack has start = stop = None."""

    path: str
    spec: Spec | None
    start: int | None = None
    stop: int | None = None

    def cut(self, whole: Any) -> Any:
        """Its blocks of the whole leaf."""
        return whole if self.start is None else whole[self.start : self.stop]


Plan = dict[str, list[Part]]


def plan(params: Params, rules: Any, stacked: Sequence[str] | None = None) -> Plan:
    """Path of each leaf -> its parts, in order, for a sequence of `Rule`s. Works on shapes alone (`jax.eval_shape`).

    Leaves under a `stacked` prefix have a leading axis over blocks; block i of leaf `blocks/x` has the path `blocks/i/x`.
    Left out, `blocks` is such a prefix where its leaves are stacks, as in a `DiT`.

    Raises InputError where a path has no rule, a rule that quantizes no path, or a shape does not fit.
    """
    check(rules)
    flat = flatten(params)
    stacked = stacks(flat) if stacked is None else stacked
    lengths = {prefix: _length(flat, prefix) for prefix in stacked}
    out: Plan = {}
    tried: list[str] = []
    for path, leaf in flat.items():
        prefix = stack_of(path, stacked)
        if prefix is None:
            tried.append(path)
            out[path] = [Part(path, _fit(path, spec_of(path, rules), leaf))]
            continue
        parts: list[Part] = []
        for i in range(lengths[prefix]):
            one = f"{prefix}/{i}/{path[len(prefix) + 1 :]}"
            tried.append(one)
            spec = _fit(one, spec_of(one, rules), leaf, stacked=True)
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


def stacks(flat: Mapping[str, Any]) -> tuple[str, ...]:
    """("blocks",) where the leaves under it share a leading axis and kernels have three; () elsewhere."""
    shapes = [leaf.shape for path, leaf in flat.items() if path.startswith("blocks/")]
    stacked = all(shapes) and len({shape[0] for shape in shapes}) == 1 and max(map(len, shapes)) >= 3
    return ("blocks",) if stacked else ()


def _length(flat: Mapping[str, Any], prefix: str) -> int:
    """Blocks of the stack under `prefix`; InputError where there is none."""
    shapes = {path: tuple(leaf.shape) for path, leaf in flat.items() if path.startswith(prefix + "/")}
    first = next(iter(shapes.values()), None)
    if first is None:
        raise InputError(
            f"stacked={prefix!r}: there is no parameter under {prefix}/; there are {', '.join(list(flat)[:4])}"
        )
    for path, shape in shapes.items():
        if not shape or shape[0] != first[0]:
            raise InputError(
                f"stacked={prefix!r}: parameter {path} has shape {shape}; wanted {first[0] if first else 'an'} entries on its "
                "first axis, one of each block, as in the other leaves of the stack"
            )
    return first[0]


def _fit(path: str, spec: Spec | None, leaf: Any, stacked: bool = False) -> Spec | None:
    if spec is None:
        return None
    shape = getattr(leaf, "shape", None)
    shape = shape and tuple(shape[1:] if stacked else shape)
    if shape is None or len(shape) != 2 or 0 in shape:
        what = f"is a {type(leaf).__name__}" if shape is None else f"has shape {shape}"
        raise InputError(f"parameter {path} {what}; only kernels (I, O) can be quantized, let a rule keep it")
    columns, rows = shape
    spec.check(path, rows, columns)
    return spec.for_matrix(rows, columns)


def abstract_quantized(
    params: Params, rules: Sequence[Rule], stacked: Sequence[str] | None = None, codebook_dtype: Any = None
) -> dict[str, Any]:
    """The shapes of `quantize`'s result from the shapes of its input."""
    flat = flatten(params)
    out = {}
    for path, parts in plan(params, rules, stacked).items():
        leaves = []
        for part in parts:
            shape = flat[path].shape if part.start is None else (part.stop - part.start, *flat[path].shape[1:])
            if part.spec is None:
                leaves.append(jax.ShapeDtypeStruct(shape, flat[path].dtype))
                continue
            *stack, columns, rows = shape
            spec = part.spec if codebook_dtype is None else part.spec.with_dtype(codebook_dtype)
            leaves.append(spec.abstract(tuple(stack), rows, columns))
        out[path] = from_parts(leaves)
    return unflatten(out)
