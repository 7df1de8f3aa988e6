"""Inception-v3 of 2015-12-05 (Szegedy et al. 2015, arXiv 1512.00567), the network behind FID, sFID and the Inception score.

Layers are named as in TensorFlow's graph (`classify_image_graph_def.pb`); inside a block slashes are underscores, so
that `mixed_4/tower/conv_1` is `mixed_4/tower_conv_1` here. The network only infers: batch norm is folded into the
convolutions when weights are read (`convert.inception`), and each convolution has a bias instead.

Where this graph differs from later Inceptions (pytorch-fid's FIDInceptionA, C, E_1 and E_2 patch torchvision's alike):
an average pool divides by the number of pixels that lie inside the image, and the last block, mixed_10, has a maximum
pool in its place. Images are resized as by TensorFlow 1.

Four things make it fast on a CPU; all are exact up to rounding. 1x1 convolutions of one input are one matrix product. A
1x1 convolution precedes the average pool, with which it commutes, so that the pool has fewer channels. Pools are sums and
maxima of shifted slices. Convolutions without padding are padded, and the rim is cut off (see `convolve`).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vq4dit_jax.errors import InputError

IMAGE_SIZE = 299
SPATIAL_CHANNELS = 7
NUM_CLASSES = 1008
# Highest precision, so that a metric does not depend on the accelerator's default (TF32, bfloat16).
_PRECISION = jax.lax.Precision.HIGHEST


def resize(images: Float[Array, "B H W C"], size: int = IMAGE_SIZE) -> Float[Array, "B size size C"]:
    """TensorFlow 1's `resize_bilinear` (align_corners=False, no half-pixel centres) to size x size.

    Output pixel i lies at i * H / size of the input, and past the last pixel the edge is repeated. That is linear in
    rows and in columns: two matrix products.
    """
    rows, columns = (_interpolation(n, size) for n in images.shape[1:3])
    return jnp.einsum("yh,bhwc,xw->byxc", rows, images, columns, precision=_PRECISION)


def _interpolation(source: int, target: int) -> Float[np.ndarray, "target source"]:
    at = np.arange(target, dtype=np.float32) * np.float32(source / target)  # in float32, as TensorFlow
    low = np.floor(at).astype(np.int64)
    matrix = np.zeros((target, source), np.float32)
    np.add.at(matrix, (np.arange(target), low), 1 - (at - low.astype(np.float32)))
    np.add.at(matrix, (np.arange(target), np.minimum(low + 1, source - 1)), at - low.astype(np.float32))
    return matrix


def convolve(
    x: Float[Array, "B H W I"], kernel: Float[Array, "h w I O"], stride: int = 1, padding: str = "SAME"
) -> Float[Array, "B y x O"]:
    """Convolution with odd kernels; "VALID" or, at stride 1, "SAME" padding."""
    if kernel.shape[:2] == (1, 1):
        return jnp.matmul(x, kernel[0, 0], precision=_PRECISION)
    # XLA's CPU backend takes a convolution of stride 1 four times faster with "SAME" padding than without (jax 0.10.2).
    crop = stride == 1 and padding == "VALID"
    y = jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME" if crop else padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=_PRECISION,
    )
    if not crop:
        return y
    (top, left), (height, width) = (n // 2 for n in kernel.shape[:2]), x.shape[1:3]
    return y[:, top : height - top, left : width - left]


def max_pool(x: Float[Array, "B H W C"], stride: int = 2, padding: int = 0) -> Float[Array, "B h w C"]:
    """Maximum over windows of 3 x 3; for x >= 0, since padding is with zeros."""
    if padding:
        x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    for axis in (1, 2):
        last = x.shape[axis] - 2
        first, second, third = (jax.lax.slice_in_dim(x, i, last + i, stride, axis) for i in range(3))
        x = jnp.maximum(jnp.maximum(first, second), third)
    return x


def average_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Mean over the part of a window of 3 x 3 that lies inside the image; stride 1."""
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = x[:, :-2] + x[:, 1:-1] + x[:, 2:]
    x = x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]
    inside = [np.minimum(np.arange(n), 1) + np.minimum(np.arange(n)[::-1], 1) + 1 for n in (height, width)]
    return x / np.multiply.outer(*inside).astype(np.float32)[None, :, :, None]


class Weights(nn.Module):
    """Kernel (h, w, I, O) and bias (O,) of a layer."""

    kernel_size: tuple[int, ...]
    features: int

    @nn.compact
    def __call__(self, inputs: int) -> tuple[Float[Array, "..."], Float[Array, " O"]]:
        kernel = self.param("kernel", nn.initializers.he_normal(), (*self.kernel_size, inputs, self.features))
        return kernel, self.param("bias", nn.initializers.zeros, (self.features,))


def _conv(
    x: Float[Array, "B H W I"],
    name: str,
    features: int,
    kernel_size: tuple[int, int] = (1, 1),
    stride: int = 1,
    padding: str = "SAME",
) -> Float[Array, "B h w O"]:
    """relu(convolution + bias), a layer of the module that is being called."""
    kernel, bias = Weights(kernel_size, features, name=name)(x.shape[-1])
    return nn.relu(convolve(x, kernel, stride, padding) + bias[None, None, None, :])


def _heads(x: Float[Array, "B H W I"], widths: dict[str, int], pooled: str = "") -> list[Float[Array, "B H W _"]]:
    """relu(1x1 convolution + bias) for each name in `widths`, in one product; that of `pooled` is of the average pool of x."""
    weights = [Weights((1, 1), width, name=name)(x.shape[-1]) for name, width in widths.items()]
    together = convolve(x, jnp.concatenate([kernel for kernel, _ in weights], axis=-1))
    heads = jnp.split(together, np.cumsum(list(widths.values()))[:-1].tolist(), axis=-1)
    heads = [average_pool(head) if name == pooled else head for name, head in zip(widths, heads, strict=True)]
    return [nn.relu(head + bias[None, None, None, :]) for head, (_, bias) in zip(heads, weights, strict=True)]


class Inception(nn.Module):
    """The whole network, or (`complete=False`) its part up to mixed_7.

    Parameters, float32: <layer>/{kernel,bias} or <block>/<layer>/{kernel,bias}, kernels (h, w, I, O); softmax/kernel
    (2048, 1008) and softmax/bias.
    """

    complete: bool = True

    @nn.compact
    def __call__(self, images: jax.typing.ArrayLike) -> dict[str, Float[Array, "B _"]]:
        """uint8 images of any size -> float32 features.

        mixed_7 (B, 768): output of mixed_7, averaged over its 17 x 17 positions. spatial (B, 2023): the first 7 channels
        of mixed_6's 1x1 convolution after relu, 17 x 17 x 7 flattened, sFID's features (Nash et al. 2021,
        arXiv 2103.03841). Where complete also pool_3 (B, 2048), FID's features, and logits (B, 1008):
        pool_3 @ kernel, without the bias, as the public code for the Inception score has it; docs/inception.md.
        """
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != jnp.uint8:
            raise InputError(f"images are {images.dtype} {images.shape}: Inception reads uint8 (B, H, W, 3)")
        x = (resize(jnp.asarray(images).astype(jnp.float32)) - 128.0) / 128.0
        x = _conv(x, "conv", 32, (3, 3), stride=2, padding="VALID")
        x = _conv(x, "conv_1", 32, (3, 3), padding="VALID")
        x = max_pool(_conv(x, "conv_2", 64, (3, 3)))
        x = _conv(x, "conv_3", 80)
        x = max_pool(_conv(x, "conv_4", 192, (3, 3), padding="VALID"))
        x = Block35(32, name="mixed")(x)
        x = Block35(64, name="mixed_1")(x)
        x = Block35(64, name="mixed_2")(x)
        x = Reduction17(name="mixed_3")(x)
        x = Block17(128, name="mixed_4")(x)
        x = Block17(160, name="mixed_5")(x)
        x = Block17(160, name="mixed_6")(x)
        spatial = x[..., :SPATIAL_CHANNELS].reshape(x.shape[0], -1)  # a block's output begins with its 1x1 convolution
        x = Block17(192, name="mixed_7")(x)
        features = {"mixed_7": x.mean(axis=(1, 2)), "spatial": spatial}
        if not self.complete:
            return features
        x = Reduction8(name="mixed_8")(x)
        x = Block8(name="mixed_9")(x)
        x = Block8(last=True, name="mixed_10")(x)
        pool_3 = x.mean(axis=(1, 2))
        kernel, _ = Weights((), NUM_CLASSES, name="softmax")(pool_3.shape[-1])
        return {**features, "pool_3": pool_3, "logits": jnp.matmul(pool_3, kernel, precision=_PRECISION)}


class Block35(nn.Module):
    """1x1; 1x1, 5x5; 1x1, 3x3, 3x3; average pool, 1x1: on 35 x 35 positions."""

    pool_features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W O"]:
        widths = {"conv": 64, "tower_conv": 48, "tower_1_conv": 64, "tower_2_conv": self.pool_features}
        direct, five, three, pooled = _heads(x, widths, "tower_2_conv")
        five = _conv(five, "tower_conv_1", 64, (5, 5))
        three = _conv(three, "tower_1_conv_1", 96, (3, 3))
        three = _conv(three, "tower_1_conv_2", 96, (3, 3))
        return jnp.concatenate([direct, five, three, pooled], axis=-1)


class Reduction17(nn.Module):
    """3x3; 1x1, 3x3, 3x3; maximum pool: from 35 x 35 to 17 x 17 positions."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w O"]:
        direct = _conv(x, "conv", 384, (3, 3), stride=2, padding="VALID")
        three = _conv(x, "tower_conv", 64)
        three = _conv(three, "tower_conv_1", 96, (3, 3))
        three = _conv(three, "tower_conv_2", 96, (3, 3), stride=2, padding="VALID")
        return jnp.concatenate([direct, three, max_pool(x)], axis=-1)


class Block17(nn.Module):
    """1x1; 1x1, 1x7, 7x1; 1x1, 7x1, 1x7, 7x1, 1x7; average pool, 1x1: on 17 x 17 positions."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W O"]:
        width = self.width
        widths = {"conv": 192, "tower_conv": width, "tower_1_conv": width, "tower_2_conv": 192}
        direct, seven, twice, pooled = _heads(x, widths, "tower_2_conv")
        seven = _conv(seven, "tower_conv_1", width, (1, 7))
        seven = _conv(seven, "tower_conv_2", 192, (7, 1))
        twice = _conv(twice, "tower_1_conv_1", width, (7, 1))
        twice = _conv(twice, "tower_1_conv_2", width, (1, 7))
        twice = _conv(twice, "tower_1_conv_3", width, (7, 1))
        twice = _conv(twice, "tower_1_conv_4", 192, (1, 7))
        return jnp.concatenate([direct, seven, twice, pooled], axis=-1)


class Reduction8(nn.Module):
    """1x1, 3x3; 1x1, 1x7, 7x1, 3x3; maximum pool: from 17 x 17 to 8 x 8 positions."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w O"]:
        three, seven = _heads(x, {"tower_conv": 192, "tower_1_conv": 192})
        three = _conv(three, "tower_conv_1", 320, (3, 3), stride=2, padding="VALID")
        seven = _conv(seven, "tower_1_conv_1", 192, (1, 7))
        seven = _conv(seven, "tower_1_conv_2", 192, (7, 1))
        seven = _conv(seven, "tower_1_conv_3", 192, (3, 3), stride=2, padding="VALID")
        return jnp.concatenate([three, seven, max_pool(x)], axis=-1)


class Block8(nn.Module):
    """1x1; 1x1, {1x3, 3x1}; 1x1, 3x3, {1x3, 3x1}; pool, 1x1: on 8 x 8 positions. `last`: the pool is a maximum."""

    last: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W O"]:
        widths = {"conv": 320, "tower_conv": 384, "tower_1_conv": 448}
        if self.last:
            direct, three, twice = _heads(x, widths)
            pooled = _conv(max_pool(x, stride=1, padding=1), "tower_2_conv", 192)
        else:
            direct, three, twice, pooled = _heads(x, {**widths, "tower_2_conv": 192}, "tower_2_conv")
        twice = _conv(twice, "tower_1_conv_1", 384, (3, 3))
        three = [_conv(three, "tower_mixed_conv", 384, (1, 3)), _conv(three, "tower_mixed_conv_1", 384, (3, 1))]
        twice = [_conv(twice, "tower_1_mixed_conv", 384, (1, 3)), _conv(twice, "tower_1_mixed_conv_1", 384, (3, 1))]
        return jnp.concatenate([direct, *three, *twice, pooled], axis=-1)
