"""Single instructions in the PTX emulator against numpy, Python's integers and fractions, and ptxas's constant folding."""

import fractions
import functools
import re

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from ptx import PtxError
from ptx.harness import execute, kernel

from benchmarks.aot import compiler, sass

pytestmark = pytest.mark.once

needs_compiler = pytest.mark.skipif(compiler.unavailable() is not None, reason=compiler.unavailable() or "")

BF16, F8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
WORD = st.integers(0, 2**32 - 1)
words = hnp.arrays(np.uint32, 32, elements=WORD)
# Any bit pattern: subnormals, infinities and NaN among them.
floats = words.map(lambda bits: bits.view(np.float32))
shifts = hnp.arrays(np.uint32, 32, elements=st.integers(0, 70))


def given(*strategies):
    """Each example has 32 threads, so that a few are many."""
    return lambda test: hypothesis.settings(max_examples=25)(hypothesis.given(*strategies)(test))


def by_thread(function, *inputs, bits: int = 32) -> list[int]:
    """function of Python integers, of each thread, modulo 2**bits."""
    return [function(*map(int, values)) % 2**bits for values in zip(*inputs)]


def signed(value: int, bits: int = 32) -> int:
    return value - 2**bits if value >> (bits - 1) else value


def byte(value: int, i: int) -> int:
    return value >> 8 * i & 0xFF


# Integers and bits


@given(words, words, words)
def test_prmt_picks_bytes_and_copies_signs(a, b, selector):
    def permute(a, b, selector):
        chosen = [selector >> 4 * i & 15 for i in range(4)]
        picked = [byte(b << 32 | a, nibble & 7) for nibble in chosen]
        return sum((0xFF * (x >> 7) if nibble & 8 else x) << 8 * i for i, (nibble, x) in enumerate(zip(chosen, picked)))

    assert execute("prmt.b32 d, a, b, c;", [a, b, selector]).tolist() == by_thread(permute, a, b, selector)


@pytest.mark.parametrize(
    "logic",
    [
        lambda a, b, c: (a & b) ^ c,
        lambda a, b, c: a | (b & ~c),
        lambda a, b, c: (a & b) | (a & c) | (b & c),
        lambda a, b, c: ~a,
        lambda a, b, c: a ^ b ^ ~c,
    ],
)
@given(words, words, words)
def test_lop3_is_the_function_whose_table_it_gets(logic, a, b, c):
    # PTX ISA: immLut is the function of 0xF0, 0xCC and 0xAA.
    table = logic(0xF0, 0xCC, 0xAA) & 0xFF
    assert np.array_equal(execute(f"lop3.b32 d, a, b, c, {table};", [a, b, c]), logic(a, b, c))


@given(words, words, shifts)
def test_shifts(a, b, n):
    run = functools.partial(execute, inputs=[a, b, n])
    assert run("shl.b32 d, a, c;").tolist() == by_thread(lambda a, n: a << n, a, n)
    assert run("shr.u32 d, a, c;").tolist() == by_thread(lambda a, n: a >> n, a, n)
    assert run("shr.s32 d, a, c;").tolist() == by_thread(lambda a, n: signed(a) >> n, a, n)
    pair = lambda a, b: b << 32 | a
    assert run("shf.l.wrap.b32 d, a, b, c;").tolist() == by_thread(
        lambda a, b, n: (pair(a, b) << n % 32) >> 32, a, b, n
    )
    assert run("shf.r.clamp.b32 d, a, b, c;").tolist() == by_thread(lambda a, b, n: pair(a, b) >> min(n, 32), a, b, n)


@given(words, words, shifts, shifts)
def test_bit_fields(a, b, position, length):
    def extract(a, position, length):
        return a >> position & 2**length - 1

    def extract_signed(a, position, length):
        # Above bit 31 there are copies of it.
        return signed(signed(a) >> min(position, 31) & 2 ** min(length, 32) - 1, min(length, 32)) if length else 0

    def insert(a, b, position, length):
        mask = (2 ** min(length, 32) - 1) << position
        return (b & ~mask) | (a << position & mask)

    inputs = [a, b, position, length]
    assert execute("bfe.u32 d, a, c, e;", inputs).tolist() == by_thread(extract, a, position, length)
    assert execute("bfe.s32 d, a, c, e;", inputs).tolist() == by_thread(extract_signed, a, position, length)
    assert execute("bfi.b32 d, a, b, c, e;", inputs).tolist() == by_thread(insert, a, b, position, length)


@given(words, words, words)
def test_integer_arithmetic(a, b, c):
    s = signed
    cases = {
        "add.u32 d, a, b;": lambda a, b, c: a + b,
        "sub.s32 d, a, b;": lambda a, b, c: a - b,
        "mul.lo.s32 d, a, b;": lambda a, b, c: a * b,
        "mul.hi.u32 d, a, b;": lambda a, b, c: a * b >> 32,
        "mul.hi.s32 d, a, b;": lambda a, b, c: s(a) * s(b) >> 32,
        "mad.lo.u32 d, a, b, c;": lambda a, b, c: a * b + c,
        "min.s32 d, a, b;": lambda a, b, c: min(s(a), s(b)),
        "max.u32 d, a, b;": lambda a, b, c: max(a, b),
        "abs.s32 d, a;": lambda a, b, c: abs(s(a)),
        "not.b32 d, a;": lambda a, b, c: ~a,
        "popc.b32 d, a;": lambda a, b, c: a.bit_count(),
        "clz.b32 d, a;": lambda a, b, c: 32 - a.bit_length(),
        "brev.b32 d, a;": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
        "dp4a.s32.s32 d, a, b, c;": lambda a, b, c: c + sum(s(byte(a, i), 8) * s(byte(b, i), 8) for i in range(4)),
        "dp4a.u32.s32 d, a, b, c;": lambda a, b, c: c + sum(byte(a, i) * s(byte(b, i), 8) for i in range(4)),
        "setp.lt.s32 %p1, a, b; selp.b32 d, a, c, %p1;": lambda a, b, c: a if s(a) < s(b) else c,
        "setp.hi.u32 %p1, a, b; @%p1 mov.b32 c, 7; mov.b32 d, c;": lambda a, b, c: 7 if a > b else c,
        "cvt.u16.u32 %h1, a; cvt.s32.s8 d, %h1;": lambda a, b, c: s(a & 0xFF, 8),
        "cvt.u16.u32 %h1, a; cvt.s32.s16 d, %h1;": lambda a, b, c: s(a & 0xFFFF, 16),
        "mov.b32 {%h1, %h2}, a; mov.b32 d, {%h2, %h1};": lambda a, b, c: a >> 16 | a << 16,
        "cvt.sat.s8.s32 d, a;": lambda a, b, c: max(-128, min(127, s(a))),
    }
    for body, function in cases.items():
        assert execute(body, [a, b, c]).tolist() == by_thread(function, a, b, c), body
    wide = by_thread(lambda a, b: s(a) * s(b), a, b, bits=64)
    assert execute("mul.wide.s32 d, a, b;", [a, b], np.uint64).tolist() == wide


@given(words, hnp.arrays(np.int32, 32, elements=st.integers(-300, 300)), words)
def test_cvt_pack_saturates_and_shifts(a, b, c):
    clip = lambda x: max(-128, min(127, signed(x))) & 0xFF
    expected = by_thread(lambda a, b, c: clip(b % 2**32) | clip(a) << 8 | c << 16, a, b, c)
    assert execute("cvt.pack.sat.s8.s32.b32 d, a, b, c;", [a, b, c]).tolist() == expected


# Floats


def equal_but_for_nan(got: np.ndarray, wanted: np.ndarray) -> bool:
    nan = np.isnan(wanted.astype(np.float64))
    bits = f"u{got.dtype.itemsize}"
    return bool(
        np.isnan(got.astype(np.float64))[nan].all() and np.array_equal(got.view(bits)[~nan], wanted.view(bits)[~nan])
    )


@given(floats, floats)
def test_conversions_to_narrow_floats(a, b):
    with np.errstate(all="ignore"):
        for name, dtype in (("bf16", BF16), ("f16", np.float16)):
            one = execute(f"cvt.rn.{name}.f32 %h1, a; mov.b16 d, %h1;", [a], np.uint16).view(dtype)
            assert equal_but_for_nan(one, a.astype(dtype))
            low_is_b = execute(f"cvt.rn.{name}x2.f32 d, a, b;", [a, b]).view(dtype).reshape(32, 2)
            assert equal_but_for_nan(low_is_b[:, 0].copy(), b.astype(dtype))
            assert equal_but_for_nan(low_is_b[:, 1].copy(), a.astype(dtype))
            back = execute(f"cvt.rn.{name}.f32 %h1, a; cvt.f32.{name} d, %h1;", [a]).view(np.float32)
            assert equal_but_for_nan(back, a.astype(dtype).astype(np.float32))
        pair = execute("cvt.rn.satfinite.e4m3x2.f32 d, a, b;", [a, b], np.uint16).view(F8).reshape(32, 2)
        assert equal_but_for_nan(pair[:, 0].copy(), np.clip(b, -448, 448).astype(F8))
        assert equal_but_for_nan(pair[:, 1].copy(), np.clip(a, -448, 448).astype(F8))
        wide = execute("cvt.rn.satfinite.e4m3x2.f32 %h1, a, b; cvt.rn.f16x2.e4m3x2 d, %h1;", [a, b]).view(np.float16)
        assert equal_but_for_nan(wide.reshape(32, 2)[:, 0].copy(), np.clip(b, -448, 448).astype(F8).astype(np.float16))


@pytest.mark.parametrize(
    "rounding, function", [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)]
)
@given(floats)
@hypothesis.example(np.resize(np.float32([0.5, 1.5, -2.5, 2147483648, -2147483904, 4294967040, np.nan, -0.5]), 32))
def test_floats_to_integers_saturate(rounding, function, a):
    def expected(low: int, high: int) -> list[int]:
        clipped = [
            0 if np.isnan(x) else max(low, min(high, x if np.isinf(x) else int(function(x)))) for x in a.astype(float)
        ]
        return [int(x) % 2**32 for x in clipped]

    assert execute(f"cvt.{rounding}.s32.f32 d, a;", [a]).tolist() == expected(-(2**31), 2**31 - 1)
    assert execute(f"cvt.{rounding}.u32.f32 d, a;", [a]).tolist() == expected(0, 2**32 - 1)


@given(words)
def test_integers_to_floats(a):
    assert np.array_equal(execute("cvt.rn.f32.s32 d, a;", [a]).view(np.float32), a.view(np.int32).astype(np.float32))
    assert np.array_equal(execute("cvt.rn.f32.u32 d, a;", [a]).view(np.float32), a.astype(np.float32))


finite = hnp.arrays(np.float32, 32, elements=st.floats(-(2.0**60), 2.0**60, width=32))
narrow_finite = finite.map(lambda x: x.astype(BF16))


def is_nearest(value: np.floating, exact: fractions.Fraction) -> bool:
    """Whether no float of its type is nearer to `exact`, and an even one was taken of two that are equally near."""
    error = abs(fractions.Fraction(float(value)) - exact)
    for way in (np.inf, -np.inf):
        other = np.nextafter(value, value.dtype.type(way))
        distance = abs(fractions.Fraction(float(other)) - exact)
        if distance < error or (distance == error and value.view(f"u{value.itemsize}") & 1):
            return False
    return True


@given(finite, finite, finite)
@hypothesis.example(
    np.full(32, 1 + 2.0**-12, np.float32), np.full(32, 1 + 2.0**-12, np.float32), np.full(32, 2.0**-90, np.float32)
)
def test_fma_rounds_once(a, b, c):
    result = execute("fma.rn.f32 d, a, b, c;", [a, b, c]).view(np.float32)
    for x, y, z, value in zip(a, b, c, result):
        if np.isfinite(value):
            exact = fractions.Fraction(float(x)) * fractions.Fraction(float(y)) + fractions.Fraction(float(z))
            assert is_nearest(value, exact)


@given(narrow_finite, narrow_finite, narrow_finite)
def test_packed_bf16_fma_rounds_once(a, b, c):
    pack = lambda x: np.stack([x, x[::-1]], -1).view(np.uint32).reshape(32)
    result = execute("fma.rn.bf16x2 d, a, b, c;", [pack(a), pack(b), pack(c)]).view(BF16).reshape(32, 2)
    assert np.array_equal(result[:, 1].view(np.uint16), result[::-1, 0].view(np.uint16))
    for x, y, z, value in zip(a, b, c, result[:, 0]):
        if np.isfinite(value):
            exact = fractions.Fraction(float(x)) * fractions.Fraction(float(y)) + fractions.Fraction(float(z))
            assert is_nearest(value, exact)


@given(floats, floats)
def test_float_arithmetic_is_ieee(a, b):
    with np.errstate(all="ignore"):
        cases = {"add": a + b, "sub": a - b, "mul": a * b, "div.rn": a / b, "neg": -a, "sqrt.rn": np.sqrt(a)}
        for name, wanted in cases.items():
            opcode = name if "." in name else f"{name}.rn" if name != "neg" else "neg"
            sources = "a" if name in ("neg", "sqrt.rn") else "a, b"
            got = execute(f"{opcode}.f32 d, {sources};", [a, b]).view(np.float32)
            assert equal_but_for_nan(got, wanted), name
        flushed = execute("add.ftz.f32 d, a, b;", [a, b]).view(np.float32)
        assert not (np.abs(flushed) < 2.0**-126)[flushed != 0].any()
        maximum = execute("max.f32 d, a, b;", [a, b]).view(np.float32)
        assert np.array_equal(maximum, np.fmax(a, b), equal_nan=True)
        lower = execute("setp.ltu.f32 %p1, a, b; selp.b32 d, 1, 0, %p1;", [a, b]).astype(bool)
        assert np.array_equal(lower, (a < b) | np.isnan(a) | np.isnan(b))


# ptxas's constant folding: somebody else's idea of the same instructions


def folded(lines: list[str]) -> list[int]:
    """What ptxas computes at compile time of instructions on constants, each of which writes %r1."""
    body = "".join(f"{line}\nst.volatile.global.b32 [%rd1+{4 * i}], %r1;\n" for i, line in enumerate(lines, 1))
    text = kernel(body, [], np.uint32).replace(
        "mov.u32 %r0, %tid.x;", "ld.param.b64 %rd1, [p0]; mov.u32 %r0, 0; mov.b32 d, 0;"
    )
    registers, stored = {"RZ": 0}, {}
    for line in sass.assemble(text)["k"].instructions:
        number = lambda text: int(text, 0) % 2**32 if re.fullmatch(r"-?(0x)?[0-9a-f]+", text) else registers.get(text)
        if move := re.fullmatch(r"(?:IMAD\.MOV\.U32 (R\d+), RZ, RZ|MOV (R\d+)), (\S+)", line):
            registers[move[1] or move[2]] = number(move[3])
        elif move := re.fullmatch(r"HFMA2\.MMA (R\d+), -RZ, RZ, (\S+), (\S+)", line):
            # A constant that is written as two halves.
            registers[move[1]] = int(np.array([move[3], move[2]], np.float16).view(np.uint32)[0])
        elif store := re.search(r"STG\.\S+ desc\S+\[R\d+\.64(?:\+(0x[0-9a-f]+))?\], (\w+)", line):
            stored[int(store[1] or "0", 16) // 4] = registers.get(store[2])
        elif target := re.match(r"\S+ (R\d+)", line):
            registers.pop(target[1], None)
    return [stored.get(i) for i in range(1, len(lines) + 1)]  # the kernel's own store is at 0


@needs_compiler
def test_ptxas_folds_constants_to_the_same_values():
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(12):
        a, b, c = (hex(x) for x in rng.integers(0, 2**32, 3))
        position, length = rng.integers(0, 20), rng.integers(1, 20)
        x = f"0f{np.float32(rng.standard_normal() * 10.0 ** rng.integers(-3, 12)).view(np.uint32):08X}"
        lines += [
            f"shf.l.wrap.b32 %r1, {a}, {b}, {position};",
            f"shf.r.wrap.b32 %r1, {a}, {b}, {position};",
            f"bfe.u32 %r1, {a}, {position}, {length};",
            f"bfe.s32 %r1, {a}, {position}, {length};",
            f"bfi.b32 %r1, {a}, {b}, {position}, {length};",
            f"mul.hi.u32 %r1, {a}, {b};",
            f"mul.hi.s32 %r1, {a}, {b};",
            f"mad.lo.s32 %r1, {a}, {b}, {c};",
            f"popc.b32 %r1, {a};",
            f"brev.b32 %r1, {a};",
            f"clz.b32 %r1, {hex(int(a, 16) >> position)};",
            f"cvt.rni.s32.f32 %r1, {x};",
            f"cvt.rzi.u32.f32 %r1, {x};",
            f"cvt.rn.f32.s32 %r1, {a};",
            f"cvt.rn.f16x2.f32 %r1, {x}, 0f3FC01234;",
        ]
    known = [(line, value) for line, value in zip(lines, folded(lines)) if value is not None]
    assert len(known) > 0.7 * len(lines)
    for line, value in known:
        assert execute(f"{line} mov.b32 d, %r1;", [np.zeros(32, np.uint32)])[0] == value, line


@needs_compiler
def test_approximate_functions_are_near_those_of_ptxas():
    lines = [
        f"{name}.approx.f32 %r1, 0f{np.float32(x).view(np.uint32):08X};"
        for name in ("ex2", "lg2", "rcp", "rsqrt", "sqrt")
        for x in (0.3, 1.7, 2.0, 19.0)
    ]
    known = [(line, value) for line, value in zip(lines, folded(lines)) if value is not None]
    assert len(known) > 0.7 * len(lines)
    for line, value in known:
        ours = execute(f"{line} mov.b32 d, %r1;", [np.zeros(32, np.uint32)])[:1].view(np.float32)
        np.testing.assert_allclose(ours, np.uint32(value).view(np.float32), rtol=3e-7, err_msg=line)


# Threads together


@given(words, st.integers(0, 31), st.sampled_from([(31, 32), (0x1C1F, 4), (0x181F, 8)]))
def test_shuffles(a, n, segment):
    c, width = segment
    lane = np.arange(32)
    base = lane // width * width
    wanted = {
        "idx": base + n % width,
        "bfly": lane ^ (n % width),
        "down": np.where(lane + n <= base + width - 1, lane + n, lane),
        "up": np.where(lane - n >= base, lane - n, lane),
    }
    for how, source in wanted.items():
        clamp = c & ~31 if how == "up" else c
        b = n % width if how in ("idx", "bfly") else n
        got = execute(f"shfl.sync.{how}.b32 d, a, {b}, {clamp}, -1;", [a])
        assert np.array_equal(got, a[source]), how


@given(hnp.arrays(np.uint32, 32, elements=st.integers(0, 3)))
def test_votes_and_reductions(a):
    ballot = sum(1 << i for i in range(32) if a[i] == 1)
    assert (execute("setp.eq.u32 %p1, a, 1; vote.sync.ballot.b32 d, %p1, -1;", [a]) == ballot).all()
    voted = execute("setp.eq.u32 %p1, a, 1; vote.sync.any.pred %p2, %p1, -1; selp.b32 d, 1, 0, %p2;", [a])
    assert (voted == (a == 1).any()).all()
    assert (execute("redux.sync.add.u32 d, a, -1;", [a]) == a.sum()).all()
    assert (execute("redux.sync.max.u32 d, a, -1;", [a]) == a.max()).all()
    same = [sum(1 << j for j in range(32) if a[j] == a[i]) for i in range(32)]
    assert execute("match.any.sync.b32 d, a, -1;", [a]).tolist() == same


@pytest.mark.parametrize("transposed", ["", ".trans"])
def test_stmatrix_and_ldmatrix_follow_the_manual(transposed):
    """Thread t holds columns 2(t%4) and 2(t%4)+1 of row t/4; stored to rows of 16 bytes, read back by plain loads."""
    a = np.random.default_rng(0).integers(0, 2**32, 32).astype(np.uint32)
    address = """
        mov.b64 %rd3, buffer; cvt.u32.u64 %r1, %rd3;
        and.b32 %r2, %r0, 7; mad.lo.u32 %r2, %r2, 16, %r1; mad.lo.u32 %r3, %r0, 4, %r1;"""
    store = f"stmatrix.sync.aligned.m8n8.x1{transposed}.shared.b16 [%r2], {{a}};"
    stored = execute(f"{address} {store} bar.sync 0; ld.shared.b32 d, [%r3];", [a]).view(np.uint16).reshape(8, 8)
    matrix = a.view(np.uint16).reshape(8, 8)  # thread t's pair is row t/4, columns 2(t%4)...
    assert np.array_equal(stored, matrix.T if transposed else matrix)
    load = f"ldmatrix.sync.aligned.m8n8.x1{transposed}.shared.b16 {{d}}, [%r2];"
    loaded = execute(f"{address} st.shared.b32 [%r3], a; bar.sync 0; {load}", [a]).view(np.uint16).reshape(8, 8)
    assert np.array_equal(loaded, matrix.T if transposed else matrix)


def test_atomics_add_up():
    rng = np.random.default_rng(0)
    values, slots = rng.integers(0, 1000, 128).astype(np.uint32), rng.integers(0, 8, 128).astype(np.uint32)
    body = """
        mov.b64 %rd3, buffer; mad.wide.u32 %rd4, b, 4, %rd3; mov.b32 %r1, 0; mad.wide.u32 %rd5, %r0, 4, %rd3;
        st.shared.b32 [%rd5], %r1; bar.sync 0;
        red.shared.add.u32 [%rd4], a; bar.sync 0;
        ld.shared.b32 d, [%rd5];"""
    assert np.array_equal(execute(body, [values, slots])[:8], np.bincount(slots, values, 8).astype(np.uint32))
    as_floats = body.replace("red.shared.add.u32", "red.shared.add.f32")
    sums = execute(as_floats, [values.astype(np.float32), slots], np.float32)
    assert np.array_equal(sums[:8], np.bincount(slots, values, 8).astype(np.float32))
    # To global memory: slot b of the first parameter, which is read back; every thread adds 1.
    count = """
        ld.param.b64 %rd3, [p0]; mad.wide.u32 %rd4, b, 4, %rd3; atom.global.add.u32 %r1, [%rd4], 1; bar.sync 0;
        ld.global.b32 d, [%rd4];"""
    counted = execute(count, [np.zeros(128, np.uint32), slots])
    assert np.array_equal(counted, np.bincount(slots)[slots].astype(np.uint32))


# What is refused

ZEROS = np.zeros(64, np.uint32)


@pytest.mark.parametrize(
    "body, complaint",
    [
        ("frobnicate.b32 d, a;", "frobnicate.b32 d , a: this instruction is not emulated"),
        ("add.rz.f32 d, a, a;", "modifier .rz is not emulated"),
        ("mov.b32 d, %clock;", "'%clock' is not emulated"),
        ("ld.global.b32 d, [%rd1+512];", "is in no buffer"),
        ("ld.global.b32 d, [%rd1+2];", "no multiple of 4"),
        ("ld.shared.b32 d, [buffer+2048];", "shared address 0xc00 is outside"),
        ("mov.b32 d, %r9;", "%r9 is read before it is written"),
        ("setp.eq.u32 %p1, %r0, 3; @%p1 bra L; L: mov.b32 d, 0;", "divergent branch"),
        ("setp.eq.u32 %p1, %r0, 3; @%p1 ret; mov.b32 d, 0;", "divergent end"),
        ("setp.lt.u32 %p1, %r0, 32; @%p1 bra L; bar.sync 0; L: mov.b32 d, 0;", "deadlock"),
        ("bar.sync 1, 32; mov.b32 d, 0;", "64 threads arrive at barrier 1, which waits for 32"),
        (
            "mov.b32 %r1, 1024; mbarrier.arrive.shared.b64 _, [%r1]; mov.b32 d, 0;",
            "no mbarrier was initialized at 0x400",
        ),
        ("bra NOWHERE; mov.b32 d, 0;", "label NOWHERE is nowhere"),
        ("div.u32 d, a, a;", "integer division by zero"),
        ("setp.lt.u32 %p1, %r0, 5; @%p1 shfl.sync.idx.b32 d, a, 0, 31, -1;", "not all threads of the warp take part"),
        ("L: bra L; mov.b32 d, 0;", "still running"),
        ("trap; mov.b32 d, 0;", "the kernel trapped"),
    ],
)
def test_what_no_gpu_does_or_we_do_not_know_is_refused(body, complaint, monkeypatch):
    from ptx.machine import Machine

    monkeypatch.setattr(Machine.run, "__defaults__", (2000,))
    with pytest.raises(PtxError, match=re.escape(complaint)):
        execute(body, [ZEROS])
