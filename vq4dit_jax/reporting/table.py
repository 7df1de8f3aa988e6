"""The table of the papers: quality by time steps and bits, full precision beside the quantized models.

A row is a dict, as `table.json` holds them:
  method ("full precision", "VQ4DiT"), bits (32, 3, 2), bytes (of the model on disk; 4 a parameter for full precision),
  steps, sampler, cfg_scale, num_images, seed; fd, sfd, is, precision, recall (None where not computed), features (the
  network and the real images that they belong to), reasons (figure -> why it is None); and, in rows that are young enough,
  mind, psnr_to_fp_db, ssim_to_fp, ms_ssim_to_fp.
"""

from typing import Any

from vq4dit_jax.reporting.markup import DASH, Element, element, fixed, note, number, section, table

_FIGURES = (  # key, name, text
    ("fd", "FID ↓", number),
    ("sfd", "sFID ↓", number),
    ("mind", "MIND ↓", number),
    ("is", "IS ↑", lambda v: number(v, 4)),
    ("precision", "Precision ↑", lambda v: fixed(v, 4)),
    ("recall", "Recall ↑", lambda v: fixed(v, 4)),
    ("psnr_to_fp_db", "PSNR ↑ (dB)", lambda v: fixed(v, 1)),
    ("ssim_to_fp", "SSIM ↑", lambda v: fixed(v, 4)),
    ("ms_ssim_to_fp", "MS-SSIM ↑", lambda v: fixed(v, 4)),
)
_TO_FULL_PRECISION = ("psnr_to_fp_db", "ssim_to_fp", "ms_ssim_to_fp")
_NOT_IN_PAPERS = ("mind", *_TO_FULL_PRECISION)
"""These have a column where a row has the figure."""
_RECIPE = ("num_images", "sampler", "cfg_scale", "seed", "features")


def sort_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """In the order of the papers: most time steps first, then most bits; of equal rows only one."""
    unique = {tuple(str(row.get(key)) for key in ("method", "bits", "steps", *_RECIPE)): row for row in reversed(rows)}
    return sorted(unique.values(), key=lambda row: (-row["steps"], -row["bits"], row["method"]))


def is_fid(rows: list[dict[str, Any]]) -> bool:
    """Whether the distances may be called FID and MIND: Inception's pool_3 in every row that has one."""
    named = [row["features"].lower() for row in rows if any(row.get(key) is not None for key in ("fd", "mind"))]
    return bool(named) and all("inception" in name and "pool_3" in name for name in named)


def _cells(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]], list[str]]:
    """(head, rows as text, notes: the recipes of the rows, and the reasons for missing figures)."""
    shown = [
        one for one in _FIGURES if one[0] not in _NOT_IN_PAPERS or any(row.get(one[0]) is not None for row in rows)
    ]
    names = [name if is_fid(rows) else name.replace("FID", "FD").replace("MIND", "MD") for _, name, _ in shown]
    recipes = list(dict.fromkeys(_recipe(row) for row in rows))
    numbered = len(recipes) > 1
    head = ["Timesteps", "Method", "Bits (W)", "Size (MB)", *names] + (["Recipe"] if numbered else [])
    cells = []
    for row in rows:
        values = [text(row.get(key)) for key, _, text in shown]
        size = fixed(row["bytes"] / 1e6, 1)
        line = [str(row["steps"]), row["method"], f"{row['bits']:g}", size, *values]
        cells.append(line + ([str(recipes.index(_recipe(row)) + 1)] if numbered else []))
    notes = [f"{i + 1}: {recipe}" if numbered else recipe for i, recipe in enumerate(recipes)]
    reasons: dict[str, list[str]] = {}
    # Full precision's own dashes explain themselves.
    silent = {*_NOT_IN_PAPERS} - {key for key, *_ in shown} | {*_TO_FULL_PRECISION}
    for row in rows:
        for figure, reason in (row.get("reasons") or {}).items():
            if figure in silent:
                continue
            figures = reasons.setdefault(reason, [])
            figures += [figure] if figure not in figures else []
    notes += [f"{DASH} {', '.join(figures)}: {reason}." for reason, figures in reasons.items()]
    return head, cells, notes


def _recipe(row: dict[str, Any]) -> str:
    return (
        f"{row['num_images']:,} images, {row['sampler'].upper()}, guidance {row['cfg_scale']:g}, seed {row['seed']}; "
        f"features: {row['features']}."
    )


def markdown(title: str, rows: list[dict[str, Any]], command: str) -> str:
    """The table with its recipe, and the command that made it."""
    head, cells, notes = _cells(sort_rows(rows))
    lines = [f"# {title}", "", _line(head), _line(["---"] * len(head)), *map(_line, cells), ""]
    return "\n".join([*lines, *(f"{text}  " for text in notes), "", f"Made by `{command}`.", ""])


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def quality_by_steps(rows: list[dict[str, Any]]) -> Element | None:
    """The same table as a section of the report; None for a run with one number of steps and one width."""
    rows = sort_rows(rows)
    if len({(row["steps"], row["method"]) for row in rows}) <= 2 and len({row["bits"] for row in rows}) <= 2:
        return None
    head, cells, notes = _cells(rows)
    caption = "Published tables have this form. Sizes: on disk; full precision in fp32."
    return section(
        "steps",
        "Quality by time steps and bits",
        element("div", {"class": "scroll"}, table(caption, head, cells, css="figures")),
        *map(note, notes),
    )
