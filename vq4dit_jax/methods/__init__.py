"""What is done to a model: passes over its parameters, alone and in the order of a method."""

from vq4dit_jax.diffusion.trajectory import Batch, Trajectory, advance, begin
from vq4dit_jax.methods import codebook_only, dkm, losses
from vq4dit_jax.methods.agreement import held_out_agreement
from vq4dit_jax.methods.loop import calibrate, make_student, read_log
from vq4dit_jax.methods.moments import InputMoments, input_moments
from vq4dit_jax.methods.recipe import FINE, LAYERWISE, PAPER, RELEASED, Recipe
from vq4dit_jax.methods.scalar import gptq, rtn
from vq4dit_jax.methods.tune import State, Trainable, finalize, init, merge, update
from vq4dit_jax.networks.network import Network, as_network

__all__ = [
    "FINE", "LAYERWISE", "PAPER", "RELEASED", "Batch", "InputMoments", "Network", "Recipe", "State", "Trainable", "Trajectory",
    "advance", "as_network", "begin", "calibrate", "codebook_only", "dkm", "finalize", "gptq", "held_out_agreement",
    "init", "input_moments", "losses", "make_student", "merge", "read_log", "rtn", "update",
]  # fmt: skip
