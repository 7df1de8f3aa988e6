"""Trees of quantized leaves: parts and runs come together again, walking sees everything, and nothing else is a leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from hypothesis import given, settings
from hypothesis import strategies as st
from models import inputs, tiny

import vq4dit_jax as vq
from vq4dit_jax import methods
from vq4dit_jax.errors import InputError
from vq4dit_jax.methods.kmeans import KMeans
from vq4dit_jax.networks.conditioning import Unconditional
from vq4dit_jax.networks.network import Network, Stack
from vq4dit_jax.networks.rules import dit_rules
from vq4dit_jax.qarray.cast import cast_kept, checked_cast
from vq4dit_jax.qarray.parts import Parts, from_parts, parts_of, split_runs, stack_length
from vq4dit_jax.qarray.rules import plan
from vq4dit_jax.qarray.tree import (
    block_path,
    dense_shapes,
    dequantize,
    flatten,
    map_slots,
    matrices,
    quantized_paths,
    replace,
    restack,
    sizes,
    unflatten,
    walk,
)  # fmt: skip
from vq4dit_jax.qarray.vq import from_codes

LENGTH = 5
KEY = jax.random.key(0)


def _vq(blocks: int, seed: int, codewords: int):
    rng = np.random.default_rng(seed)
    book = rng.normal(size=(blocks, 1, codewords, 2)).astype(np.float32)
    return from_codes(jnp.asarray(book), rng.integers(0, codewords, (blocks, 4, 3)))


@st.composite
def stacks(draw):
    """A stacked tree of LENGTH blocks; leaves are arrays or VQArrays, whole or in parts."""
    tree = {}
    for name in draw(st.lists(st.sampled_from("abcd"), min_size=1, unique=True)):
        cuts = draw(st.sets(st.integers(1, LENGTH - 1), max_size=3))
        borders = [0, *sorted(cuts), LENGTH]
        parts = []
        for i, (start, stop) in enumerate(zip(borders[:-1], borders[1:], strict=True)):
            seed = draw(st.integers(0, 99))
            if draw(st.booleans()):
                parts.append(_vq(stop - start, seed, codewords=2 + i))
            else:
                parts.append(np.random.default_rng(seed).normal(size=(stop - start, 6, 4)).astype(np.float32))
        tree[name] = {"kernel": from_parts(parts)}
    return {"blocks": tree}


def _blocks_of(leaf):
    """Every block of a leaf decoded, in order."""
    dense = lambda part: np.asarray(part.decode()).swapaxes(-1, -2) if hasattr(part, "decode") else np.asarray(part)
    return np.concatenate([dense(part) for _, part in parts_of(leaf)])


@settings(max_examples=30)
@given(stacks())
def test_runs_cover_every_block_once_and_in_order(tree):
    runs = split_runs(tree["blocks"])
    assert sum(stack_length(run) for run in runs) == LENGTH
    for name in tree["blocks"]:
        wanted = _blocks_of(tree["blocks"][name]["kernel"])
        pieces = [run[name]["kernel"] for run in runs]
        assert not any(isinstance(piece, Parts) for piece in pieces)
        np.testing.assert_array_equal(np.concatenate([_blocks_of(piece) for piece in pieces]), wanted)


@settings(max_examples=30)
@given(stacks())
def test_walking_mapping_and_restacking_give_the_tree_back(tree):
    same = lambda other: (
        jax.tree.structure(other) == jax.tree.structure(tree)
        and all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(tree), strict=True))
    )
    assert same(map_slots(lambda slot: slot.leaf, tree))
    assert same(unflatten(flatten(tree)))
    assert same(replace(tree, flatten(tree)))
    assert same(restack(tree, (leaf for _, _, leaf in matrices(tree))))
    for slot in walk(tree):
        whole = np.arange(LENGTH)
        first = slot.start or 0
        np.testing.assert_array_equal(slot.cut(whole), whole[first : first + stack_length(slot.leaf)])
    dense = dequantize(tree)
    assert {path: leaf.shape for path, leaf in flatten(dense).items()} == dense_shapes(tree)
    for path, block, leaf in matrices(tree):
        np.testing.assert_array_equal(np.asarray(flatten(dense)[path][block]), np.asarray(leaf.decode()).T)
    assert set(quantized_paths(tree)) == {path for path, _, _ in matrices(tree)}


def test_a_scalar_parameter_is_a_leaf_like_any_other():
    tree = {"scale": jnp.float32(2.0), "up": {"kernel": jnp.ones((4, 4))}}
    packed = vq.quantize(tree, rules=[("up/kernel", vq.VQSpec(2, 2)), (".*", vq.KEEP)], key=jax.random.key(0))
    assert [path for path, _, _ in matrices(packed)] == ["up/kernel"]
    assert sizes(packed).parameters == 17
    with pytest.raises(InputError, match=r"parameter scale has shape \(\); only kernels"):
        vq.quantize(tree, rules=[(".*", vq.VQSpec(2, 2))], key=jax.random.key(0))


@pytest.mark.parametrize(
    ("node", "what"), [(None, "NoneType"), ((jnp.ones(2),), "tuple"), ("x", "str"), ([1.0], "list"), (1.0, "float")]
)
def test_a_node_that_is_no_leaf_is_named(node, what):
    for function in (sizes, flatten, lambda tree: list(matrices(tree))):
        with pytest.raises(InputError, match=f"parameter a/b is a {what}; wanted an array"):
            function({"a": {"b": node}})


def test_a_stack_of_any_name_and_depth_has_the_path_of_its_rule():
    tree = {
        "net": {"decoder": {"layers": {"up": {"kernel": jnp.ones((3, 8, 8))}}}},
        "out": {"kernel": jnp.ones((8, 8))},
    }
    stacked = ("net/decoder/layers",)
    rules = [("net/decoder/layers/1/up/kernel", vq.VQSpec(4, 2)), ("out/kernel", vq.VQSpec(4, 2)), (".*", vq.KEEP)]
    packed = vq.quantize(tree, rules=rules, key=jax.random.key(0), stacked=stacked)
    paths = [block_path(path, block, stacked) for path, block, _ in matrices(packed)]
    assert paths == ["net/decoder/layers/1/up/kernel", "out/kernel"]
    # What is written is what a rule matches: the same matrices again.
    again = vq.quantize(
        tree, rules=[*((p, vq.VQSpec(4, 2)) for p in paths), (".*", vq.KEEP)], key=jax.random.key(0), stacked=stacked
    )
    assert jax.tree.structure(again) == jax.tree.structure(packed)
    with pytest.raises(InputError, match="under none of blocks"):
        block_path("net/decoder/layers/up/kernel", 1)
    for wrong, message in (
        (("layers",), "there is no parameter under layers/"),
        (("out", "net"), "wanted 8 entries|first axis"),
    ):
        ragged = {**tree, "out": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(3)}}
        with pytest.raises(InputError, match=message):
            plan(ragged, rules, wrong)


def test_frozen_dicts_with_parts_run_like_dicts():
    model, params = tiny()
    rules = ((r"blocks/0/mlp/fc1/kernel", vq.VQSpec(16, 4)), *dit_rules(2))
    packed = vq.quantize(FrozenDict(params), rules=rules, key=jax.random.key(0), max_iterations=1)
    apply = lambda p: np.asarray(model.apply({"params": p}, *inputs(model)))
    np.testing.assert_array_equal(apply(FrozenDict(packed)), apply(packed))


def test_kept_parameters_are_cast_by_what_was_quantized():
    """Also a kept kernel of a block, a stack of another name, and the kept blocks of a stack; quantized leaves never."""
    tree = {
        "layers": {"a": {"kernel": jnp.ones((3, 8, 8)) / 3}, "b": {"kernel": jnp.ones((3, 8, 8))}},
        "step": jnp.int32(3),
    }
    rules = [("layers/1/a/kernel", vq.VQSpec(4, 2)), (".*", vq.KEEP)]
    packed = vq.quantize(tree, rules=rules, key=jax.random.key(0), stacked=("layers",))
    half = cast_kept(packed, jnp.float16)
    a = half["layers"]["a"]["kernel"]
    assert [jnp.dtype(x.dtype).name for x in (a[0], a[1].codebook, a[2], half["layers"]["b"]["kernel"], half["step"])] == [
        "float16", "float32", "float16", "float16", "int32"
    ]  # fmt: skip
    np.testing.assert_array_equal(np.asarray(a[1].codebook), np.asarray(packed["layers"]["a"]["kernel"][1].codebook))


def test_k_means_sees_the_weights_as_they_are_and_not_as_they_would_be_kept():
    """The pass casts after it has quantized: also of a stack whose name rules do not know."""
    tree = {"layers": {"a": {"kernel": jax.random.normal(KEY, (2, 16, 16)), "bias": jnp.ones((2, 16)) / 3}}}
    network = Network(lambda params, x, t, cond: (x, None), (1, 1, 1), Unconditional(), stacks=(Stack("layers", 2),))
    rules = (("layers/./a/kernel", vq.VQSpec(4, 2)), (".*", vq.KEEP))
    run = methods.begin(network, tree, KEY)
    found, _ = KMeans(rules=rules, other_dtype="bfloat16")(run, tree, KEY)
    wanted = vq.quantize(tree, rules=rules, key=KEY, stacked=("layers",))
    for (_, _, ours), (_, _, theirs) in zip(matrices(found), matrices(wanted), strict=True):
        np.testing.assert_array_equal(np.asarray(ours.codebook), np.asarray(theirs.codebook))
    assert found["layers"]["a"]["bias"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("values", "dtype", "message"),
    [
        ([1.0, 1e5], "float16", "holds 1e\\+05, which float16 cannot hold; store it as bfloat16 or float32"),
        ([1e-9, -3e-10], "float16", "at most 1e-09, too small for float16"),
        ([2e-7, 1e-7], "float16", "too small for float16"),  # subnormals: a bit or two are left
    ],
)
def test_casts_that_lose_the_values_are_refused(values, dtype, message):
    with pytest.raises(InputError, match=f"parameter out/bias .*{message}"):
        cast_kept({"out": {"bias": jnp.asarray(values)}}, dtype)
    assert np.isfinite(np.asarray(checked_cast(values, "bfloat16", "x"), np.float32)).all()


def test_casts_that_only_round_are_not():
    values = np.append(np.random.default_rng(0).normal(size=1000).astype(np.float32), 1e-12)
    np.testing.assert_array_equal(np.asarray(checked_cast(values, "float16", "x")), values.astype(np.float16))


def test_codebooks_that_float16_cannot_hold_are_refused():
    rules = [("up/kernel", vq.VQSpec(2, 2)), (".*", vq.KEEP)]
    tree = {"up": {"kernel": jnp.full((4, 4), 1e6)}}
    with pytest.raises(InputError, match="parameter up/kernel: its codebook holds 1e\\+06"):
        vq.quantize(tree, rules=rules, key=jax.random.key(0), codebook_dtype=jnp.float16)
    with pytest.raises(InputError, match="parameter up/kernel: its weights .* need scales that float16"):
        vq.quantize({"up": {"kernel": jnp.full((4, 4), 1e-9)}}, rules=[(".*", vq.IntSpec(4))], key=jax.random.key(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vq.VQSpec(0, 4), "codewords=0"),
        (lambda: vq.VQSpec(256, 0), "subvector=0"),
        (lambda: vq.VQSpec(256, 4, 1, "float99"), "dtype=float99"),
        (lambda: vq.IntSpec(1), "bits=1"),
        (lambda: vq.IntSpec(4, 0), "group=0"),
        (lambda: vq.IntSpec(4, grid="odd"), "kind='odd'"),
        (lambda: plan({"a": jnp.ones(2)}, [("(", vq.KEEP)]), r"rule '\(' is no regular expression"),
        (lambda: plan({"a": jnp.ones(2)}, [(".*", (256, 4))]), r"rule '\.\*' has \(256, 4\); wanted a spec"),
        (lambda: plan({"a": jnp.ones(2)}, 0), "rules=0: wanted a list"),
        (lambda: vq.quantize({"a": jnp.ones(2)}, key=jax.random.key(0)), "not the parameters of a DiT"),
    ],
)
def test_specs_and_rules_that_mean_nothing_are_refused(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
