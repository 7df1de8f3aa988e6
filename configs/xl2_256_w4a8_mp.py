"""DiT-XL/2 at 256x256 pixels with 2 to 8 bits for each role's weights, 4.0 in all, and 8-bit activations (ViDiT-Q, mixed).

Needs: what configs/xl2_256_w2.py needs.
Costs: not yet measured on a GPU.
Gives: the packed model, table.md in the papers' form, and report.html.
Vary:  --config.beside=runs/xl2_256_w2     the rows of a finished run in the same table; its full-precision samples are used
       --config.model.random_init=True     random weights: nothing is downloaded, for timing
"""

from ml_collections import ConfigDict

from vq4dit_jax.run.config import w4a8_mp, xl2


def get_config() -> ConfigDict:
    c = w4a8_mp(xl2(image_size=256, bits=2.0))
    c.viditq.mixed_by = "roles"  # blocks stay one stack, which the kernels take in one launch
    return c.lock()
