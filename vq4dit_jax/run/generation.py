"""Sampling at scale: any number of images in bounded memory, over all devices and processes, resumable.

The images are cut by global index into shards of `batch` images. A device makes one shard at a time, so the bits of a
shard depend on nothing but its recipe: not on how many devices and processes there are, nor on where an earlier
run was killed. Processes share a folder and nothing else: each makes the missing ones among its own, every P-th, and the first
process joins them into ADM's `.npz`.
"""

import dataclasses
import json
import os
import pathlib
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8

from vq4dit_jax import files
from vq4dit_jax.diffusion.samplers import SAMPLERS
from vq4dit_jax.diffusion.sampling import replicated, to_uint8
from vq4dit_jax.errors import InputError
from vq4dit_jax.networks.network import as_network
from vq4dit_jax.networks.sampling import sample
from vq4dit_jax.progress import progress

Decoder = Callable[[Float[np.ndarray, "B H W C"]], Float[np.ndarray, "B H2 W2 3"]]
"""Model space to images in [-1, 1]."""
_POLL_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is sampled: with the model and the key, it decides every byte.

    Attributes:
      num_images: images in all.
      batch: images that a device makes at once, and in a shard.
      labels: "balanced" (image i has class i mod classes), "random", or classes that are taken in turn: "207,360".
      sampler, steps, cfg_scale: as in `networks.sampling.sample`.
    """

    num_images: int
    batch: int = 50
    labels: str = "balanced"
    sampler: str = "ddpm"
    steps: int = 250
    cfg_scale: float = 1.5

    def __post_init__(self):
        for name in ("num_images", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: wanted at least 1")
        if self.sampler not in SAMPLERS:
            raise InputError(f"sampler={self.sampler}: wanted one of {', '.join(SAMPLERS)}")
        if not 1 <= self.steps <= 1000:
            raise InputError(f"steps={self.steps}: wanted 1 to 1000")
        # A device is not made to fill up a batch that has fewer images than all.
        object.__setattr__(self, "batch", min(self.batch, self.num_images))

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.batch)

    def indices(self, shard: int) -> Int[np.ndarray, " batch"]:
        """Global indices of a shard's images; those of the last one go past the end, so that all have one shape."""
        return np.arange(shard * self.batch, (shard + 1) * self.batch)


def generate(
    plan: Plan,
    model: Any,
    params: Any,
    key: jax.Array,
    target: str | os.PathLike,
    decode: Decoder,
    description: str = "sample",
) -> None:
    """Writes `target`, an `.npz` with `arr_0` uint8 (num_images, H, W, 3), from shards in a folder beside it.

    Shards that are there already are kept: the caller sees to it that they belong to the same plan, model and key. All
    processes of a `jax.distributed` job call this with a `target` on a file system that they share; it returns in
    each when the file is complete.
    """
    target = pathlib.Path(target)
    shards = target.with_name(f".{target.stem}-shards")
    shards.mkdir(parents=True, exist_ok=True)
    as_network(model).conditioning.choose(plan.labels, key, plan.indices(0))  # refuses bad labels before the work
    missing = [shard for shard in range(plan.num_shards) if not _path(shards, shard).exists()]
    # By number, not by place in the list: the other processes' lists were made at other moments.
    mine = [shard for shard in missing if shard % jax.process_count() == jax.process_index()]
    params = jax.device_put(params, replicated())
    with progress(plan.num_images, description, "image") as bar:
        # Progress counts the other processes' images as they are made, this one's as it makes them.
        bar.update(_images(plan, set(range(plan.num_shards)) - set(missing)))
        bar.unpause()
        for group in _groups(mine, jax.local_device_count()):
            for shard, images in _make(plan, model, params, key, decode, group):
                with files.atomic_path(_path(shards, shard)) as partial, open(partial, "wb") as file:
                    np.save(file, images)
            bar.update(_images(plan, set(group)) * jax.process_count())
    if jax.process_index() == 0:
        paths = [_path(shards, shard) for shard in range(plan.num_shards)]
        _wait_for(lambda: all(path.exists() for path in paths))
        first = np.load(paths[0], mmap_mode="r")
        parts = (np.load(path) for path in paths)
        write_npz(target, (plan.num_images, *first.shape[1:]), np.uint8, parts)
        files.remove(shards)
    else:
        _wait_for(target.exists)


def _path(folder: pathlib.Path, shard: int) -> pathlib.Path:
    return folder / f"{shard:06d}.npy"


def _images(plan: Plan, shards: set[int]) -> int:
    return sum(min(plan.batch, plan.num_images - shard * plan.batch) for shard in shards)


def _groups(shards: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(shards), size):
        yield shards[start : start + size]


def _make(
    plan: Plan, model: Any, params: Any, key: jax.Array, decode: Decoder, group: list[int]
) -> Iterator[tuple[int, UInt8[np.ndarray, "B H W 3"]]]:
    """The images of at most one shard a device; devices without one repeat the last, so that one program serves all."""
    filled = group + group[-1:] * (jax.local_device_count() - len(group))
    indices = np.concatenate([plan.indices(shard) for shard in filled])
    x = sample(
        model,
        params,
        as_network(model).conditioning.choose(plan.labels, key, indices),
        key=key,
        num_steps=plan.steps,
        sampler=plan.sampler,
        cfg_scale=plan.cfg_scale,
        indices=indices,
    )
    for lane, shard in enumerate(group):
        rows = np.asarray(x[lane * plan.batch : (lane + 1) * plan.batch])
        if not np.isfinite(rows).all():
            raise InputError(
                f"shard {shard}: the model gives NaN or infinity; the checkpoint is damaged, or its dtype is too narrow"
            )
        yield shard, to_uint8(decode(rows))[: _images(plan, {shard})]


def _wait_for(condition: Callable[[], bool]) -> None:
    """Other processes are waited for by their files: no collective that could time out in hours of sampling."""
    while not condition():
        time.sleep(_POLL_SECONDS)


def write_npz(target: str | os.PathLike, shape: tuple[int, ...], dtype: Any, parts: Iterable[np.ndarray]) -> None:
    """Writes `arr_0` of this shape from its parts along the first axis, one at a time, as `np.savez` would in one go.

    The same array gives the same bytes however it was cut. A file of 10 GB takes the memory of a part.
    """
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    with files.atomic_path(target) as partial:
        files.reserve(partial, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        entry = zipfile.ZipInfo("arr_0.npy", date_time=(1980, 1, 1, 0, 0, 0))
        entry.external_attr = 0o644 << 16
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            with archive.open(entry, "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                written = 0
                for part in parts:
                    if part.shape[1:] != shape[1:] or part.dtype != dtype:
                        raise InputError(
                            f"{target}: a part is {part.dtype}{part.shape}; wanted {np.dtype(dtype)}(..., {shape[1:]})"
                        )
                    member.write(part.tobytes())
                    written += len(part)
        if written != shape[0]:
            raise InputError(f"{target}: its parts hold {written} images; wanted {shape[0]}")


def read_head(file: str | os.PathLike, count: int) -> UInt8[np.ndarray, "N H W 3"]:
    """The first `count` images of an uncompressed or compressed `.npz`, without reading the rest."""
    with zipfile.ZipFile(file) as archive, archive.open("arr_0.npy") as member:
        np.lib.format.read_magic(member)
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
        shape = (min(count, shape[0]), *shape[1:])
        data = member.read(int(np.prod(shape)) * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(shape)


def claim(file: pathlib.Path, recipe: dict[str, Any], same: tuple[str, ...]) -> None:
    """Writes `recipe` to `file`, or refuses where one is there that differs in the keys `same`."""
    if file.exists():
        theirs = json.loads(file.read_text(encoding="utf-8"))
        differing = [
            f"{key} ({recipe[key]} here, {theirs.get(key)} there)" for key in same if recipe[key] != theirs.get(key)
        ]
        if differing:
            raise InputError(
                f"{file.parent} holds samples of another recipe: {', '.join(differing)}; choose another folder"
            )
    elif jax.process_index() == 0:
        files.write_json(file, recipe)
