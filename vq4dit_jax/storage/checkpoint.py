"""The packed model on disk: orbax and safetensors, one manifest. Describes itself; loads with no config.

Both files hold the same arrays under the same names: a quantized kernel is its leaf's arrays, `<path>/<name>` (of a
`VQArray` codebook and assignments); all else is one array under its path. `docs/checkpoints.md` decodes them in five lines
of numpy.
"""

import contextlib
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from vq4dit_jax import files
from vq4dit_jax.errors import InputError
from vq4dit_jax.files import atomic_path
from vq4dit_jax.networks.registry import Model, check_fits, restore
from vq4dit_jax.qarray.base import KINDS, is_quantized
from vq4dit_jax.qarray.parts import from_parts, is_parts, parts_of
from vq4dit_jax.qarray.tree import flatten as flatten_tree
from vq4dit_jax.qarray.tree import unflatten
from vq4dit_jax.storage import manifest as manifests
from vq4dit_jax.storage.manifest import Manifest

_PART = "part_"


def _named(params: Any) -> Iterator[tuple[str, Any]]:
    """(name in the file, leaf) of every leaf; the parts of a stack are numbered."""
    for path, leaf in flatten_tree(params).items():
        for i, (_, part) in enumerate(parts_of(leaf)):
            yield (f"{path}/{_PART}{i}" if is_parts(leaf) else path), part


def flatten(params: Any) -> dict[str, np.ndarray]:
    """'/'-joined names to numpy arrays, quantized leaves as their own arrays, parts of a stack numbered."""
    out: dict[str, np.ndarray] = {}
    for name, leaf in _named(params):
        if is_quantized(leaf):
            out.update({f"{name}/{key}": np.asarray(array) for key, array in leaf.arrays().items()})
        else:
            out[name] = np.asarray(leaf)
    return out


def make_manifest(model: Model, params: Any, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a reader needs beside the arrays. `quantized` maps a name to the kind and the static facts of its leaf."""
    quantized = {name: {"kind": leaf.kind, **leaf.facts()} for name, leaf in _named(params) if is_quantized(leaf)}
    mixed = {path: len(leaf) for path, leaf in flatten_tree(params).items() if is_parts(leaf)}
    return manifests.make(model, quantized, mixed, extra)


def _rebuild(arrays: dict[str, Any], manifest: Any, source: str) -> tuple[Model, dict[str, Any]]:
    """Arrays and manifest back to (model, params), validated."""
    read = manifests.read(manifest, source)
    model = restore(read.model, source)
    leaves = _kept(arrays, read, source)
    for name, facts in read.quantized.items():
        own = {key[len(name) + 1 :]: a for key, a in arrays.items() if key.startswith(name + "/")}
        leaves[name] = KINDS[facts["kind"]].restore(own, facts, f"{source}: {name}")
    for path, count in read.mixed.items():
        names = [f"{path}/{_PART}{i}" for i in range(count)]
        if missing := [name for name in names if name not in leaves]:
            raise InputError(f"{source}: {missing[0]} is in the manifest and not in the file; it is damaged")
        leaves[path] = from_parts([leaves.pop(name) for name in names])
    for name in leaves:
        parents = itertools.accumulate(name.split("/")[:-1], "{}/{}".format)
        if both := next((parent for parent in parents if parent in leaves), None):
            raise InputError(f"{source}: {both[:80]} is an array and has others under it; the file is damaged")
    params = unflatten(leaves)
    check_fits(model, params, source)
    return model, jax.tree.map(jnp.asarray, params)


def _kept(arrays: dict[str, Any], read: Manifest, source: str) -> dict[str, Any]:
    """The arrays that belong to no quantized leaf; InputError for what no parameter is."""
    owned = tuple(name + "/" for name in read.quantized)
    kept = {name: a for name, a in arrays.items() if not (owned and name.startswith(owned))}
    for name, array in kept.items():
        floating = jnp.issubdtype(array.dtype, jnp.floating)
        if not floating and array.dtype.kind not in "iub":
            raise InputError(f"{source}: {name[:80]} is {array.dtype}; wanted numbers")
        if floating and not np.isfinite(np.asarray(array, np.float32)).all():
            raise InputError(f"{source}: {name[:80]} holds NaN or infinity; the file is damaged, make it again")
    return kept


def save_quantized(path: str | os.PathLike, model: Model, params: Any, extra: dict[str, Any] | None = None) -> None:
    """Writes the orbax folder `path`: packed arrays as nested dicts, the manifest in orbax's custom metadata.

    `model` is a `DiT`, or, for a network that is not ours, a dict of JSON values: what you will want to know to
    build it again. `extra` is any JSON value to keep in the manifest (the recipe, say). Written beside and renamed.
    """
    save_tree(path, unflatten(flatten(params)), make_manifest(model, params, extra))


def load_quantized(path: str | os.PathLike) -> tuple[Model, dict[str, Any], dict[str, Any]]:
    """(model, params, manifest); `model.apply` takes the params as they are.

    Of a network that is not ours `model` is the dict it was saved with; its module runs on `dequantize(params)`.
    """
    tree, manifest = load_tree(path)
    arrays = flax.traverse_util.flatten_dict(tree, sep="/") if isinstance(tree, dict) else {}
    return *_rebuild(arrays, manifest, str(path)), manifest


def save_safetensors(file: str | os.PathLike, model: Model, params: Any, extra: dict[str, Any] | None = None) -> None:
    """Writes the same arrays and manifest as one safetensors file (manifest as JSON under `manifest` in its metadata)."""
    from safetensors.numpy import save_file

    manifest = make_manifest(model, params, extra)
    arrays = {name: np.ascontiguousarray(a) for name, a in flatten(params).items()}
    with atomic_path(file) as partial:
        # One entry, because safetensors writes several in an order that differs from process to process.
        save_file(arrays, partial, metadata={"manifest": json.dumps(manifest, sort_keys=True)})
        partial.chmod(0o666 & ~_umask())  # safetensors writes it for its owner alone


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load_safetensors(file: str | os.PathLike) -> tuple[Model, dict[str, Any], dict[str, Any]]:
    """(model, params, manifest), as `load_quantized`, of a file that `save_safetensors` wrote."""
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(file):
        raise InputError(f"{file}: no such file; wanted a model.safetensors written by vq4dit-jax")
    try:
        with safe_open(file, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}
    except SafetensorError as error:
        raise InputError(f"{file} is no readable safetensors file ({error}); it is truncated or damaged") from None
    if "manifest" not in metadata:
        raise InputError(f"{file} has no vq4dit-jax manifest; a full-precision checkpoint is loaded by load_pretrained")
    manifest = manifests.parse(metadata["manifest"], str(file))
    return *_rebuild(arrays, manifest, str(file)), manifest


def save_tree(path: str | os.PathLike, tree: Any, metadata: dict[str, Any]) -> None:
    """Writes a pytree of arrays as an orbax folder, beside and renamed.

    Uncompressed, a file for each array: codes have next to no redundancy, the size on disk is then the count of bits,
    and the same model gives the same size every time.
    """
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.use_ocdbt = False
    arrays = jax.tree.map(np.asarray, tree)
    with atomic_path(path, "folder") as partial, context, _errors_only():
        files.reserve(partial, sum(a.nbytes for a in jax.tree.leaves(arrays)))
        try:
            ocp.save(partial.absolute(), arrays, custom_metadata=metadata)
            # Orbax names the folder that it wrote to, which is nobody's business and makes sizes depend on it.
            if (mark := partial / "commit_success.txt").exists():
                mark.write_text("Checkpoint commit was successful", encoding="utf-8")
        finally:
            # What orbax leaves beside the target when it is interrupted.
            for rest in partial.parent.glob(f"{partial.name}.orbax-checkpoint-tmp*"):
                shutil.rmtree(rest, ignore_errors=True)


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    """Orbax warns that there are no OCDBT files to merge or to read, which is as it should be."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def load_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """The metadata of an orbax folder, without its arrays."""
    from orbax.checkpoint import v1 as ocp

    with _readable(path) as folder:
        return ocp.metadata(folder).custom_metadata or {}


def load_tree(path: str | os.PathLike) -> tuple[Any, dict[str, Any]]:
    """(tree, metadata) of an orbax folder: nested dicts of numpy arrays."""
    from orbax.checkpoint import v1 as ocp

    with _readable(path) as folder:
        return ocp.load(folder), ocp.metadata(folder).custom_metadata or {}


@contextlib.contextmanager
def _readable(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """The absolute folder; what goes wrong while it is read is an InputError."""
    folder = pathlib.Path(path).absolute()
    files.recover(folder)
    if not folder.is_dir():
        raise InputError(f"{path}: no such folder; wanted an orbax checkpoint")
    try:
        with _errors_only():
            yield folder
    except Exception as error:  # orbax and tensorstore raise many kinds for a damaged folder
        raise InputError(f"{path} is no readable orbax checkpoint ({type(error).__name__}: {error})") from error


def _names(tree: Any) -> list[str]:
    return [
        jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


def save_state(path: str | os.PathLike, state: Any, metadata: dict[str, Any]) -> None:
    """Writes any pytree of arrays (structs, optimizer states) by the names of its leaves."""
    flat = dict(zip(_names(state), jax.tree.leaves(state), strict=True))
    tree = flax.traverse_util.unflatten_dict(flat, sep="/")
    save_tree(path, tree, {"format": files.STATE_FORMAT, **metadata})


def load_state(path: str | os.PathLike, like: Any) -> tuple[Any, dict[str, Any]]:
    """(state of `like`'s structure, metadata); InputError where a leaf is missing or has another shape."""
    tree, metadata = load_tree(path)
    flat = flax.traverse_util.flatten_dict(tree, sep="/")
    leaves = []
    for name, wanted in zip(_names(like), jax.tree.leaves(like), strict=True):
        found = flat.get(name)
        if found is None or found.shape != wanted.shape or found.dtype != wanted.dtype:
            what = "nothing" if found is None else f"{found.dtype}{found.shape}"
            raise InputError(
                f"{path}: {name} is {what}; wanted {wanted.dtype}{wanted.shape}; remove the folder to start anew"
            )
        leaves.append(jnp.asarray(found))
    given = {key: value for key, value in metadata.items() if key != "format"}
    return jax.tree.unflatten(jax.tree.structure(like), leaves), given
