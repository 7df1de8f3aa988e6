"""CIFAR ResNets (He et al. 2015, arXiv 1512.03385, section 4.2) as feature extractors: depth 6n + 2, n blocks a stage.

The network of github akamaster/pytorch_resnet_cifar10: shortcuts of option A (a strided slice, channels padded with
zeros). It is used for inference alone, so batch norm is folded into the convolutions when a checkpoint is converted
(`convert.resnet_cifar`), and each convolution has a bias instead.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vq4dit_jax.errors import InputError

STAGE_WIDTHS = (16, 32, 64)
SPATIAL_CHANNELS = 7
# Mean and deviation that the weights were trained with, on [0, 1] images.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class BasicBlock(nn.Module):
    """relu(conv(relu(conv(x))) + shortcut(x)); `stride` and `width` are those of the first convolution."""

    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w width"]:
        h = nn.relu(_conv3x3(self.width, "conv1", self.stride)(x))
        h = _conv3x3(self.width, "conv2")(h)
        if self.stride != 1 or x.shape[-1] != self.width:
            pad = (self.width - x.shape[-1]) // 2
            x = jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), (pad, pad)))
        return nn.relu(h + x)


class CifarResNet(nn.Module):
    """ResNet-`depth` for 32x32 images.

    Parameters: conv1, layer{1,2,3}_{0..n-1}/conv{1,2}, linear; each with kernel and bias, all float32.
    """

    depth: int = 56
    num_classes: int = 10

    @nn.compact
    def __call__(self, images: jax.typing.ArrayLike) -> dict[str, Float[Array, "B _"]]:
        """images (B, 32, 32, 3) uint8 -> float32 features.

        pool (B, 64): the last feature map, averaged; spatial (B, 448): its first 7 channels, 8 x 8 x 7 flattened, in
        place of sFID's spatial features (Nash et al. 2021, arXiv 2103.03841); logits (B, num_classes).
        """
        if self.depth < 8 or self.depth % 6 != 2:
            raise InputError(f"depth={self.depth}: a CIFAR ResNet has depth 6n + 2 with n >= 1, such as 20 or 56")
        if images.ndim != 4 or images.shape[1:] != (32, 32, 3) or images.dtype != jnp.uint8:
            raise InputError(
                f"images are {images.dtype} {images.shape}: a CIFAR ResNet reads uint8 (B, 32, 32, 3);"
                " choose another classifier for images of another size"
            )
        x = jnp.asarray(images).astype(jnp.float32) / 255.0
        x = (x - jnp.array(_MEAN, jnp.float32).reshape(1, 1, 1, 3)) / jnp.array(_STD, jnp.float32).reshape(1, 1, 1, 3)
        x = nn.relu(_conv3x3(STAGE_WIDTHS[0], "conv1")(x))
        for stage, width in enumerate(STAGE_WIDTHS, start=1):
            for block in range((self.depth - 2) // 6):
                stride = 2 if stage > 1 and block == 0 else 1
                x = BasicBlock(width, stride, name=f"layer{stage}_{block}")(x)
        pool = x.mean(axis=(1, 2))
        logits = nn.Dense(self.num_classes, precision=jax.lax.Precision.HIGHEST, name="linear")(pool)
        return {"pool": pool, "spatial": x[..., :SPATIAL_CHANNELS].reshape(x.shape[0], -1), "logits": logits}


def _conv3x3(width: int, name: str, stride: int = 1) -> nn.Conv:
    # Padding in numbers, since "SAME" pads a strided convolution on one side only, unlike the original.
    # Highest precision, so that a metric does not depend on the accelerator's default (TF32, bfloat16).
    return nn.Conv(
        width, (3, 3), strides=stride, padding=((1, 1), (1, 1)), precision=jax.lax.Precision.HIGHEST, name=name
    )
