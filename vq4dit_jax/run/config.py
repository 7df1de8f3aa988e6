"""The configuration of a run: every key with its default, and what the keys mean together."""

import math
import pathlib
import re
from collections.abc import Collection
from typing import Any

import ml_collections

from vq4dit_jax.diffusion.samplers import SAMPLERS
from vq4dit_jax.errors import InputError
from vq4dit_jax.methods import method, viditq, vq4dit
from vq4dit_jax.methods.kmeans import KMeans
from vq4dit_jax.methods.method import Model, Recipe
from vq4dit_jax.methods.vq4dit import FINE, LAYERWISE
from vq4dit_jax.networks import dit
from vq4dit_jax.networks.rules import dit_rules
from vq4dit_jax.qarray.rules import BITS, Rule
from vq4dit_jax.qarray.spec import spec_from_json
from vq4dit_jax.run import seeds

DTYPES = ("float32", "bfloat16", "float16")


def default() -> ml_collections.ConfigDict:
    """All keys. A config file calls this, changes what it is about, and returns it locked."""
    c = ml_collections.ConfigDict()
    c.seed = 0
    """Root of all randomness: k-means, trajectories, samples."""
    c.beside = ()
    """Finished runs (workdirs) of the same model whose rows join this one's table; full-precision samples of the same
    recipe are taken from them."""

    c.model = ml_collections.ConfigDict()
    c.model.variant = ""  # "DiT-XL/2" and so on; "" where shapes tell all
    c.model.checkpoint = (
        ""  # a file or folder, "asset:NAME" (shipped), or "official:NAME" (cache folder, else download)
    )
    c.model.vae = ""  # of a model of latents: a diffusers folder or file, or "official:sd-vae-ft-ema"; "" for a preview
    c.model.update(dit.SETTINGS)
    c.model.random_init = False  # random weights of the variant, for timing
    c.model.depth = 0  # blocks of a random_init model; 0: the variant's
    c.model.input_size = 32  # of a random_init model: latent or image side

    c.quantize = ml_collections.ConfigDict()
    c.quantize.method = "vq4dit"  # "viditq": integers or codebooks with rounded activations; "rules": no calibration
    c.quantize.bits = 2.0  # 1, 1.5, 2, 3 or 4
    c.quantize.rules = ()  # ((path regex, (K, d, groups) or ()), ...), first match wins; () for the rules of `bits`
    c.quantize.kmeans_iterations = 100
    c.quantize.codebook_dtype = "float32"
    c.quantize.other_dtype = "float32"  # biases, embedders, final layer

    c.calibration = ml_collections.ConfigDict(
        {**vq4dit.defaults(), **LAYERWISE}
    )  # methods/vq4dit.py and tune.py explain them
    c.calibration.save_every = 50  # steps between checkpoints

    c.viditq = ml_collections.ConfigDict(viditq.SETTINGS)  # methods/viditq.py explains them

    c.sample = ml_collections.ConfigDict()
    c.sample.num_images = 1000
    c.sample.batch = 100  # images that a device makes at once
    c.sample.labels = "balanced"  # or "random", or classes taken in turn: "207,360"
    c.sample.sampler = "ddpm"
    c.sample.steps = 50
    c.sample.more_steps = ()  # further numbers of steps, for rows of the table
    c.sample.cfg_scale = 1.5
    c.sample.activations = (
        "float32"  # of quantized models; bfloat16, int8, e4m3: through the kernels of docs/kernels.md
    )
    c.sample.grid_images = 24  # images in the pictures and in the report

    c.evaluation = ml_collections.ConfigDict()
    c.evaluation.classifier = ""  # "cifar10_resnet56", a file of Inception weights, "official:NAME"; "" for none
    c.evaluation.reference = ""  # real images: a folder, an .npz of images or statistics, "asset:NAME", "official:NAME"
    c.evaluation.class_names = ()
    return c


def cifar10() -> ml_collections.ConfigDict:
    """The built-in demo model and its evaluation."""
    c = default()
    c.model.checkpoint = "asset:dit_cifar10.safetensors"
    c.quantize.codebook_dtype = "float16"  # on so small a model float32 codebooks would cost 0.35 bits a weight
    c.quantize.other_dtype = "float16"
    c.calibration.allocation = "layers"
    c.calibration.batch = 8
    c.calibration.steps = 300
    c.sample.num_images = 400
    c.sample.steps = 25
    c.evaluation.classifier = "cifar10_resnet56"
    c.evaluation.reference = "asset:cifar10_reference.npz"
    c.evaluation.class_names = (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"
    )  # fmt: skip
    return c


def w8a8(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """ViDiT-Q with 8-bit weights, a scale for each row, and 8-bit activations."""
    c.quantize.method = "viditq"
    c.sample.activations = "int8"
    return c


def w4a8(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """ViDiT-Q with 4-bit weights, a scale for each row and 128 inputs as the kernels have it, and 8-bit activations."""
    c = w8a8(c)
    c.viditq.update(weight_bits=4.0, weight_group=128)
    return c


def w4a8_mp(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The same with 4.0 bits a weight in all, spread over the layers."""
    c = w4a8(c)
    c.viditq.budget = 4.0
    return c


def w2a8(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """VQ4DiT's codebooks of 2 bits a weight on ViDiT-Q's 8-bit activations."""
    c = w8a8(c)
    c.viditq.update(weights="codebooks", weight_bits=2.0, balance=False)
    return c


def xl2(image_size: int, bits: float) -> ml_collections.ConfigDict:
    """The published DiT-XL/2 with the batch, steps and guidance of the paper."""
    c = default()
    c.model.variant = "DiT-XL/2"
    c.model.checkpoint = f"official:DiT-XL-2-{image_size}x{image_size}.pt"
    c.model.vae = "official:sd-vae-ft-ema"
    c.model.input_size = image_size // 8
    c.quantize.bits = bits
    c.calibration.batch = 16
    c.calibration.steps = 500
    c.calibration.save_every = 100
    c.calibration.remat = True
    c.calibration.budget = 1.005
    if bits >= 3:
        c.calibration.update(FINE)
    c.calibration.allocation = "roles"  # blocks stay one stack, which the kernels take in one launch
    c.sample.num_images = 10_000
    c.sample.batch = 50
    c.sample.steps = 50
    c.sample.more_steps = (100, 250)
    c.evaluation.classifier = "official:inception-2015-12-05"
    c.evaluation.reference = f"official:imagenet{image_size}"
    return c


def models(config: ml_collections.ConfigDict) -> tuple[Model, ...]:
    """The models that a run makes, and their passes; InputError names the key that cannot be used."""
    c = config.quantize
    first = KMeans(
        rules=rules(config),
        codebook_dtype=c.codebook_dtype,
        other_dtype=c.other_dtype,
        iterations=c.kmeans_iterations,
    )
    calibration = {k: v for k, v in config.calibration.items() if k in vq4dit.defaults()}
    return method.models(c.method, Recipe(first, calibration, dict(config.viditq)))


def bits(config: ml_collections.ConfigDict) -> float:
    """Nominal bits of a weight."""
    return float(config.viditq.weight_bits if config.quantize.method == "viditq" else config.quantize.bits)


def rules(config: ml_collections.ConfigDict) -> tuple[Rule, ...]:
    """The rules of `quantize.rules`, or those of the method and its bits."""
    if config.quantize.rules:
        return tuple(_rule(rule) for rule in config.quantize.rules)
    if config.quantize.method == "viditq":
        return dit_rules(viditq.spec(viditq.check(dict(config.viditq))))
    bits = config.quantize.bits
    return dit_rules(int(bits) if bits == int(bits) else bits)


def _rule(rule: Any) -> Rule:
    try:
        pattern, spec = rule
        re.compile(pattern)
        return pattern, spec_from_json(spec)
    except (TypeError, ValueError, re.error) as error:
        raise InputError(
            f"--config.quantize.rules: {rule!r} is no rule: {error}; wanted (path regex, (K, d, groups)), or () to keep"
        ) from None


def validate(config: ml_collections.ConfigDict) -> None:
    """Everything that can be told before work begins; InputError names the key."""
    seeds.check_seed("--config.seed", config.seed)
    _one_of("quantize.bits", config.quantize.bits, tuple(map(float, BITS)))
    models(config)
    try:
        re.compile(config.calibration.tuned)
    except re.error as error:
        raise InputError(
            f"--config.calibration.tuned={config.calibration.tuned}: no regular expression: {error}"
        ) from None
    for section in ("calibration", "sample"):
        if not math.isfinite(config[section].cfg_scale):
            raise InputError(f"--config.{section}.cfg_scale={config[section].cfg_scale}: wanted a finite number")
    _one_of("sample.sampler", config.sample.sampler, SAMPLERS)
    _one_of("sample.activations", config.sample.activations, ("float32", "bfloat16", "int8", "e4m3"))
    timed = config.quantize.method == "viditq" and config.viditq.activation_budget
    if timed and config.sample.activations != "float32":
        raise InputError(
            f"--config.sample.activations={config.sample.activations} with viditq.activation_budget={timed:g}: kernels read "
            "8 bits or bfloat16 at all times; wanted float32, where activations are rounded and stay float32 numbers"
        )
    _one_of("quantize.codebook_dtype", config.quantize.codebook_dtype, DTYPES)
    _one_of("quantize.other_dtype", config.quantize.other_dtype, DTYPES)
    for key in ("sample.num_images", "sample.batch", "sample.grid_images", "calibration.save_every"):
        section, name = key.split(".")
        if config[section][name] < 1:
            raise InputError(f"--config.{key}={config[section][name]}: wanted at least 1")
    all_steps = [
        ("sample", "steps", config.sample.steps),
        ("calibration", "trajectory_steps", config.calibration.trajectory_steps),
    ]
    for section, name, steps in all_steps + [("sample", "more_steps", steps) for steps in config.sample.more_steps]:
        if not 1 <= steps <= 1000:
            raise InputError(f"--config.{section}.{name}={steps}: wanted 1 to 1000")
    if len({config.sample.steps, *config.sample.more_steps}) <= len(config.sample.more_steps):
        raise InputError(
            f"--config.sample.more_steps={config.sample.more_steps}: wanted numbers that differ, and from steps"
        )
    for folder in config.beside:
        if not (pathlib.Path(folder) / "table.json").exists():
            raise InputError(f"--config.beside={folder}: no finished run there; wanted the workdir of one")
    if bool(config.evaluation.classifier) != bool(config.evaluation.reference):
        raise InputError("--config.evaluation.classifier and .reference: give both or neither")
    if config.model.random_init and not config.model.variant:
        raise InputError("--config.model.random_init=True needs --config.model.variant, such as DiT-XL/2")
    if not config.model.random_init and not config.model.checkpoint:
        raise InputError("--config.model.checkpoint is empty: give a .pt, .safetensors or diffusers folder")


def from_json(values: dict[str, Any], where: str) -> ml_collections.ConfigDict:
    """The config that `as_json` made the values of; keys that are missing have their defaults. InputError for others."""
    config = default()

    def fill(section: ml_collections.ConfigDict, given: dict[str, Any], prefix: str) -> None:
        for key, value in given.items():
            if key not in section:
                raise InputError(
                    f"{where}: {prefix}{key} is no key of a config; a newer vq4dit-jax may have written it"
                )
            if isinstance(section[key], ml_collections.ConfigDict) and isinstance(value, dict):
                fill(section[key], value, f"{prefix}{key}.")
                continue
            try:
                section[key] = _tuples(value)
            except (TypeError, ValueError) as error:
                raise InputError(f"{where}: {prefix}{key}={value!r}: {error}") from None

    fill(config, values, "")
    return config


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _one_of(key: str, value: Any, allowed: Collection[Any]) -> None:
    if value not in allowed:
        raise InputError(f"--config.{key}={value}: wanted one of {', '.join(map(str, allowed))}")


def as_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Plain, JSON-ready dicts; tuples as lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, tuple | list) else value

    return plain(config.to_dict())
