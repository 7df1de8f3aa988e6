"""The baselines: against textbook loops in float64, against qwix, and by what must hold of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny

from vq4dit_jax import methods
from vq4dit_jax.codebook.kmeans import kmeans as run_kmeans
from vq4dit_jax.codebook.kmeans import nearest_codewords
from vq4dit_jax.errors import InputError
from vq4dit_jax.integer import grids as uniform
from vq4dit_jax.integer.gptq import inverse_factor, quantize_weight, round_columns
from vq4dit_jax.methods import dkm
from vq4dit_jax.methods.kmeans import quantize
from vq4dit_jax.methods.vq4dit import CODEBOOKS_ONLY, passes
from vq4dit_jax.networks.conditioning import ClassLabels
from vq4dit_jax.networks.network import Network
from vq4dit_jax.networks.rules import dit_rules
from vq4dit_jax.qarray.linear import linear
from vq4dit_jax.qarray.rules import KEEP, abstract_quantized
from vq4dit_jax.qarray.spec import VQSpec
from vq4dit_jax.qarray.tree import dequantize, random_params, sizes
from vq4dit_jax.qarray.vq import VQArray

GRIDS = [(2, None, "asymmetric"), (3, 16, "centred"), (4, 24, "symmetric")]


def _weight(rows=12, columns=40, seed=0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (rows, columns)) + 0.1


def _moments(columns=40, seed=1) -> np.ndarray:
    """Of correlated inputs with a mean, as those of a network are."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * columns, 8)) @ rng.standard_normal((8, columns))
    x = x + 0.3 * rng.standard_normal(x.shape) + rng.standard_normal(columns)
    return x.T @ x / len(x)


def _gptq(weight, moments, bits, group, *others) -> jax.Array:
    """The weight that GPTQ's codes stand for."""
    return uniform.decode(*quantize_weight(weight, moments, bits, group, *others), group)


def _error(weight, rounded, moments) -> np.ndarray:
    """Of each row, (w - q) H (w - q)^T."""
    difference = np.asarray(weight, np.float64) - np.asarray(rounded, np.float64)
    return np.einsum("oi,ij,oj->o", difference, moments, difference)


# Round to nearest -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group", "kind"), GRIDS)
def test_round_to_nearest_takes_the_nearest_level_of_every_groups_grid(bits, group, kind):
    """40 inputs in groups of 16 and 24 leave a shorter last group."""
    weight = np.asarray(_weight())
    grid = uniform.fit_grid(weight, bits, group, kind, (1.0,))
    found = np.asarray(uniform.round_to_nearest(weight, grid, bits, group))
    size = group or 40
    for row in range(12):
        for g, start in enumerate(range(0, 40, size)):
            cell = weight[row, start : start + size].astype(np.float64)
            if kind == "asymmetric":
                low, high = min(cell.min(), 0), max(cell.max(), 0)
                scale = float(np.float16((high - low) / (2**bits - 1)))
                levels = scale * (np.arange(2**bits) - round(-low / scale))
            else:
                shift = 0.5 if kind == "symmetric" else 0.0
                scale = float(np.float16(np.abs(cell).max() / (2 ** (bits - 1) - shift)))
                levels = scale * (np.arange(2**bits) - 2 ** (bits - 1) + 0.5 - shift)
            assert grid.scale[row, g] == pytest.approx(scale, rel=2e-3)  # float16 may round to either side
            nearest = np.abs(cell[:, None] - levels).min(1)
            mine = np.abs(cell - found[row, start : start + size])
            np.testing.assert_allclose(mine, nearest, atol=3 * 2**bits * 1e-3 * scale)
            assert len(np.unique(found[row, start : start + size])) <= 2**bits


def test_a_clip_search_lowers_the_error_that_it_is_asked_to():
    weight, importance = _weight(), jnp.linspace(0.1, 3, 40)
    for counts in (None, importance):
        weights = np.ones(40) if counts is None else np.asarray(counts)
        errors = []
        for shares in ((1.0,), uniform.SHARES):
            grid = uniform.fit_grid(weight, 2, 16, "asymmetric", shares, counts)
            difference = np.asarray(weight - uniform.round_to_nearest(weight, grid, 2, 16))
            errors.append((weights * np.square(difference)).sum(1))
        assert (errors[1] <= errors[0] * (1 + 1e-5)).all() and errors[1].sum() < 0.8 * errors[0].sum()


def test_rows_of_zeros_stay_so():
    weight = _weight().at[3].set(0).at[5, :16].set(0)
    for kind in uniform.KINDS:
        grid = uniform.fit_grid(weight, 2, 16, kind)
        found = np.asarray(uniform.round_to_nearest(weight, grid, 2, 16))
        assert (found[3] == 0).all() and (found[5, :16] == 0).all() and np.isfinite(found).all()
        assert np.isfinite(np.asarray(_gptq(weight, _moments(), 2, 16, kind))).all()


def test_bytes_count_codes_scales_and_zero_points():
    assert uniform.stored_bytes((6, 64), 2, None, "symmetric") == (6 * 16, 6 * 2)
    assert uniform.stored_bytes((6, 192), 4, 128, "asymmetric") == (6 * 96, 12 * 2 + 6)  # the last group has 64
    assert uniform.stored_bytes((6, 192), 3, 64, "centred") == (6 * 72, 18 * 2)


# GPTQ -------------------------------------------------------------------------------------------------------------


def _textbook(weight, moments, grid, bits, dampening=0.01):
    """Algorithm 1 of the paper, column by column, with an explicit inverse that shrinks by elimination (eq 3)."""
    w, h = np.array(weight, np.float64), np.array(moments, np.float64)
    inverse = np.linalg.inv(h + dampening * np.diag(h).mean() * np.eye(len(h)))
    q = np.zeros_like(w)
    for j in range(w.shape[1]):
        s, z = np.asarray(grid.scale[:, j], np.float64), np.asarray(grid.zero[:, j], np.float64)
        q[:, j] = s * (np.clip(np.round(w[:, j] / s + z), 0, 2**bits - 1) - z)
        w -= np.outer((w[:, j] - q[:, j]) / inverse[j, j], inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j], inverse[:, j] = 0, 0
        inverse[j, j] = 1
    return q


@pytest.mark.parametrize(("bits", "group", "kind"), GRIDS)
@pytest.mark.parametrize("block", [16, 128])  # 16 leaves a last block that is filled up
def test_gptq_is_the_textbooks_in_float64(bits, group, kind, block):
    weight, moments = _weight(), _moments()
    grid = uniform.expand(uniform.fit_grid(weight, bits, group, kind, (1.0,)), 40, group)
    factor = jnp.asarray(inverse_factor(moments), jnp.float32)
    found, error = round_columns(weight, factor, grid, bits, block)
    wanted = _textbook(weight, moments, grid, bits)
    np.testing.assert_allclose(np.asarray(found), wanted, atol=1e-5)
    dampened = moments + 0.01 * np.diag(moments).mean() * np.eye(40)
    np.testing.assert_allclose(np.asarray(error), _error(weight, found, dampened), rtol=1e-3)


def test_the_factor_is_that_of_the_dampened_inverse():
    moments = _moments()
    moments[7] = moments[:, 7] = 0  # an input that is always 0
    u = inverse_factor(moments, 0.02)
    mean = np.diag(moments).mean()
    wanted = moments + np.diag(np.where(np.arange(40) == 7, 1.0, 0.0)) * mean + 0.02 * mean * np.eye(40)
    np.testing.assert_allclose(u.T @ u @ wanted, np.eye(40), atol=1e-8)
    np.testing.assert_array_equal(u, np.triu(u))


@pytest.mark.parametrize(("bits", "group", "kind"), GRIDS)
def test_gptq_of_uncorrelated_inputs_is_round_to_nearest(bits, group, kind):
    weight = _weight()
    grid = uniform.fit_grid(weight, bits, group, kind, (1.0,))
    for act_order in (False, True):
        found = _gptq(weight, np.eye(40), bits, group, kind, (1.0,), act_order)
        np.testing.assert_array_equal(
            np.asarray(found), np.asarray(uniform.round_to_nearest(weight, grid, bits, group))
        )


@pytest.mark.parametrize(("bits", "group", "kind"), GRIDS)
def test_gptq_has_less_output_error_than_round_to_nearest(bits, group, kind):
    weight, moments = _weight(), _moments()
    grid = uniform.fit_grid(weight, bits, group, kind, (1.0,))
    nearest = _error(weight, uniform.round_to_nearest(weight, grid, bits, group), moments).sum()
    plain = _error(weight, _gptq(weight, moments, bits, group, kind, (1.0,)), moments).sum()
    chosen = _error(weight, _gptq(weight, moments, bits, group, kind), moments).sum()
    assert plain < 0.5 * nearest and chosen < plain


# qwix: symmetric grids with float32 scales --------------------------------------------------------------------------


@pytest.fixture
def qwix():
    pytest.importorskip("qwix", reason="qwix, an optional oracle, is not installed")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize(("bits", "qtype"), [(4, jnp.dtype("int4")), (2, "int2"), (8, jnp.dtype("int8"))])
@pytest.mark.parametrize("group", [None, 20])
def test_round_to_nearest_is_qwixs(qwix, bits, qtype, group):
    """Ties, which the largest weight of a group is by construction, may be broken either way."""
    from qwix._src.core import qarray

    weight, tiles = _weight(), {} if group is None else {1: group}
    how = qarray.HowToQuantize(qtype=qtype, channelwise_axes=[0], tiled_axes=tiles)
    grid = uniform.fit_grid(weight, bits, group, "symmetric", (1.0,))
    scale, _ = qarray.compute_scale_zero_point(qarray.calibrate(weight, how), qtype)
    np.testing.assert_allclose(np.asarray(grid.scale), np.asarray(scale).reshape(12, -1), rtol=2**-11)  # of float16
    theirs = qarray.quantize_with_scale_zero_point(weight, qtype, grid.scale, None)
    mine = np.asarray(uniform.round_to_nearest(weight, grid, bits, group))
    theirs = np.asarray(qarray.dequantize(theirs))
    assert (np.abs(mine - theirs) < 1e-5).mean() > 0.95
    np.testing.assert_allclose(np.abs(mine - weight), np.abs(theirs - weight), atol=1e-5 * 2**bits)


def test_gptq_is_qwixs(qwix):
    from qwix._src.core import qarray
    from qwix.contrib import gptq_core

    weight, moments = _weight(columns=12), _moments(12)
    how = qarray.HowToQuantize(qtype=jnp.dtype("int4"), channelwise_axes=[0])
    theirs, _ = jax.jit(lambda w, h: gptq_core.quantize_weight(w, h, how))(weight, jnp.asarray(moments, jnp.float32))
    scale = jnp.broadcast_to(theirs.scale, weight.shape)
    grid = uniform.Grid(scale, jnp.full_like(scale, 8))
    found, _ = round_columns(weight, jnp.asarray(inverse_factor(moments), jnp.float32), grid, 4)
    np.testing.assert_allclose(np.asarray(found), np.asarray(qarray.dequantize(theirs)), atol=1e-5)


# Whole trees ------------------------------------------------------------------------------------------------------


def _layers() -> dict:
    """A stack of two blocks, two Linears each, and a kept kernel."""
    shapes = {"fc1": {"kernel": (2, 48, 32), "bias": (2, 32)}, "fc2": {"kernel": (2, 32, 48), "bias": (2, 48)}}
    tree = {"blocks": shapes, "out": {"kernel": (3, 48, 3), "bias": (3,)}}
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), tree, is_leaf=lambda s: isinstance(s, tuple))
    return random_params(shapes, jax.random.key(0), 0.2)


RULES = ((r"blocks/\d+/fc[12]/kernel", VQSpec(16, 4)), (r".*", KEEP))


def test_dense_baselines_quantize_what_rules_say_and_count_all_bytes():
    params = _layers()
    eyes = {f"blocks/fc{i}/kernel": jnp.tile(jnp.eye(n)[None], (2, 1, 1)) for i, n in ((1, 48), (2, 32))}
    nearest = methods.rtn(params, 3, 16, kind="asymmetric", rules=RULES)
    columns = methods.gptq(params, eyes, 3, 16, shares=(1.0,), rules=RULES)
    groups = 2 * (32 * 3 + 48 * 2)
    for result in (nearest, columns):
        found = sizes(result)
        assert found.quantized_parameters == 16 * groups
        assert found.assignment_bytes == 16 * groups * 3 // 8
        assert found.codebook_bytes == groups * 2 + groups * 3 // 8
        assert found.bits_per_quantized_weight == pytest.approx(3 + (16 + 3) / 16)
        assert found.other_bytes == 2 * (2 * 32 + 2 * 48 + 3 * 48 * 3 + 3)
        assert found.parameters == found.quantized_parameters + found.other_bytes // 2
    same = lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    jax.tree.map(same, nearest, columns)
    half = lambda a: a.astype(jnp.float16)
    jax.tree.map(same, nearest["out"], jax.tree.map(half, params["out"]))
    same(nearest["blocks"]["fc1"]["bias"], half(params["blocks"]["fc1"]["bias"]))
    for name in ("fc1", "fc2"):
        kernel, wanted = dequantize(nearest)["blocks"][name]["kernel"], params["blocks"][name]["kernel"]
        grid = uniform.fit_grid(wanted[1].T, 3, 16, "asymmetric", (1.0,))
        same(kernel[1].T, uniform.round_to_nearest(wanted[1].T, grid, 3, 16))


def test_rules_say_which_blocks_are_quantized():
    params = _layers()
    result = methods.rtn(params, 2, rules=((r"blocks/0/.*", KEEP), *RULES))
    kernel, wanted = dequantize(result)["blocks"]["fc1"]["kernel"], params["blocks"]["fc1"]["kernel"]
    np.testing.assert_array_equal(np.asarray(kernel[0]), np.asarray(wanted[0].astype(jnp.float16).astype(jnp.float32)))
    assert all(len(np.unique(kernel[1, :, o])) <= 4 for o in range(32))
    assert sizes(result).quantized_parameters == 2 * 32 * 48


def test_the_linears_of_a_dit_are_quantized_without_rules():
    teacher = tiny()[1]
    packed = abstract_quantized(teacher, dit_rules(2))
    assert sizes(methods.rtn(teacher, 2)).quantized_parameters == sizes(packed).quantized_parameters


@pytest.mark.parametrize(
    ("bits", "group", "kind", "named"),
    [(1, None, "centred", "bits=1"), (2, 0, "centred", "group=0"), (2, None, "odd", "kind='odd'")],
)
def test_what_makes_no_grid_is_refused(bits, group, kind, named):
    with pytest.raises(InputError, match=named):
        methods.rtn(_layers(), bits, group, kind=kind, rules=RULES)


def test_moments_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="moments of blocks/fc1/kernel are missing"):
        methods.gptq(_layers(), {}, 2, rules=RULES)


# Codebooks --------------------------------------------------------------------------------------------------------


def _apply(params, x, t, cond):
    """Two residual blocks on all pixels of an image at once, and the class in a bias."""
    rows = x.reshape(len(x), 48) + cond[:, None].astype(jnp.float32) / 5
    blocks = []
    for i in range(2):
        one = jax.tree.map(lambda a: a[i], params["blocks"])
        hidden = jax.nn.gelu(linear(rows, one["fc1"]["kernel"], one["fc1"]["bias"]))
        rows = rows + linear(hidden, one["fc2"]["kernel"], one["fc2"]["bias"])
        blocks.append(rows)
    return rows.reshape(x.shape), blocks


NETWORK = Network(_apply, (4, 4, 3), ClassLabels(5))


@pytest.fixture(scope="module")
def kmeans():
    return quantize(_layers(), rules=RULES, key=jax.random.key(0))


def _packed(tree) -> list[VQArray]:
    is_leaf = lambda node: isinstance(node, VQArray)
    return [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_leaf) if is_leaf(leaf)]


def test_codebook_only_keeps_the_assignments_of_kmeans(kmeans):
    own = passes(CODEBOOKS_ONLY, steps=3, batch=2, trajectory_steps=3)
    tuned = methods.calibrate(NETWORK, _layers(), kmeans, key=jax.random.key(1), passes=own)
    for old, new in zip(_packed(kmeans), _packed(tuned), strict=True):
        np.testing.assert_array_equal(np.asarray(new.assignments), np.asarray(old.assignments))
        assert (np.asarray(new.codebook) != np.asarray(old.codebook)).mean() > 0.9


def test_attention_over_candidates_is_that_over_all_codewords():
    """What lies outside of 16 candidates weighs less than 1e-3 at the largest temperature."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 256)).astype(np.float32)
    result = run_kmeans(weight.reshape(1, -1, 4), 256, jax.random.key(0), max_iterations=10)
    tau = dkm.START * float(result.error[0])
    squared = np.square(weight.reshape(-1, 1, 4) - result.codebook).sum(-1)
    whole = np.exp(-(squared - squared.min(1, keepdims=True)) / tau)
    whole /= whole.sum(1, keepdims=True)
    outside = 1 - np.sort(whole, 1)[:, -dkm.DKM.num_candidates :].sum(1)
    assert outside.mean() < 1e-3
    ids, _ = nearest_codewords(weight.reshape(-1, 4), result.codebook[0], dkm.DKM.num_candidates)
    candidates = jnp.asarray(ids.T.reshape(-1, 64, 64))
    leaf = dkm.AttentionArray(
        jnp.asarray(result.codebook), candidates, jnp.asarray(weight), jnp.float32(tau), (64, 256)
    )
    wanted = np.einsum("pk,kd->pd", whole, result.codebook[0]).reshape(64, 256)
    assert np.square(np.asarray(leaf.decode()) - wanted).mean() < 1e-6
    assert np.abs(whole.max(1) - 1).mean() > 0.05  # it is soft


def test_attentions_gradient_goes_through_soft_weight_and_attention():
    """Against finite differences in float64 of the formula."""
    rng = np.random.default_rng(0)
    codebook, weight = rng.standard_normal((2, 8, 2)), rng.standard_normal((4, 6))
    direction, probe = rng.standard_normal(codebook.shape), rng.standard_normal((4, 6))
    candidates = np.stack([rng.permutation(8)[:3] for _ in range(12)]).T.reshape(3, 4, 3)

    def soft(codebook):
        near = np.stack([codebook[o // 2][candidates[:, o]] for o in range(4)], 1)
        ratios = np.exp(-np.square(near - weight.reshape(1, 4, 3, 2)).sum(-1) / 0.7)
        return ((ratios / ratios.sum(0))[..., None] * near).sum(0).reshape(4, 6)

    make = lambda book: dkm.AttentionArray(
        book, jnp.asarray(candidates, jnp.int32), jnp.asarray(weight, jnp.float32), jnp.float32(0.7), (4, 6)
    )
    book = jnp.asarray(codebook, jnp.float32)
    found, pull = jax.vjp(jax.jit(lambda book: make(book).decode()), book)
    np.testing.assert_allclose(np.asarray(found), soft(codebook), rtol=1e-5, atol=1e-6)
    (found,) = pull(jnp.asarray(probe, jnp.float32))
    step = 1e-5 * direction
    wanted = ((soft(codebook + step) - soft(codebook - step)) * probe).sum() / 2e-5
    assert float((np.asarray(found) * direction).sum()) == pytest.approx(wanted, rel=1e-4)


def test_dkm_lowers_the_loss_and_ends_at_nearest_codewords(kmeans):
    teacher = _layers()
    settings = dkm.DKM(steps=24, batch=2, trajectory_steps=4, learning_rate_codebooks=2e-3, num_candidates=8)
    log = []
    hard = methods.calibrate(NETWORK, teacher, kmeans, key=jax.random.key(1), passes=(settings,), on_step=log.append)
    assert (
        len(log) == 24
        and log[0]["tau_share"] == pytest.approx(dkm.START)
        and log[-1]["tau_share"] == pytest.approx(dkm.END)
    )
    found = methods.held_out_agreement(NETWORK, teacher, {"kmeans": kmeans, "dkm": hard}, 1.5, jax.random.key(9))
    assert found["dkm"][0] < 0.9 * found["kmeans"][0]
    leaf = hard["blocks"]["fc1"]["kernel"]
    weight = np.asarray(teacher["blocks"]["fc1"]["kernel"]).swapaxes(1, 2)
    for block in range(2):
        ids, _ = nearest_codewords(weight[block].reshape(-1, 4), leaf.codebook[block, 0], 1)
        np.testing.assert_array_equal(np.asarray(leaf.codes()[block]).reshape(-1), ids[:, 0])


def test_dkm_leaves_candidates_and_kept_parameters_alone(kmeans):
    teacher = _layers()
    settings = dkm.DKM(steps=2, batch=2, trajectory_steps=2, num_candidates=4)
    student = dkm.make_attentive(settings, teacher, kmeans)
    state = settings.init(student)
    tables = {path.removesuffix(":codebook") for path in state.trainable.tables}
    assert set(state.trainable.biases) == {path.replace("kernel", "bias") for path in tables}
    assert not state.trainable.logits and not state.trainable.kept
    hard = settings.finalize(student, state)  # nothing was trained: k-means again
    for old, new in zip(_packed(kmeans), _packed(hard), strict=True):
        np.testing.assert_array_equal(np.asarray(new.codebook), np.asarray(old.codebook))
        assert (np.asarray(new.codes()) == np.asarray(old.codes())).mean() > 0.999  # equal distances
    np.testing.assert_array_equal(np.asarray(hard["out"]["kernel"]), np.asarray(teacher["out"]["kernel"]))
