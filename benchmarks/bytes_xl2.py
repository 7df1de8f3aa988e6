"""Bytes of DiT-XL/2 in every form that a config of this repository makes, from shapes alone: the table in docs/methods.md.

    python -m benchmarks.bytes_xl2

Codes, tables (codebooks, scales, centres) and all that is kept are counted as they are stored. Nothing is downloaded or trained.
"""

import pathlib
import runpy
from typing import Any

import jax

from vq4dit_jax.networks.dit import parameter_shapes, variant
from vq4dit_jax.qarray.cast import cast_kept
from vq4dit_jax.qarray.rules import abstract_quantized
from vq4dit_jax.qarray.tree import Sizes, sizes
from vq4dit_jax.run import config as configs

FORMS = {
    "W8A8": "xl2_256_w8a8",
    "W4A8": "xl2_256_w4a8",
    "W4A8, mixed": "xl2_256_w4a8_mp",
    "W3": "xl2_256_w3",
    "W2": "xl2_256_w2",
    "W2A8": "xl2_256_w2a8",
    "W1.5": "xl2_256_w1p5",
}
"""Name -> config. An allocation or a mixture spends its budget to within a layer's step, so that these rows are the most."""
_CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def counted(name: str) -> tuple[Sizes, float | None]:
    """(sizes of the form before bits are spread, bits a weight of the budget or None)."""
    config = runpy.run_path(str(_CONFIGS / f"{name}.py"))["get_config"]()
    model = variant(config.model.variant, input_size=config.model.input_size)
    network, q = model.network(), config.quantize
    packed = abstract_quantized(parameter_shapes(model), configs.rules(config), network.prefixes, q.codebook_dtype)
    if q.other_dtype:
        packed = jax.eval_shape(lambda tree: cast_kept(tree, q.other_dtype), packed)
    found = sizes(packed)
    if q.method == "viditq" and config.viditq.budget:
        return found, config.viditq.budget
    codebooks = q.method == "vq4dit" or config.viditq.weights == "codebooks"
    if codebooks and config.calibration.allocation != "given":
        return found, config.calibration.budget * 8 * found.assignment_bytes / found.quantized_parameters
    return found, None


def rows() -> list[tuple[str, float, int, int]]:
    """(form, bits a quantized weight, bytes of these, bytes of all else); a budget counts where there is one."""
    teacher = sizes(parameter_shapes(variant("DiT-XL/2")))
    out = [("float16", 16.0, 2 * teacher.parameters, 0)]
    for form, name in FORMS.items():
        found, budget = counted(name)
        bits = found.bits_per_quantized_weight if budget is None else budget
        out.append((form, bits, int(bits * found.quantized_parameters / 8), found.other_bytes))
    return out


def table() -> str:
    """Markdown."""
    found: Any = rows()
    whole = found[0][2]
    lines = ["| form | bits a weight | MB of quantized weights | MB of all else | MB | of float16 |", "|" + "---|" * 6]
    for form, bits, packed, kept in found:
        parts = (f"{packed / 1e6:,.1f}", f"{kept / 1e6:,.1f}", f"{(packed + kept) / 1e6:,.1f}")
        lines.append(f"| {form} | {bits:.3f} | {' | '.join(parts)} | {(packed + kept) / whole:.1%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
