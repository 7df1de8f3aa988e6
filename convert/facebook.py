"""facebookresearch/DiT's checkpoints: its names are those of our tree, with `weight` for `kernel`."""

from typing import Any

from convert.layout import BIAS, CONV, LINEAR, POSITIONS, TABLE, Layout, Rule

_LINEARS = {
    "t_embedder/mlp/0": "t_embedder.mlp.0",
    "t_embedder/mlp/2": "t_embedder.mlp.2",
    "blocks/attn/qkv": "blocks.{}.attn.qkv",
    "blocks/attn/proj": "blocks.{}.attn.proj",
    "blocks/mlp/fc1": "blocks.{}.mlp.fc1",
    "blocks/mlp/fc2": "blocks.{}.mlp.fc2",
    "blocks/adaLN_modulation/1": "blocks.{}.adaLN_modulation.1",
    "final_layer/adaLN_modulation/1": "final_layer.adaLN_modulation.1",
    "final_layer/linear": "final_layer.linear",
}

FACEBOOK = Layout(
    name="facebookresearch/DiT",
    block_prefix="blocks.",
    rules=(
        Rule("x_embedder/proj/kernel", CONV, ("x_embedder.proj.weight",)),
        Rule("x_embedder/proj/bias", BIAS, ("x_embedder.proj.bias",)),
        Rule("pos_embed", POSITIONS, ("pos_embed",)),
        Rule("y_embedder/embedding_table/embedding", TABLE, ("y_embedder.embedding_table.weight",)),
        *(Rule(f"{ours}/kernel", LINEAR, (f"{theirs}.weight",)) for ours, theirs in _LINEARS.items()),
        *(Rule(f"{ours}/bias", BIAS, (f"{theirs}.bias",)) for ours, theirs in _LINEARS.items()),
    ),
)


def metadata(model: Any) -> dict[str, str]:
    """What shapes in these names do not tell of a `DiT`: `num_heads`, `num_classes` of a table without a null row, and a SiT's
    `model`, `prediction` and `path_type`."""
    told = {"num_heads": str(model.num_heads)}
    if not model.null_label:
        told["num_classes"] = str(model.num_classes)
    if model.predicts == "flow":
        told |= {"model": "SiT", "prediction": "velocity", "path_type": "Linear"}
    return told
