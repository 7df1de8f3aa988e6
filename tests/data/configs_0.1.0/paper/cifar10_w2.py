"""configs/cifar10_w2.py with the calibration of the paper: to compare with, not to use.

benchmarks/results/quality_cifar10/table.md says what it gave, with 500 steps of batch 16.
"""

from ml_collections import ConfigDict

from vq4dit_jax.calibration.recipe import PAPER
from vq4dit_jax.config import cifar10


def get_config() -> ConfigDict:
    c = cifar10()
    c.calibration.update(PAPER)
    return c.lock()
