"""configs/cifar10_w2.py with the calibration of the released code: to compare with, not to use.

benchmarks/results/quality_cifar10/table.md says what it gave.
"""

from ml_collections import ConfigDict

from vq4dit_jax.calibration.recipe import RELEASED
from vq4dit_jax.config import cifar10


def get_config() -> ConfigDict:
    c = cifar10()
    c.calibration.update(RELEASED)
    return c.lock()
