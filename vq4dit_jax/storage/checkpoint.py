"""The packed model on disk: orbax and safetensors, one manifest. Describes itself; loads with no config.

Both files hold the same arrays under the same names: a quantized kernel is two arrays, `<path>/codebook` and
`<path>/assignments`; all else is one array under its path. `docs/checkpoints.md` decodes them in five lines of numpy.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

import pallas_kernels
from vq4dit_jax import files
from vq4dit_jax.errors import InputError
from vq4dit_jax.files import atomic_path
from vq4dit_jax.networks.dit import DiT
from vq4dit_jax.qarray.vq import VQArray, validate

FORMAT, VERSION = files.MODEL_FORMAT, 1
_PART = "part_"
_FOREIGN = "foreign"
Model = Any
"""A `DiT`, or a dict of JSON values that describes a network that is not ours; `_describe` refuses others."""


def _fields(model: DiT) -> dict[str, Any]:
    """The module's own fields, JSON-ready."""
    skip = {"parent", "name", "remat"}  # remat is no property of the model
    values = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in skip}
    return {**values, "dtype": jnp.dtype(model.dtype).name}


def _describe(model: Model) -> dict[str, Any]:
    """The manifest's `model`: a DiT's class and fields, or the metadata of a network that is not ours."""
    if isinstance(model, DiT):
        return {"class": "DiT", "fields": _fields(model)}
    if not isinstance(model, Mapping):
        raise InputError(
            f"model is a {type(model).__name__}; wanted a vq4dit_jax.DiT, or for a network of your own a dict that "
            "describes it, such as {'name': ..., 'depth': ...}"
        )
    try:
        return {"class": _FOREIGN, "metadata": json.loads(json.dumps(dict(model), allow_nan=False))}
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the dict that describes your network is no JSON ({error}); wanted text, numbers, lists"
        ) from None


def _restore(described: dict[str, Any]) -> Model:
    """What `_describe` was given."""
    if described["class"] == _FOREIGN:
        return described["metadata"]
    fields = described["fields"]
    return DiT(**{**fields, "dtype": jnp.dtype(fields["dtype"])})


def flatten(params: Any) -> dict[str, np.ndarray]:
    """'/'-joined names to numpy arrays, quantized leaves as their two arrays, parts of a mixed stack numbered."""
    out: dict[str, np.ndarray] = {}
    for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items():
        for name, part in _named_parts(path, leaf):
            if isinstance(part, VQArray):
                out[f"{name}/codebook"] = np.asarray(part.codebook)
                out[f"{name}/assignments"] = np.asarray(part.assignments)
            else:
                out[name] = np.asarray(part)
    return out


def _named_parts(path: str, leaf: Any) -> list[tuple[str, Any]]:
    if isinstance(leaf, tuple):
        return [(f"{path}/{_PART}{i}", part) for i, part in enumerate(leaf)]
    return [(path, leaf)]


def make_manifest(model: Model, params: Any, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a reader needs beside the arrays. `quantized` maps a path to the static facts of its `VQArray`."""
    quantized, mixed = {}, {}
    for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items():
        if isinstance(leaf, tuple):
            mixed[path] = len(leaf)
        for name, part in _named_parts(path, leaf):
            if isinstance(part, VQArray):
                quantized[name] = {
                    "shape": list(part.shape),
                    "codewords": part.num_codewords,
                    "subvector": part.subvector_length,
                    "groups": part.num_groups,
                    "code_bits": pallas_kernels.code_bits(part.num_codewords),
                }
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": _describe(model),
        "quantized": quantized,
        "mixed": mixed,
        "extra": extra or {},
    }


def _rebuild(arrays: dict[str, Any], manifest: dict[str, Any], source: str) -> tuple[Model, dict[str, Any]]:
    """Arrays and manifest back to (model, params), validated."""
    if manifest.get("format") != FORMAT:
        raise InputError(f"{source} is no vq4dit-jax model (its manifest says format={manifest.get('format')!r})")
    if manifest["version"] > VERSION:
        raise InputError(
            f"{source} has manifest version {manifest['version']}; this vq4dit-jax reads {VERSION}; update it"
        )
    arrays = dict(arrays)
    for name, facts in manifest["quantized"].items():
        try:
            codebook, codes = arrays.pop(f"{name}/codebook"), arrays.pop(f"{name}/assignments")
        except KeyError as missing:
            raise InputError(
                f"{source}: array {missing} is in the manifest and not in the file; it is damaged"
            ) from None
        leaf = VQArray(codebook, codes, tuple(facts["shape"]))
        validate(leaf, f"{source}: {name}")
        arrays[name] = leaf
    for path, count in manifest["mixed"].items():
        arrays[path] = tuple(arrays.pop(f"{path}/{_PART}{i}") for i in range(count))
    params = flax.traverse_util.unflatten_dict(arrays, sep="/")
    return _restore(manifest["model"]), jax.tree.map(jnp.asarray, params)


def save_quantized(path: str | os.PathLike, model: Model, params: Any, extra: dict[str, Any] | None = None) -> None:
    """Writes the orbax folder `path`: packed arrays as nested dicts, the manifest in orbax's custom metadata.

    `model` is a `DiT`, or, for a network that is not ours, a dict of JSON values: what you will want to know to
    build it again. `extra` is any JSON value to keep in the manifest (the recipe, say). Written beside and renamed.
    """
    tree = flax.traverse_util.unflatten_dict(flatten(params), sep="/")
    save_tree(path, tree, make_manifest(model, params, extra))


def load_quantized(path: str | os.PathLike) -> tuple[Model, dict[str, Any], dict[str, Any]]:
    """(model, params, manifest); `model.apply` takes the params as they are.

    Of a network that is not ours `model` is the dict it was saved with; its module runs on `dequantize(params)`.
    """
    tree, manifest = load_tree(path)
    arrays = flax.traverse_util.flatten_dict(tree, sep="/")
    return *_rebuild(arrays, manifest, str(path)), manifest


def save_safetensors(file: str | os.PathLike, model: Model, params: Any, extra: dict[str, Any] | None = None) -> None:
    """Writes the same arrays and manifest as one safetensors file (manifest as JSON under `manifest` in its metadata)."""
    from safetensors.numpy import save_file

    manifest = make_manifest(model, params, extra)
    arrays = {name: np.ascontiguousarray(a) for name, a in flatten(params).items()}
    with atomic_path(file) as partial:
        save_file(arrays, partial, metadata={"format": FORMAT, "manifest": json.dumps(manifest)})
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
    manifest = json.loads(metadata["manifest"])
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
