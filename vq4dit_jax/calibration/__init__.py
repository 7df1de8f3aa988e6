"""Zero-data calibration of a vector-quantized model against its full-precision teacher."""

from vq4dit_jax.calibration.assess import held_out_agreement
from vq4dit_jax.calibration.loop import calibrate, make_student, read_log
from vq4dit_jax.calibration.moments import InputMoments, input_moments
from vq4dit_jax.calibration.network import Network, as_network
from vq4dit_jax.calibration.optimize import State, Trainable, finalize, init, merge, update
from vq4dit_jax.calibration.recipe import FINE, LAYERWISE, PAPER, RELEASED, Recipe
from vq4dit_jax.calibration.trajectory import Batch, Trajectory, advance, begin

__all__ = [
    "FINE",
    "LAYERWISE",
    "PAPER",
    "RELEASED",
    "Batch",
    "InputMoments",
    "Network",
    "Recipe",
    "State",
    "Trainable",
    "Trajectory",
    "advance",
    "as_network",
    "begin",
    "calibrate",
    "finalize",
    "held_out_agreement",
    "init",
    "input_moments",
    "make_student",
    "merge",
    "read_log",
    "update",
]
