"""What a result was made from decides whether it may go on; nothing else does."""

import json

import hypothesis
import hypothesis.strategies as st
import pytest

from vq4dit_jax.errors import InputError
from vq4dit_jax.storage.identity import Claim, differences, digest_file, identity

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
