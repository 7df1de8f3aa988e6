"""Fragment order: a bijection of the right size, and the register layout of the PTX ISA, which is written out here again."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import fragments, nibbles
from pallas_kernels.fragments import FragmentOrder
from pallas_kernels.weights import ByteWeights, NibbleWeights, pair_rows, unpair_rows, vq_shapes, vq_weights

# As a program of its own each compiles in a tenth of the time that its operations take one by one.
unpack = jax.jit(fragments.unpack, static_argnums=1)
unpack_nibbles = jax.jit(nibbles.unpack, static_argnums=1)
decode = jax.jit(fragments.decode, static_argnums=2)
codebook_of = jax.jit(fragments.codebook_of, static_argnums=(1, 2))
codebook_words = jax.jit(fragments.codebook_words, static_argnums=(1, 2))
dense = jax.jit(lambda weights, layer: weights.dense(layer))

ORDERS = [
    FragmentOrder(itemsize, length, bits, paired)
    for itemsize in (1, 2)
    for length in (2, 4, 8)
    for bits in (6, 8)
    for paired in (False, True)
]
name_of = lambda order: f"{8 * order.itemsize}-bit-d{order.length}-{order.bits}bits" + "-paired" * order.paired_rows
every_order = pytest.mark.parametrize("order", ORDERS, ids=name_of)


@st.composite
def packed_codes(draw):
    """(order, codes of a small matrix or stack of them)."""
    order = draw(st.sampled_from(ORDERS))
    stack = draw(st.sampled_from([(), (2,), (2, 3)]))
    rows = 64 * draw(st.integers(1, 3))
    columns = order.columns * draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return order, rng.integers(0, 2**order.bits, (*stack, rows, columns // order.length)).astype(np.uint8)


@settings(max_examples=25)
@given(packed_codes())
def test_packing_is_a_bijection_and_spends_exactly_the_bits_of_a_code(case):
    order, codes = case
    words = fragments.pack(codes, order)
    assert words.dtype == np.int32 and 32 * words.size == order.bits * codes.size
    rows = unpack(jnp.asarray(words), order)
    np.testing.assert_array_equal(np.asarray(rows).reshape(codes.shape), codes)


@every_order
def test_every_word_is_the_packing_of_some_codes(order):
    words = np.random.default_rng(0).integers(-(2**31), 2**31, (3, 2 * order.lines, 32)).astype(np.int32)
    codes = np.asarray(unpack(jnp.asarray(words), order)).reshape(3 * 64, -1)
    assert codes.min() == 0 and codes.max() == 2**order.bits - 1
    np.testing.assert_array_equal(fragments.pack(codes, order), words)


@settings(max_examples=12)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from([(), (2,), (3, 2)]), st.integers(1, 3), st.integers(1, 3), st.booleans()
)
def test_packing_of_nibbles_is_a_bijection_in_4_bits(seed, stack, tiles, steps, paired):
    values = np.random.default_rng(seed).integers(-8, 8, (*stack, 64 * tiles, 128 * steps)).astype(np.int8)
    words = nibbles.pack(values, paired)
    assert words.dtype == np.int32 and 32 * words.size == 4 * values.size
    np.testing.assert_array_equal(np.asarray(unpack_nibbles(jnp.asarray(words), paired)).reshape(values.shape), values)


@pytest.mark.parametrize("shape", [(1, 16), (2, 64), (3, 128, 5), (2, 32, 2, 3)])
def test_pairing_of_rows_is_undone(shape):
    rows = np.arange(np.prod(shape)).reshape(shape)
    paired = pair_rows(rows)
    np.testing.assert_array_equal(unpair_rows(paired), rows)
    np.testing.assert_array_equal(pair_rows(unpair_rows(rows)), rows)
    # Row 8rr + q is row 2q + rr of each 16.
    np.testing.assert_array_equal(paired[:, :16], rows[:, [2 * q + rr for rr in range(2) for q in range(8)]])


DTYPES = {2: (ml_dtypes.bfloat16,), 1: (np.int8, ml_dtypes.float8_e4m3fn)}


def random_codebook(rng, dtype, *shape):
    numbers = rng.integers(-127, 128, shape) if dtype is np.int8 else rng.standard_normal(shape)
    return numbers.astype(dtype)


@settings(max_examples=15)
@given(
    st.sampled_from(ORDERS),
    st.integers(0, 2**32 - 1),
    st.sampled_from([(), (2,), (2, 3)]),
    st.sampled_from([1, 16, 64, 100, 256]),
    st.sampled_from([1, 2, 8, 32]),
    st.data(),
)
def test_a_codebook_comes_back_from_its_words_and_every_replica_holds_it(order, seed, stack, codewords, replicas, data):
    codewords = min(codewords, 2**order.bits)
    dtype = data.draw(st.sampled_from(DTYPES[order.itemsize]))
    codebook = random_codebook(np.random.default_rng(seed), dtype, *stack, codewords, order.length)
    words = codebook_words(jnp.asarray(codebook), order, replicas)
    back = np.asarray(codebook_of(words, order, dtype))
    np.testing.assert_array_equal(back[..., :codewords, :], codebook)
    assert not back[..., codewords:, :].astype(np.float32).any()
    copies = np.asarray(words).reshape(*stack, 2**order.bits, replicas, order.codebook_words)
    assert (copies == copies[..., :1, :]).all()
    # What the kernel reads: little-endian operands, and the codeword twice where it is shorter than a word.
    repeats = 4 * order.codebook_words // (order.length * order.itemsize)
    np.testing.assert_array_equal(
        copies[..., :codewords, 0, :], np.ascontiguousarray(np.tile(codebook, repeats)).view("<i4")
    )


# The theorem: what a lane decodes is what the matrix unit expects of it.


def isa_fragment(itemsize):
    """(row, column) in W of element i of lane t for the four wgmma of a step, (128 lanes, 4, elements) each.

    PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16" and ".m64nNk32", matrix A: warp w has rows 16w to 16w + 15,
    and in it, with groupID = lane >> 2 and threadID_in_group = lane % 4, 16-bit elements a0 to a7 stand at

        row = groupID      for a_i, 0 <= i < 2 or 4 <= i < 6     col = 2 threadID_in_group + (i & 1)      for i < 4
              groupID + 8  otherwise                                   2 threadID_in_group + (i & 1) + 8  otherwise

    and 8-bit elements a0 to a15 at

        row = groupID      for a_i, 0 <= i < 4 or 8 <= i < 12    col = 4 threadID_in_group + (i & 3)      for i < 8
              groupID + 8  otherwise                                   4 threadID_in_group + (i & 3) + 16 otherwise
    """
    row, column = (np.zeros((128, 4, 16 // itemsize), int) for _ in range(2))
    for thread, mma, i in np.ndindex(row.shape):
        warp, lane = divmod(thread, 32)
        group_id, thread_in_group = lane >> 2, lane % 4
        if itemsize == 2:
            first = 0 <= i < 2 or 4 <= i < 6
            at = 2 * thread_in_group + (i & 1) + (0 if i < 4 else 8)
        else:
            first = 0 <= i < 4 or 8 <= i < 12
            at = 4 * thread_in_group + (i & 3) + (0 if i < 8 else 16)
        row[thread, mma, i] = 16 * warp + (group_id if first else group_id + 8)
        column[thread, mma, i] = 32 // itemsize * mma + at
    return row, column


def as_mma_operands(registers, dtype):
    """Registers (128, 16, 4 bytes) of a step, rr after rr, as elements (128 lanes, 4 wgmma, those of its four registers)."""
    # Of register (rr, j), j counts 16 bytes of a row; a wgmma takes two j, and of each first rr = 0, then rr = 1.
    ordered = registers.reshape(128, 2, 4, 2, 4).transpose(0, 2, 3, 1, 4).reshape(128, 4, 16)
    return np.ascontiguousarray(ordered).view(dtype)


def lane_codes(words, order):
    """The codes that each lane reads, (128 lanes, codes), from the words (lines, 32) of one tile and step."""
    flat = [int(word) for word in words.reshape(-1).view(np.uint32)]

    def code(group, number):
        if order.bits == 8:  # a group's words side by side, little-endian
            return flat[group * order.words + number // 4] >> 8 * (number % 4) & 255
        # Word by word, all groups: three words hold 16 codes, the last one in their top two bits.
        three = [flat[(number // 16 * 3 + i) * order.groups + group] for i in range(3)]
        number %= 16
        if number == 15:
            return sum((word >> 30) << 2 * i for i, word in enumerate(three))
        return three[number // 5] >> 6 * (number % 5) & 63

    return np.array([[code(lane // order.sharing, n) for n in range(order.codes)] for lane in range(128)])


def lane_registers(words, codebook, order):
    """The bytes of each lane's registers, (128 lanes, 16, 4): whole codewords, or the lane's part of one."""
    codewords = codebook[lane_codes(words, order)].view(np.uint8)  # lane, code, bytes
    if order.sharing == 1:
        return codewords.reshape(128, 16, 4)
    parts = codewords.reshape(128, 16, order.sharing, 4)
    return np.stack([parts[lane, :, lane % order.sharing] for lane in range(128)])


def in_register_order(w, paired):
    """Rows of W (64, columns) as the registers have them: paired, row 8rr + q of a warp is row 2q + rr of W."""
    return pair_rows(w[None])[0] if paired else w


@every_order
def test_decoded_registers_are_the_matrix_units_fragment_of_w(order):
    rng = np.random.default_rng(1)
    dtype = DTYPES[order.itemsize][0]
    codes = rng.integers(0, 2**order.bits, (2, 64, 2 * order.columns // order.length)).astype(np.uint8)
    codebook = random_codebook(rng, dtype, 2**order.bits, order.length)
    words = fragments.pack(codes.reshape(128, -1), order).reshape(2, 2, order.lines, 32)
    for tile, step in np.ndindex(2, 2):
        w = codebook[codes[tile]].reshape(64, 2, order.columns)[:, step]
        held = as_mma_operands(lane_registers(words[tile, step], codebook, order), dtype)
        np.testing.assert_array_equal(held, in_register_order(w, order.paired_rows)[isa_fragment(order.itemsize)])


@pytest.mark.parametrize("paired", [False, True])
def test_nibbles_by_shift_and_mask_are_16_times_the_matrix_units_fragment_of_w(paired):
    values = np.random.default_rng(2).integers(-8, 8, (64, 256)).astype(np.int8)
    words = nibbles.pack(values, paired).reshape(2, 128, 8)  # step, lane, word
    for step in range(2):
        bytes_ = np.stack([words[step] << 4, words[step]], axis=-1).view(np.uint8) & 0xF0  # register 2i, then 2i + 1
        held = as_mma_operands(bytes_.reshape(128, 16, 4), np.int8)
        w = in_register_order(values[:, 128 * step : 128 * (step + 1)], paired)
        np.testing.assert_array_equal(held.astype(int), 16 * w.astype(int)[isa_fragment(1)])


@every_order
def test_decode_gives_the_rows_as_the_registers_have_them(order):
    rng = np.random.default_rng(3)
    dtype = DTYPES[order.itemsize][0]
    codes = rng.integers(0, 2**order.bits, (64, 3 * order.columns // order.length)).astype(np.uint8)
    codebook = random_codebook(rng, dtype, 2**order.bits, order.length)
    got = decode(jnp.asarray(fragments.pack(codes, order)[0]), jnp.asarray(codebook), order)
    np.testing.assert_array_equal(got, in_register_order(codebook[codes].reshape(64, -1), order.paired_rows))


# Stacks of weights give back, densely, what was packed.


@settings(max_examples=15)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([8, 200, 256]),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([1, 5, 64, 65, 256]),
    st.sampled_from([(1, 1), (2, 3)]),
    st.sampled_from([dtype for dtypes in DTYPES.values() for dtype in dtypes]),
    st.booleans(),
)
def test_vq_weights_give_back_what_was_packed(seed, columns, length, codewords, layers_and_groups, dtype, paired):
    rng, (layers, groups) = np.random.default_rng(seed), layers_and_groups
    codes = rng.integers(0, codewords, (layers, 192, columns // length)).astype(np.uint8)
    codebooks = random_codebook(rng, dtype, layers, groups, codewords, length)
    weights = vq_weights(codes, jnp.asarray(codebooks), paired_rows=paired)
    assert (weights.layers, weights.rows, weights.columns, weights.groups) == (layers, 192, columns, groups)
    bits = 6 if codewords <= 64 else 8
    assert weights.steps == -(-columns * codebooks.itemsize // 128)
    assert 8 * weights.assignments.nbytes == bits * layers * 192 * weights.steps * weights.order.columns // length
    assert weights.assignments.nbytes == weights.stream_bytes * layers * 3 * weights.steps
    assert weights.codebooks.nbytes == weights.table_bytes * layers * groups <= 16384 * layers * groups
    shapes = vq_shapes(layers, 192, columns, groups, codewords, length, dtype, paired)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), weights) == jax.tree.map(lambda a: (a.shape, a.dtype), shapes)
    for layer in range(layers):
        by_row = np.repeat(codebooks[layer], 192 // groups, axis=0)  # row, codeword, entry
        wanted = by_row[np.arange(192)[:, None], codes[layer]].reshape(192, columns)
        np.testing.assert_array_equal(dense(weights, jnp.int32(layer)), wanted)


@pytest.mark.parametrize("paired", [False, True])
def test_integer_weights_give_back_what_was_packed(paired):
    rng = np.random.default_rng(4)
    packed = pair_rows if paired else lambda rows: rows
    for dtype in DTYPES[1]:
        w = random_codebook(rng, dtype, 2, 128, 256)
        stack = ByteWeights(jnp.asarray(packed(w)), 256, paired)
        assert (stack.layers, stack.rows, stack.columns) == w.shape
        np.testing.assert_array_equal(dense(stack, jnp.int32(1)), w[1])
    w = rng.integers(-8, 8, (2, 128, 256)).astype(np.int8)
    scales = rng.random((2, 128, 2)).astype(np.float32)  # layer, row, group of columns
    stack = NibbleWeights(
        jnp.asarray(nibbles.pack(w, paired)), jnp.asarray(packed(scales).swapaxes(1, 2)), 256, paired_rows=paired
    )
    assert (stack.layers, stack.rows, stack.columns) == w.shape
    for layer in range(2):
        values, by_group = dense(stack, jnp.int32(layer))
        np.testing.assert_array_equal(values, w[layer])
        np.testing.assert_array_equal(by_group, scales[layer].T)


def test_what_has_no_fragment_order_is_refused():
    for length, codewords in ((3, 256), (16, 256), (4, 257), (4, 0)):
        with pytest.raises(ValueError, match=f"d={length}, K={codewords}: kernels want d of 2, 4 or 8 and K of 256"):
            fragments.order_for(2, length, codewords)
    order = fragments.order_for(2, 4, 256)
    for rows, subvectors in ((96, 16), (64, 17)):
        with pytest.raises(ValueError, match=r"wanted multiples of \(64, 64\)"):
            fragments.pack(np.zeros((rows, subvectors), np.uint8), order)
    with pytest.raises(ValueError, match=r"W is \(64, 192\); wanted multiples of \(64, 128\)"):
        nibbles.pack(np.zeros((64, 192), np.int8))
    assert fragments.order_for(1, 4, 64).bits == 6 and fragments.order_for(1, 4, 65).bits == 8
