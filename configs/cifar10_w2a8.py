"""The built-in CIFAR-10 DiT with 2-bit codebooks (VQ4DiT) that read 8-bit activations (ViDiT-Q): both papers at once.

Costs: a quarter of an hour on two CPU cores, 4 GB of memory; nothing is downloaded.
Gives: the packed model, sampled beside the original and beside k-means, and report.html.
Vary:  --config.viditq.weight_bits=3            3-bit codebooks (add --config=configs/cifar10_w3.py's rates)
       --config.sample.activations=float32      activations rounded as float32 numbers, for a comparison
"""

from ml_collections import ConfigDict

from vq4dit_jax.run.config import cifar10, w2a8


def get_config() -> ConfigDict:
    return w2a8(cifar10()).lock()
