"""A kind of leaf that the library does not know goes through everything, from rules to samples, with no change elsewhere."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import inputs, tiny

import vq4dit_jax as vq
from vq4dit_jax.errors import InputError
from vq4dit_jax.qarray.base import Cost, QuantizedArray, matrix_fact, register, static, take
from vq4dit_jax.qarray.parts import Parts
from vq4dit_jax.qarray.spec import Spec, register_spec, spec_from_json
from vq4dit_jax.qarray.tree import densify, matrices
from vq4dit_jax.storage import provenance

RANK = 4


@register
class LowRank(QuantizedArray):
    """W_hat = left right with `left` (*stack, O, r) and `right` (*stack, r, I) float16; `matrix` = (O, I)."""

    kind = "test_low_rank"
    left: Any
    right: Any
    matrix: tuple[int, int] = static()

    @property
    def stack(self) -> tuple[int, ...]:
        return tuple(self.left.shape[:-2])

    def decode(self, dtype: Any = None) -> jax.Array:
        wide = [jnp.asarray(a, jnp.float32) for a in (self.left, self.right)]
        return jnp.matmul(*wide).astype(dtype or jnp.float32)

    def arrays(self) -> dict[str, Any]:
        return {"left": self.left, "right": self.right}

    def facts(self) -> dict[str, Any]:
        return {"shape": list(self.matrix), "rank": self.left.shape[-1]}

    @classmethod
    def restore(cls, arrays: Any, facts: Any, name: str) -> "LowRank":
        left, right = take(arrays, ("left", "right"), name)
        if left.shape[-1] != facts["rank"] or left.shape[-1] != right.shape[-2]:
            raise InputError(f"{name}: factors {left.shape} and {right.shape} are not of rank {facts['rank']}")
        return cls(left, right, matrix_fact(facts, name))

    def cost(self) -> Cost:
        size = lambda a: 2 * math.prod(a.shape)
        return Cost(math.prod(self.stack) * math.prod(self.matrix), 0, size(self.left) + size(self.right))


@register_spec
class LowRankSpec(Spec):
    """Truncated singular value decomposition."""

    kind = "test_low_rank"
    rank: int = RANK

    def check(self, path: str, rows: int, columns: int) -> None:
        if self.rank > min(rows, columns):
            raise InputError(f"parameter {path} has no rank {self.rank}")

    def abstract(self, stack: tuple[int, ...], rows: int, columns: int) -> LowRank:
        half = lambda *shape: jax.ShapeDtypeStruct((*stack, *shape), jnp.float16)
        return LowRank(half(rows, self.rank), half(self.rank, columns), (rows, columns))

    def quantize(self, weight: Any, key: jax.Array, *, iterations: int = 100) -> LowRank:
        u, s, v = np.linalg.svd(weight, full_matrices=False)
        left, right = u[..., : self.rank] * s[..., None, : self.rank], v[..., : self.rank, :]
        return LowRank(jnp.asarray(left, jnp.float16), jnp.asarray(right, jnp.float16), weight.shape[-2:])


RULES = (
    (r"blocks/0/attn/qkv/kernel", vq.VQSpec(16, 4, groups=3)),
    (r"blocks/\d+/attn/qkv/kernel", LowRankSpec(RANK)),
    (r"blocks/\d+/mlp/fc1/kernel", vq.IntSpec(4, group=16)),
    (r"blocks/1/mlp/fc2/kernel", vq.KEEP),
    (r"blocks/\d+/mlp/fc2/kernel", spec_from_json({"kind": "test_low_rank", "rank": 3})),
    (r".*", vq.KEEP),
)


@pytest.fixture(scope="module")
def made():
    """A model of two blocks whose leaves are of every kind, one of them in parts of two kinds, and one in part kept."""
    model, params = tiny()
    return model, params, vq.quantize(params, rules=RULES, key=jax.random.key(0))


def test_rules_make_its_leaves(made):
    _, params, packed = made
    qkv, fc2 = packed["blocks"]["attn"]["qkv"]["kernel"], packed["blocks"]["mlp"]["fc2"]["kernel"]
    assert isinstance(qkv, Parts) and [type(part) for part in qkv] == [vq.VQArray, LowRank]
    assert isinstance(packed["blocks"]["mlp"]["fc1"]["kernel"], vq.IntArray)
    assert fc2[0].left.shape == (1, 32, 3) and fc2[1] is not None
    weight = np.asarray(params["blocks"]["attn"]["qkv"]["kernel"][1]).T
    singular = np.linalg.svd(weight, compute_uv=False)
    found = np.linalg.norm(
        np.asarray(qkv[1].decode())[0] - weight
    )  # Eckart-Young: what is left is the rest of the spectrum
    assert found == pytest.approx(np.linalg.norm(singular[RANK:]), rel=1e-3)


def test_sizes_count_it(made):
    _, params, packed = made
    before, after = vq.sizes(params), vq.sizes(packed)
    assert after.parameters == before.parameters
    # Of width 32: qkv (96, 32) with 16 codewords a group, fc1 (64, 32) and fc2 (32, 64).
    weights = {"vq": 96 * 32, "low rank": 96 * 32 + 64 * 32, "int": 2 * 64 * 32}
    assert after.quantized_parameters == sum(weights.values())
    codes = 96 * 8 // 2 + 2 * 64 * 32 // 2
    low_rank = 2 * (RANK * (96 + 32) + 3 * (32 + 64))
    assert after.assignment_bytes == codes
    assert after.codebook_bytes == 3 * 16 * 4 * 4 + low_rank + 2 * (64 * 2 * 2 + 64 * 2 // 2)
    assert after.other_bytes == 4 * (before.parameters - after.quantized_parameters)
    assert LowRankSpec(RANK).stored_bits(96, 32) == 16 * RANK * (96 + 32)
    found = [(path, block, type(leaf).__name__) for path, block, leaf in matrices(packed)]
    assert ("blocks/attn/qkv/kernel", 1, "LowRank") in found and len(found) == 5


@pytest.mark.parametrize("form", ["quantized", "safetensors"])
def test_it_comes_back_from_files(made, tmp_path, form):
    model, _, packed = made
    save, load = getattr(vq, f"save_{form}"), getattr(vq, f"load_{form}")
    save(tmp_path / "m", model, packed)
    loaded_model, loaded, manifest = load(tmp_path / "m")
    assert loaded_model == model and provenance.digest(loaded) == provenance.digest(packed)
    assert jax.tree.structure(loaded) == jax.tree.structure(packed)
    assert manifest["version"] == 2
    assert manifest["quantized"]["blocks/attn/qkv/kernel/part_1"] == {
        "kind": "test_low_rank", "rank": RANK, "shape": [96, 32]
    }  # fmt: skip


def test_the_model_runs_from_it(made):
    model, params, packed = made
    dense = vq.dequantize(packed)
    assert jax.tree.map(jnp.shape, dense) == jax.tree.map(jnp.shape, params)
    apply = jax.jit(lambda p: model.apply({"params": p}, *inputs(model)))
    wanted = apply(dense)
    for form in (packed, densify(packed)):
        np.testing.assert_allclose(
            np.asarray(apply(form)), np.asarray(wanted), atol=1e-5 * float(jnp.abs(wanted).max())
        )


def test_it_samples(made):
    model, _, packed = made
    how = dict(key=jax.random.key(0), num_steps=2, cfg_scale=1.5)
    sample = lambda params: np.asarray(vq.sample(model, params, jnp.arange(2, dtype=jnp.int32), **how))
    found, wanted = sample(packed), sample(vq.dequantize(packed))
    assert found.shape == (2, 8, 8, 3) and np.isfinite(found).all()
    np.testing.assert_allclose(found, wanted, atol=1e-3 * np.abs(wanted).max())


def test_a_file_of_a_kind_that_nobody_registered_is_refused(made, tmp_path):
    model, _, packed = made
    vq.save_safetensors(tmp_path / "m", model, packed)
    whole = (tmp_path / "m").read_bytes()
    (tmp_path / "other").write_bytes(whole.replace(b"test_low_rank", b"test_low_RANK"))
    with pytest.raises(InputError, match="part_1 is of kind 'test_low_RANK'; known are"):
        vq.load_safetensors(tmp_path / "other")


def test_what_it_has_no_form_for_is_said(made):
    _, _, packed = made
    leaf = packed["blocks"]["attn"]["qkv"]["kernel"][1]
    assert leaf.tunable() == {} and leaf.soften(None, 2, "distance") is leaf and leaf.harden() is leaf
    assert leaf.solve(jnp.ones((2, 32, 96)), jnp.ones((2, 32, 32)), 1, feedbacks=1, rounds=1) is None
    with pytest.raises(InputError, match="a LowRank has no form for the kernels"):
        leaf.prepare(jnp.int8)
    with pytest.raises(InputError, match="a LowRank cannot be scaled"):
        leaf.scaled(2.0)
