"""Opens a file of weights by its content, not by its name, and the shards that an index lists."""

import pathlib

from convert.checkpoint import Checkpoint, read_json
from convert.safetensors_files import open_safetensors
from convert.sniff import JSON, SAFETENSORS, UNKNOWN, sniff
from convert.torch_files import open_torch
from vq4dit_jax.errors import InputError


def open_weights(path: pathlib.Path) -> Checkpoint:
    """Opens a PyTorch or safetensors file, or the shards that an `.index.json` lists."""
    kind = sniff(path)
    if kind == JSON:
        return _open_index(path)
    if kind == SAFETENSORS or (kind == UNKNOWN and path.suffix == ".safetensors"):
        return open_safetensors(path)
    return open_torch(path)


def _open_index(path: pathlib.Path) -> Checkpoint:
    index = read_json(path)
    if "weight_map" in index or path.name.endswith(".index.json"):
        return _open_shards(path, index.get("weight_map"))
    if isinstance(index.get("error"), str):
        raise InputError(f"{path}: a server's message, not weights: {index['error'][:120]}; download the file again")
    if "_class_name" in index or "architectures" in index or "model_type" in index:
        raise InputError(f"{path}: a model's config, not its weights; give the folder that it lies in")
    raise InputError(f"{path}: JSON without a weight_map; a file of weights or a diffusers .index.json is wanted")


def _open_shards(index: pathlib.Path, weight_map: object) -> Checkpoint:
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise InputError(f"{index}: no weight_map from parameters' names to files in it")
    shards = {}
    for name in sorted(set(weight_map.values())):
        file = index.parent / name
        if pathlib.PurePath(name).name != name:
            raise InputError(f"{index}: names the file {name!r}; only files in its own folder are read")
        if not file.is_file():
            raise InputError(f"{file}: no such file; {index.name} wants it")
        if sniff(file) == JSON:
            raise InputError(f"{file}: an index or a config, not weights; {index.name} wants a shard of weights")
        shards[name] = open_weights(file)
    for parameter, file in weight_map.items():
        if parameter not in shards[file].shapes:
            raise InputError(f"{index.parent / file}: no parameter {parameter}, which {index.name} places there")
    return Checkpoint(
        index.parent,
        {parameter: shards[file].shapes[parameter] for parameter, file in weight_map.items()},
        lambda parameter: shards[weight_map[parameter]].read(parameter),
    )
