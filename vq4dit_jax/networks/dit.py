"""Diffusion Transformer (Peebles & Xie 2023, arXiv 2212.09748), named parameter for parameter as its checkpoints.

One module serves the full-precision teacher, the student in calibration and the packed model: only the leaves of
the parameter tree differ (see `linear.py`). Blocks are stacked on a leading axis and scanned, so XL/2 compiles as
fast as one block, and a quantized block is decoded only while it runs.

Images are NHWC in model space: C = 4 latents or C = 3 pixels.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from vq4dit_jax.diffusion.guidance import Guidance, classifier_free
from vq4dit_jax.diffusion.process import Process
from vq4dit_jax.networks import prepared
from vq4dit_jax.networks.conditioning import ClassLabels
from vq4dit_jax.networks.layers import (
    Attention,
    LabelEmbedder,
    Mlp,
    Modulation,
    PatchEmbed,
    TimestepEmbedder,
    layer_norm,
    modulate,
    sincos_positions,
)
from vq4dit_jax.networks.network import Network, OutputLayer, Prediction, Role, Stack
from vq4dit_jax.networks.prepared import PreparedBlocks
from vq4dit_jax.qarray.linear import Linear, leaf
from vq4dit_jax.qarray.parts import scan

_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
DIT_VARIANTS: dict[str, dict[str, int]] = {
    f"DiT-{size}/{patch}": dict(depth=depth, hidden_size=width, num_heads=heads, patch_size=patch)
    for size, (depth, width, heads) in _SIZES.items()
    for patch in (2, 4, 8)
}
ROLES = (
    Role("attn/qkv/kernel", "tokens", "self", codebooks=3),
    Role("attn/proj/kernel", "tokens", "self", values="attn/qkv/kernel"),
    Role("mlp/fc[12]/kernel", "tokens", "mlp"),
    Role("adaLN_modulation/1/kernel", "conditioning", "conditioning"),
)
"""The Linears of a block."""
_NORM_EPS = 1e-6


class DiTBlock(nn.Module):
    """adaLN-Zero block: x + gate * f(modulate(norm(x))) for attention, then for the MLP.

    `modulation` (B, 6D), where given, is used instead of computing it from c.
    """

    num_heads: int
    mlp_ratio: float
    norm2_eps: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], c: Float[Array, "B D"], modulation: Float[Array, "B C"] | None = None
    ) -> Float[Array, "B T D"]:
        width = x.shape[-1]
        chunks = Modulation(6 * width, name="adaLN_modulation")(c) if modulation is None else modulation
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(chunks, 6, axis=-1)
        h = Attention(self.num_heads, name="attn")(modulate(layer_norm(x, _NORM_EPS), shift1, scale1))
        x = x + gate1[:, None, :] * h
        h = Mlp(int(self.mlp_ratio * width), name="mlp")(modulate(layer_norm(x, self.norm2_eps), shift2, scale2))
        return x + gate2[:, None, :] * h


class FinalLayer(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], c: Float[Array, "B D"]) -> Float[Array, "B T F"]:
        shift, scale = jnp.split(Modulation(2 * x.shape[-1], name="adaLN_modulation")(c), 2, axis=-1)
        return Linear(self.features, nn.initializers.zeros, name="linear")(
            modulate(layer_norm(x, _NORM_EPS), shift, scale)
        )


class DiT(nn.Module):
    """The network: x (B, H, W, C), t (B,), y (B,) -> (B, H, W, 2C), noise prediction and variance interpolation.

    With learn_sigma=False the output is (B, H, W, C). `dtype` is that of the computation; parameters may be stored
    in any. `freq_shift` and `norm2_eps` differ in checkpoints made for diffusers' own module. `remat` recomputes
    each block in a backward pass. Without `null_label` it was trained without dropping labels and cannot be guided.

    With predicts="flow" it is a SiT (Ma et al. 2024, arXiv 2401.08740): t is in [0, 1], noise at 0 and data at 1, and the output
    is the velocity (B, H, W, C); what learn_sigma adds was never trained and is cut off.
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    learn_sigma: bool = True
    freq_shift: int = 0
    norm2_eps: float = _NORM_EPS
    null_label: bool = True
    predicts: str = "eps"
    dtype: Any = jnp.float32
    remat: bool = False

    @property
    def out_channels(self) -> int:
        """Of the last Linear; a flow's output has `in_channels`."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def grid(self) -> int:
        return self.input_size // self.patch_size

    def setup(self) -> None:
        self.x_embedder = PatchEmbed(self.patch_size, self.hidden_size)
        self.pos_embed = self.param("pos_embed", lambda _: jnp.asarray(sincos_positions(self.grid, self.hidden_size)))
        self.t_embedder = TimestepEmbedder(self.hidden_size, self.freq_shift)
        self.y_embedder = LabelEmbedder(self.num_classes, self.hidden_size, self.null_label)
        self._block = DiTBlock(self.num_heads, self.mlp_ratio, self.norm2_eps, parent=None)
        # In a function, because Flax takes apart the dicts and tuples that a module's attributes are.
        blocks = leaf(self, "blocks", self._init_blocks)
        self._blocks = lambda: blocks
        self.final_layer = FinalLayer(self.patch_size**2 * self.out_channels)

    def __call__(
        self,
        x: Float[Array, "B H W C"],
        t: Num[Array, " B"],
        y: Int[Array, " B"],
        return_blocks: bool = False,
        modulations: Any = None,
    ) -> Any:
        """Noise prediction; with `return_blocks` also the outputs of the blocks (L, B, T, D), for L_d (eq 8).

        `modulations`: what the method of that name gave for the same (t, y); computed where left out.
        """
        c = self.conditioning(t, y)
        tokens, outputs = self._tokens(x), []
        for i, run in enumerate(self._runs()):
            given = None if modulations is None else modulations[i]
            tokens, out, _ = self._run(run, tokens, c, given, return_blocks)
            outputs.append(out)
        image = self._unpatchify(self.final_layer(tokens, c))
        if self.predicts == "flow":
            image = image[..., : self.in_channels]
        return (image, jnp.concatenate(outputs)) if return_blocks else image

    def conditioning(self, t: Num[Array, " B"], y: Int[Array, " B"]) -> Float[Array, "B D"]:
        """c, the sum of the embeddings of time step and class: all that adaLN reads."""
        return self.t_embedder(t, self.dtype) + self.y_embedder(y, self.dtype)

    def modulations(self, t: Num[Array, " B"], y: Int[Array, " B"]) -> tuple[jax.Array, ...]:
        """Shifts, scales and gates of every run of equal blocks: (L, B, 6D), or (B, L * 6D) of prepared blocks.

        They depend on (t, y) alone, so a sampler can compute them once for all its steps.
        """
        c = self.conditioning(t, y)
        return tuple(self._modulation(run, c) for run in self._runs())

    def ranges(
        self, x: Float[Array, "B H W C"], t: Num[Array, " B"], y: Int[Array, " B"]
    ) -> dict[str, Float[Array, " L"]]:
        """The largest magnitudes of what each prepared block's proj and fc2 read."""
        c, tokens, ranges = self.conditioning(t, y), self._tokens(x), []
        for run in self._runs():
            tokens, _, found = self._run(run, tokens, c, None, True)
            ranges.append(found)
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *ranges)

    def _runs(self) -> list[Any]:
        """The stack of blocks, or the runs of equal blocks that prepared ones come in."""
        blocks = self._blocks()
        return list(blocks) if isinstance(blocks, tuple) else [blocks]

    def _tokens(self, x: Float[Array, "B H W C"]) -> Float[Array, "B T D"]:
        return self.x_embedder(x.astype(self.dtype)) + self.pos_embed.astype(self.dtype)[None]

    def _modulation(self, run: Any, c: Float[Array, "B D"]) -> jax.Array:
        if isinstance(run, PreparedBlocks):
            return prepared.modulation(run, nn.silu(c))
        one = Modulation(6 * self.hidden_size, parent=None)
        apply = lambda _, p, __: (None, one.apply({"params": p}, c))
        return scan(apply, None, run["adaLN_modulation"])[1]

    def _run(self, run: Any, tokens: jax.Array, c: jax.Array, modulation: Any, look: bool) -> tuple[Any, Any, Any]:
        """A run of equal blocks: tokens, and where `look` is set outputs of all blocks and ranges of prepared ones."""
        if isinstance(run, PreparedBlocks):
            given = self._modulation(run, c) if modulation is None else modulation
            how = dict(num_heads=self.num_heads, eps=(_NORM_EPS, self.norm2_eps))
            if look:
                out = prepared.run_observed(run, tokens, given, **how)
                return out[0].astype(self.dtype), out[1].astype(self.dtype), out[2]
            return prepared.run(run, tokens, given, **how).astype(self.dtype), None, None
        apply = lambda p, tokens, m: self._block.apply({"params": p}, tokens, c, m)
        apply = jax.checkpoint(apply) if self.remat else apply
        step = lambda tokens, p, m: (out := apply(p, tokens, m), out if look else None)
        return *scan(step, tokens, run, modulation), None

    def forward_with_cfg(
        self,
        x: Float[Array, "B H W C"],
        t: Num[Array, " B"],
        y: Int[Array, " B"],
        cfg_scale: Any,
        modulations: Any = None,
    ) -> Float[Array, "B H W F"]:
        """Classifier-free guidance as in the reference: x = [z, z], y = [labels, null]; only the first half of x is read.

        The guided noise prediction stands in both halves of the output, the rest is each half's own.
        """
        half = x[: x.shape[0] // 2]
        out = self(jnp.concatenate([half, half]), t, y, modulations=modulations)
        channels = self.guided_channels
        guided = classifier_free(*jnp.split(out[..., :channels], 2), cfg_scale)
        return jnp.concatenate([jnp.concatenate([guided, guided]), out[..., channels:]], axis=-1)

    def guided(
        self,
        x: Float[Array, "B H W C"],
        t: Num[Array, " B"],
        y: Int[Array, " B"],
        null: Int[Array, " B"],
        cfg_scale: Any,
    ) -> Float[Array, "B H W C"]:
        """The guided prediction for labels `y` and null labels `null`, without the learned variance."""
        out = self(jnp.concatenate([x, x]), jnp.concatenate([t, t]), jnp.concatenate([y, null]))
        return Guidance(self.guided_channels).combine(out, cfg_scale, self.in_channels)[..., : self.in_channels]

    @property
    def guided_channels(self) -> int:
        """Of C = 4 latents only the first three are guided: the published figures were made that way."""
        return 3 if self.in_channels == 4 else self.in_channels

    def network(self) -> Network:
        """What calibration and sampling know of this model."""
        learned = self.learn_sigma and self.predicts != "flow"
        return Network(
            _Apply(self),
            (self.input_size, self.input_size, self.in_channels),
            ClassLabels(self.num_classes, self.null_label),
            Process(self.predicts, learned),
            Guidance(self.guided_channels),
            (Stack("blocks", self.depth, ROLES, self.num_heads),),
            _Predict(self),
            _Hoist(self),
            OutputLayer("final_layer/linear", self.patch_size) if learned else None,
        )

    def _init_blocks(self, key: jax.Array) -> Any:
        tokens, c = jnp.zeros((1, self.grid**2, self.hidden_size)), jnp.zeros((1, self.hidden_size))
        return jax.vmap(lambda k: self._block.init(k, tokens, c)["params"])(jax.random.split(key, self.depth))

    def _unpatchify(self, patches: Float[Array, "B T F"]) -> Float[Array, "B H W C"]:
        grid, p = self.grid, self.patch_size
        x = patches.reshape(-1, grid, grid, p, p, self.out_channels)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, grid * p, grid * p, self.out_channels)


@dataclasses.dataclass(frozen=True)
class _Apply:
    """Output and block outputs; as an object, so that networks of equal models are equal."""

    model: DiT

    def __call__(self, params: Any, x: jax.Array, t: jax.Array, y: jax.Array) -> Prediction:
        return Prediction(*self.model.apply({"params": params}, x, t, y, return_blocks=True))


@dataclasses.dataclass(frozen=True)
class _Predict:
    model: DiT

    def __call__(self, params: Any, x: jax.Array, t: jax.Array, y: jax.Array, modulations: Any = None) -> jax.Array:
        return self.model.apply({"params": params}, x, t, y, modulations=modulations)


@dataclasses.dataclass(frozen=True)
class _Hoist:
    model: DiT

    def __call__(self, params: Any, t: jax.Array, y: jax.Array) -> Any:
        return self.model.apply({"params": params}, t, y, method="modulations")


def variant(name: str, **overrides: Any) -> DiT:
    """`variant("DiT-XL/2", input_size=64)`, or "SiT-XL/2", the same module as a flow; KeyError names the known ones."""
    sizes = DIT_VARIANTS.get(name.replace("SiT-", "DiT-", 1))
    if sizes is None:
        raise KeyError(f"no variant {name!r}; known: {', '.join(DIT_VARIANTS)}, and SiT of the same sizes")
    flow = {"predicts": "flow"} if name.startswith("SiT-") else {}
    return DiT(**{**sizes, **flow, **overrides})


def parameter_shapes(model: DiT) -> Any:
    """The tree of `jax.ShapeDtypeStruct`s that `model.init` would fill; nothing is computed."""
    x = jax.ShapeDtypeStruct((1, model.input_size, model.input_size, model.in_channels), jnp.float32)
    label = jax.ShapeDtypeStruct((1,), jnp.int32)
    return jax.eval_shape(model.init, jax.eval_shape(jax.random.key, 0), x, label, label)["params"]


SETTINGS: dict[str, int] = {"num_heads": 0, "num_classes": 0}
"""Keys of a config's `model` section that are this network's own; 0: from the variant or the checkpoint."""
