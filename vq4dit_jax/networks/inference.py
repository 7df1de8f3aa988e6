"""From a quantized (or dense) DiT to one that runs from packed weights: fragment order, 8-bit operands, scales."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pallas_kernels import nibbles
from pallas_kernels.operand import Operand
from pallas_kernels.reference_norm import largest_quantized
from pallas_kernels.weights import NibbleWeights, PreparedLinear, pair_rows
from vq4dit_jax.diffusion import trajectory
from vq4dit_jax.errors import InputError
from vq4dit_jax.networks.dit import DiT
from vq4dit_jax.networks.fold import fold
from vq4dit_jax.networks.network import random_problem
from vq4dit_jax.networks.prepared import PreparedBlocks
from vq4dit_jax.qarray import is_quantized
from vq4dit_jax.qarray.parts import split_runs
from vq4dit_jax.qarray.spec import IntSpec
from vq4dit_jax.qarray.tree import densify, map_leaves, rounds_activations

ACTIVATIONS = {None: jnp.bfloat16, "int8": jnp.int8, "e4m3": jnp.float8_e4m3fn}
WEIGHTS = {"int8": IntSpec(8, None, "symmetric"), "int4": IntSpec(4, nibbles.COLUMNS, "symmetric")}
_RANGES = ("attn/proj", "mlp/fc2")
"""Layers whose operands are quantized with a fixed scale."""
_ADALN_TABLE_BYTES = 32768
"""The launch for adaLN has few tokens, so loads from the codebook are what takes its time: 16 copies of each codeword."""


def prepare_for_inference(
    params: Any,
    activations: str | None = None,
    *,
    weights: str | None = None,
    ranges: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A DiT's parameters with blocks that run from packed weights; `model.apply` takes them, gradients are off.

    Args:
      params: packed (`quantize`, `load_quantized`) where `weights` is None; else dense.
      activations: None for bfloat16, "int8" or "e4m3" for 8 bits: by token before every Linear, where codebooks are
        8 bits too with a scale each (W2A8, W3A8).
      weights: "int8" (a scale for each row: W8A8) or "int4" (a scale for each row and 128 inputs: W4A8), rounded to the
        nearest on symmetric grids (`integer.grids`), with `activations` of "int8"; ViDiT-Q, arXiv 2406.02540.
      ranges: of `activation_ranges`; then what proj and fc2 read is quantized where it is made, with a fixed scale for
        each layer. Without them, or where a layer rotates what it reads, it is written in bfloat16 and read again, to
        quantize by token.

    Arrays outside the blocks become bfloat16; quantized leaves there stay as they are. The result is for running only: it is no
    format, files hold `params`. Raises InputError where a combination has no form, or blocks are not those of a DiT.
    """
    if activations not in ACTIVATIONS:
        raise InputError(f"activations={activations!r}: wanted None, 'int8' or 'e4m3'")
    if weights is not None and weights not in WEIGHTS:
        raise InputError(f"weights={weights!r}: wanted None (packed codebooks), 'int8' or 'int4'")
    if weights and activations != "int8":
        raise InputError(f"weights={weights!r} go with activations='int8', not {activations!r}")
    if ranges is not None and activations is None:
        raise InputError("ranges are of 8-bit activations; give activations='int8' or 'e4m3', or leave ranges out")
    blocks = params.get("blocks") if isinstance(params, Mapping) else None
    if not isinstance(blocks, Mapping) or {"attn", "mlp", "adaLN_modulation"} - set(blocks):
        raise InputError(
            "params hold no blocks of a DiT (attn, mlp, adaLN_modulation); prepared ones cannot be prepared again"
        )
    depth = sum(run["attn"]["qkv"]["bias"].shape[0] for run in split_runs(blocks))
    if ranges is not None and {name: np.shape(v) for name, v in ranges.items()} != dict.fromkeys(_RANGES, (depth,)):
        raise InputError(f"ranges: wanted {' and '.join(_RANGES)} with an entry for each of the {depth} blocks")
    dtype, runs, first = jnp.dtype(ACTIVATIONS[activations]), [], 0
    for run in split_runs(blocks):
        depth = run["attn"]["qkv"]["bias"].shape[0]
        own = (
            None if ranges is None else {k: np.asarray(v, np.float32)[first : first + depth] for k, v in ranges.items()}
        )
        runs.append(_prepare_run(run, dtype, weights, own))
        first += depth
    kept = {
        name: map_leaves(lambda a: a if is_quantized(a) else jnp.asarray(a, jnp.bfloat16), leaf)
        for name, leaf in params.items()
        if name != "blocks"
    }
    return {**kept, "blocks": runs[0] if len(runs) == 1 else tuple(runs)}


def activation_ranges(
    model: DiT,
    params: Any,
    *,
    key: jax.Array,
    weights: str | None = None,
    images: int = 16,
    num_steps: int = 10,
    cfg_scale: float = 1.5,
) -> dict[str, Float[np.ndarray, " L"]]:
    """The largest magnitudes that proj and fc2 of each block read while the model samples from noise: zero data.

    `images` random classes, DDPM in `num_steps` steps with guidance; the model itself, prepared without ranges, makes the
    trajectory. Arguments as those of `prepare_for_inference` and `sample`.
    """
    rounded = weights or any(map(rounds_activations, jax.tree.leaves(params, is_leaf=is_quantized)))
    prepared = prepare_for_inference(params, "int8" if rounded else None, weights=weights)
    network = model.network()
    problem = random_problem(network, prepared, key, images=images, cfg_scale=cfg_scale)
    how = dict(num_steps=num_steps, scale=cfg_scale, observe=_Ranges(model), given=prepared)
    _, seen = trajectory.observed(network, prepared, problem, **how)
    return {name: np.asarray(seen[name]).max(0) for name in _RANGES}


@dataclasses.dataclass(frozen=True)
class _Ranges:
    """The ranges of one evaluation; an object, so that one program serves all calls."""

    model: DiT

    def __call__(self, evaluation: trajectory.Evaluation, prepared: Any) -> dict[str, jax.Array]:
        x, t, y = evaluation.x, evaluation.t, evaluation.cond
        return self.model.apply({"params": prepared}, x, t, y, method="ranges")


def for_sampling(model: DiT, params: Any, activations: str, cfg_scale: float) -> Any:
    """`params` in the form that runs `activations` fastest: "float32" (as they are; leaves in parts are decoded, see
    `tree.densify`), "bfloat16", "int8" or "e4m3".

    Packed weights stay packed. Dense ones become 8-bit integers, and take "int8" alone. Ranges are sampled with a fixed
    key, so that a recipe makes the same images wherever it runs.
    """
    if activations == "float32":
        return densify(params)
    if activations not in ("bfloat16", "int8", "e4m3"):
        raise InputError(f"activations={activations}: wanted float32, bfloat16, int8 or e4m3")
    packed = any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized)))
    if not packed and activations != "int8":
        raise InputError(f"activations={activations}: weights in full precision take float32 or int8")
    weights = None if packed else "int8"
    if activations == "bfloat16":
        return prepare_for_inference(params)
    if not any(_plain(run, name) for run in split_runs(params["blocks"]) for name in _RANGES):
        return prepare_for_inference(params, activations, weights=weights)
    ranges = activation_ranges(model, params, key=jax.random.key(0), weights=weights, cfg_scale=cfg_scale)
    return prepare_for_inference(params, activations, weights=weights, ranges=ranges)


def _prepare_run(run: Any, dtype: Any, weights: str | None, ranges: Any) -> PreparedBlocks:
    make = functools.partial(_prepare_linear, dtype=dtype, weights=weights)
    fixed = {name: np.maximum(v, 1e-6) / largest_quantized(dtype) for name, v in (ranges or {}).items()}
    # A fixed scale is applied where rows are made, before a rotation of what reads them could be.
    attended, hidden = (fixed.get(name) if _plain(run, name) else None for name in _RANGES)
    # Few tokens: adaLN's time is that of reading its weights, and codewords in 16 bits take no more than in 8.
    kernel = run["adaLN_modulation"]["1"]["kernel"]
    rounded = weights is not None or rounds_activations(kernel)
    adaln = make if rounded else functools.partial(make, dtype=jnp.dtype(jnp.bfloat16))
    blocks = PreparedBlocks(
        modulation=adaln("adaLN_modulation/1", run["adaLN_modulation"]["1"], as_one=True),
        qkv=make("attn/qkv", run["attn"]["qkv"]),
        proj=make("attn/proj", run["attn"]["proj"], operand_scale=attended),
        fc1=make("mlp/fc1", run["mlp"]["fc1"], result_scale=hidden),
        fc2=make("mlp/fc2", run["mlp"]["fc2"], operand_scale=hidden),
        attention_scale=None if attended is None else jnp.asarray(attended, jnp.float32),
    )
    return fold(blocks)


def _plain(run: Any, name: str) -> bool:
    """Whether the rows that a Linear reads are rounded as they are made: nothing, or what `fold` puts there, is done to them."""
    outer, inner = name.split("/")
    kernel = run[outer][inner]["kernel"]
    operand = kernel.prepared_operand() if is_quantized(kernel) else None
    return operand is None or not operand.rotation


def _one_operand(operand: Operand | None, name: str) -> Operand | None:
    """The operand of a product of all layers at once, whose vectors must be the same in all of them."""
    if operand is None:
        return None
    for what in ("scale", "shift"):
        rows = getattr(operand, what)
        if rows is not None and not (np.asarray(rows) == np.asarray(rows[:1])).all():
            raise InputError(
                f"blocks/{name}/kernel has another {what} of its operand in each block; one product makes all of them, and "
                "needs one: give its rule scaled=False"
            )
    first = lambda a: None if a is None else a[:1]
    return Operand(first(operand.scale), first(operand.shift), operand.rotation)


def _prepare_linear(
    name: str,
    leaf: Mapping[str, Any],
    *,
    dtype: Any,
    weights: str | None,
    as_one: bool = False,
    result_scale: Any = None,
    operand_scale: Any = None,
) -> PreparedLinear:
    """`as_one`: the layers' rows one after the other, as a stack of one. `result_scale`, `operand_scale` (L,)."""
    kernel, paired = leaf["kernel"], result_scale is not None
    try:
        if weights is not None:
            if is_quantized(kernel):
                raise InputError(
                    f"blocks/{name}/kernel is a {type(kernel).__name__}; weights={weights!r} are made of dense ones: dequantize"
                )
            kernel = WEIGHTS[weights].quantize(np.asarray(kernel, np.float32).swapaxes(-1, -2), jax.random.key(0))
        elif not is_quantized(kernel):
            raise InputError(
                f"blocks/{name}/kernel is a {type(kernel).__name__}; wanted packed weights: quantize first, or give weights="
            )
        table = _ADALN_TABLE_BYTES if as_one else 0
        packed, row_scale = kernel.prepare(dtype, as_one=as_one, paired_rows=paired, table_bytes=table)
    except ValueError as e:
        raise InputError(f"blocks/{name}/kernel has no form for the kernels: {e}") from e
    operand, missing = kernel.prepared_operand(), kernel.missing()
    operand = _one_operand(operand, name) if as_one else operand
    bias = np.asarray(leaf["bias"], np.float32)
    bias = bias if missing is None else bias + missing
    if operand_scale is not None:
        scale = np.asarray(operand_scale)[:, None]
        if isinstance(packed, NibbleWeights):
            packed = dataclasses.replace(packed, scales=packed.scales * scale[:, :, None].astype(np.float32))
        else:
            row_scale = row_scale * scale
    if paired:
        bias, row_scale = pair_rows(bias), None if row_scale is None else pair_rows(row_scale)
    flat = lambda a: None if a is None else jnp.asarray(a.reshape(1, -1) if as_one else a)
    result = None if result_scale is None else jnp.asarray(result_scale, jnp.float32)
    return PreparedLinear(packed, flat(bias), flat(row_scale), result, operand)
