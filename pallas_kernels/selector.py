"""Which implementation runs a product, a norm or attention here, and why: a table from facts, decided while tracing.

The choice depends on the facts alone, not on trials at run time; `explain` prints it.
"""

import contextlib
import contextvars
import dataclasses
import functools
import importlib.util
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import hadamard, tiles
from pallas_kernels.operand import Operand
from pallas_kernels.tiles import Tile
from pallas_kernels.weights import NibbleWeights, Weights


@dataclasses.dataclass(frozen=True)
class Facts:
    """The device that a program is traced for. `cudnn`: whether XLA can call cuDNN's attention."""

    platform: str
    name: str = ""
    capability: tuple[int, int] | None = None
    multiprocessors: int = 132
    cudnn: bool = False

    def __str__(self) -> str:
        version = f", compute capability {self.capability[0]}.{self.capability[1]}" if self.capability else ""
        return f"{self.name or self.platform}{version}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """`implementation` is "mosaic" (our kernel), "xla", or "cudnn" (attention); `tile` goes with a product's kernel.

    `operands`: the dtype of what XLA multiplies, where it runs a product or attention; what comes in another is cast to it.
    """

    implementation: str
    reason: str
    tile: Tile | None = None
    operands: Any = None


H200 = Facts("gpu", "NVIDIA H200", (9, 0), 132, False)
"""The device that `benchmarks.aot` compiles for, without cuDNN, which is not among its wheels."""

_OWN_PRODUCTS = {
    jnp.dtype(jnp.bfloat16): ((8, 0), jnp.dtype(jnp.float32)),
    jnp.dtype(jnp.float8_e4m3fn): ((8, 9), jnp.dtype(jnp.float16)),
}
"""The compute capability from which NVIDIA's GPUs multiply a dtype, and for those before a dtype that holds each of its values.

XLA does the same by itself to a plain product. It refuses, while it compiles, one that names its algorithm, as attention of
`jax.nn` does in bfloat16. float16 would take a quarter less memory there, but not hold what is beyond 65504.
"""

_VECTORS = "the Linear's operand is scaled or centred: `networks.fold` puts that into what comes before"

_ASSUMED: contextvars.ContextVar[Facts | None] = contextvars.ContextVar("assumed", default=None)


@contextlib.contextmanager
def assume(facts: Facts) -> Iterator[None]:
    """Traces for another device than this process's. Programs that were traced before keep their choices."""
    token = _ASSUMED.set(facts)
    try:
        yield
    finally:
        _ASSUMED.reset(token)


def facts() -> Facts:
    """Of the default device, or those assumed."""
    return _ASSUMED.get() or _facts_of_device()


@functools.cache
def _facts_of_device() -> Facts:
    device = jax.devices()[0]
    if device.platform != "gpu":
        return Facts(device.platform)
    capability = str(getattr(device, "compute_capability", ""))
    major, _, minor = capability.partition(".")
    return Facts(
        "gpu",
        device.device_kind,
        (int(major), int(minor or 0)) if major.isdigit() else None,
        int(getattr(device, "core_count", 132)),
        _has_cudnn(),
    )


def _has_cudnn() -> bool:
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.util.find_spec("nvidia.cudnn") is not None
    return False


def _not_hopper(facts: Facts) -> str | None:
    """The reason why no Hopper kernel can run there, or None."""
    if facts.platform != "gpu":
        return f"{facts.platform}: the kernels are for NVIDIA Hopper"
    if facts.capability is None:
        return f"{facts.name}: no compute capability known (not an NVIDIA GPU)"
    if facts.capability != (9, 0):
        major, minor = facts.capability
        return f"compute capability {major}.{minor}: the kernels use wgmma and the copy engine of 9.0 (Hopper)"
    return None


def _by_xla(facts: Facts, dtype: Any, reason: str) -> Choice:
    """XLA's product of operands in `dtype`, or in one that holds their values where the device does not multiply it."""
    dtype = jnp.dtype(dtype)
    first, wider = _OWN_PRODUCTS.get(dtype, (None, None))
    if first is None or facts.capability is None or facts.capability >= first:
        return Choice("xla", f"{reason}; XLA gets operands in {dtype.name}", operands=dtype)
    lacks = f"{dtype.name} has products from compute capability {first[0]}.{first[1]} on"
    return Choice("xla", f"{reason}; XLA gets operands in {wider.name}: {lacks}", operands=wider)


def product(
    facts: Facts, weights: Weights, tokens: int, *, result_bytes: int = 2, image_tokens: int = 0, may_split: bool = True
) -> Choice:
    """For X (tokens, I) times packed W; `image_tokens` is not 0 where a gate of each image is applied."""
    # 4-bit integers with scales by group: `ops` multiplies the scales into them first.
    by_xla = functools.partial(_by_xla, facts, jnp.float32 if isinstance(weights, NibbleWeights) else weights.dtype)
    if reason := _not_hopper(facts):
        return by_xla(reason)
    group_rows = weights.rows // weights.groups
    if group_rows % 64:
        return by_xla(f"{group_rows} rows share a codebook: a kernel's tile has 64")
    itemsize = jnp.dtype(weights.dtype).itemsize
    tile = tiles.choose(
        tokens,
        weights.rows,
        weights.columns,
        itemsize=itemsize,
        group_rows=group_rows,
        stream_bytes=weights.stream_bytes,
        table_bytes=weights.table_bytes,
        result_bytes=result_bytes,
        token_divisor=image_tokens,
        may_split=may_split,
        decodes=weights.decodes,
        multiprocessors=facts.multiprocessors,
    )
    if tile is None:
        return by_xla(f"no tile fits: M={tokens}, O={weights.rows}, I={weights.columns}, T={image_tokens}")
    return Choice("mosaic", f"{facts.name}: {jnp.dtype(weights.dtype).name} operands, {tile}", tile)


def norm(facts: Facts, width: int, tokens: int, x_dtype: Any, operand: Operand | None = None) -> Choice:
    """For LayerNorm, modulation and quantization of images of `tokens` tokens, with the operand of what reads them."""
    if reason := _not_hopper(facts):
        return Choice("xla", reason)
    if operand is not None and operand.has_vectors:
        return Choice("xla", _VECTORS)
    if x_dtype != jnp.bfloat16 or width % 64 or width > 3072 or tokens < 4:
        return Choice("xla", f"{jnp.dtype(x_dtype).name} ({tokens} tokens, D={width}): wanted bfloat16, D % 64 == 0")
    return _by_warp(facts, width, operand)


def rows(facts: Facts, shape: tuple[int, int], x_dtype: Any, operand: Operand | None = None) -> Choice:
    """For the operand and the quantization by token of rows (M, D), where no norm does it."""
    if reason := _not_hopper(facts):
        return Choice("xla", reason)
    count, width = shape
    if operand is not None and operand.has_vectors:
        return Choice("xla", _VECTORS)
    if x_dtype != jnp.bfloat16 or width % 64 or width > 4608 or count < 4:
        what = f"{jnp.dtype(x_dtype).name} (M={count}, D={width})"
        return Choice("xla", f"{what}: wanted bfloat16, 4 rows or more, D % 64 == 0, D up to 4608")
    return _by_warp(facts, width, operand)


def _by_warp(facts: Facts, width: int, operand: Operand | None) -> Choice:
    """For rows that lie in the registers of a warp."""
    how = f"{facts.name}: one pass, a token a warp"
    if operand is None:
        return Choice("mosaic", how)
    if hadamard.fits_warp(operand.rotation, width):
        return Choice("mosaic", f"{how}, rotated in groups of {operand.rotation}")
    return Choice(
        "xla",
        f"rotation in groups of {operand.rotation}, D={width}: the kernels have groups of 16, 64 or 256 where they divide D, "
        f"and of 144 or 576 where {hadamard.ROW_OF_36} does",
    )


def attention(facts: Facts, head_size: int, dtype: Any) -> Choice:
    """For softmax(Q K^T) V without a mask."""
    by_xla = functools.partial(_by_xla, facts, dtype)
    if facts.platform != "gpu" or facts.capability is None or facts.capability < (8, 0):
        return by_xla(f"{facts}: cuDNN's attention needs compute capability 8.0")
    if not facts.cudnn:
        return by_xla("no cuDNN (pip install nvidia-cudnn-cu13 or -cu12)")
    if dtype not in (jnp.bfloat16, jnp.float16) or head_size % 8 or head_size > 128:
        return by_xla(f"{jnp.dtype(dtype).name}, heads of {head_size}: cuDNN takes 16 bits, multiples of 8 to 128")
    return Choice("cudnn", f"{facts.name}: flash attention")


def fused_attention(facts: Facts, head_size: int, num_heads: int, tokens: int) -> Choice:
    """For attention that reads the qkv product in its own layout."""
    reason = _not_hopper(facts)
    if facts.platform != "gpu":
        return _by_xla(facts, jnp.bfloat16, reason)
    if reason or tokens % 64 or head_size % 8 or head_size > 128 or head_size % 16 and num_heads % 2:
        return attention(facts, head_size, jnp.bfloat16)
    return Choice("mosaic", f"{facts.name}: flash attention on the qkv product as it lies")


def soft_weights(facts: Facts, num_codewords: int, length: int, candidates: int) -> Choice:
    """For the soft weights of calibration and their gradient."""
    if reason := _not_hopper(facts):
        return Choice("xla", reason)
    if num_codewords > 256 or length not in (2, 4, 8) or candidates > 4:
        return Choice("xla", f"K={num_codewords}, d={length}, n={candidates}: wanted K to 256, d of 2, 4 or 8, n to 4")
    return Choice("mosaic", f"{facts.name}: fused forward, gradients without colliding scatters")
