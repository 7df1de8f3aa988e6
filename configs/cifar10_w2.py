"""The built-in CIFAR-10 DiT (5.5 million parameters) at 2 bits a weight, from end to end. configs/demo.py is shorter.

Costs: a quarter of an hour on two CPU cores, 4 GB of memory; nothing is downloaded.
Gives: the packed model, sampled beside the original, and report.html. The pictures of both show the same things.
Vary:  --config.calibration.steps=500 --config.calibration.batch=16 --config.sample.num_images=1000   the benchmark's size
       --config=configs/cifar10_w3.py                                                                  3 bits, with rates for them
       --config.sample.sampler=dpm++ --config.sample.steps=10                                          faster sampling
"""

from ml_collections import ConfigDict

from vq4dit_jax.run.config import cifar10


def get_config() -> ConfigDict:
    return cifar10().lock()
