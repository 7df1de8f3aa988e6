"""The collected figures for people: two markdown tables, quality and cost."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.quality import worth
from benchmarks.quality.stages import COMPARED
from vq4dit_jax.reporting.markup import DASH, fixed, number


def markdown(result: dict[str, Any]) -> str:
    rows, images, seeds = result["rows"], result["images"], result["seeds"]
    share = images // seeds
    c = result["config"]
    lines = [
        f"# Quality by method and bits, {c['model']['checkpoint'] or c['model']['variant']}",
        "",
        f"{images:,} images a row: {seeds} seeds of {share:,}, {c['sample']['sampler'].upper()} in {c['sample']['steps']} "
        f"steps, guidance {c['sample']['cfg_scale']:g}. Methods that calibrate have {c['calibration']['steps']} steps of "
        f"batch {c['calibration']['batch']}{_other_steps(rows)}.",
        "",
        f"*Pooled*: of all {images:,} images as one set. *Seeds*: mean ± standard deviation of the figures of {seeds} sets of "
        f"{share:,} images, each from a model of its own seed. Frechet distances of {share:,} images are biased upward against "
        f"those of {images:,}, in all rows alike: compare pooled with pooled, seeds with seeds. *To full precision*: "
        "how far above its distance, of the same noise and classes.",
        "",
        "## Quality",
        "",
    ]
    head, cells = zip(*_quality(rows), strict=True)
    lines += _table([*head], [[cell(row) for cell in cells] for row in rows])
    lines += [
        "",
        "Bits: of a quantized weight, codes, codebooks and scales counted. PSNR: median over "
        f"{min(COMPARED, share)} images of each seed, to full precision's of the same noise and class. Noise error: relative L2 "
        "error of the guided noise prediction on one held-out trajectory."
        + "".join(f" {text}" for column, text in _EXPLAINED.items() if column in head),
        "",
        *_worth(rows),
        "## Size and cost",
        "",
    ]
    head, cells = zip(*_cost(rows), strict=True)
    lines += _table([*head], [[cell(row) for cell in cells] for row in rows])
    lines += [
        "",
        "MB: packed, with all that is kept in 16 or 32 bits. Seconds and memory: means over seeds. Seconds compare only "
        "between rows of the same machine." + (f" {_STEP.format(c['sample']['batch'])}" if "Step, ms" in head else ""),
    ]
    lines += [part for remark in _remarks(rows) for part in ("", f"{remark}.")]
    if features := next((row["pooled"]["features"] for row in rows), None):
        lines += ["", f"Features: {features}."]
    reasons = {f"{name}: {why}" for row in rows for name, why in row["pooled"]["reasons"].items()
               if name != "is"}  # fmt: skip
    lines += ["", *(f"{DASH} {reason}.  " for reason in sorted(reasons))] if reasons else []
    if result["missing"]:
        lines += ["", f"Missing: {_missing(result['missing'], seeds)}."]
    commits = sorted({seed["commit"] or "unknown" for row in rows for seed in row["seeds"]})
    if commits:
        devices = sorted({seed["devices"]["samples"] for row in rows for seed in row["seeds"]})
        lines += ["", f"Models made at {', '.join(commits)}; samples on {' and '.join(devices)}."]
    return "\n".join([*lines, "", f"Made by `{result['command']}`.", ""])


def _worth(rows: list[dict[str, Any]]) -> list[str]:
    if (found := worth.compared(rows)) is None:
        return []
    explained = "Against the form itself at the same seeds: mean ± standard deviation of the differences."
    return ["## What each choice is worth", "", *_table(*found), "", explained, ""]


_YOUNG = ("mind", "ssim_to_fp", "ms_ssim_to_fp")
_EXPLAINED = {
    "MD ↓ pooled": "MD: Monge distance, the formula of MIND on the features of FD.",
    "SSIM ↑ seeds": "SSIM and MS-SSIM: means over the images of PSNR.",
}

README = ("fp", "kmeans_w2", "gptq_w2_g64", "released_w2", "ours_w2")
"""The rows of the README's table, in its order."""


def short(result: dict[str, Any], names: Sequence[str] = ()) -> str:
    """A few columns of the named rows, for the README; of all rows, for docs/quality.md. A test compares both pages."""
    head = [
        "Method",
        "Bits a weight",
        "Frechet distance",
        "to full precision",
        "PSNR to full precision",
        "L_d",
        "Calibration",
    ]
    exact = _exact(result["rows"])
    lines = []
    rows = {row["name"]: row for row in result["rows"]}
    for row in (rows[name] for name in names or rows):
        mean, bits = row["mean"], fixed(row["size"]["bits_per_quantized_weight"], 2)
        psnr, seconds = mean.get("psnr_to_fp_db"), mean.get("calibrate_s")
        cells = [
            row["label"],
            bits,
            number(row["pooled"]["fd"], 4),
            _gap(row, exact),
            DASH if psnr is None else f"{fixed(psnr, 1)} dB",
            number(mean.get("l_d"), 3),
            DASH if seconds is None else f"{fixed(seconds, 0)} s",
        ]
        lines.append([f"**{cell}**" for cell in cells] if row["label"] == "VQ4DiT" else cells)
    return "\n".join(_table(head, lines))


def _exact(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    return next((row for row in rows if row["method"] == "fp"), None)


def _gap(row: dict[str, Any], exact: dict[str, Any] | None) -> str:
    """How far above full precision's a row's pooled distance is."""
    if exact is None or row is exact or row["pooled"]["fd"] is None or not exact["pooled"]["fd"]:
        return DASH
    return f"{100 * (row['pooled']['fd'] / exact['pooled']['fd'] - 1):+.1f} %"


def _gaps(row: dict[str, Any], exact: dict[str, Any] | None) -> str:
    """The same of each seed, whose images are of the same noise and classes: mean and standard deviation."""
    if exact is None or row is exact:
        return DASH
    pairs = [(one["fd"], other["fd"]) for one, other in zip(row["seeds"], exact["seeds"], strict=True)]
    if not all(one is not None and other for one, other in pairs):
        return DASH
    gaps = [100 * (one / other - 1) for one, other in pairs]
    spread = f" ± {statistics.stdev(gaps):.1f}" if len(gaps) > 1 else ""
    return f"{statistics.fmean(gaps):+.1f}{spread} %"


def _other_steps(rows: list[dict[str, Any]]) -> str:
    """ "; VQ4DiT 400" where rows have another number of steps than the table."""
    own = {row["label"]: row["overrides"].get("calibration.steps") for row in rows}
    return "".join(f"; {label} {steps}" for label, steps in own.items() if steps)


def _remarks(rows: list[dict[str, Any]]) -> list[str]:
    """ "VQ4DiT, 1.57 bits, seeds 1 and 2: ..." for the remarks in the models' definition.json."""
    seeds_of: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for seed in row["seeds"]:
            if remark := seed.get("remark"):
                # Not the nominal bits: two rows of a method can have the same ones.
                bits = fixed(row["size"]["bits_per_quantized_weight"], 2)
                seeds_of.setdefault((f"{row['label']}, {bits} bits", remark), []).append(str(seed["seed"]))
    return [f"{which}, seed{'s' * (len(seeds) > 1)} {' and '.join(seeds)}: {remark}"
            for (which, remark), seeds in seeds_of.items()]  # fmt: skip


def _missing(items: list[dict[str, Any]], seeds: int) -> str:
    """ "dkm_w2, paper_w2 (quantize is not done); ours_w2 seeds 1, 2 (sample is not done)"."""
    lacking: dict[tuple[str, str], list[str]] = {}
    for item in items:
        lacking.setdefault((item["what"], item["row"]), []).append(str(item["seed"]))
    rows: dict[str, list[str]] = {}
    for (what, row), numbers in lacking.items():
        some = f" seed{'s' * (len(numbers) > 1)} {', '.join(numbers)}" if len(numbers) < seeds else ""
        rows.setdefault(what, []).append(row + some)
    return "; ".join(f"{', '.join(names)} ({what})" for what, names in rows.items())


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [_line(head), _line(["---"] * len(head)), *map(_line, rows)]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _spread(row: dict[str, Any], name: str, digits: int = 4) -> str:
    mean, std = row["mean"].get(name), row["std"].get(name)
    return number(mean, digits) if std is None else f"{number(mean, digits)} ± {number(std, 2)}"


def _quality(rows: list[dict[str, Any]]) -> list[tuple[str, Callable[[dict[str, Any]], str]]]:
    """(head, cell of a row) of each column. Figures that results of older versions lack have one where a row has them."""
    exact = _exact(rows)
    young = {name for name in _YOUNG if any(row["mean"].get(name) is not None for row in rows)}
    pooled = lambda name: lambda row: number(row["pooled"].get(name), 4)
    share = lambda name: lambda row: fixed(row["pooled"][name], 4)
    seeds = lambda name, digits=4: lambda row: _spread(row, name, digits)
    columns = [
        ("Method", "", lambda row: row["label"]),
        ("Bits (W)", "", lambda row: fixed(row["size"]["bits_per_quantized_weight"], 2)),
        ("FD ↓ pooled", "fd", pooled("fd")),
        ("to full precision", "fd", lambda row: _gap(row, exact)),
        ("FD ↓ seeds", "fd", seeds("fd")),
        ("to full precision, seeds", "fd", lambda row: _gaps(row, exact)),
        ("sFD ↓ pooled", "sfd", pooled("sfd")),
        ("MD ↓ pooled", "mind", pooled("mind")),
        ("MD ↓ seeds", "mind", seeds("mind")),
        ("IS ↑ seeds", "is", seeds("is")),
        ("Precision ↑ pooled", "precision", share("precision")),
        ("Recall ↑ pooled", "recall", share("recall")),
        ("PSNR ↑ seeds, dB", "psnr_to_fp_db", seeds("psnr_to_fp_db", 3)),
        ("SSIM ↑ seeds", "ssim_to_fp", seeds("ssim_to_fp")),
        ("MS-SSIM ↑ seeds", "ms_ssim_to_fp", seeds("ms_ssim_to_fp")),
        ("Noise error ↓ seeds", "noise_error", seeds("noise_error", 3)),
    ]
    return [(head, cell) for head, name, cell in columns if name not in _YOUNG or name in young]


_STEP = (
    "Step: a guided forward of {} images on the CPU, in the form that made the row's images; speed: full precision's time in "
    "the same run over it."
)


def _cost(rows: list[dict[str, Any]]) -> list[tuple[str, Callable[[dict[str, Any]], str]]]:
    """(head, cell of a row) of each column; the times of a step have one where a row has them."""
    of_size = lambda name, digits, unit=1: lambda row: fixed(row["size"][name] / unit, digits)
    mean = lambda name, digits: lambda row: fixed(row["mean"].get(name), digits)
    timed = any("speed" in row["mean"] for row in rows)
    columns = [
        ("Method", lambda row: row["label"]),
        ("Nominal bits", lambda row: f"{row['bits']:g}"),
        ("Bits (W)", of_size("bits_per_quantized_weight", 3)),
        ("Bits of all parameters", of_size("bits_per_parameter", 3)),
        ("MB", of_size("bytes", 3, 1e6)),
        ("L_d ↓ seeds", lambda row: _spread(row, "l_d", 3)),
        ("Quantize, s", mean("quantize_s", 1)),
        ("Calibrate, s", mean("calibrate_s", 0)),
        ("Peak memory, GB", mean("peak_gb", 2)),
        ("Step, ms", mean("step_ms", 0)),
        ("Speed", mean("speed", 2)),
        ("On", lambda row: " and ".join(sorted({seed["devices"]["model"] for seed in row["seeds"]}))),
    ]
    return [column for column in columns if timed or column[0] not in ("Step, ms", "Speed")]
