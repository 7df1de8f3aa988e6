"""The PTX emulator on whole kernels: JAX's stock matrix product, and small ones that Mosaic compiles for these tests."""

import re

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas.ops.gpu import hopper_matmul_mgpu
from ptx import PtxError, emulate, launch

from benchmarks.aot import compiler

pytestmark = pytest.mark.once

needs_compiler = pytest.mark.skipif(compiler.unavailable() is not None, reason=compiler.unavailable() or "")

BF16, F8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn


@needs_compiler
def test_jaxs_own_matmul_is_right_to_the_rounding_of_its_output():
    """The one kernel here that somebody else wrote, and the emulator's own proof."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((256, 256)).astype(BF16) for _ in range(2))
    config = hopper_matmul_mgpu.TuningConfig(
        tile_m=128, tile_n=64, tile_k=64, max_concurrent_steps=2, grid_minor_dim=hopper_matmul_mgpu.MatmulDimension.N,
        grid_tile_width=1,
    )  # fmt: skip
    (y,) = emulate(
        lambda a, b: hopper_matmul_mgpu.matmul(a, b, None, config), [a, b], [jax.ShapeDtypeStruct((256, 256), BF16)]
    )
    exact = a.astype(np.float64) @ b.astype(np.float64)
    # Half a unit in the last place of bfloat16, and a little for sums in float32.
    assert (np.abs(y.astype(np.float64) - exact) <= np.abs(exact) * 2.0**-8 + 1e-4).all()


WARPGROUP = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)


def transforms(dtype: np.dtype, swizzle: int | None) -> tuple:
    if swizzle is None:
        return ()
    return (plgpu.TilingTransform((8, swizzle // np.dtype(dtype).itemsize)), plgpu.SwizzleTransform(swizzle))


def product(a: jax.Array, b: jax.Array, swizzle: int, mn_major: bool, out: np.dtype) -> jax.Array:
    """a (64, K) @ b: (K, N) as it lies in memory (`mn_major`), or the transpose of (N, K). Both through shared memory."""
    layout = transforms(a.dtype, swizzle)
    n = b.shape[1] if mn_major else b.shape[0]

    def body(a_gmem, b_gmem, out_gmem, a_smem, b_smem, barrier):
        plgpu.copy_gmem_to_smem(a_gmem, a_smem, barrier)
        plgpu.copy_gmem_to_smem(b_gmem, b_smem, barrier)
        plgpu.barrier_wait(barrier)
        transposed = plgpu.transpose_ref(b_smem, (1, 0)) if jax.__version_info__ < (0, 11) else b_smem.T

        def accumulate(acc):
            plgpu.wgmma(acc, a_smem, b_smem if mn_major else transposed)
            plgpu.wgmma_wait(0)
            out_gmem[...] = acc[...]

        pl.run_scoped(accumulate, plgpu.ACC((64, n), out))

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((64, n), out),
        scratch_types=[
            plgpu.SMEM(a.shape, a.dtype, transforms=layout),
            plgpu.SMEM(b.shape, b.dtype, transforms=layout),
            plgpu.Barrier(num_arrivals=2),
        ],
        compiler_params=WARPGROUP,
    )(a, b)


@needs_compiler
@pytest.mark.parametrize(
    "dtype, swizzle, mn_major",
    [
        *((BF16, swizzle, mn_major) for swizzle in (128, 64, 32) for mn_major in (False, True)),
        (np.float16, 128, False),
        (np.float16, 128, True),
        *((dtype, swizzle, False) for dtype in (np.int8, F8) for swizzle in (128, 64)),
    ],
)
def test_matrix_products_through_shared_memory(dtype, swizzle, mn_major):
    rng = np.random.default_rng(0)
    k = 128 // np.dtype(dtype).itemsize
    draw = lambda *shape: (rng.integers(-128, 128, shape) if dtype == np.int8 else rng.standard_normal(shape)).astype(
        dtype
    )
    a, b = draw(64, k), draw(k, 96) if mn_major and swizzle == 64 else draw(k, 64)
    out = np.dtype(np.int32 if dtype == np.int8 else np.float32)
    stored = b if mn_major else np.ascontiguousarray(b.T)
    (y,) = emulate(
        lambda a, b: product(a, b, swizzle, mn_major, out), [a, stored], [jax.ShapeDtypeStruct((64, b.shape[1]), out)]
    )
    exact = a.astype(np.float64) @ b.astype(np.float64)
    assert np.abs(y - exact).max() <= (0 if dtype == np.int8 else 1e-6 * np.abs(exact).max())


def through_shared_memory(x: jax.Array, box: tuple[int, ...], swizzle: int | None, doubles: bool) -> jax.Array:
    """x, or 2x, in boxes that overhang its ends."""
    axes = "abcde"[: x.ndim]

    def body(x_gmem, out_gmem, smem, barrier):
        here = tuple(pl.ds(jax.lax.axis_index(axis) * side, side) for axis, side in zip(axes, box))
        plgpu.copy_gmem_to_smem(x_gmem.at[here], smem, barrier)
        plgpu.barrier_wait(barrier)
        if doubles:
            smem[...] = smem[...] + smem[...]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem, out_gmem.at[here])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=tuple(-(-size // side) for size, side in zip(x.shape, box)),
        grid_names=tuple(axes),
        scratch_types=[
            plgpu.SMEM(box, x.dtype, transforms=transforms(x.dtype, swizzle)),
            plgpu.Barrier(num_arrivals=1),
        ],
        compiler_params=WARPGROUP,
    )(x)


@needs_compiler
@pytest.mark.parametrize(
    "shape, box, swizzle, dtype, doubles",
    [
        ((100,), (32,), None, np.float32, False),
        ((100, 40), (64, 32), None, np.float32, True),
        ((104, 192), (64, 128), 128, BF16, True),
        ((104, 96), (64, 64), 64, BF16, True),
        ((72, 96), (64, 64), 32, np.int8, False),
        ((3, 20, 40), (2, 8, 16), None, np.int32, False),
        ((3, 3, 20, 40), (2, 2, 8, 16), None, np.int32, False),
        ((2, 3, 3, 20, 40), (1, 2, 2, 8, 16), None, np.int32, False),
    ],
)
def test_copies_clip_at_every_end(shape, box, swizzle, dtype, doubles):
    x = np.random.default_rng(0).integers(-50, 50, shape).astype(dtype)
    copy = lambda x: through_shared_memory(x, box, swizzle, doubles)
    (y,) = emulate(copy, [x], [jax.ShapeDtypeStruct(shape, dtype)])
    assert np.array_equal(y, 2 * x.astype(np.float64) if doubles else x)


@needs_compiler
def test_beyond_the_end_a_copy_reads_zeros():
    """The sum of a box that overhangs: what is beyond counts as zero, not as what memory held before."""

    def body(x_gmem, out_gmem, smem, barrier):
        smem[...] = jnp.full((64, 32), 7.0, jnp.float32)
        plgpu.commit_smem()
        plgpu.copy_gmem_to_smem(x_gmem.at[pl.ds(jax.lax.axis_index("i") * 64, 64)], smem, barrier)
        plgpu.barrier_wait(barrier)
        out_gmem[...] = smem[...]

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((64, 32), jnp.float32),
        grid=(1,),
        grid_names=("i",),
        scratch_types=[plgpu.SMEM((64, 32), jnp.float32), plgpu.Barrier(num_arrivals=1)],
        compiler_params=WARPGROUP,
    )
    x = np.random.default_rng(0).standard_normal((40, 32)).astype(np.float32)
    (y,) = emulate(kernel, [x], [jax.ShapeDtypeStruct((64, 32), np.float32)])
    assert np.array_equal(y, np.pad(x, ((0, 24), (0, 0))))


@needs_compiler
def test_operands_may_come_in_any_order_and_more_than_one_result_may_go():
    def body(x_gmem, y_gmem, difference_gmem, sum_gmem):
        difference_gmem[...] = x_gmem[...] - y_gmem[...]
        sum_gmem[...] = x_gmem[...] + y_gmem[...]

    shape = jax.ShapeDtypeStruct((128,), jnp.float32)
    kernel = plgpu.kernel(body, out_type=(shape, shape), compiler_params=WARPGROUP)

    def swapped(unused, y, x):
        difference, total = kernel(x.reshape(128), y)
        return total, difference

    x, y = np.float32(np.arange(128)).reshape(2, 64), np.float32(np.arange(128)) ** 2
    total, difference = emulate(swapped, [x, y, x], [shape, shape])
    assert np.array_equal(total, x.reshape(-1) + y) and np.array_equal(difference, x.reshape(-1) - y)


@needs_compiler
def test_a_result_may_take_an_operands_buffer():
    """CTAs that come one after another, as here they do, add to one array; the caller's own stays as it was."""

    def body(x_gmem, sums_gmem):
        sums_gmem[...] = sums_gmem[...] + x_gmem[jax.lax.axis_index("i")]

    def program(x, sums):
        refs = jax.new_ref(x), jax.new_ref(sums)
        if jax.__version_info__ < (0, 11):  # whose plgpu.kernel takes no refs
            mesh = plgpu.Mesh(grid=(5,), grid_names=("i",))
            pl.core_map(mesh, compiler_params=WARPGROUP)(lambda: body(*refs))
        else:
            plgpu.kernel(body, out_type=(), grid=(5,), grid_names=("i",), compiler_params=WARPGROUP)(*refs)
        return refs[1][...]

    rng = np.random.default_rng(0)
    x, sums = rng.integers(0, 99, (5, 128)).astype(np.float32), rng.integers(0, 99, 128).astype(np.float32)
    before = sums.copy()
    (total,) = emulate(program, [x, sums], [jax.ShapeDtypeStruct((128,), np.float32)])
    assert np.array_equal(total, before + x.sum(0)) and np.array_equal(sums, before)


@needs_compiler
def test_a_program_that_is_not_one_kernel_is_refused():
    with pytest.raises(PtxError, match="not one Mosaic kernel; it launches: kCustomKernel"):
        emulate(lambda x: jnp.tanh(x) * 2, [np.zeros(128, np.float32)], [jax.ShapeDtypeStruct((128,), np.float32)])
    with pytest.raises(PtxError, match=r"the function returns \[\(\(128,\), dtype\('float32'\)\)\]"):
        emulate(lambda x: jnp.tanh(x), [np.zeros(128, np.float32)], [jax.ShapeDtypeStruct((64,), np.float32)])


def two_stores_from_one_buffer(x: jax.Array) -> jax.Array:
    """(2, 128) copies of x and of x + 1, through the same shared memory."""

    def body(x_gmem, out_gmem, smem, barrier):
        plgpu.copy_gmem_to_smem(x_gmem, smem, barrier)
        plgpu.barrier_wait(barrier)
        for i in range(2):
            plgpu.copy_smem_to_gmem(smem, out_gmem.at[i])
            plgpu.wait_smem_to_gmem(0)
            smem[...] = smem[...] + 1
            plgpu.commit_smem()

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((2, 128), jnp.float32),
        scratch_types=[plgpu.SMEM((128,), jnp.float32), plgpu.Barrier(num_arrivals=1)],
        compiler_params=WARPGROUP,
    )(x)


@needs_compiler
@pytest.mark.parametrize(
    "pattern, replacement",
    [
        (r"mbarrier\.try_wait\.parity\.shared(?:::cta)?\.b64\s+(\S+),[^;]*;", r"setp.eq.u32 \1, 0, 0;"),
        (r"cp\.async\.bulk\.wait_group(?:\.read)?\s+0;", ""),
    ],
    ids=["load", "store"],
)
def test_a_missing_wait_for_a_copy_shows(pattern, replacement, monkeypatch):
    x = np.arange(128, dtype=np.float32)
    call = lambda: emulate(two_stores_from_one_buffer, [x], [jax.ShapeDtypeStruct((2, 128), np.float32)])[0]
    assert np.array_equal(call(), [x, x + 1])
    run = launch.run

    def run_without(ptx, *rest):
        changed, count = re.subn(pattern, replacement, ptx)
        assert count
        return run(changed, *rest)

    monkeypatch.setattr(launch, "run", run_without)
    assert not np.array_equal(call(), [x, x + 1])


@needs_compiler
def test_a_missing_wait_for_a_product_shows(monkeypatch):
    a = np.random.default_rng(0).standard_normal((64, 64)).astype(BF16)
    multiply = lambda a: product(a, a, 128, False, np.dtype(np.float32))
    run = launch.run
    monkeypatch.setattr(launch, "run", lambda ptx, *rest: run(re.sub(r"wgmma\.wait_group\S*\s+0;", "", ptx), *rest))
    (y,) = emulate(multiply, [a], [jax.ShapeDtypeStruct((64, 64), np.float32)])
    exact = a.astype(np.float64) @ a.astype(np.float64).T
    assert np.abs(y - exact).max() > 1
