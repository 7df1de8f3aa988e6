"""The VAE of Stable Diffusion (Rombach et al. 2022, arXiv 2112.10752), named parameter for parameter as in diffusers.

It leads from images in [-1, 1] to latents of an eighth of their side, and back. `convert.vae.load_vae` opens its checkpoints;
`vq4dit_jax.networks.latents.decode_images` decodes many latents in bounded memory. Images and latents are NHWC.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vq4dit_jax.errors import InputError

_NORM_EPS = 1e-6
_QUERIES = 1024  # of attention at a time: the scores of one chunk at 64x64 latents take 16 MiB an image, whole ones 64


class AutoencoderKL(nn.Module):
    """`decode`: latents to images; `encode`: images to the posterior of their latents.

        image = vae.apply({"params": params}, z, method="decode")

    `block_out_channels` are the widths of the levels, the widest image first; each level but the last halves it. The
    decoder has `layers_per_block` + 1 residual blocks a level. `scaling_factor` is what a diffusion model's latents
    were multiplied with; this module neither multiplies nor divides.

    `dtype` is that of convolutions and matrix products: float32 (full float32, also where an accelerator's default is
    less) or bfloat16. float16 is refused, because activations may pass its 65504. Norms, activation functions and
    attention's softmax are in float32 throughout, and so are the parameters and what comes out.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    image_channels: int = 3
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    dtype: Any = jnp.float32

    @property
    def downsampling(self) -> int:
        """Side of an image / side of its latents."""
        return 2 ** (len(self.block_out_channels) - 1)

    def setup(self) -> None:
        dtype = jnp.dtype(self.dtype)
        if dtype not in (jnp.float32, jnp.bfloat16):
            raise InputError(f"dtype={dtype}: the VAE computes in float32 or bfloat16")
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise InputError(f"norm_num_groups={self.norm_num_groups} does not divide the width {width}")
        sizes = (self.block_out_channels, self.layers_per_block)
        self.encoder = Encoder(*sizes, 2 * self.latent_channels, self.norm_num_groups, dtype)
        self.decoder = Decoder(*sizes, self.image_channels, self.norm_num_groups, dtype)
        self.quant_conv = _conv(2 * self.latent_channels, 1, dtype)
        self.post_quant_conv = _conv(self.latent_channels, 1, dtype)

    def decode(self, z: Float[Array | np.ndarray, "B h w latent_channels"]) -> Float[Array, "B H W image_channels"]:
        """Latents, already divided by `scaling_factor`, to float32 images around [-1, 1], not clipped; H = 8h, W = 8w."""
        return self.decoder(self.post_quant_conv(jnp.asarray(z))).astype(jnp.float32)

    def encode(
        self, x: Float[Array | np.ndarray, "B H W image_channels"]
    ) -> tuple[Float[Array, "B h w _"], Float[Array, "B h w _"]]:
        """Images in [-1, 1] to mean and log variance of the latents, float32; the latter is clipped to [-30, 20]."""
        height, width = x.shape[1:3]
        if height % self.downsampling or width % self.downsampling:
            raise InputError(f"x is {height} x {width} pixels; the VAE encodes multiples of {self.downsampling}")
        moments = self.quant_conv(self.encoder(jnp.asarray(x))).astype(jnp.float32)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def __call__(self, x: Float[Array | np.ndarray, "B H W image_channels"]) -> Float[Array, "B H W image_channels"]:
        """The reconstruction from the posterior's mean; it makes `init` touch every parameter."""
        return self.decode(self.encode(x)[0])


class Encoder(nn.Module):
    widths: tuple[int, ...]
    layers: int
    features: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w features"]:
        x = _conv(self.widths[0], 3, self.dtype, "conv_in")(x)
        for i, width in enumerate(self.widths):
            last = i == len(self.widths) - 1
            x = Level(width, self.layers, "" if last else "down", self.groups, self.dtype, name=f"down_blocks_{i}")(x)
        x = MidBlock(self.groups, self.dtype, name="mid_block")(x)
        x = norm_silu(x, self.groups, self.dtype, "conv_norm_out")
        return _conv(self.features, 3, self.dtype, "conv_out")(x)


class Decoder(nn.Module):
    widths: tuple[int, ...]
    layers: int
    features: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B H W features"]:
        x = _conv(self.widths[-1], 3, self.dtype, "conv_in")(x)
        x = MidBlock(self.groups, self.dtype, name="mid_block")(x)
        for i, width in enumerate(reversed(self.widths)):
            last = i == len(self.widths) - 1
            x = Level(width, self.layers + 1, "" if last else "up", self.groups, self.dtype, name=f"up_blocks_{i}")(x)
        x = norm_silu(x, self.groups, self.dtype, "conv_norm_out")
        return _conv(self.features, 3, self.dtype, "conv_out")(x)


class Level(nn.Module):
    """Residual blocks at one resolution, then half (`resample` "down") or twice ("up") of it, or the same ("")."""

    width: int
    layers: int
    resample: str
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w width"]:
        for i in range(self.layers):
            x = ResnetBlock(self.width, self.groups, self.dtype, name=f"resnets_{i}")(x)
        if self.resample == "down":
            return Downsample(self.dtype, name="downsamplers_0")(x)
        if self.resample == "up":
            return Upsample(self.dtype, name="upsamplers_0")(x)
        return x


class Downsample(nn.Module):
    """Every second pixel of a 3 x 3 convolution that is padded below and on the right only."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
        return _conv(x.shape[-1], 3, self.dtype, "conv", strides=2, padding=((0, 1), (0, 1)))(x)


class Upsample(nn.Module):
    """Every pixel four times, then a 3 x 3 convolution."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B H W C"]:
        return _conv(x.shape[-1], 3, self.dtype, "conv")(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))


class MidBlock(nn.Module):
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        width = x.shape[-1]
        x = ResnetBlock(width, self.groups, self.dtype, name="resnets_0")(x)
        x = AttentionBlock(self.groups, self.dtype, name="attentions_0")(x)
        return ResnetBlock(width, self.groups, self.dtype, name="resnets_1")(x)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1 x 1 convolution on x where the width changes."""

    width: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W width"]:
        h = norm_silu(x, self.groups, self.dtype, "norm1")
        h = _conv(self.width, 3, self.dtype, "conv1")(h)
        h = norm_silu(h, self.groups, self.dtype, "norm2")
        h = _conv(self.width, 3, self.dtype, "conv2")(h)
        if x.shape[-1] != self.width:
            x = _conv(self.width, 1, self.dtype, "conv_shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """x + attention(norm(x)) over all pixels, with one head as wide as x."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        batch, height, width, channels = x.shape
        dense = functools.partial(nn.Dense, channels, dtype=self.dtype, precision=_precision(self.dtype))
        h = norm(x, self.groups, "group_norm").astype(self.dtype).reshape(batch, height * width, channels)
        out = attention(dense(name="to_q")(h), dense(name="to_k")(h), dense(name="to_v")(h))
        return x + dense(name="to_out_0")(out).reshape(x.shape)


def attention(q: Float[Array, "B T C"], k: Float[Array, "B T C"], v: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
    """softmax(q k^T / sqrt(C)) v, `_QUERIES` queries at a time; scores and softmax in float32."""
    precision = _precision(q.dtype)
    scale = 1 / math.sqrt(q.shape[-1])

    def chunk(q: Float[Array, "B Q C"]) -> Float[Array, "B Q C"]:
        scores = jnp.einsum("bqc,bkc->bqk", q, k, precision=precision, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * scale, axis=-1).astype(v.dtype)
        return jnp.einsum("bqk,bkc->bqc", weights, v, precision=precision)

    batch, tokens, channels = q.shape
    if tokens <= _QUERIES:
        return chunk(q)
    chunks = -(-tokens // _QUERIES)
    q = jnp.pad(q, ((0, 0), (0, chunks * _QUERIES - tokens), (0, 0))).reshape(batch, chunks, _QUERIES, channels)
    out = jax.lax.map(chunk, q.swapaxes(0, 1)).swapaxes(0, 1)
    return out.reshape(batch, chunks * _QUERIES, channels)[:, :tokens]


def norm(x: Float[Array, "B H W C"], groups: int, name: str) -> Float[Array, "B H W C"]:
    """GroupNorm in float32, as a submodule of the caller."""
    # Not E[x^2] - E[x]^2, which cancels where the mean is large.
    return nn.GroupNorm(groups, epsilon=_NORM_EPS, use_fast_variance=False, name=name)(x.astype(jnp.float32))


def norm_silu(x: Float[Array, "B H W C"], groups: int, dtype: Any, name: str) -> Float[Array, "B H W C"]:
    return nn.silu(norm(x, groups, name)).astype(dtype)


def _conv(
    features: int, side: int, dtype: Any, name: str | None = None, strides: int = 1, padding: Any = None
) -> nn.Conv:
    padding = side // 2 if padding is None else padding
    return nn.Conv(
        features, (side, side), strides, padding=padding, dtype=dtype, precision=_precision(dtype), name=name
    )


def _precision(dtype: Any) -> jax.lax.Precision | None:
    """Of a product in `dtype`: float32 is not rounded to TF32 or bfloat16, as is the default of some accelerators."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
