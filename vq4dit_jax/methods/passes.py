"""A method is a sequence of passes. A pass takes a model's parameters and returns better ones; the runner keeps what it made.

    params, report = pass_(run, params, key)        key = fold_in(root, crc32(name of the pass))

Each pass is a frozen dataclass whose fields are its settings. What it returns is written to a folder of its own, under the
identity of all that it was made of: the pass and its settings, the parameters it was given, the teacher, what the network
says of itself, the key and the version. A run that was stopped finds it there and goes on with the next pass; that is all
of resuming.
"""

import dataclasses
import os
import pathlib
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import numpy as np

from vq4dit_jax import __version__
from vq4dit_jax.networks.network import Network, as_network, check
from vq4dit_jax.qarray.tree import flatten, unflatten
from vq4dit_jax.storage import checkpoint, identity, provenance

Report = dict[str, Any]
REMEDY = "give another folder, or remove it"


@dataclasses.dataclass
class Context:
    """What the passes of a run share.

    Attributes:
      model: a module of this library, or a `Network`.
      network: how it is run.
      teacher: full-precision parameters, jax arrays.
      key: the root of the run's randomness; passes get keys of their own from it, and share those of `pass_key`.
      folder: where results are kept; None: nowhere. To a pass: where it may keep what it has while it runs.
      made_of: all that decides what is kept in `folder`, JSON-ready; None where nothing is kept.
      log_file: of the gradient steps, one JSON line each; None: no log.
      save_every: gradient steps between checkpoints.
      on_step: is given each line of the log.
      memo: results that several passes use, by what they are of; nothing in it is needed to resume.
    """

    model: Any
    network: Network
    teacher: Any
    key: Any = None
    folder: pathlib.Path | None = None
    made_of: dict[str, Any] | None = None
    log_file: str | os.PathLike | None = None
    save_every: int = 50
    on_step: Callable[[dict[str, Any]], None] = lambda line: None
    memo: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def recomputing(self) -> Network:
        """The network with blocks that are recomputed in a backward pass."""
        return as_network(self.model, remat=True)


@runtime_checkable
class Pass(Protocol):
    """A frozen dataclass; see the module."""

    name: ClassVar[str]

    def __call__(self, run: Context, params: Any, key: jax.Array) -> tuple[Any, Report]: ...


def pass_key(key: jax.Array, name: str) -> jax.Array:
    """The key of the pass (or part of one) of this name."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def begin(
    model: Any, teacher: Any, key: jax.Array, folder: str | os.PathLike | None = None, **settings: Any
) -> Context:
    """The context of a model (a module of ours, or a `Network`) and its full-precision parameters, which may be numpy's."""
    network = as_network(model)
    teacher = jax.device_put(teacher)
    check(network, teacher)
    return Context(model, network, teacher, key, None if folder is None else pathlib.Path(folder), **settings)


def apply(passes: Sequence[Pass], run: Context, params: Any) -> tuple[Any, list[Report]]:
    """(parameters after all passes, their reports). Passes whose result stands in `run.folder` are not run again.

    A report has the pass' `name` and `seconds`. Raises InputError where the folder holds the results of something else.
    """
    reports: list[Report] = []
    params = unflatten(flatten(params))  # plain dicts, of a FrozenDict too
    facts = None if run.folder is None else _facts(run, params)
    for number, one in enumerate(passes):
        folder = None if run.folder is None else run.folder / f"{number:02d}_{one.name}"
        if facts is not None:
            facts["passes"][f"{number:02d}_{one.name}"] = provenance.facts_of(one)
        if folder is not None and folder.exists():
            params, report = _read(folder, facts)
        else:
            begun = time.perf_counter()
            # A pass keeps what it has to itself beside its result, and knows it by the same facts.
            own = folder and folder.with_name(folder.name + "_steps")
            inner = dataclasses.replace(run, folder=own, made_of=facts)
            params, report = one(inner, params, pass_key(run.key, one.name))
            params = jax.block_until_ready(params)
            report = {"name": one.name, "seconds": round(time.perf_counter() - begun, 4), **report}
            if folder is not None:
                checkpoint.save_quantized(folder, {"pass": one.name}, params, {"made_of": facts, "report": report})
        reports.append(report)
    run.memo.clear()
    return params, reports


def _facts(run: Context, params: Any) -> dict[str, Any]:
    """All that decides a result, JSON-ready."""
    network = provenance.facts_of(run.network)
    return {
        "version": __version__,
        "teacher": provenance.digest(run.teacher),
        "parameters": provenance.digest(params),
        "key": np.asarray(jax.random.key_data(run.key)).tolist(),
        # `predict` and `hoist` are cheaper ways to what `apply` says.
        "network": {name: fact for name, fact in network.items() if name not in ("predict", "hoist")},
        "passes": {},
    }


def _read(folder: pathlib.Path, facts: dict[str, Any] | None) -> tuple[Any, Report]:
    _, params, manifest = checkpoint.load_quantized(folder)
    identity.refuse_others(folder.parent, facts or {}, manifest["extra"].get("made_of", {}), REMEDY)
    return params, manifest["extra"]["report"]
