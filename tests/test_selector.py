"""What runs where, and why: the selector's table, and the cut of a product into blocks."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import selector, tiles
from pallas_kernels.operand import Operand
from pallas_kernels.selector import Choice, Facts
from pallas_kernels.weights import ByteWeights, vq_shapes
from vq4dit_jax.networks.dit import DIT_VARIANTS

DEVICES = {
    "cpu": Facts("cpu"),
    "tpu": Facts("tpu", "TPU v5 lite"),
    "t4": Facts("gpu", "Tesla T4", (7, 5), 40, True),
    "a100": Facts("gpu", "NVIDIA A100", (8, 0), 108, True),
    "h100": Facts("gpu", "NVIDIA H100 80GB HBM3", (9, 0), 132, True),
    "h200": selector.H200,
    "b200": Facts("gpu", "NVIDIA B200", (10, 0), 148, True),
    "amd": Facts("gpu", "AMD Instinct MI300X", None, 304),
}
HOPPER = ("h100", "h200")
NOT_HOPPER = {
    "cpu": "cpu: the kernels are for NVIDIA Hopper",
    "tpu": "tpu: the kernels are for NVIDIA Hopper",
    "t4": "compute capability 7.5: the kernels use wgmma and the copy engine of 9.0 (Hopper)",
    "a100": "compute capability 8.0: the kernels use wgmma and the copy engine of 9.0 (Hopper)",
    "b200": "compute capability 10.0: the kernels use wgmma and the copy engine of 9.0 (Hopper)",
    "amd": "AMD Instinct MI300X: no compute capability known (not an NVIDIA GPU)",
}


def vq(rows=1152, columns=1152, length=4, codewords=256, groups=1, dtype=jnp.bfloat16):
    return vq_shapes(1, rows, columns, groups, codewords, length, dtype)


def int8(rows, columns):
    return ByteWeights(jax.ShapeDtypeStruct((1, rows, columns), jnp.int8), columns)


@pytest.mark.parametrize("device", NOT_HOPPER)
def test_elsewhere_than_on_hopper_xla_runs_everything_and_the_reason_says_what_the_device_is(device):
    facts, reason = DEVICES[device], NOT_HOPPER[device]
    choices = [selector.norm(facts, 1152, 256, jnp.bfloat16), selector.soft_weights(facts, 256, 4, 2)]
    assert choices == 2 * [Choice("xla", reason)]
    for weights in (vq(), vq(dtype=jnp.float8_e4m3fn), int8(1152, 1152)):
        choice = selector.product(facts, weights, 4096)
        assert choice.implementation == "xla" and choice.reason.startswith(f"{reason}; XLA gets operands in ")


@pytest.mark.parametrize("device, bfloat16, e4m3", [
    ("cpu", "bfloat16", "float8_e4m3fn"),
    ("tpu", "bfloat16", "float8_e4m3fn"),
    ("t4", "float32", "float16"),
    ("a100", "bfloat16", "float16"),
    ("b200", "bfloat16", "float8_e4m3fn"),
    ("amd", "bfloat16", "float8_e4m3fn"),
])  # fmt: skip
def test_xla_gets_operands_that_the_device_multiplies_and_a_wider_dtype_is_said_with_its_reason(device, bfloat16, e4m3):
    facts = dataclasses.replace(DEVICES[device], cudnn=False)
    for choice, own, operands in (
        (selector.product(facts, vq(), 4096), "bfloat16", bfloat16),
        (selector.product(facts, vq(dtype=jnp.float8_e4m3fn), 4096), "float8_e4m3fn", e4m3),
        (selector.product(facts, vq(dtype=jnp.int8), 4096), "int8", "int8"),
        (selector.product(facts, int8(1152, 1152), 4096), "int8", "int8"),
        (selector.attention(facts, 72, jnp.bfloat16), "bfloat16", bfloat16),
        (selector.attention(facts, 72, jnp.float16), "float16", "float16"),
        (selector.attention(facts, 72, jnp.float32), "float32", "float32"),
        (selector.fused_attention(facts, 72, 16, 256), "bfloat16", bfloat16),
    ):
        assert (choice.implementation, choice.operands) == ("xla", jnp.dtype(operands))
        wider = f": {own} has products from compute capability {'8.0' if own == 'bfloat16' else '8.9'} on"
        assert choice.reason.endswith(f"; XLA gets operands in {operands}{'' if own == operands else wider}")


@pytest.mark.parametrize("device", HOPPER)
def test_on_hopper_our_kernels_run_and_the_reason_names_the_device(device):
    facts = DEVICES[device]
    for weights, name in (
        (vq(), "bfloat16"),
        (vq(dtype=jnp.float8_e4m3fn), "float8_e4m3fn"),
        (int8(1152, 1152), "int8"),
    ):
        choice = selector.product(facts, weights, 4096)
        assert choice.implementation == "mosaic" and choice.tile is not None
        assert choice.reason == f"{facts.name}: {name} operands, {choice.tile}"
    for choice in (selector.norm(facts, 1152, 256, jnp.bfloat16), selector.soft_weights(facts, 256, 4, 2)):
        assert choice.implementation == "mosaic" and choice.reason.startswith(f"{facts.name}: ")


def test_what_no_kernel_takes_goes_to_xla_and_the_reason_names_it():
    hopper = selector.H200
    reasons = {
        "float32 (256 tokens, D=1152): wanted bfloat16, D % 64 == 0": selector.norm(hopper, 1152, 256, jnp.float32),
        "bfloat16 (256 tokens, D=96): wanted bfloat16, D % 64 == 0": selector.norm(hopper, 96, 256, jnp.bfloat16),
        "K=512, d=4, n=2: wanted K to 256, d of 2, 4 or 8, n to 4": selector.soft_weights(hopper, 512, 4, 2),
        "K=256, d=16, n=2: wanted K to 256, d of 2, 4 or 8, n to 4": selector.soft_weights(hopper, 256, 16, 2),
        "K=256, d=4, n=5: wanted K to 256, d of 2, 4 or 8, n to 4": selector.soft_weights(hopper, 256, 4, 5),
    }
    for reason, choice in reasons.items():
        assert choice == Choice("xla", reason)
    products = {
        "96 rows share a codebook: a kernel's tile has 64": selector.product(hopper, vq(192, 128, groups=2), 64),
        "no tile fits: M=100, O=1152, I=1152, T=50": selector.product(hopper, vq(), 100, image_tokens=50),
    }
    for reason, choice in products.items():
        assert choice == Choice("xla", f"{reason}; XLA gets operands in bfloat16", operands=jnp.dtype(jnp.bfloat16))


@pytest.mark.parametrize(
    "width, group", [(1152, 16), (1152, 64), (1152, 144), (1152, 576), (768, 256), (4608, 576), (64, 64)]
)
def test_rotations_that_a_warp_has_run_in_the_kernels_and_the_reason_names_the_group(width, group):
    operand, where = Operand(rotation=group), f"rotated in groups of {group}"
    found = [selector.rows(selector.H200, (64, width), jnp.bfloat16, operand)]
    if width <= 3072:
        found.append(selector.norm(selector.H200, width, 16, jnp.bfloat16, operand))
    for choice in found:
        assert choice == Choice("mosaic", f"NVIDIA H200: one pass, a token a warp, {where}")
    for device, reason in NOT_HOPPER.items():
        assert selector.rows(DEVICES[device], (64, width), jnp.bfloat16, operand) == Choice("xla", reason)


def test_operands_that_no_kernel_takes_go_to_xla_and_the_reason_names_them():
    hopper, bf16 = selector.H200, jnp.bfloat16
    vectors, rotated = Operand(scale=jnp.ones((1, 1152)), rotation=64), Operand(rotation=64)
    assert selector.norm(hopper, 1152, 256, bf16, vectors) == Choice(
        "xla", "the Linear's operand is scaled or centred: `networks.fold` puts that into what comes before"
    )
    for width, group in ((1152, 256), (768, 576), (1152, 36)):
        reason = selector.rows(hopper, (64, width), bf16, Operand(rotation=group)).reason
        assert reason.startswith(f"rotation in groups of {group}, D={width}: the kernels have groups of")
        assert selector.norm(hopper, width, 256, bf16, Operand(rotation=group)) == Choice("xla", reason)
    assert selector.rows(hopper, (64, 1152), bf16, vectors) == selector.norm(hopper, 1152, 256, bf16, vectors)
    assert selector.rows(hopper, (64, 1152), bf16) == Choice("mosaic", "NVIDIA H200: one pass, a token a warp")
    wanted = "wanted bfloat16, 4 rows or more, D % 64 == 0, D up to 4608"
    for shape, dtype, operand, what in (
        ((64, 96), bf16, Operand(rotation=16), "bfloat16 (M=64, D=96)"),
        ((64, 1152), jnp.float32, rotated, "float32 (M=64, D=1152)"),
        ((3, 1152), bf16, rotated, "bfloat16 (M=3, D=1152)"),
        ((64, 9216), bf16, rotated, "bfloat16 (M=64, D=9216)"),
    ):
        assert selector.rows(hopper, shape, dtype, operand) == Choice("xla", f"{what}: {wanted}")


def test_attention_is_cudnns_where_it_can_be():
    cudnn = {name: selector.attention(facts, 72, jnp.bfloat16) for name, facts in DEVICES.items()}
    assert {name for name, choice in cudnn.items() if choice.implementation == "cudnn"} == {"a100", "h100", "b200"}
    needs = "cuDNN's attention needs compute capability 8.0"
    assert cudnn["t4"].reason.startswith(f"Tesla T4, compute capability 7.5: {needs}; XLA gets operands in float32: ")
    assert cudnn["cpu"].reason == f"cpu: {needs}; XLA gets operands in bfloat16"
    assert cudnn["h200"].reason.startswith("no cuDNN (pip install")
    for head_size, dtype, fact in (
        (72, jnp.float32, "float32"),
        (130, jnp.bfloat16, "130"),
        (136, jnp.bfloat16, "136"),
    ):
        choice = selector.attention(DEVICES["h100"], head_size, dtype)
        assert choice.implementation == "xla" and fact in choice.reason


def test_facts_are_those_of_the_device_unless_others_are_assumed():
    assert selector.facts() == Facts("cpu")
    with selector.assume(DEVICES["t4"]):
        assert selector.facts() == DEVICES["t4"]
        with selector.assume(selector.H200):
            assert selector.facts() == selector.H200
        assert selector.facts() == DEVICES["t4"]
    assert selector.facts() == Facts("cpu")
    assert str(DEVICES["t4"]) == "Tesla T4, compute capability 7.5" and str(DEVICES["cpu"]) == "cpu"


@pytest.mark.parametrize(
    "device, facts",
    [
        (dict(platform="tpu", device_kind="TPU v4"), Facts("tpu")),
        (dict(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0", core_count=132), (9, 0)),
        (dict(platform="gpu", device_kind="NVIDIA B200", compute_capability="10.0", core_count=148), (10, 0)),
        (dict(platform="gpu", device_kind="AMD Instinct MI300X", compute_capability="gfx942", core_count=304), None),
    ],
)
def test_facts_are_read_from_jaxs_device(monkeypatch, device, facts):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(**device)])
    found = selector._facts_of_device.__wrapped__()
    if isinstance(facts, Facts):
        assert found == facts
    else:
        cores = device["core_count"]
        assert (found.name, found.capability, found.multiprocessors) == (device["device_kind"], facts, cores)


# (O, I, groups) of every product of every size of DiT; the modulation of all layers is one product.
SHAPES = [
    shape
    for depth, width in sorted({(v["depth"], v["hidden_size"]) for v in DIT_VARIANTS.values()})
    for shape in (
        (3 * width, width, 3),
        (width, width, 1),
        (4 * width, width, 1),
        (width, 4 * width, 1),
        (6 * depth * width, width, depth),
    )
]


@settings(max_examples=150)
@given(
    st.sampled_from(SHAPES),
    st.one_of(st.integers(1, 20000), st.sampled_from([2, 16, 64, 512, 2048, 4096, 16384])),
    st.sampled_from([0, 64, 256, 1024]),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([64, 256]),
    st.sampled_from([jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn]),
    st.booleans(),
    st.booleans(),
)
def test_the_tile_of_a_dits_product_divides_it_and_fits(
    shape, tokens, image_tokens, length, codewords, dtype, small, may_split
):
    rows, columns, groups = shape
    weights = vq(rows, columns, length, codewords, groups, dtype)
    result_bytes = 1 if small else 2
    choice = selector.product(
        selector.H200,
        weights,
        tokens,
        result_bytes=result_bytes,
        image_tokens=image_tokens,
        may_split=may_split,
    )
    tile = choice.tile
    assert choice.implementation == "mosaic"
    assert rows // groups % tile.rows == 0
    assert columns % (weights.order.columns * tile.splits) == 0
    assert image_tokens % tile.tokens == 0
    assert may_split or tile.splits == 1
    # A pipeline of fewer steps than stages would wait for stages that nobody fills.
    assert tile.stages <= max(3, columns // weights.order.columns // tile.splits)
    result = 4 if tile.splits > 1 else result_bytes
    assert tiles.shared_bytes(tile, weights.stream_bytes, weights.table_bytes, result) <= 227 * 1024


@settings(max_examples=50)
@given(st.sampled_from(SHAPES), st.integers(1, 20000), st.sampled_from([0, 64, 256, 1024]))
def test_the_tile_of_a_product_of_bytes_divides_it_and_fits(shape, tokens, image_tokens):
    rows, columns, _ = shape
    tile = selector.product(selector.H200, int8(rows, columns), tokens, image_tokens=image_tokens).tile
    assert rows % tile.rows == 0 and columns % (128 * tile.splits) == 0 and image_tokens % tile.tokens == 0
    assert tile.rows <= 256  # elements of a dimension that the copy engine takes at once
    result = 4 if tile.splits > 1 else 2
    assert tiles.shared_bytes(tile, 64 * 128, 0, result) <= 227 * 1024


def test_few_tokens_have_small_tiles_many_have_large_ones_and_few_tiles_are_split():
    tile = lambda tokens, weights: selector.product(selector.H200, weights, tokens).tile
    assert tile(2, vq()).tokens == 16
    assert tile(16384, vq(4608)).tokens >= 128 and tile(16384, vq(4608)).splits == 1
    # 36 tiles of 128 x 128 for 132 multiprocessors.
    assert tile(512, vq(1152, 4608)).splits > 1 or tile(512, vq(1152, 4608)).tokens < 128
