"""What VQ4DiT is compared with. All quantize the same Linears, and those that calibrate do it on the same zero data.

    rtn             uniform scalar codes, rounded to nearest; no data at all
    gptq            uniform scalar codes, columns rounded in turn and the rest made up for it (Frantar et al. 2023)
    dkm             codebooks tuned through soft attention of sub-vectors over them (Cho et al. 2022)
    codebook_only   codebooks tuned, the assignments of k-means kept (the fine-tuning of PQF, Martinez et al. 2021)

`rtn` and `gptq` return a `Uniform`: dense parameters to sample from, and the bytes of the packed form. `dkm.calibrate` and
`calibration.calibrate` with `codebook_only.RECIPE` return packed trees as VQ4DiT does. Plain k-means is `quantize`.
"""

from vq4dit_jax.baselines import codebook_only, dkm
from vq4dit_jax.baselines.scalar import Uniform, gptq, rtn

__all__ = ["Uniform", "codebook_only", "dkm", "gptq", "rtn"]
