"""What a calibration run is made of, as data."""

import dataclasses

from vq4dit_jax.errors import InputError

_CHOICES = {
    "ratio_start": ("uniform", "distance"),
    "regularizer": ("paper", "released"),
    "codebook_training": ("together", "after_freezing"),
    "schedule": ("constant", "cosine"),
    "optimizer": ("adam", "rmsprop"),
    "allocation": ("given", "roles", "layers"),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One calibration run. The paper's form and the released code's are values of these fields: `PAPER`, `RELEASED`.

    Attributes:
      layerwise: before the gradient steps, solve every layer's assignments and codebook for its outputs (`vq.layerwise`);
        the steps then tune codebooks and biases of assignments that stay. Needs num_candidates = 1, and a DiT, or a
        `Network` whose Linears go through `models.linear`.
      allocation: of the bits, with layerwise. "given": as `quantize` had them. "layers" or "roles": the same bits spread
        anew, over single layers or over roles (all qkv, all fc1, ...) by what their errors cost (`allocate`).
      gains: with layerwise, every solved layer's codebook and bias take the factor and the shift that give its outputs the
        teacher's scale and mean (`vq.layerwise.restored`); and after the steps all blocks take one more factor, that gives
        images the teacher's contrast (`contrast`).
      budget: with an allocation, the bits that codes and codebooks may take in all, in units of the codes of `quantize`:
        2.1 bits a weight for 1.05 and K = 256, d = 4. (A small model's codebooks are more than a tenth of it.)
      steps: optimizer steps in all; one for each time step of the teacher's trajectories.
      batch: images of a trajectory; the networks see 2 * batch rows, labels and null label.
      trajectory_steps: DDPM steps from noise to image; a new trajectory starts with new noise and classes.
      cfg_scale: guidance of the teacher's trajectory.
      num_candidates: n, codewords that each sub-vector chooses among (eq 5).
      ratio_start: "uniform" r = 1/n (paper), or "distance" r proportional to 1/distance (released code).
      regularizer: "paper" sum_n (1 - |2r - 1|) averaged over sub-vectors (eq 9), or "released" n * mean r(1 - r) over
        those not yet frozen, averaged over layers, and only on steps where it is above its minimum of that trajectory.
      lambda_d, lambda_r: weights of L_d and L_r (eq 10).
      lambda_s: weight of L_s + L_c, what is left in the image of the error of the sampler's next step
        (`losses.step_distance`).
      tuned: a regular expression; parameters that are not quantized and whose paths match it whole are trained, too. With
        the last Linear of a DiT among them, and lambda_s, its variance makes room for the error of the mean at the end
        (`variance.fit`).
      learning_rate_ratios, learning_rate_codebooks, learning_rate_biases, learning_rate_tuned: of the optimizer.
      optimizer: "adam", or "rmsprop" as in the paper.
      decay, epsilon: of the mean of squared gradients, and what is added to its root.
      schedule: "constant", or "cosine" to 0 at the last step, for codebooks and biases.
      freeze_threshold: a sub-vector whose largest ratio passes it is frozen to that candidate.
      freeze_from, freeze_by: fractions of the run between which the threshold falls to 1/n, so that from
        `freeze_by` on every assignment is hard and the rest of the run tunes codebooks and biases of the very model
        that is saved. Both 1 for a constant threshold.
      codebook_training: "together" from the first step (paper), or "after_freezing": a layer's codebooks only once 99 %
        of its sub-vectors are frozen (released code).
      remat: recompute each block of a DiT in the backward pass instead of keeping what is inside it: a third more time,
        and memory for one block instead of all. (In a network of your own, wrap its blocks in `flax.linen.remat`.)
    """

    layerwise: bool = False
    allocation: str = "given"
    gains: bool = False
    budget: float = 1.05
    steps: int = 500
    batch: int = 16
    trajectory_steps: int = 50
    cfg_scale: float = 1.5
    num_candidates: int = 2
    ratio_start: str = "distance"
    regularizer: str = "paper"
    lambda_d: float = 1.0
    lambda_r: float = 0.0
    lambda_s: float = 0.0
    learning_rate_ratios: float = 1e-2
    learning_rate_codebooks: float = 3e-4
    learning_rate_biases: float = 3e-4
    learning_rate_tuned: float = 1e-5
    tuned: str = ""
    optimizer: str = "rmsprop"
    decay: float = 0.9
    epsilon: float = 1e-8
    schedule: str = "cosine"
    freeze_threshold: float = 0.99
    freeze_from: float = 0.1
    freeze_by: float = 0.5
    codebook_training: str = "together"
    remat: bool = False

    def __post_init__(self):
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"calibration.{name}={getattr(self, name)!r}: wanted one of {', '.join(allowed)}")
        for name in ("steps", "batch", "trajectory_steps", "num_candidates"):
            if getattr(self, name) < 1:
                raise InputError(f"calibration.{name}={getattr(self, name)}: wanted at least 1")
        if self.layerwise and self.num_candidates != 1:
            raise InputError(
                f"calibration.num_candidates={self.num_candidates} with layerwise=True: assignments are then solved for, "
                "and have no candidates; wanted 1, or layerwise=False"
            )
        if self.allocation != "given" and not self.layerwise:
            raise InputError(f"calibration.allocation={self.allocation!r}: wanted 'given' without layerwise=True")
        if self.gains and not self.layerwise:
            raise InputError(
                "calibration.gains=True without layerwise=True: gains are those of solved layers; wanted False, or layerwise=True"
            )
        if not 0 <= self.freeze_from <= self.freeze_by <= 1:
            raise InputError(
                f"calibration.freeze_from={self.freeze_from}, freeze_by={self.freeze_by}: wanted 0 <= from <= by <= 1"
            )


LAYERWISE = dict(
    layerwise=True,
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

FINE = dict(gains=True, learning_rate_codebooks=2e-6, learning_rate_biases=4e-6, learning_rate_tuned=4e-7)
"""Beside `LAYERWISE`, the best at 3 bits and more: errors are smaller, and so must the steps be."""

CANDIDATES = dict(
    layerwise=False,
    allocation="given",
    gains=False,
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

_PUBLISHED = {
    **CANDIDATES,
    "learning_rate_ratios": 5e-2,
    "learning_rate_codebooks": 1e-4,
    "learning_rate_biases": 1e-4,
    "schedule": "constant",
    "freeze_from": 1.0,
    "freeze_by": 1.0,
}
PAPER = dict(**_PUBLISHED, ratio_start="uniform", regularizer="paper", codebook_training="together", lambda_r=0.1)
"""The paper's form. Its lambdas are unknown; docs/calibration.md says how this lambda_r was found."""

RELEASED = dict(
    **_PUBLISHED, ratio_start="distance", regularizer="released", codebook_training="after_freezing", lambda_r=0.5
)
"""The released code's form."""
