"""SiT (Ma et al. 2024, arXiv 2401.08740) and REPA (Yu et al. 2024, arXiv 2410.06940): DiT's modules trained as flows.

The one convention of `DiT(predicts="flow")` is SiT's on its linear path: time runs from noise at t = 0 to data at t = 1,

    x_t = t * data + (1 - t) * noise,        the network predicts the velocity v = data - noise,

and the time embedder reads t in [0, 1], not multiplied by 1000. Of an output with 2C channels (learn_sigma, SiT's default)
the first C are the velocity; SiT's forward drops the rest.

REPA's code (its loss.py and samplers.py) runs time the other way: x_t = (1 - t) * data + t * noise, and its network f
predicts noise - data. So v(x, t) = -f(x, 1 - t), and the weights are turned to compute v: the last Linear is negated, and
the first Linear of the time embedder is rotated, since the cosine and the sine of w (1 - t) are a rotation and a reflection
of those of w t. This is exact but for rounding. REPA's extra heads (`projectors.*`), which only its loss reads, are left out.
Its class labels are laid out as DiT's.
"""

import dataclasses
import math
import re
from typing import NamedTuple

import numpy as np

from convert.checkpoint import Checkpoint
from vq4dit_jax.errors import InputError
from vq4dit_jax.networks.dit import DIT_VARIANTS

SIT_VARIANTS = {name.replace("DiT", "SiT"): sizes for name, sizes in DIT_VARIANTS.items()}
VARIANTS = DIT_VARIANTS | SIT_VARIANTS
FAMILIES = {"DiT": "eps", "SiT": "flow"}  # a variant without its size, for models of other sizes
TURNED = ("final_layer.linear.weight", "t_embedder.mlp.0.weight")
"""Weights that `forwards` changes."""
_HEADS = "projectors."
_VELOCITY = {"velocity": False, "v": True}  # how SiT and REPA call it -> whether time runs backwards
_MODEL_KEYS = ("model", "class", "_class_name")
_EPS = ("eps", "epsilon")
_IN_NAME = re.compile(r"(?<![a-z])sit(?![a-z])", re.IGNORECASE)


class Training(NamedTuple):
    """What a network was trained to predict.

    Attributes:
      predicts: `DiT.predicts`.
      backwards: noise at t = 1 and predictions of noise - data, as REPA has them.
    """

    predicts: str
    backwards: bool = False


def training(checkpoint: Checkpoint, variant: str | None, predicts: str | None) -> Training:
    """The training by the file's own arguments or metadata, else by the caller, else DiT's noise prediction.

    A SiT is known by `prediction`, `path_type` or `model` among its arguments, a REPA also by its projectors.

    Raises:
      InputError: another prediction or path than velocity on the linear path, a caller's arguments that contradict the file or
        each other, or a SiT by its file name alone.
    """
    asked = _asked(variant, predicts)
    told = _told(checkpoint)
    says = ", ".join(f"{key}={value}" for key, value in told.items()) or f"{_HEADS}* (REPA's heads)"
    if _is_flow(checkpoint, told):
        if asked == "eps":
            raise InputError(
                f"{checkpoint.path}: has {says}, so it is a flow (SiT); as a DDPM model (predicts='eps', a DiT variant) it "
                "would sample noise; leave out predicts= and variant="
            )
        return Training("flow", _direction(checkpoint, told, says))
    if asked == "flow" and told.get("model", "").lower().startswith("dit"):
        raise InputError(f"{checkpoint.path}: has {says}, so it predicts noise; it cannot be read as a flow (SiT)")
    if asked is None and not told and _IN_NAME.search(checkpoint.path.stem):
        raise InputError(
            f"{checkpoint.path}: the file's name says SiT, but its weights look like DiT's and it holds no arguments "
            'that tell; pass variant="SiT-XL/2" (a flow) or variant="DiT-XL/2" (noise prediction), or only "SiT" or '
            '"DiT" for other sizes'
        )
    return Training(asked or "eps")


def _told(checkpoint: Checkpoint) -> dict[str, str]:
    facts = {key: value for key, value in checkpoint.facts.items() if isinstance(value, str)}
    facts["model"] = next((facts[key] for key in _MODEL_KEYS if key in facts), "")
    return {key: facts[key] for key in ("model", "prediction", "path_type") if facts.get(key)}


def _asked(variant: str | None, predicts: str | None) -> str | None:
    if predicts not in (None, *FAMILIES.values()):
        raise InputError(f"predicts={predicts!r}; known: {', '.join(FAMILIES.values())}")
    family = FAMILIES[variant.partition("-")[0]] if variant is not None else None
    if None not in (family, predicts) and family != predicts:
        raise InputError(f"variant={variant!r} predicts {family!r}, not predicts={predicts!r}; leave out one of them")
    return predicts or family


def _is_flow(checkpoint: Checkpoint, told: dict[str, str]) -> bool:
    if any(name.startswith(_HEADS) for name in checkpoint.shapes) or told.get("model", "").lower().startswith("sit"):
        return True
    return "path_type" in told or told.get("prediction", "eps") not in _EPS


def _direction(checkpoint: Checkpoint, told: dict[str, str], says: str) -> bool:
    """Whether time runs backwards."""
    heads = any(name.startswith(_HEADS) for name in checkpoint.shapes)
    prediction = told.get("prediction", "v" if heads else "velocity")
    if prediction not in _VELOCITY or told.get("path_type", "linear").lower() != "linear":
        raise InputError(
            f"{checkpoint.path}: has {says}; of flows only prediction=velocity (REPA: v) on path_type=Linear is supported"
        )
    return _VELOCITY[prediction]


def without_heads(checkpoint: Checkpoint) -> tuple[Checkpoint, list[str]]:
    """The checkpoint without REPA's projectors, and a line that says so where there were some."""
    shapes = {name: shape for name, shape in checkpoint.shapes.items() if not name.startswith(_HEADS)}
    count = len(checkpoint.shapes) - len(shapes)
    said = [f"leaving out {count} parameters of {_HEADS}*, REPA's training heads"] if count else []
    return dataclasses.replace(checkpoint, shapes=shapes), said


def check_attention(checkpoint: Checkpoint) -> None:
    """Refuses normalised queries and keys (REPA's and timm's qk_norm=True)."""
    norms = [name for name in checkpoint.shapes if re.search(r"\.attn\.[qk]_norm\.", name)]
    if norms:
        raise InputError(f"{checkpoint.path}: has {norms[0]} (qk_norm=True); DiT's attention has no such layers")


def forwards(checkpoint: Checkpoint) -> Checkpoint:
    """The weights of v(x, t) = -f(x, 1 - t), in float32, from those of f in facebookresearch's names. Those of `TURNED` must be
    dense."""

    def read(name: str) -> np.ndarray:
        stored = checkpoint.read(name)
        if name.startswith("final_layer.linear."):
            return -stored
        return reversed_time(np.asarray(stored, np.float32)) if name == "t_embedder.mlp.0.weight" else stored

    return dataclasses.replace(checkpoint, read=read)


def reversed_time(kernel: np.ndarray) -> np.ndarray:
    """A Linear (O, I) over I/2 cosines and I/2 sines of w t -> the one that gives the same for 1 - t.

    cos(w - wt) = cos w cos wt + sin w sin wt and sin(w - wt) = sin w cos wt - cos w sin wt.
    """
    half = kernel.shape[1] // 2
    angles = np.exp(-math.log(10000) * np.arange(half) / half)
    cos, sin = np.cos(angles), np.sin(angles)
    of_cos, of_sin = kernel[:, :half], kernel[:, half:]
    return np.concatenate([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], axis=1).astype(np.float32)
