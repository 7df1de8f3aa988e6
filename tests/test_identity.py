"""What a result was made from decides whether it may go on; nothing else does."""

import dataclasses
import functools
import hashlib
import json
from typing import Any

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny

from vq4dit_jax.diffusion.process import Process
from vq4dit_jax.errors import InputError
from vq4dit_jax.methods.kmeans import KMeans
from vq4dit_jax.networks.conditioning import Features
from vq4dit_jax.networks.network import Network, Role, Stack
from vq4dit_jax.networks.registry import describe
from vq4dit_jax.qarray.spec import VQSpec
from vq4dit_jax.storage.identity import Claim, canonical, differences, digest_file, identity
from vq4dit_jax.storage.provenance import facts_of

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
_FACTS = st.dictionaries(st.from_regex(r"[a-z]{1,4}", fullmatch=True), _VALUES, max_size=4)


@hypothesis.given(_FACTS, st.randoms())
def test_the_order_of_keys_is_no_part_of_an_identity(facts, random):
    shuffled = list(facts.items())
    random.shuffle(shuffled)
    assert identity(**facts) == identity(**dict(shuffled))
    assert differences(facts, dict(shuffled)) == []


@hypothesis.given(_FACTS, _FACTS)
def test_facts_that_differ_have_another_identity_and_a_name_for_it(one, other):
    """A missing fact reads as null, so these two are compared without nulls."""
    one, other = ({k: v for k, v in facts.items() if "null" not in json.dumps(v)} for facts in (one, other))
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (identity(**one) == identity(**other)) == same
    if one != other:
        assert differences(one, other) or differences(other, one) or {} in (one, other)


def test_identities_are_of_values_and_not_of_their_python_types():
    assert identity(a=(1, 2)) == identity(a=[1, 2])
    for value in (float("nan"), float("inf"), {1, 2}, object()):
        with pytest.raises((TypeError, ValueError)):
            identity(a=value)


def test_a_folder_is_its_names_and_contents(tmp_path):
    def folder(name, **contents):
        for file, text in contents.items():
            path = tmp_path / name / file.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return digest_file(tmp_path / name)

    one = folder("one", a="1", b__c="2")
    assert folder("two", b__c="2", a="1") == one
    assert (
        len({one, folder("renamed", a="1", b__d="2"), folder("changed", a="1", b__c="3"), folder("less", a="1")}) == 4
    )
    (tmp_path / "one" / ".cache").mkdir()
    (tmp_path / "one" / ".cache" / "note").write_text("of a download")
    assert digest_file(tmp_path / "one") == one
    with pytest.raises(InputError, match="nothing"):
        digest_file(tmp_path / "nothing")


@pytest.mark.parametrize("section", [None, "definition"])
def test_a_claim_is_taken_once_and_refuses_others_by_what_differs(tmp_path, section):
    claim = lambda **facts: Claim(
        tmp_path / "a" / "claim.json", facts, "remove it", lambda: {"devices": "2 x cpu"}, section
    )
    claim(bits=2, rules=(1, 2)).check()
    assert not (tmp_path / "a").exists()
    claim(bits=2, rules=(1, 2)).take()
    written = (tmp_path / "a" / "claim.json").read_bytes()
    claim(bits=2, rules=[1, 2]).take()
    assert (tmp_path / "a" / "claim.json").read_bytes() == written and b"2 x cpu" in written
    with pytest.raises(InputError, match=r"bits \(3 here, 2 there\).*remove it"):
        claim(bits=3, rules=(1, 2)).take()
    assert [key for key, _ in claim(bits=3, rules=(1, 3)).differing()] == ["bits", "rules"]


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "\x00"])
def test_a_damaged_claim_is_one_line(tmp_path, text):
    (tmp_path / "claim.json").write_text(text)
    for section in (None, "definition"):
        with pytest.raises(InputError, match=r"claim\.json"):
            Claim(tmp_path / "claim.json", {"a": 1}, section=section).check()


def test_messages_do_not_repeat_long_values():
    ((_, text),) = differences({"a": "x" * 10_000}, {"a": 1})
    assert len(text) < 200


# What a network and a pass say of themselves -----------------------------------------------------------------------


class _Layer(nn.Module):
    heads: int
    activation: Any = jax.nn.relu

    def __call__(self, params, x, t, cond):
        return x, None


@dataclasses.dataclass(frozen=True)
class _Apply:
    layer: _Layer
    eps: float = 1e-6


class _Plain:
    heads = 2


def _apply(params, x, t, cond, heads=2):
    return x, None


def test_a_networks_facts_are_its_fields_and_the_names_of_its_functions():
    """Written out: nothing in them is of this process alone, such as an address or the order of a hash."""
    bank = {"text": np.zeros((2, 3), np.float32)}
    conditioning = Features(bank, lambda params, cond: cond, prompts=("a cat", "a dog"))
    stacks = (Stack("trunk", 2, (Role("up/kernel"),)),)
    found = facts_of(Network(_apply, (2, 4, 4, 3), conditioning, Process("flow"), stacks=stacks))
    zeros = hashlib.sha256(b"array float32 (2, 3) " + bytes(24)).hexdigest()
    name = "test_identity.test_a_networks_facts_are_its_fields_and_the_names_of_its_functions"
    assert found == {
        "class": "vq4dit_jax.networks.network.Network",
        "apply": "test_identity._apply",
        "sample_shape": [2, 4, 4, 3],
        "conditioning": {
            "class": "vq4dit_jax.networks.conditioning.Features",
            "bank": {"text": f"float32(2, 3) sha256 {zeros}"},
            "null_of": f"{name}.<locals>.<lambda>",
        },  # titles of pictures decide nothing
        "process": {
            "class": "vq4dit_jax.diffusion.process.Process",
            **{"predicts": "flow", "learned_variance": False, "beta_start": 1e-4, "beta_end": 0.02, "data_time": 1},
        },
        "guidance": {"class": "vq4dit_jax.diffusion.guidance.Guidance", "channels": None},
        "stacks": [
            {
                "path": "trunk",
                "length": 2,
                "roles": [{"pattern": "up/kernel", "reads": "tokens", "group": "mlp", "codebooks": 1, "values": ""}],
                "heads": 0,
            }
        ],
        **dict.fromkeys(("predict", "hoist", "output_layer")),
    }


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (_Apply(_Layer(2)), _Apply(_Layer(4))),
        (_Apply(_Layer(2)), _Apply(_Layer(2), eps=1e-5)),
        (_Layer(2).__call__, _Layer(4).__call__),
        (_Layer(2), _Layer(2, nn.gelu)),
        (functools.partial(_apply, heads=2), functools.partial(_apply, heads=4)),
        (jax.jit(functools.partial(_apply, heads=2)), jax.jit(functools.partial(_apply, heads=4))),
        (_apply, _Plain()),
        (jnp.zeros(2), jnp.ones(2)),
        (np.dtype("float32"), np.dtype("int8")),
        (jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT),
        (KMeans(rules=((".*", VQSpec(256, 4)),)), KMeans(rules=((".*", VQSpec(256, 2)),))),
    ],
)
def test_what_is_told_of_a_value_tells_it_from_another(one, other):
    assert facts_of(one) != facts_of(other)
    for value in (one, other):
        assert " at 0x" not in canonical(facts_of(value))


def test_values_that_do_the_same_have_the_same_facts():
    assert facts_of(_Layer(2, name="layer")) == facts_of(_Layer(2)) == facts_of(_Layer(2).clone())
    assert facts_of(jax.jit(_apply)) == facts_of(_apply) and facts_of(_Plain()) == facts_of(_Plain())
    assert facts_of(tiny(remat=True)[0]) == facts_of(tiny()[0]) == describe(tiny()[0])
