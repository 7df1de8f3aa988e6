"""The ahead-of-time compiler: what it says of programs whose launches and code are known beforehand."""

import json
import os
import subprocess
import sys
import types

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest
from jax.experimental.pallas.ops.gpu import hopper_matmul_mgpu

from benchmarks.aot import __main__ as report
from benchmarks.aot import compiler, sass
from benchmarks.aot.launches import Thunk, innermost_body, launches_of, parse_thunks

needs_compiler = pytest.mark.skipif(compiler.unavailable() is not None, reason=compiler.unavailable() or "")

SQUARE = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)


def matmul(a: jax.Array, b: jax.Array, tile_m: int = 128) -> jax.Array:
    """JAX's own Mosaic kernel. It holds two stages of (tile_m + 64 * 2) * 64 elements of bfloat16 in shared memory."""
    config = hopper_matmul_mgpu.TuningConfig(
        tile_m=tile_m, tile_n=64, tile_k=64, max_concurrent_steps=2,
        grid_minor_dim=hopper_matmul_mgpu.MatmulDimension.N, grid_tile_width=1,
    )  # fmt: skip
    return hopper_matmul_mgpu.matmul(a, b, None, config)


@needs_compiler
def test_a_kernel_and_its_machine_code():
    compiled = compiler.compile(matmul, SQUARE, SQUARE, name="stock kernel")
    assert compiled.name == "stock_kernel"
    (kernel,) = compiled.kernels
    assert kernel.is_mosaic and ".target sm_90a" in kernel.ptx and "gpu.launch_func" in kernel.host
    assert compiled.outputs == (jax.ShapeDtypeStruct((256, 256), jnp.bfloat16),)
    (launch,) = compiled.launches()
    assert (launch.kind, launch.name) == ("kCustomCall", kernel.name)
    assembly = kernel.assembly
    # Three warpgroups of 128 threads share 65,536 registers: 168 each, as multiples of 8.
    assert assembly.registers == 168 and assembly.spill_bytes == assembly.stack_bytes == 0
    assert kernel.dynamic_shared_bytes >= 2 * (128 + 128) * 64 * 2
    assert assembly.mma() == "HGMMA"
    # A step of the loop is (128, 64) @ (64, 64) for a warpgroup: 2 * 4 instructions of m = 64, k = 16.
    loop = assembly.main_loop()
    assert sum(sass.opcode(line) == "HGMMA" for line in loop) == 8
    assert 8 < len(loop) < len(assembly.instructions)


@needs_compiler
def test_a_kernel_that_was_compiled_before_has_its_texts_again():
    first, second = (compiler.compile(lambda a, b: matmul(a, b), SQUARE, SQUARE) for _ in range(2))
    assert first.kernels[0].ptx == second.kernels[0].ptx


@needs_compiler
def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    before = dict(os.environ), jax.config.jax_persistent_cache_min_compile_time_secs
    compiler.compile(lambda x: x + 1, jax.ShapeDtypeStruct((64,), jnp.float32))
    assert (dict(os.environ), jax.config.jax_persistent_cache_min_compile_time_secs) == before
    assert not list(tmp_path.iterdir())
    # The CPU is still the place where things run.
    assert jax.jit(lambda x: x + 1)(1).devices() == {jax.devices("cpu")[0]}


@needs_compiler
def test_launches_of_loops_and_branches():
    """Two Mosaic kernels of one name, told apart by the shared memory of their tiles, in a loop over steps of a loop."""

    def inner(x, b):
        return matmul(x, b, 64) + matmul(b, x, 128), None

    def program(a, b):
        step = lambda x, _: jax.lax.scan(lambda x, _: inner(x, b), x, None, length=5)
        return jnp.sort(jax.lax.scan(step, a, None, length=3)[0], axis=0)

    compiled = compiler.compile(program, SQUARE, SQUARE)
    small, large = sorted(compiled.mosaic_kernels, key=lambda kernel: kernel.dynamic_shared_bytes)
    assert large.dynamic_shared_bytes - small.dynamic_shared_bytes >= 2 * 64 * 64 * 2
    kinds = [thunk.kind for thunk in compiled.launches_per_iteration()]
    assert kinds.count("kCustomCall") == 2
    assert "kWhile" not in kinds and len(kinds) < len(compiled.launches())
    assert any("sort" in thunk.name for thunk in compiled.launches())
    assert not any("sort" in thunk.name for thunk in compiled.launches_per_iteration())
    # XLA's kernels have their code too.
    fusion = next(kernel for kernel in compiled.kernels if not kernel.is_mosaic)
    assert fusion.host is None and fusion.assembly.registers > 0 and fusion.assembly.mma() is None


@needs_compiler
def test_a_tensor_core_dot_of_xla_is_a_launch():
    compiled = compiler.compile(lambda a, b: jnp.tanh(a @ b) @ b, SQUARE, SQUARE)
    assert len(compiled.launches()) >= 2
    assert compiled.launches_per_iteration() == compiled.launches()


# Reading XLA's text, without a compiler

SEQUENCE = """\
001: kCopy  [source       | next=003 (2)] kCopy
003: kWhile [prev=002 (1) | sink        ]   
condition:
    004: kCustomKernel [source | sink] compare_1 grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
  body:
    007: kWhile        [prev=005 (2) | sink        ]       
condition:
        008: kCustomKernel [source | sink] compare_2 grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
      body:
        017: kCustomCall   [source       | next=019 (2)] kCustomCall
        027: kConditional  [prev=016 (1) | next=028 (1)]               
          false_branch:
            No thunks.
          true_branch:
            020: kGemm [source       | next=021 (1)] kGemm
            021: kCustomKernel [prev=020 (1) | next=026 (1)] add grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
    029: kCopy         [prev=027 (1) | sink        ] kCopy
030: kCustomKernel [prev=003 (1) | sink        ] sort_1 grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
"""
METADATA = "".join(
    f'thunk_metadata {{\n  thunk_info {{\n    profile_annotation: "{name}"\n    thunk_id: {number}\n  }}\n}}\n'
    for number, name in ((1, "copy.1"), (17, "mpmd_map.3"), (20, "gemm.7"), (21, "add.fusion"), (29, "copy.2"))
)


def test_thunks_nest_as_xla_prints_them():
    thunks = parse_thunks(SEQUENCE, METADATA, {"mpmd_map.3": "vq_matmul"})
    assert [thunk.kind for thunk in thunks] == ["kCopy", "kWhile", "kCustomKernel"]
    assert thunks[0] == Thunk("kCopy", "copy.1", "copy.1")
    outer = thunks[1].bodies
    assert outer["condition"] == (Thunk("kCustomKernel", "compare_1", "compare_1"),)
    assert [thunk.kind for thunk in outer["body"]] == ["kWhile", "kCopy"]
    inner = outer["body"][0].bodies["body"]
    assert inner[0] == Thunk("kCustomCall", "vq_matmul", "mpmd_map.3")
    branch = (Thunk("kGemm", "gemm.7", "gemm.7"), Thunk("kCustomKernel", "add", "add.fusion"))
    assert inner[1].bodies == {"false_branch": (), "true_branch": branch}
    assert innermost_body(thunks) == inner
    assert [thunk.name for thunk in launches_of(inner)] == ["vq_matmul", "gemm.7", "add"]
    names = ["copy.1", "vq_matmul", "gemm.7", "add", "copy.2", "sort_1"]
    assert [thunk.name for thunk in launches_of(thunks)] == names


def test_a_line_that_is_not_known_is_refused():
    with pytest.raises(RuntimeError, match="line of unknown form: 'something new'"):
        parse_thunks("something new", "", {})


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(sass, "tool", lambda name: None)
    reason = compiler.unavailable.__wrapped__()
    assert reason.startswith("compiling for a GPU needs ") and "ptxas" in reason and "nvidia-cuda-nvdisasm" in reason
    monkeypatch.setattr(compiler, "unavailable", lambda: reason)
    with pytest.raises(RuntimeError, match="compiling for a GPU needs"):
        compiler.compile(lambda x: x, jax.ShapeDtypeStruct((1,), jnp.float32))


def test_the_shortest_loop_around_a_tensor_core_instruction_is_the_main_loop():
    instructions = (
        "MOV R1, R2",
        "@P1 HGMMA.64x64x16.F32.BF16 R4, R8, gdesc[UR4]",
        "LDS R1, [R2]",
        "@!UP0 BRA `(.L_x_1)",
        "BRA `(.L_x_0)",
        "BRA `(.L_x_9)",
    )
    assembly = sass.Assembly(168, 0, 0, 1, instructions, {".L_x_0": 0, ".L_x_1": 1, ".L_x_9": 5})
    assert assembly.main_loop() == instructions[1:4]
    assert assembly.opcodes() == {"BRA": 3, "MOV": 1, "HGMMA": 1, "LDS": 1}
    assert sass.Assembly(8, 0, 0, 0, instructions[:1], {}).main_loop() == ()


# The report


@needs_compiler
def test_the_report_fails_where_a_limit_is_broken(monkeypatch, tmp_path, capsys):
    good = {"fn": matmul, "shapes": (SQUARE, SQUARE), "mma": "HGMMA", "max_loop": 100, "max_launches": 1}
    bad = {**good, "mma": "IGMMA", "max_loop": 10, "max_launches": 0}
    found = {"good": types.SimpleNamespace(**good), "bad": types.SimpleNamespace(**bad)}
    cases = types.ModuleType("benchmarks.aot.cases")
    monkeypatch.setitem(sys.modules, "benchmarks.aot.cases", cases)
    cases.cases = lambda: found
    assert report.main(["--only", "good", "--json", str(tmp_path / "out.json")]) == 0
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert (row["case"], row["mma"], row["registers"], row["launches"], row["broken"]) == ("good", "HGMMA", 168, 1, [])
    assert report.main(["--only", "bad"]) == 1
    printed = capsys.readouterr()
    assert "bad: HGMMA where IGMMA is wanted" in printed.err and "more than 10" in printed.err
    assert "bad: 1 launches a block, more than 0" in printed.err


@needs_compiler
def test_spills_and_shared_memory_are_seen():
    """64 numbers that are all needed at the end, in 32 registers."""
    lines = [f"ld.volatile.global.b32 %r{i}, [%rd1+{4 * i}];" for i in range(64)]
    lines += [f"st.volatile.global.b32 [%rd1+{4 * i}], %r{63 - i};" for i in range(64)]
    ptx = """
.version 9.0
.target sm_90a
.address_size 64
.visible .entry crowded(.param .u64 p) .maxnreg 32
{ .reg .b32 %r<64>; .reg .b64 %rd<2>; .shared .b32 x[25];
ld.param.b64 %rd1, [p]; st.volatile.shared.b64 [x], %rd1;
LINES
ret; }
""".replace("LINES", "\n".join(lines))
    assembly = sass.assemble(ptx)["crowded"]
    assert assembly.registers <= 32
    assert assembly.spill_bytes >= 2 * 4 * (64 - 32) and assembly.stack_bytes >= 4 * (64 - 32)
    assert assembly.shared_bytes == 100
    with pytest.raises(RuntimeError, match="ptxas failed: .*frobnicate"):
        sass.assemble(ptx.replace("ret;", "frobnicate;"))


@needs_compiler
def test_a_launch_has_the_name_of_its_own_kernel():
    """Kernels that do not wait for each other, so that XLA may take them in any order."""

    def adds(number: int):
        def body(x_gmem, out_gmem):
            out_gmem[...] = x_gmem[...] + number

        body.__name__ = f"adds_{number}"
        shape = jax.ShapeDtypeStruct((128 * number,), jnp.float32)
        params = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)
        return plgpu.kernel(body, out_type=shape, compiler_params=params), shape

    kernels, shapes = zip(*map(adds, (3, 1, 4, 2)))
    compiled = compiler.compile(lambda *x: [kernel(v) for kernel, v in zip(kernels, x)][::-1], *shapes)
    for thunk in compiled.launches():
        number = thunk.name.removeprefix("adds_")[0]
        assert f"f32[{128 * int(number)}]" in compiled.hlo.split(f"%{thunk.instruction} = ")[1].splitlines()[0]
    assert len(compiled.launches()) == 4


def test_importing_the_compiler_starts_no_backend():
    code = "import benchmarks.aot.compiler, jax; from jax._src import xla_bridge; assert not xla_bridge._backends"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=report.__file__.rsplit("/", 3)[0])
