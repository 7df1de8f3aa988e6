"""Times on a device: medians of interleaved calls, each on a cold L2 cache, and bursts of calls by the host's clock."""

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Calls = Mapping[str, Callable[[], Any]]
Samples = dict[str, list[float]]
"""Milliseconds of each call."""

_FLUSH_BYTES = 256 * 2**20
"""Written before every measured call: several times the L2 cache (50 MB on an H100, 60 MB on an H200)."""


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles."""
    if len(samples) == 1:
        return {"median": samples[0], "quartiles": [samples[0]] * 2, "samples": 1}
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": middle, "quartiles": [low, high], "samples": len(samples)}


def kernel_times(calls: Calls, repeats: int) -> tuple[Samples, str]:
    """Time of the kernels of each call, in turns, on a cold L2 cache; and the clock that it was taken with.

    "cupti": time stamps of the device around every kernel, without the gaps between them. "wall", where CUPTI does not
    answer: `wall_times` of bursts, with gaps, and with a warm cache.
    """
    import jax

    if jax.default_backend() == "gpu":
        try:
            return _by_cupti(calls, repeats), "cupti"
        except (RuntimeError, ImportError, AttributeError) as e:
            print(f"no times from CUPTI ({type(e).__name__}: {e}); the host's clock is used", flush=True)
    return wall_times(calls, jax.block_until_ready, bursts=repeats), "wall"


def _by_cupti(calls: Calls, repeats: int) -> Samples:
    import jax

    buffer = _flush_buffer()
    flush = lambda: _flush()(buffer)
    every = {"": flush, **calls}
    for call in every.values():  # compiled and loaded before anything is traced
        jax.block_until_ready(call())
    kernels = {}
    for name, call in every.items():
        with _Trace() as alone:
            jax.block_until_ready(call())
        kernels[name] = [kernel for kernel, _ in alone.found]
    with _Trace() as trace:
        for _ in range(repeats):
            for call in calls.values():
                jax.block_until_ready(flush())
                jax.block_until_ready(call())
    order = [name for _ in range(repeats) for call in calls for name in ("", call)]
    return split(trace.found, order, kernels)


def split(found: Sequence[tuple[str, float]], order: Sequence[str], kernels: Mapping[str, list[str]]) -> Samples:
    """The sum over the kernels of each call in `order`, from one list of (kernel, ms) of all of them.

    `kernels` are those of a call. RuntimeError where the list is not that of these calls.
    """
    samples: Samples = {name: [] for name in order if name}
    rest = iter(found)
    for name in order:
        own = [next(rest, ("nothing", 0.0)) for _ in kernels[name]]
        if [kernel for kernel, _ in own] != kernels[name]:
            raise RuntimeError(
                f"{name or 'flush'} ran {[kernel for kernel, _ in own]} where it ran {kernels[name]} alone"
            )
        if name:
            samples[name].append(sum(ms for _, ms in own))
    if next(rest, None) is not None:
        raise RuntimeError("kernels ran that belong to no call")
    return samples


class _Trace:
    """Kernels that ran inside the `with`, as (name, ms), through the profiler of Mosaic GPU."""

    found: list[tuple[str, float]]

    def __enter__(self) -> "_Trace":
        from jax._src.lib import mosaic_gpu

        self._profiler = mosaic_gpu._mosaic_gpu_ext
        self._profiler._cupti_init()
        return self

    def __exit__(self, *_: Any) -> None:
        self.found = self._profiler._cupti_get_timings(True)


@functools.cache
def _flush() -> Callable[[Any], Any]:
    import jax

    return jax.jit(lambda a: a ^ 1)


@functools.cache
def _flush_buffer() -> Any:
    import jax.numpy as jnp

    return jnp.zeros(_FLUSH_BYTES // 4, jnp.int32)


def wall_times(calls: Calls, wait: Callable[[Any], Any], bursts: int, burst_ms: float = 50.0) -> Samples:
    """Milliseconds a call in bursts of about `burst_ms` that end with `wait` of the last result; bursts take turns."""
    lengths = {}
    for name, call in calls.items():
        wait(call())
        start = time.perf_counter()
        wait(call())
        lengths[name] = max(1, min(100, int(burst_ms / 1e3 / (time.perf_counter() - start))))
    samples: Samples = {name: [] for name in calls}
    for _ in range(bursts):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(lengths[name]):
                result = call()
            wait(result)
            samples[name].append(1e3 * (time.perf_counter() - start) / lengths[name])
    return samples


def floors(flops: float, bytes_moved: float, device: str, eight_bits: bool) -> dict[str, float]:
    """Milliseconds that the arithmetic and the memory traffic take at least, on an H200 or H100.

    H200: 790 TFLOP/s in bfloat16 and 4.3 TB/s, measured; H100: the same arithmetic, and 0.9 of its 3.35 TB/s.
    """
    rate = 790e12 * (2 if eight_bits else 1)
    bandwidth = 4.3e12 if "H200" in device else 0.9 * 3.35e12
    compute, memory = 1e3 * flops / rate, 1e3 * bytes_moved / bandwidth
    return {"compute": compute, "memory": memory, "larger": max(compute, memory)}


READY = "ready"
"""A case yields this after compilation and before it measures; it continues when it has the GPU for itself."""
