"""The built-in CIFAR-10 DiT with 2 to 8 bits for each layer's weights, 4.0 in all, and 8-bit activations (ViDiT-Q, mixed).

Costs: a quarter of an hour on two CPU cores, 4 GB of memory; nothing is downloaded.
Gives: the packed model, sampled beside the original and beside plain rounding, and report.html with the bits of every layer.
Vary:  --config.viditq.budget=3.5               fewer bits
       --config.viditq.mixed_by=roles           the blocks of a role alike, so that they stay one stack
"""

from ml_collections import ConfigDict

from vq4dit_jax.run.config import cifar10, w4a8_mp


def get_config() -> ConfigDict:
    return w4a8_mp(cifar10()).lock()
