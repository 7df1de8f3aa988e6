"""The demo: the built-in CIFAR-10 DiT (5.5 million parameters) at 2 bits a weight, from end to end, in few steps.

Costs: six minutes on two slow CPU cores (Zen 3), 4 GB of memory; nothing is downloaded.
Gives: the packed model, sampled beside the original, and report.html. The pictures of both show the same things.
Vary:  --config=configs/cifar10_w2.py                           300 gradient steps, 400 images, 25 sampling steps: 15 minutes
       --config.sample.sampler=ddpm --config.sample.steps=50    the sampler of the benchmark
"""

from ml_collections import ConfigDict

from vq4dit_jax.run.config import cifar10


def get_config() -> ConfigDict:
    c = cifar10()
    c.calibration.steps = 40
    c.calibration.trajectory_steps = 25
    c.sample.num_images = 200
    c.sample.sampler = "dpm++"
    c.sample.steps = 6
    return c.lock()
