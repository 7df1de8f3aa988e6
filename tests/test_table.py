"""The table of the papers: order, names of the figures, recipes, and what stands for a figure that is missing."""

import re

from vq4dit_jax.reporting import markdown
from vq4dit_jax.reporting.markup import render
from vq4dit_jax.reporting.table import is_fid, quality_by_steps, sort_rows

INCEPTION = "Inception-v3 (2015-12-05) pool_3 (2048) against VIRTUAL_imagenet256_labeled.npz"


def _row(**changes) -> dict:
    row = {
        "method": "VQ4DiT", "bits": 2.0, "bytes": 170_000_000, "steps": 50, "sampler": "ddpm", "cfg_scale": 1.5, "seed": 0,
        "num_images": 10_000, "fd": 12.42, "sfd": 20.5, "is": 200.25, "precision": 0.71234, "recall": 0.5, "features": INCEPTION,
    }  # fmt: skip
    return {**row, **changes}


FULL = {"method": "full precision", "bits": 32.0, "bytes": 2_700_000_000}
ROWS = [
    _row(), _row(steps=250), _row(steps=100), _row(bits=3.0), _row(bits=3.0, steps=250), _row(bits=3.0, steps=100),
    *(_row(**FULL, steps=steps, fd=steps / 10) for steps in (50, 100, 250)),
]  # fmt: skip


def _cells(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line.startswith("|")
    ]


def test_rows_stand_as_in_the_papers_by_steps_then_bits():
    head, rule, *rows = _cells(markdown("DiT-XL/2", ROWS, "python -m vq4dit_jax.main"))
    assert head == [
        "Timesteps",
        "Method",
        "Bits (W)",
        "Size (MB)",
        "FID ↓",
        "sFID ↓",
        "IS ↑",
        "Precision ↑",
        "Recall ↑",
    ]
    assert set(rule) == {"---"} and {len(row) for row in rows} == {len(head)}
    assert [(row[0], row[2]) for row in rows] == [(s, b) for s in ("250", "100", "50") for b in ("32", "3", "2")]
    assert rows[0][3:5] == ["2700.0", "25.0"] and rows[-1][1:5] == ["VQ4DiT", "2", "170.0", "12.4"]


def test_the_order_and_doubles_of_the_input_change_nothing():
    """A full-precision row that two runs have stands once."""
    assert sort_rows(ROWS[::-1] + ROWS) == sort_rows(ROWS)


def test_only_pool_3_of_inception_is_called_fid():
    assert is_fid(ROWS)
    for features in (
        "Inception-v3 (2015-12-05) up to mixed_7 mixed_7 (768) against x",
        "CIFAR-10 ResNet-56 pool (64) against x",
    ):
        rows = [*ROWS, _row(features=features, steps=10)]
        assert not is_fid(rows)
        assert "FID" not in "".join(_cells(markdown("DiT", rows, "c"))[0])


def test_the_recipe_stands_below_once_or_by_number():
    text = markdown("DiT", ROWS, "make table")
    assert text.count("10,000 images, DDPM, guidance 1.5, seed 0") == 1 and "Made by `make table`." in text
    two = markdown("DiT", [*ROWS, _row(num_images=50_000)], "c")
    assert "1: 10,000 images" in two and "2: 50,000 images" in two and _cells(two)[0][-1] == "Recipe"
    assert sorted({row[-1] for row in _cells(two)[2:]}) == ["1", "2"]


def test_a_missing_figure_is_a_dash_and_its_reason_is_told():
    reasons = {"fd": "no weights of the last layers", "psnr_to_fp_db": "nothing beside it"}
    rows = [_row(fd=None, sfd=None, reasons=reasons), _row(**FULL)]
    text = markdown("DiT", rows, "c")
    assert _cells(text)[-1][4:6] == ["—", "—"]
    assert re.search(r"— fd: no weights of the last layers\.", text)
    assert "nothing beside it" not in text  # the table has no column of it


def test_figures_that_the_papers_lack_have_a_column_where_a_row_has_them():
    """Rows of a run of an older version, beside this one, have dashes there."""
    reasons = {"mind": "moments alone", "psnr_to_fp_db": "nothing beside it", "ssim_to_fp": "nothing beside it"}
    young = _row(mind=30.25, psnr_to_fp_db=31.27, ssim_to_fp=0.98765, ms_ssim_to_fp=None)
    head, _, *rows = _cells(
        text := markdown("DiT", [young, _row(**FULL, mind=29.0, reasons=reasons), _row(steps=10)], "c")
    )
    more = ["FID ↓", "sFID ↓", "MIND ↓", "IS ↑", "Precision ↑", "Recall ↑", "PSNR ↑ (dB)", "SSIM ↑"]
    assert head[4:] == more
    found = [[row[head.index(name)] for name in ("MIND ↓", "PSNR ↑ (dB)", "SSIM ↑")] for row in rows]
    assert found == [["29.0", "—", "—"], ["30.2", "31.3", "0.9877"], ["—", "—", "—"]]
    assert "— mind: moments alone." in text and "nothing beside it" not in text
    for figures in {"mind": 1.0}, {"mind": 1.0, "fd": None}:
        named = [_cells(markdown("DiT", [_row(features=f, **figures)], "c"))[0] for f in (INCEPTION, "ResNet-56 pool")]
        assert "MIND ↓" in named[0] and "MD ↓" in named[1]


def test_the_report_has_the_table_only_where_it_says_more_than_metrics():
    assert quality_by_steps([_row(), _row(**FULL)]) is None and quality_by_steps([]) is None
    html = render(quality_by_steps(ROWS))
    assert html.count("<tr>") == 1 + len(ROWS) and "10,000 images" in html
    assert "<b>" not in render(quality_by_steps([*ROWS, _row(features="<b>bold</b>")]))
