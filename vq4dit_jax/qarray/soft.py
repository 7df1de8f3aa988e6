"""`SoftVQArray`: a weight as a ratio-weighted mean of its candidate codewords, the form that calibration trains."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.soft_weights import soft_weights
from vq4dit_jax.codebook.kmeans import nearest_codewords
from vq4dit_jax.qarray.vq import VQArray, from_codes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftVQArray:
    """W_hat = sum_n r_n C[a_n] with r = softmax(z) over the n candidates of each sub-vector (VQ4DiT, eq 5 to 7).

    Invariants:
      * `codebook` (*stack, G, K, d) float32; `candidates` (*stack, n, O, S) int32 below K, nearest first;
        `logits` z (*stack, n, O, S) float32; `frozen` (*stack, O, S) bool.
      * a frozen sub-vector counts as its candidate of largest logit alone, and its logits get no gradient.
      * `shape` = (O, I) is static, I = S*d.
    """

    codebook: Any
    candidates: Any
    logits: Any
    frozen: Any
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})

    @property
    def num_candidates(self) -> int:
        return self.candidates.shape[-3]

    def ratios(self) -> Float[Array, "*stack n O S"]:
        """r, exactly one-hot where frozen."""
        if self.num_candidates == 1:
            return jnp.ones_like(self.logits)
        axis = self.logits.ndim - 3
        hard = jax.nn.one_hot(self.logits.argmax(axis), self.logits.shape[axis], axis=axis, dtype=self.logits.dtype)
        return jnp.where(jnp.expand_dims(self.frozen, axis), hard, jax.nn.softmax(self.logits, axis))

    def decode(self) -> Float[Array, "*stack O I"]:
        """The soft weight; differentiable in codebook and logits."""
        return soft_weights(self.codebook, self.candidates, self.ratios())

    def matmul(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        """x @ W_hat^T of one matrix (no stack axes)."""
        return jax.lax.dot_general(x, self.decode().astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())))

    def harden(self) -> VQArray:
        """The candidate of largest ratio (the earlier one of equals), packed. Step 9 of the method."""
        axis = self.logits.ndim - 3
        best = jnp.expand_dims(self.logits.argmax(axis), axis)
        codes = jnp.take_along_axis(self.candidates, best, axis).squeeze(axis)
        return from_codes(self.codebook, np.asarray(codes))


def subvectors(weight: Float[np.ndarray, "O I"], num_groups: int, length: int) -> Float[np.ndarray, "G P d"]:
    """Cuts W along its inputs: group g holds the O/G*S sub-vectors of its rows, row after row."""
    return np.asarray(weight, np.float32).reshape(num_groups, -1, length)


def soften(
    hard: VQArray, weight: Float[np.ndarray, "*stack O I"], num_candidates: int, start: str = "distance"
) -> SoftVQArray:
    """Candidates (eq 5) and first logits of a k-means result.

    `start` "uniform": z = 0, r = 1/n (the paper). "distance": z_i = log(dist_n / (dist_i + 1e-5)) with squared
    distances, z_n = 0, so r is proportional to 1/distance (the released code).
    With one candidate it is the code that `hard` has, nearest or not, and is frozen.
    """
    if start not in ("uniform", "distance"):
        raise ValueError(f"start={start!r}: wanted 'uniform' or 'distance'")
    rows, columns = hard.shape
    stack, groups = hard.stack, hard.num_groups
    codebook = jnp.asarray(hard.codebook, jnp.float32)
    if num_candidates == 1:
        candidates = jnp.expand_dims(hard.codes(), len(stack))
        frozen = jnp.ones((*stack, *candidates.shape[-2:]), bool)
        return SoftVQArray(codebook, candidates, jnp.zeros(candidates.shape, jnp.float32), frozen, hard.shape)
    codebooks = np.asarray(hard.codebook, np.float32).reshape(-1, hard.num_codewords, hard.subvector_length)
    vectors = np.asarray(weight, np.float32).reshape(len(codebooks), -1, hard.subvector_length)
    found = [nearest_codewords(v, c, num_candidates) for v, c in zip(vectors, codebooks, strict=True)]
    # (stack * G, O/G * S, n) -> (*stack, n, O, S)
    shape = (*stack, groups, rows // groups, columns // hard.subvector_length, num_candidates)

    def arrange(parts: list[np.ndarray]) -> np.ndarray:
        a = np.stack([np.asarray(p) for p in parts]).reshape(shape)
        a = a.reshape(*stack, rows, -1, num_candidates)
        return np.moveaxis(a, -1, len(stack))

    candidates = arrange([ids for ids, _ in found]).astype(np.int32)
    logits = np.zeros(candidates.shape, np.float32)
    if start == "distance":
        distances = arrange([d for _, d in found])
        last = distances.take([-1], axis=len(stack))
        logits = (np.log(last + 1e-5) - np.log(distances + 1e-5)).astype(np.float32)
    frozen = np.zeros((*stack, rows, candidates.shape[-1]), bool)
    return SoftVQArray(codebook, jnp.asarray(candidates), jnp.asarray(logits), jnp.asarray(frozen), hard.shape)
