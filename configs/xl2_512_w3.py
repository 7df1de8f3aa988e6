"""DiT-XL/2 at 512x512 pixels in 3 bits a weight (64 codewords of 2 weights for each Linear of the blocks).

Needs: the official checkpoint DiT-XL-2-512x512.pt (2.7 GB, CC-BY-NC 4.0). It is looked for in the cache folder
       ($VQ4DIT_CACHE, else ~/.cache/vq4dit-jax), else downloaded; or --config.model.checkpoint=PATH.
Costs: not yet measured on a GPU. The blocks shrink from 2553 MiB to 241 MiB.
Vary:  --config.model.random_init=True        random weights: no download, for timing
       --config.sample.cfg_scale=4.0          the guidance of the paper's pictures
       --config.sample.num_images=10000       the number of images of the published figures
"""

from ml_collections import ConfigDict

from vq4dit_jax.config import xl2


def get_config() -> ConfigDict:
    return xl2(image_size=512, bits=3.0).lock()
