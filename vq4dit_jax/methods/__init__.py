"""What is done to a model: passes over its parameters, alone and in the order of a method."""

from vq4dit_jax.methods import vq4dit
from vq4dit_jax.methods.agreement import held_out_agreement
from vq4dit_jax.methods.allocate import Allocate
from vq4dit_jax.methods.calibrate import calibrate, default_passes
from vq4dit_jax.methods.contrast import FitContrast
from vq4dit_jax.methods.dkm import DKM
from vq4dit_jax.methods.kmeans import KMeans, quantize
from vq4dit_jax.methods.loop import read_log
from vq4dit_jax.methods.moments import InputMoments, input_moments
from vq4dit_jax.methods.passes import Context, Pass, apply, begin
from vq4dit_jax.methods.scalar import gptq, rtn
from vq4dit_jax.methods.solve_layers import SolveLayers
from vq4dit_jax.methods.tune import Tune
from vq4dit_jax.methods.variance import FitVariance

__all__ = [
    "DKM",
    "Allocate",
    "Context",
    "FitContrast",
    "FitVariance",
    "InputMoments",
    "KMeans",
    "Pass",
    "SolveLayers",
    "Tune",
    "apply",
    "begin",
    "calibrate",
    "default_passes",
    "gptq",
    "held_out_agreement",
    "input_moments",
    "quantize",
    "read_log",
    "rtn",
    "vq4dit",
]
