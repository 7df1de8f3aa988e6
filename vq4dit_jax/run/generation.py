"""Sampling at scale: any number of images in bounded memory, over all devices and processes, resumable.

The images are cut by global index into shards of `batch` images. A device makes one shard at a time, so the bits of a
shard depend on nothing but its recipe: not on how many devices and processes there are, nor on where an earlier
run was killed. Processes share a folder and nothing else: each makes the missing ones among its own, every P-th, and the first
process joins them into ADM's `.npz`.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator
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
from vq4dit_jax.npz import write_npz
from vq4dit_jax.progress import progress
from vq4dit_jax.storage.identity import Claim

Decoder = Callable[[Float[np.ndarray, "B H W C"]], Float[np.ndarray, "B H2 W2 3"]]
"""Model space to images in [-1, 1]."""
_POLL_SECONDS = 0.5
PATIENCE = 30 * 60.0
"""Seconds without a new file after which another process is taken for dead."""


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
        if not math.isfinite(self.cfg_scale):
            raise InputError(f"cfg_scale={self.cfg_scale}: wanted a finite number")
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
    patience: float = PATIENCE,
) -> None:
    """Writes `target`, an `.npz` with `arr_0` uint8 (num_images, H, W, 3), from shards in a folder beside it.

    Shards that are there already are kept: the caller sees to it that they belong to the same plan, model and key. All
    processes of a `jax.distributed` job call this with a `target` on a file system that they share; it returns in
    each when the file is complete.

    Raises:
      InputError: labels that the model does not have, samples that are not finite, or a process of the job that has not
        made a shard that is its own while nothing new has come for `patience` seconds.
    """
    target = pathlib.Path(target)
    if target.exists():
        return
    shards = target.with_name(f".{target.stem}-shards")
    shards.mkdir(parents=True, exist_ok=True)
    as_network(model).conditioning.choose(plan.labels, key, plan.indices(0))  # refuses bad labels before the work
    missing = [shard for shard in range(plan.num_shards) if not _is_whole(plan, shards, shard)]
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
    paths = [_path(shards, shard) for shard in range(plan.num_shards)]
    if jax.process_index() == 0:
        _wait_for(lambda: all(path.exists() for path in paths), paths, target, patience)
        first = _load(paths[0])
        parts = (_load(path) for path in paths)
        write_npz(target, (plan.num_images, *first.shape[1:]), np.uint8, parts)
        files.remove(shards)
    else:
        _wait_for(target.exists, paths, target, patience)


def _path(folder: pathlib.Path, shard: int) -> pathlib.Path:
    return folder / f"{shard:06d}.npy"


def _load(path: pathlib.Path) -> UInt8[np.ndarray, "B H W 3"]:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise InputError(f"{path} is no readable array ({error}); remove it and run the same command again") from None


def _is_whole(plan: Plan, folder: pathlib.Path, shard: int) -> bool:
    """Whether a shard is there with all its images; one that a crash of the machine has cut is made again."""
    if not _path(folder, shard).is_file():
        return False
    try:
        images = _load(_path(folder, shard))
    except InputError:
        return False
    return images.dtype == np.uint8 and images.ndim == 4 and len(images) == _images(plan, {shard})


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


def _wait_for(condition: Callable[[], bool], paths: list[pathlib.Path], target: pathlib.Path, patience: float) -> None:
    """Other processes are waited for by their files: no collective that could time out in hours of sampling.

    InputError where none of the shards at `paths`, and no other file there, has come or grown for `patience` seconds: a
    process is dead then.
    """
    since, before = time.monotonic(), None
    while not condition():
        now = _sizes((paths[0].parent, target.parent))
        if now != before:
            since, before = time.monotonic(), now
        elif time.monotonic() - since > patience:
            first = next((i for i, path in enumerate(paths) if not path.exists()), None)
            missing, process = (target, 0) if first is None else (paths[first], first % jax.process_count())
            raise InputError(
                f"{missing}, of process {process}, has not come, nor has anything else for {patience / 60:g} minutes; see why "
                "that process ended, and start the same command again in all of them"
            )
        time.sleep(_POLL_SECONDS)


def _sizes(folders: tuple[pathlib.Path, ...]) -> dict[str, int]:
    """The files in some folders with their sizes; a file may go while they are counted."""
    out = {}
    for where in folders:
        with contextlib.suppress(FileNotFoundError), os.scandir(where) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    out[entry.name] = entry.stat().st_size
    return out


def claim(made_from: Claim, patience: float = PATIENCE) -> None:
    """Takes a folder for a job: the first process writes what the samples are made from, the others wait for it and compare."""
    deadline = time.monotonic() + patience
    if jax.process_index() == 0:
        made_from.take()
        return
    while not made_from.file.exists():
        if time.monotonic() > deadline:
            raise InputError(
                f"{made_from.file} has not been written by process 0 for {patience / 60:g} minutes; see why it does not run, "
                "and whether all processes share the folder"
            )
        time.sleep(_POLL_SECONDS)
    made_from.check()
