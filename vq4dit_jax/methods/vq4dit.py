"""VQ4DiT (arXiv 2408.17131) as passes: our form, the paper's and the released code's, as settings of the same passes.

    ours        k-means, bits allocated to layers, layers solved for their outputs, tables and biases tuned, variance fitted
    published   k-means, candidates that are chosen while codebooks and biases are trained

`settings` are the keys of a config's `calibration` section: those of `Tune`, and the switches below.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vq4dit_jax.errors import InputError
from vq4dit_jax.methods.allocate import BY, Allocate
from vq4dit_jax.methods.contrast import FitContrast
from vq4dit_jax.methods.passes import Pass
from vq4dit_jax.methods.solve_layers import SolveLayers
from vq4dit_jax.methods.tune import Tune
from vq4dit_jax.methods.variance import FitVariance

SWITCHES: dict[str, Any] = dict(layerwise=False, allocation="given", gains=False, budget=1.05, variance=False)
"""Beside the fields of `Tune`.

    layerwise    solve every layer's assignments and codebook for its outputs first (`SolveLayers`); needs num_candidates = 1
    allocation   of the bits, with layerwise: "given" as quantized, "layers" or "roles" (`Allocate`)
    budget       of the allocation
    gains        with layerwise: restore every layer's scale and mean, and after the steps the images' contrast (`FitContrast`)
    variance     after the steps, let the learned variance make up for the error of the mean (`FitVariance`), where the steps
                 tune leaves for what the sampler keeps of an error: with `tuned`, and lambda_s > 0
"""

LAYERWISE: dict[str, Any] = dict(
    layerwise=True,
    variance=True,
    num_candidates=1,
    lambda_s=100.0,
    learning_rate_codebooks=1e-5,
    learning_rate_biases=2e-5,
    learning_rate_tuned=2e-6,
    tuned="final_layer/.*",
    optimizer="adam",
    decay=0.99,
)
"""The best there is for a DiT at 2 bits and less, and the configs' own."""

FINE: dict[str, Any] = dict(
    gains=True, learning_rate_codebooks=2e-6, learning_rate_biases=4e-6, learning_rate_tuned=4e-7
)
"""Beside `LAYERWISE`, the best at 3 bits and more: errors are smaller, and so must the steps be."""

CANDIDATES: dict[str, Any] = dict(
    layerwise=False,
    allocation="given",
    gains=False,
    variance=False,
    num_candidates=2,
    lambda_s=0.0,
    learning_rate_codebooks=3e-4,
    learning_rate_biases=3e-4,
    learning_rate_tuned=1e-5,
    tuned="",
    optimizer="rmsprop",
    decay=0.9,
)
"""The fields' own values, for a config that has `LAYERWISE`: soft assignments as in the paper, with all choices final at half
time. The best there is for a `Network` whose Linears are not ours."""

CODEBOOKS_ONLY: dict[str, Any] = {**CANDIDATES, "num_candidates": 1, "lambda_r": 0.0}
"""Codebooks alone are tuned, the assignments of k-means stay: the fine-tuning step of PQF (Martinez et al. 2021,
arXiv 2010.15703, section 3.3), with the block-wise loss of VQ4DiT on the teacher's trajectory for a loss.

    W_hat = C[A], A fixed:    C <- C - rate * RMSprop(dL_d / dC),  dL_d / dC_k = sum over sub-vectors of codeword k

Of PQF there are no permutations, and k-means is plain instead of annealed."""

_PUBLISHED: dict[str, Any] = {
    **CANDIDATES,
    "learning_rate_ratios": 5e-2,
    "learning_rate_codebooks": 1e-4,
    "learning_rate_biases": 1e-4,
    "schedule": "constant",
    "freeze_from": 1.0,
    "freeze_by": 1.0,
}
PAPER: dict[str, Any] = dict(
    **_PUBLISHED, ratio_start="uniform", regularizer="paper", codebook_training="together", lambda_r=0.1
)
"""The paper's form. Its lambdas are unknown; docs/calibration.md says how this lambda_r was found."""

RELEASED: dict[str, Any] = dict(
    **_PUBLISHED, ratio_start="distance", regularizer="released", codebook_training="after_freezing", lambda_r=0.5
)
"""The released code's form."""

_FIELDS = tuple(field.name for field in dataclasses.fields(Tune))


def defaults() -> dict[str, Any]:
    """Every setting with its own value."""
    return {**SWITCHES, **dataclasses.asdict(Tune())}


def passes(settings: Mapping[str, Any] | None = None, **more: Any) -> tuple[Pass, ...]:
    """The passes after k-means. Settings that are left out have the values of `defaults`.

    Raises InputError for a setting that is unknown, out of range, or needs another one.
    """
    given = {**(settings or {}), **more}
    if unknown := sorted(set(given) - set(_FIELDS) - set(SWITCHES)):
        raise InputError(f"calibration.{unknown[0]}: no such setting; there are {', '.join([*SWITCHES, *_FIELDS])}")
    s = {**defaults(), **given}
    if s["allocation"] not in ("given", *BY):
        raise InputError(f"calibration.allocation={s['allocation']!r}: wanted one of given, {', '.join(BY)}")
    if s["layerwise"] and s["num_candidates"] != 1:
        raise InputError(
            f"calibration.num_candidates={s['num_candidates']} with layerwise=True: assignments are then solved for, "
            "and have no candidates; wanted 1, or layerwise=False"
        )
    if s["allocation"] != "given" and not s["layerwise"]:
        raise InputError(f"calibration.allocation={s['allocation']!r}: wanted 'given' without layerwise=True")
    if s["gains"] and not s["layerwise"]:
        raise InputError(
            "calibration.gains=True without layerwise=True: gains are those of solved layers; wanted False, or layerwise=True"
        )
    if not s["budget"] > 0:
        raise InputError(f"calibration.budget={s['budget']}: wanted more than 0")
    tune = Tune(**{name: s[name] for name in _FIELDS})
    batch = dict(images=tune.batch, cfg_scale=tune.cfg_scale)
    sampler = dict(num_steps=tune.trajectory_steps, cfg_scale=tune.cfg_scale)
    out: list[Pass] = []
    if s["allocation"] != "given":
        out.append(Allocate(s["budget"], s["allocation"], **batch))
    if s["layerwise"]:
        out.append(SolveLayers(**batch, restore=s["gains"]))
    out.append(tune)
    if s["gains"]:
        out.append(FitContrast(**sampler))
    # Version 0.1.0 had no such key, and fitted the variance under these conditions: its configs keep their meaning.
    if s["variance"] and s["tuned"] and s["lambda_s"] > 0:
        out.append(FitVariance(tune.batch, **sampler))
    return tuple(out)
