"""Writes docs/api.md from the docstrings of the names in `vq4dit_jax.__all__`.

    python docs/make_api.py           writes the page
    python docs/make_api.py --check   exit status 1 where the page is not what would be written

A function or class has its signature, the first paragraph of its docstring, and the sections (Args, Raises, Invariants, ...) as
they are. A module has its first paragraph. Groups are the packages that names come from. Standard library only.
"""

import argparse
import importlib
import inspect
import pathlib
import re
import sys
import types
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/api.md"
GROUPS = {
    "storage": "Checkpoints and files",
    "convert": "Foreign checkpoints",
    "qarray": "Quantized arrays",
    "methods": "Methods",
    "networks": "Networks",
    "diffusion": "Sampling",
    "evaluation": "Evaluation",
    "reporting": "Reports",
}
"""Title of each group by the package, in the order of the page. Packages that are not listed follow by name."""
_HEAD = """# Public names

Made by `python docs/make_api.py` from the docstrings; a test fails where this page is not up to date. All of these are
attributes of `vq4dit_jax`, imported as `import vq4dit_jax as vq`.
"""
_SECTION = re.compile(r"^(Args|Returns|Raises|Yields|Invariants|Attributes|Examples?|Raises [A-Z].*|Source)\b.*")


def sections(docstring: str) -> str:
    """The first paragraph, and every later one that begins like a section, with the indented lines that belong to it."""
    paragraphs = re.split(r"\n[ \t]*\n", inspect.cleandoc(docstring).strip())
    return "\n\n".join([paragraphs[0], *(p for p in paragraphs[1:] if _SECTION.match(p))])


def signature(name: str, value: Any) -> str:
    """On one line where it fits, else a parameter a line."""
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return name
    returned = _type(found.return_annotation)
    end = f") -> {returned}" if returned else ")"
    parameters = _parameters(found)
    line = f"{name}({', '.join(parameters)}{end}"
    return line if len(line) <= 120 else f"{name}(\n" + "".join(f"    {p},\n" for p in parameters) + end


def _parameters(found: inspect.Signature) -> list[str]:
    out, starred = [], False
    for parameter in found.parameters.values():
        kind = parameter.kind
        if kind is inspect.Parameter.KEYWORD_ONLY and not starred:
            out, starred = [*out, "*"], True
        starred = starred or kind is inspect.Parameter.VAR_POSITIONAL
        mark = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}.get(kind, "")
        typed = _type(parameter.annotation)
        equals = " = " if typed else "="
        default = "" if parameter.default is inspect.Parameter.empty else f"{equals}{_constant(parameter.default)}"
        out.append(f"{mark}{parameter.name}{': ' if typed else ''}{typed}{default}")
    return out


def _type(annotation: Any) -> str:
    """Without the names of modules; nothing where there is no annotation, or one too long to be read (jax's ArrayLike)."""
    if annotation is inspect.Parameter.empty or annotation is inspect.Signature.empty:
        return ""
    plain = isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias)
    text = annotation.__name__ if plain else str(annotation)
    text = re.sub(r"\b(?:\w+\.)+(?=[A-Za-z_])", "", text)
    return text if len(text) <= 80 and " at 0x" not in text and text != "Any" else ""


def _constant(value: Any) -> str:
    """A default, the same in every process."""
    if isinstance(value, type | types.FunctionType):
        return "..." if value.__name__ == "<lambda>" else value.__name__
    text = repr(value)
    return "..." if " at 0x" in text or len(text) > 60 or text == "<factory>" else text


def home(value: Any, name: str, namespace: Any) -> str:
    """The dotted module that a name comes from."""
    if isinstance(value, types.ModuleType):
        return value.__name__
    found = getattr(value, "__module__", None) or ""
    places = getattr(namespace, "_HOME", {})
    return places.get(name, found) if not found.startswith((namespace.__name__, "convert")) else found


def group(module: str, package: str) -> str:
    """The part of the house: "storage" of "vq4dit_jax.storage.checkpoint", "convert" of "convert.load"."""
    parts = module.split(".")
    return parts[1] if parts[0] == package and len(parts) > 1 else parts[0]


def entry(name: str, value: Any, module: str) -> str:
    """One name of the page, in Markdown."""
    if isinstance(value, types.ModuleType):
        first = sections(value.__doc__ or "").split("\n\n")[0]
        return f"### `{name}`\n\nThe package `{module}`. {first}\n"
    if not callable(value):
        text = f"a {type(value).__name__} of {len(value)}" if isinstance(value, dict) else _constant(value)
        return f"### `{name}`\n\nA constant of `{module}`: {text}.\n"
    # A dataclass without a docstring gets its signature for one; that of a class is not inherited.
    doc = (value.__dict__.get("__doc__") if isinstance(value, type) else value.__doc__) or ""
    text = "" if doc.startswith(f"{name}(") else sections(doc)
    return f"### `{name}`\n\n```python\n{signature(name, value)}\n```\n\nFrom `{module}`.\n\n{_verbatim(text)}\n"


def _verbatim(text: str) -> str:
    """Paragraphs as text; those with indented lines as a block, in which line breaks and names stay as they are."""
    blocks = text.split("\n\n")
    return "\n\n".join(f"```text\n{b}\n```" if re.search(r"^[ \t]+\S", b, re.MULTILINE) else b for b in blocks)


def page(namespace: Any) -> str:
    """The whole page for a package with `__all__`."""
    found: dict[str, list[tuple[str, Any, str]]] = {}
    for name in namespace.__all__:
        value = getattr(namespace, name)
        module = home(value, name, namespace)
        found.setdefault(group(module, namespace.__name__), []).append((name, value, module))
    order = [*(g for g in GROUPS if g in found), *sorted(set(found) - set(GROUPS))]
    parts = [_HEAD]
    for one in order:
        # Functions and classes first, then the module itself.
        names = sorted(found[one], key=lambda item: (isinstance(item[1], types.ModuleType), item[0].lower()))
        parts.append(f"## {GROUPS.get(one, one)}\n")
        parts += [entry(*item) for item in names]
    return "\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python docs/make_api.py", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page is stale")
    flags = parser.parse_args(arguments)
    sys.path.insert(0, str(ROOT))
    made = page(importlib.import_module("vq4dit_jax"))
    if not flags.check:
        PAGE.write_text(made)
        return 0
    if PAGE.exists() and PAGE.read_text() == made:
        return 0
    print("docs/api.md is not what the docstrings say; run: python docs/make_api.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
