"""Codebooks alone are tuned, the assignments of k-means stay: the fine-tuning step of PQF (Martinez et al. 2021,
arXiv 2010.15703, section 3.3), with the block-wise loss of VQ4DiT on the teacher's trajectory for a loss.

    W_hat = C[A], A fixed:    C <- C - rate * RMSprop(dL_d / dC),  dL_d / dC_k = sum over sub-vectors of codeword k

It is the calibration of VQ4DiT with one candidate, whose ratio is 1: `calibrate(..., recipe=Recipe(**RECIPE))`. Of PQF there
are no permutations, and k-means is plain instead of annealed.
"""

from vq4dit_jax.methods.recipe import CANDIDATES

RECIPE = {**CANDIDATES, "num_candidates": 1, "lambda_r": 0.0}
"""Fields of `methods.Recipe`; the rest as one likes, best as in the run that it is compared with."""
