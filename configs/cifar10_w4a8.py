"""The built-in CIFAR-10 DiT with 4-bit weights and 8-bit activations (ViDiT-Q): 4.23 bits a weight, all overhead counted.

Costs: minutes on two CPU cores, 4 GB of memory; nothing is downloaded.
Gives: the packed model, sampled beside the original and beside plain rounding, and report.html.
Vary:  --config.viditq.rotation=0               no rotation
       --config.viditq.solve=False              weights rounded to nearest
       --config.sample.activations=float32      activations rounded as float32 numbers, for a comparison
"""

from ml_collections import ConfigDict

from vq4dit_jax.run.config import cifar10, w4a8


def get_config() -> ConfigDict:
    return w4a8(cifar10()).lock()
