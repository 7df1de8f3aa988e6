"""What a result was made from: one identity for everything that is resumed or kept.

Two things are the same where they were made from the same facts: values of a config, and digests of files and of trees
(`provenance.digest`), never paths. A `Claim` keeps the facts beside the result and refuses another's.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

from vq4dit_jax import files
from vq4dit_jax.errors import InputError

_SHOWN = 3
"""Differences that a message names."""


def canonical(value: Any) -> str:
    """JSON with sorted keys: equal values give equal text. TypeError or ValueError for what strict JSON cannot hold."""
    return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))


def identity(**facts: Any) -> str:
    """SHA-256 (hexadecimal) of named facts, JSON values all; the order of names and of keys does not matter."""
    return hashlib.sha256(canonical(facts).encode()).hexdigest()


def digest_file(path: str | os.PathLike) -> str:
    """SHA-256 (hexadecimal) of a file's content, or of the names and contents of all files in a folder.

    Hidden files are left out: download tools and notebooks keep notes of their own there.

    InputError where nothing is there, or what is there is neither.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        inside = (p.relative_to(path) for p in path.rglob("*") if p.is_file())
        shown = [name for name in inside if not any(part.startswith(".") for part in name.parts)]
        return identity(**{name.as_posix(): digest_file(path / name) for name in shown})
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differences(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(key, "key (value here, value there)") of each difference between two JSON objects, keys as `section.key`.

    In the order of ours.
    """
    out = []
    for key in dict.fromkeys([*ours, *theirs]):
        here, there = (json.loads(json.dumps(facts.get(key))) for facts in (ours, theirs))
        if isinstance(here, dict) and isinstance(there, dict):
            out += differences(here, there, f"{prefix}{key}.")
        elif here != there:
            out.append((f"{prefix}{key}", f"{prefix}{key} ({_cut(here)} here, {_cut(there)} there)"))
    return out


def _cut(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-15:]}"


def spell(found: list[tuple[str, str]]) -> str:
    """The first few differences, as a message names them."""
    return ", ".join(text for _, text in found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")


def refuse_others(where: str | os.PathLike, ours: dict[str, Any], theirs: dict[str, Any], remedy: str) -> None:
    """Raises InputError, naming what differs, where the facts of what lies at `where` are not ours."""
    if found := differences(ours, theirs):
        raise InputError(f"{where} was made from something else: {spell(found)}; {remedy}")


@dataclasses.dataclass(frozen=True)
class Claim:
    """The file beside a result that says what the result is made from.

    Attributes:
      file: JSON; its folder is what is claimed.
      facts: all that decides the result.
      remedy: what the user may do where the folder is of other facts.
      about: makes what else is to be noted (devices, versions, date); it is not compared.
      section: the key of the file under which the facts stand; None: they stand among `about`.
      filled: gives facts of an older version the keys that are younger than they are.
    """

    file: pathlib.Path
    facts: dict[str, Any]
    remedy: str = "choose another folder"
    about: Callable[[], dict[str, Any]] = dict
    section: str | None = None
    filled: Callable[[dict[str, Any]], dict[str, Any]] = lambda facts: facts

    def differing(self) -> list[tuple[str, str]]:
        """The differences from what is claimed already; none where nothing is. InputError for a damaged file."""
        return differences(self.facts, self._theirs()) if self.file.exists() else []

    def _theirs(self) -> dict[str, Any]:
        held = files.read_json(self.file)
        if self.section is None:
            return self.filled({key: held.get(key) for key in self.facts})
        theirs = held.get(self.section)
        if not isinstance(theirs, dict):
            raise InputError(
                f"{self.file} has no {self.section!r}; it is damaged, or of another program; {self.remedy}"
            )
        return self.filled(theirs)

    def check(self) -> None:
        """Raises InputError where the folder was claimed with other facts."""
        if self.file.exists():
            refuse_others(self.file.parent, self.facts, self._theirs(), self.remedy)

    def take(self) -> None:
        """`check`, and writes the file where it is missing."""
        self.check()
        if not self.file.exists():
            facts = self.facts if self.section is None else {self.section: self.facts}
            files.write_json(self.file, {**facts, **self.about()})
