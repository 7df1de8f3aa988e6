"""The model that was trained further than the built-in one: its file, its card, and that it is the better of the two."""

import dataclasses
import io
import json
import pathlib
import re
import shlex
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import vq4dit_jax as vq
from examples import export, objective, train_reference
from vq4dit_jax.diffusion import schedule as diffusion
from vq4dit_jax.files import asset
from vq4dit_jax.run.config import cifar10

FIRST, LONGER = "dit_cifar10", "dit_cifar10_30epochs"
RUN = pathlib.Path(__file__).parents[1] / "benchmarks/results/reference_cifar10"
PER_CLASS = 40


def unseen_images(tar: pathlib.Path, classes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(images in [-1, 1], labels): the first of each class among the test images."""
    wanted = {f"test/{name}/{i:04d}.jpg": label for label, name in enumerate(classes) for i in range(PER_CLASS)}
    found = {}
    with tarfile.open(tar, "r:xz") as archive:
        for member in archive:
            if member.name in wanted:
                with Image.open(io.BytesIO(archive.extractfile(member).read())) as image:
                    found[member.name] = np.asarray(image, np.float32) / 127.5 - 1
            if len(found) == len(wanted):
                break
    names = sorted(found)
    assert len(names) == PER_CLASS * len(classes)
    return np.stack([found[name] for name in names]), np.array([wanted[name] for name in names], np.int32)


def test_it_predicts_the_noise_of_images_that_neither_has_seen_better(shared):
    x0, labels = unseen_images(shared / "data/cifar10/cifar10_jpg.tar.xz", cifar10().evaluation.class_names)
    sched = diffusion.make_schedule(diffusion.TRAIN_STEPS)
    noise = jax.random.normal(jax.random.key(0), x0.shape, jnp.float32)
    t = jnp.arange(len(x0), dtype=jnp.int32) * 619 % diffusion.TRAIN_STEPS  # every class at early and late time steps
    x_t = objective.diffuse(sched, jnp.asarray(x0), noise, t)

    def loss(name: str) -> np.ndarray:
        model, params = vq.load_pretrained(asset(f"{name}.safetensors"))
        output = jax.jit(model.apply)({"params": params}, x_t, t, jnp.asarray(labels))
        return np.asarray(objective.losses(sched, output, jnp.asarray(x0), noise, t)[0])

    gain = loss(FIRST) - loss(LONGER)
    assert gain.mean() > 3 * gain.std() / np.sqrt(len(gain))


def test_it_has_the_shape_of_the_built_in_model_and_other_weights():
    (theirs, first), (model, longer) = (vq.load_pretrained(asset(f"{name}.safetensors")) for name in (FIRST, LONGER))
    assert model == theirs
    assert jax.tree.map(jnp.shape, longer) == jax.tree.map(jnp.shape, first)
    same = [bool((a == b).all()) for a, b in zip(*map(jax.tree.leaves, (first, longer)), strict=True)]
    assert sum(same) == 1  # the position table, which is not trained
    assert asset(f"{LONGER}.safetensors").stat().st_size < 12e6


def test_the_card_is_of_the_run_in_the_results():
    card = asset(f"{LONGER}.md").read_text(encoding="utf-8")
    metrics = json.loads((RUN / "metrics.json").read_text(encoding="utf-8"))
    config = json.loads((RUN / "config.json").read_text(encoding="utf-8"))
    log = [json.loads(line) for line in (RUN / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert f"| figures | {export.spell(metrics)} |" in card
    assert metrics["step"] == config["steps"] == log[-1]["step"]
    assert f"{config['steps']} steps of batch {config['batch']} " in card
    assert f"`{config['init']}`" in card and config["data_sha256"] in card
    command = re.search(r"\| command \| `python -m examples.train_reference (.*)` \|", card)[1]
    flags = train_reference.parser().parse_args(shlex.split(command))
    recipe = dataclasses.asdict(train_reference._recipe(flags))
    assert {"variant": flags.variant, "init": flags.init, **recipe}.items() <= config.items()
