"""What a calibration run is made of, as data."""

import dataclasses

from vq4dit_jax.errors import InputError

_CHOICES = {
    "ratio_start": ("uniform", "distance"),
    "regularizer": ("paper", "released"),
    "codebook_training": ("together", "after_freezing"),
    "schedule": ("constant", "cosine"),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One calibration run. The paper's form and the released code's are values of these fields: `PAPER`, `RELEASED`.

    Attributes:
      steps: optimizer steps in all; one for each time step of the teacher's trajectories.
      batch: images of a trajectory; the networks see 2 * batch rows, labels and null label.
      trajectory_steps: DDPM steps from noise to image; a new trajectory starts with new noise and classes.
      cfg_scale: guidance of the teacher's trajectory.
      num_candidates: n, codewords that each sub-vector chooses among (eq 5).
      ratio_start: "uniform" r = 1/n (paper), or "distance" r proportional to 1/distance (released code).
      regularizer: "paper" sum_n (1 - |2r - 1|) averaged over sub-vectors (eq 9), or "released" n * mean r(1 - r) over
        those not yet frozen, averaged over layers, and only on steps where it is above its minimum of that trajectory.
      lambda_d, lambda_r: weights of L_d and L_r (eq 10).
      learning_rate_ratios, learning_rate_codebooks, learning_rate_biases: of RMSprop.
      decay, epsilon: of RMSprop.
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

    steps: int = 500
    batch: int = 16
    trajectory_steps: int = 50
    cfg_scale: float = 1.5
    num_candidates: int = 2
    ratio_start: str = "distance"
    regularizer: str = "paper"
    lambda_d: float = 1.0
    lambda_r: float = 0.0
    learning_rate_ratios: float = 1e-2
    learning_rate_codebooks: float = 3e-4
    learning_rate_biases: float = 3e-4
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
        if not 0 <= self.freeze_from <= self.freeze_by <= 1:
            raise InputError(
                f"calibration.freeze_from={self.freeze_from}, freeze_by={self.freeze_by}: wanted 0 <= from <= by <= 1"
            )


_PUBLISHED = dict(
    learning_rate_ratios=5e-2,
    learning_rate_codebooks=1e-4,
    learning_rate_biases=1e-4,
    schedule="constant",
    freeze_from=1.0,
    freeze_by=1.0,
)
PAPER = dict(**_PUBLISHED, ratio_start="uniform", regularizer="paper", codebook_training="together", lambda_r=0.1)
"""The paper's form. Its lambdas are unknown; docs/calibration.md says how this lambda_r was found."""

RELEASED = dict(
    **_PUBLISHED, ratio_start="distance", regularizer="released", codebook_training="after_freezing", lambda_r=0.5
)
"""The released code's form."""
