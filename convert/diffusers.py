"""diffusers' `DiTTransformer2DModel` (before: `Transformer2DModel` with `ada_norm_zero`).

It differs from facebookresearch/DiT in more than names. Query, key and value are three Linears; every block has
its own copy of the time-step and label embedders, and the output layer uses the first block's; the position table is
computed, not stored. Its module also computes something slightly different, for which our `DiT` has fields: the
exponent of the time-step sinusoids is divided by 127, not 128, and the second LayerNorm of a block has the config's
`norm_eps`, by default 1e-5, not 1e-6.
"""

from collections.abc import Mapping
from typing import Any

from convert.layout import BIAS, CONV, LINEAR, TABLE, Layout, Rule
from vq4dit_jax.errors import InputError

_BLOCK = "transformer_blocks.{}"
_EMBEDDERS = f"{_BLOCK}.norm1.emb"
_LINEARS = {
    "t_embedder/mlp/0": (f"{_EMBEDDERS}.timestep_embedder.linear_1",),
    "t_embedder/mlp/2": (f"{_EMBEDDERS}.timestep_embedder.linear_2",),
    "blocks/attn/qkv": tuple(f"{_BLOCK}.attn1.to_{role}" for role in "qkv"),
    "blocks/attn/proj": (f"{_BLOCK}.attn1.to_out.0",),
    "blocks/mlp/fc1": (f"{_BLOCK}.ff.net.0.proj",),
    "blocks/mlp/fc2": (f"{_BLOCK}.ff.net.2",),
    "blocks/adaLN_modulation/1": (f"{_BLOCK}.norm1.linear",),
    "final_layer/adaLN_modulation/1": ("proj_out_1",),
    "final_layer/linear": ("proj_out_2",),
}

DIFFUSERS = Layout(
    name="diffusers",
    block_prefix="transformer_blocks.",
    rules=(
        Rule("x_embedder/proj/kernel", CONV, ("pos_embed.proj.weight",)),
        Rule("x_embedder/proj/bias", BIAS, ("pos_embed.proj.bias",)),
        Rule("y_embedder/embedding_table/embedding", TABLE, (f"{_EMBEDDERS}.class_embedder.embedding_table.weight",)),
        *(Rule(f"{ours}/kernel", LINEAR, tuple(f"{t}.weight" for t in theirs)) for ours, theirs in _LINEARS.items()),
        *(Rule(f"{ours}/bias", BIAS, tuple(f"{t}.bias" for t in theirs)) for ours, theirs in _LINEARS.items()),
    ),
)

CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
DEFAULT_NORM_EPS = 1e-5
FREQ_SHIFT = 1

# Values of a config, besides sizes, with which our module computes the same.
_WANTED = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}


def check_config(path: Any, config: Mapping[str, Any]) -> float:
    """Refuses a `config.json` of another architecture; `norm_eps` of the one it is."""
    name = config.get("_class_name", CLASSES[0])
    if name not in CLASSES:
        raise InputError(f"{path}: config.json has _class_name={name!r}; {' or '.join(CLASSES)} is wanted")
    for key, wanted in _WANTED.items():
        if config.get(key, wanted) != wanted:
            raise InputError(f"{path}: config.json has {key}={config[key]!r}; DiT has {wanted!r}")
    norm_eps = config.get("norm_eps", DEFAULT_NORM_EPS)
    if type(norm_eps) not in (int, float) or not 0 < norm_eps < 1:
        raise InputError(f"{path}: config.json has norm_eps={norm_eps!r}; a number between 0 and 1 is wanted")
    return norm_eps
