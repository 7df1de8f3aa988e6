"""The layers that diffusion transformers are made of, named as in DiT's checkpoints."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from pallas_kernels import ops
from vq4dit_jax.qarray.linear import Linear

_NUM_FREQUENCIES = 128


def layer_norm(x: Float[Array, "B T D"], eps: float) -> Float[Array, "B T D"]:
    """LayerNorm without weights; statistics in float32."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)).astype(x.dtype)


def modulate(x: Float[Array, "B T D"], shift: Float[Array, "B D"], scale: Float[Array, "B D"]) -> Float[Array, "B T D"]:
    return x * (1 + scale[:, None, :]) + shift[:, None, :]


def sincos_positions(grid: int, features: int) -> Float[np.ndarray, "T D"]:
    """Fixed 2D sine-cosine position embedding, x in the first half of the features, y in the second."""
    frequencies = 1 / 10000 ** (np.arange(features // 4, dtype=np.float64) / (features / 4))
    y, x = np.meshgrid(np.arange(grid, dtype=np.float64), np.arange(grid, dtype=np.float64), indexing="ij")
    angles = [np.outer(axis.reshape(-1), frequencies) for axis in (x, y)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)


class PatchEmbed(nn.Module):
    """Non-overlapping p x p patches to tokens; `kernel` (p, p, C, D)."""

    patch_size: int
    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B T D"]:
        conv = nn.Conv(
            self.features, (self.patch_size,) * 2, strides=self.patch_size, padding="VALID", dtype=x.dtype, name="proj"
        )
        return conv(x).reshape(x.shape[0], -1, self.features)


class TimestepMLP(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B F"]) -> Float[Array, "B D"]:
        x = Linear(self.features, nn.initializers.normal(0.02), name="0")(x)
        return Linear(self.features, nn.initializers.normal(0.02), name="2")(nn.silu(x))


class TimestepEmbedder(nn.Module):
    """Sinusoids of t, cosines first, then an MLP. diffusers' layout divides the exponent by `half - 1` (freq_shift=1)."""

    features: int
    freq_shift: int = 0

    @nn.compact
    def __call__(self, t: Num[Array, " B"], dtype: Any) -> Float[Array, "B D"]:
        # Rounded to float32 where the reference rounds: at t = 999 an exact exponent would differ by 1e-5.
        exponent = np.float32(-math.log(10000)) * np.arange(_NUM_FREQUENCIES, dtype=np.float32)
        exponent = exponent / np.float32(_NUM_FREQUENCIES - self.freq_shift)
        frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)
        angles = t.astype(jnp.float32)[:, None] * frequencies[None]
        x = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        return TimestepMLP(self.features, name="mlp")(x.astype(dtype))


class LabelEmbedder(nn.Module):
    """A row per class, and with `null_label` one more, index num_classes, for the null label of guidance."""

    num_classes: int
    features: int
    null_label: bool = True

    @nn.compact
    def __call__(self, y: Int[Array, " B"], dtype: Any) -> Float[Array, "B D"]:
        init = nn.initializers.normal(0.02)
        rows = self.num_classes + self.null_label
        table = nn.Embed(rows, self.features, embedding_init=init, dtype=dtype, name="embedding_table")
        return table(y)


class Modulation(nn.Module):
    """adaLN: SiLU and a Linear from the conditioning to all shifts, scales and gates."""

    features: int

    @nn.compact
    def __call__(self, c: Float[Array, "B D"]) -> Float[Array, "B C"]:
        return Linear(self.features, nn.initializers.zeros, name="1")(nn.silu(c))


class Attention(nn.Module):
    num_heads: int

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        batch, tokens, width = x.shape
        qkv = Linear(3 * width, name="qkv")(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        out = ops.attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        return Linear(width, name="proj")(out.reshape(batch, tokens, width))


class Mlp(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return Linear(x.shape[-1], name="fc2")(nn.gelu(Linear(self.hidden, name="fc1")(x), approximate=True))
