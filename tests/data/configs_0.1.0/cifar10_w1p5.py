"""The built-in CIFAR-10 DiT at 1.5 bits a weight, spread over its layers from 0.75 to 4.

Costs: as configs/cifar10_w2.py.
Gives: three quarters of the bytes of its codes and codebooks. The Frechet distance is 11 % above full precision's; 2 bits in the
       released form are 49 % above (benchmarks/results/quality_cifar10/table.md).
"""

from ml_collections import ConfigDict

from vq4dit_jax.config import cifar10


def get_config() -> ConfigDict:
    c = cifar10()
    c.quantize.bits = 1.5
    return c.lock()
