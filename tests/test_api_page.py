"""docs/api.md: up to date, and made of signatures and docstrings as they are."""

import importlib.util
import subprocess
import sys
import types

import pytest
from conftest import ROOT

_spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs/make_api.py")
make_api = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_api)


@pytest.mark.once
def test_the_page_is_what_the_docstrings_say():
    """In a process of its own, because the tests' type checks wrap what they import."""
    done = subprocess.run([sys.executable, "docs/make_api.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def double(x: int, *, times: "int" = 2, **more: float) -> dict[str, int]:
    """Twice the number.

    Why this is so is told here and stands not on the page.

    Args:
      x: the number.

    Raises ValueError where x is odd.
    """


def namespace(**names):
    package = types.ModuleType("house")
    for name, value in names.items():
        value.__module__ = f"house.{name}s.inner"
        setattr(package, name, value)
    package.__all__ = list(names)
    return package


def test_an_entry_has_the_signature_the_first_paragraph_and_the_sections():
    text = make_api.page(namespace(double=double))
    assert "double(x: int, *, times: int = 2, **more: float) -> dict[str, int]" in text
    assert "From `house.doubles.inner`." in text and "## doubles" in text
    assert "Twice the number." in text and "Raises ValueError where x is odd." in text
    assert "```text\nArgs:\n  x: the number.\n```" in text
    assert "Why this is so" not in text


def test_every_public_name_is_on_the_page_once():
    import vq4dit_jax

    made = make_api.page(vq4dit_jax)
    for name in vq4dit_jax.__all__:
        assert made.count(f"### `{name}`\n") == 1


def test_a_stale_page_fails_the_check(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_api, "PAGE", tmp_path / "api.md")
    assert make_api.main(["--check"]) == 1
    assert make_api.main([]) == 0 and make_api.main(["--check"]) == 0
    make_api.PAGE.write_text(make_api.PAGE.read_text().replace("Args:", "Arguments:", 1))
    assert make_api.main(["--check"]) == 1
    assert "run: python docs/make_api.py" in capsys.readouterr().err
