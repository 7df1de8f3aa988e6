"""DiT-XL/2 at 256x256 pixels in 3 bits a weight (64 codewords of 2 weights for each Linear of the blocks).

Needs: the official checkpoint (2.7 GB, CC-BY-NC 4.0), a Stable Diffusion VAE (335 MB), the FID network (96 MB) and ADM's
       ImageNet statistics (2 GB). Each is looked for in the cache folder ($VQ4DIT_CACHE, else ~/.cache/vq4dit-jax), else
       downloaded. Without the last two the quality figures are null, with the reason.
Costs: not yet measured on a GPU. 30,000 full-precision and 40,000 quantized images are most of it.
Gives: the blocks in 241 MiB instead of 2553, and table.md in the papers' form: FID, sFID, IS, precision and recall of 10,000
       images at 50, 100 and 250 steps, full precision beside 3 bits.
Vary:  --config.beside=runs/xl2_256_w2     the rows of a finished run in the same table; its full-precision samples are used
       --config.sample.more_steps=()            50 steps only
       --config.sample.cfg_scale=4.0            the guidance of the paper's pictures
       --config.model.random_init=True          random weights: nothing is downloaded, for timing
"""

from ml_collections import ConfigDict

from vq4dit_jax.config import xl2


def get_config() -> ConfigDict:
    return xl2(image_size=256, bits=3.0).lock()
