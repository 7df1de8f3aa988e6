"""`SoftVQArray`: a weight as a ratio-weighted mean of its candidate codewords, the form that calibration trains."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import pallas_kernels
from pallas_kernels.soft_weights import soft_weights
from vq4dit_jax.codebook.kmeans import nearest_codewords
from vq4dit_jax.integer.packing import packed_bytes
from vq4dit_jax.qarray.base import Cost, Transient, register, static
from vq4dit_jax.qarray.vq import VQArray, from_codes


@register
class SoftVQArray(Transient):
    """W_hat = sum_n r_n C[a_n] with r = softmax(z) over the n candidates of each sub-vector (VQ4DiT, eq 5 to 7).

    Invariants:
      * `codebook` (*stack, G, K, d) float32.
      * with n > 1 candidates: `candidates` (*stack, n, O, S) int32 below K, nearest first; `logits` z (*stack, n, O, S)
        float32; `frozen` (*stack, O, S) bool; `assignments` is None. A frozen sub-vector counts as its candidate of
        largest logit alone, and its logits get no gradient.
      * with one candidate: `assignments` are the packed codes of a `VQArray`; the other three are None. There is nothing
        to choose, and the codes take the memory that they take on disk.
      * `matrix` = (O, I), I = S*d.
    """

    kind = "soft"
    codebook: Any
    candidates: Any
    logits: Any
    frozen: Any
    matrix: tuple[int, int] = static()
    assignments: Any = None

    @property
    def stack(self) -> tuple[int, ...]:
        return tuple(self.codebook.shape[:-3])

    @property
    def num_candidates(self) -> int:
        return 1 if self.candidates is None else self.candidates.shape[-3]

    @property
    def num_subvectors(self) -> int:
        """Of the whole stack."""
        return math.prod(self.stack) * self.matrix[0] * (self.matrix[1] // self.codebook.shape[-1])

    def _fixed(self) -> VQArray:
        return VQArray(self.codebook, self.assignments, self.matrix)

    def ratios(self) -> Float[Array, "*stack n O S"]:
        """r, exactly one-hot where frozen."""
        if self.candidates is None:
            return jnp.ones((*self.stack, 1, self.matrix[0], self.matrix[1] // self.codebook.shape[-1]), jnp.float32)
        axis = self.logits.ndim - 3
        hard = jax.nn.one_hot(self.logits.argmax(axis), self.logits.shape[axis], axis=axis, dtype=self.logits.dtype)
        return jnp.where(jnp.expand_dims(self.frozen, axis), hard, jax.nn.softmax(self.logits, axis))

    def decode(self, dtype: Any = None) -> Float[Array, "*stack O I"]:
        """The soft weight; differentiable in codebook and logits."""
        candidates = self.candidates
        if candidates is None:
            candidates = jnp.expand_dims(self._fixed().codes(), len(self.stack))
        weight = soft_weights(self.codebook, candidates, self.ratios())
        return weight if dtype is None else weight.astype(dtype)

    def cost(self) -> Cost:
        """Of the hard form with a codebook in float32."""
        rows, columns = self.matrix
        *_, codewords, length = self.codebook.shape
        layers, bits = math.prod(self.stack), pallas_kernels.code_bits(codewords)
        codes = layers * rows * packed_bytes(columns // length, bits)
        return Cost(layers * rows * columns, codes, 4 * math.prod(self.codebook.shape))

    def tunable(self) -> dict[str, Any]:
        """The codebook; and the logits, where there is a choice."""
        found = {"codebook": self.codebook}
        return found if self.candidates is None else {**found, "logits": self.logits}

    def harden(self) -> VQArray:
        """The candidate of largest ratio (the earlier one of equals), packed. Step 9 of the method."""
        if self.candidates is None:
            return self._fixed()
        logits, candidates = np.asarray(self.logits), np.asarray(self.candidates)
        codes = np.take_along_axis(candidates, logits.argmax(-3, keepdims=True), -3).squeeze(-3)
        return from_codes(self.codebook, codes)


def soften(
    hard: VQArray, weight: Float[np.ndarray, "*stack O I"] | None, num_candidates: int, start: str = "distance"
) -> SoftVQArray:
    """Candidates (eq 5) and first logits of a k-means result.

    `start` "uniform": z = 0, r = 1/n (the paper). "distance": z_i = log(dist_n / (dist_i + 1e-5)) with squared
    distances, z_n = 0, so r is proportional to 1/distance (the released code).
    With one candidate it is the code that `hard` has, nearest or not.
    """
    if start not in ("uniform", "distance"):
        raise ValueError(f"start={start!r}: wanted 'uniform' or 'distance'")
    rows, columns = hard.matrix
    stack, groups = hard.stack, hard.num_groups
    codebook, packed = jax.device_put((np.asarray(hard.codebook, np.float32), hard.assignments))
    if num_candidates == 1:
        return SoftVQArray(codebook, None, None, None, hard.matrix, packed)
    codebooks = np.asarray(codebook).reshape(-1, hard.num_codewords, hard.subvector_length)
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
    return SoftVQArray(codebook, *jax.device_put((candidates, logits, frozen)), hard.matrix)
