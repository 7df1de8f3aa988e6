"""The demo: the built-in CIFAR-10 DiT (5.5 million parameters) at 2 bits a weight, from end to end.

Costs: ten minutes on two CPU cores, 2 GB of memory; nothing is downloaded.
Gives: the packed model, sampled beside the original, and report.html. The pictures of both show the same things.
Vary:  --config.calibration.steps=500 --config.calibration.batch=16 --config.sample.num_images=1000   the benchmark's size
       --config.quantize.bits=3                                                                        or configs/cifar10_w3.py
       --config.sample.sampler=ddim, or dpm++, with --config.sample.steps=10                           faster sampling
"""

from ml_collections import ConfigDict

from vq4dit_jax.config import default

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def get_config() -> ConfigDict:
    c = default()
    c.model.checkpoint = "asset:dit_cifar10.safetensors"
    c.quantize.codebook_dtype = "float16"
    c.quantize.other_dtype = "float16"
    c.calibration.batch = 8
    c.calibration.steps = 300
    c.sample.num_images = 400
    c.sample.steps = 25
    c.evaluation.classifier = "cifar10_resnet56"
    c.evaluation.reference = "asset:cifar10_reference.npz"
    c.evaluation.class_names = CIFAR10
    return c.lock()
