"""The bytes of DiT-XL/2's forms, against sums written out by hand."""

import pytest
from conftest import ROOT

from benchmarks import bytes_xl2

# (inputs, outputs) of the quantized Linears of a block; 28 blocks.
LINEARS = ((1152, 3 * 1152), (1152, 1152), (1152, 4608), (4608, 1152), (1152, 6 * 1152))
WEIGHTS = 28 * sum(i * o for i, o in LINEARS)


@pytest.mark.parametrize(("name", "bits", "group"), [("xl2_256_w8a8", 8, None), ("xl2_256_w4a8", 4, 128)])
def test_integers_take_their_codes_float16_scales_and_two_float16_vectors_for_the_operand(name, bits, group):
    found, budget = bytes_xl2.counted(name)
    scales = lambda i, o: o if group is None else o * (i // group)
    assert budget is None and found.quantized_parameters == WEIGHTS
    assert found.assignment_bytes == WEIGHTS * bits // 8
    assert found.codebook_bytes == 28 * sum(2 * scales(i, o) + 2 * 2 * i for i, o in LINEARS)


def test_two_bits_take_a_byte_for_four_weights_and_their_codebooks():
    found, budget = bytes_xl2.counted("xl2_256_w2")
    assert found.assignment_bytes == WEIGHTS // 4
    codebook = 256 * 4 * 4  # float32; qkv has three, for q, k and v
    assert found.codebook_bytes == 28 * (3 + 4) * codebook
    assert budget == pytest.approx(2 * 1.005)


def test_all_else_has_a_fixed_size_and_the_page_has_the_table():
    kept = {rest for _, _, _, rest in bytes_xl2.rows()[1:]}
    # 674,834,720 parameters and the table of positions, without the weights of the blocks, in float32.
    assert kept == {4 * (674_834_720 + 256 * 1152 - WEIGHTS)}
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert bytes_xl2.table() in page, "make it anew: python -m benchmarks.bytes_xl2"
