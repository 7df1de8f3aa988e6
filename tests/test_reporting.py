"""The report and the picture grids: what is written is what was given, and a browser is content with it."""

import base64
import dataclasses
import html.parser
import io
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vq4dit_jax.errors import InputError
from vq4dit_jax.progress import progress
from vq4dit_jax.reporting import ReportData, charts, grids, markup, process, write_comparison, write_grid, write_report

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
MODELS = ("fp", "kmeans", "vq4dit")


class Page(html.parser.HTMLParser):
    """Every element of a page with its attributes, and its text; fails where the tags are not balanced."""

    def __init__(self, source: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        self.text = re.sub(r"\s+", " ", "".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data if self.open[-1] in ("span", "b", "sub", "small", "code") else f" {data} ")

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def data() -> ReportData:
    """A run of 40 steps on a model of 3 blocks, with figures no two of which are alike."""
    rng = np.random.default_rng(0)
    log = []
    for step in range(40):
        line = {
            "step": step,
            "trajectory": step // 10,
            "timestep": 900 - step % 10 * 100,
            "l_d": 0.09 / (step + 1),
            "l_r": 2 - step / 20,
        }
        line |= {"loss": 0.1, "frozen_fraction": step / 40, "seconds": 0.25}
        if step % 5 == 0:
            line["ratio_histogram"] = rng.integers(1, 1000, 20).tolist()
        log.append(line)
    layers = []
    for block in range(3):
        for i, role in enumerate(("attn/qkv", "mlp/fc1")):
            layer = {
                "path": f"blocks/{block}/{role}/kernel",
                "block": block,
                "role": role,
                "shape": [96 + i, 32],
                "codewords": 256 - i,
            }
            layer |= {
                "subvector": 4,
                "groups": 3 - i,
                "bits": 2.1234 + block,
                "kmeans_error": 0.2101 + block / 10 + i / 100,
            }
            layers.append(layer | {"final_error": 0.2606 + block / 10 + i / 100})

    def quality(k: int) -> dict:
        figures = {
            "fd": 10.316 * k,
            "sfd": 14.213 + k,
            "mind": 31.52 + k,
            "is": 6.9146 - k,
            "precision": 0.71251 - k / 10,
            "recall": 0.6128 - k / 10,
        }
        to_fp = {"psnr_to_fp_db": 20.04 + k, "ssim_to_fp": 0.9 + k / 100, "ms_ssim_to_fp": 0.93 + k / 100}
        return figures | to_fp | {"num_images": 1000 + k, "features": "ResNet-56 pooled (64)"}

    metrics = {
        "format": 1,
        "model": {"variant": "DiT-T/2", "parameters": 9_832_944, "quantized_parameters": 9_437_184},
        "size": {
            "fp32_bytes": 39_331_776, "quantized_bytes": 4_283_392, "assignment_bytes": 2_359_296,
            "codebook_bytes": 143_360, "other_bytes": 1_583_040, "bits_per_quantized_weight": 2.1215,
        },
        "quality": {
            "fp": quality(1) | dict.fromkeys(("psnr_to_fp_db", "ssim_to_fp", "ms_ssim_to_fp")), "kmeans": quality(3),
            "vq4dit": quality(2),
        },
        "calibration": {
            "steps": 40, "l_d_last": 0.0032316, "l_r_last": 0.05344, "frozen_fraction": 0.9876, "kmeans_l_d": 0.09353,
            "hard_l_d": 0.0022134, "kmeans_eps_error": 0.22041, "hard_eps_error": 0.044189,
        },
        "time_s": {
            "load": 1.34, "kmeans": 21.4, "calibrate": 251.7, "export": 0.82, "sample": 3725.0, "evaluate": None,
        },
        "recipe": {
            "sampler": "ddpm", "steps": 25, "cfg_scale": 1.5, "seed": 17, "batch": 16, "devices": ["cpu:0", "cpu:1"],
            "versions": {"jax": "0.10.2"},
        },
    }  # fmt: skip
    return ReportData(
        title="DiT-T/2 in 2 bits",
        metrics=metrics,
        config={
            "model": {"variant": "DiT-T/2", "checkpoint": None},
            "calibration": {"lr": {"ratios": 0.05}},
            "seed": 17,
        },
        train_log=log,
        layers=layers,
        images={name: rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8) for name in MODELS},
        labels=["cat", "dog", "ship", "frog", "truck", "deer"],
        command="python -m vq4dit_jax.main --config=configs/t.py --workdir=runs/t",
    )


def written(folder: pathlib.Path, data: ReportData) -> Page:
    write_report(folder / "report.html", data)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def empty(**changes) -> ReportData:
    return dataclasses.replace(ReportData("t", {}, {}, [], [], {}, [], ""), **changes)


def test_page_holds_the_figures_it_was_given(tmp_path, data):
    text = written(tmp_path, data).text.replace("\u202f", " ").replace("\u00a0", " ")
    for figure in (
        "9.83 M parameters", "96.0 % of them", "37.51 MiB", "4.08 MiB", "9.2×", "2.12 of 32", "2.122 bits",  # size
        "39 331 776", "4 283 392", "2 359 296", "143 360", "1 583 040", "197 696",  # the last: what the format costs
        "10.3 ", "30.9 ", "20.6 ", "closes 50 %",  # Frechet distances, (30.948 - 20.632) / (30.948 - 10.316)
        "15.2 ", "17.2 ", "16.2 ", "5.91", "3.91", "4.91", "0.613", "0.413", "0.513", "0.313", "23.0", "22.0",
        "1 001", "1 003", "1 002", "ResNet-56 pooled (64)", "not FID", "Inception-score analogue",
        "0.0935", "0.00221", "42.3×", "0.220", "0.0442", "4.99×",
        "After 40 steps: Ld 0.00323, Lr 0.0534, 98.8 %",
        "1.3 s", "21 s", "4 min 12 s", "0.8 s", "1 h 02 min", "10 s, 0.250 s for the median step",
        "ddpm", "25", "1.5", "17", "16", "cpu:0, cpu:1", "0.10.2",
        "config.calibration.lr.ratios 0.05", "config.model.checkpoint —", data.command,
    ):  # fmt: skip
        assert figure.lower() in text.lower(), figure
    for layer in data.layers:
        assert f"{layer['kmeans_error']:.3f}" in text
        assert f"{layer['final_error']:.3f}" in text
        assert f"{layer['bits']:.3f}" in text
        assert "×".join(map(str, layer["shape"])) in text


def test_the_better_quantized_model_is_marked(tmp_path, data):
    write_report(tmp_path / "report.html", data)
    marked = re.findall(r"<strong>(.*?)</strong>", (tmp_path / "report.html").read_text())
    # PSNR, SSIM and MS-SSIM were made higher for k-means.
    assert marked == ["20.6", "16.2", "33.5", "4.91", "0.513", "0.413", "23.0", "0.9300", "0.9600"]


def of_models(data: ReportData, names: tuple[str, ...]) -> ReportData:
    """The report of a run of these models, the last one the best but for full precision, with the tables of all of them."""
    full, *_ = data.metrics["quality"].values()
    distances = {name: 10.0 * (len(names) - i if i else 1) for i, name in enumerate(names)}
    quality = {name: {**full, "fd": distances[name], "psnr_to_fp_db": 20.0 + i} for i, name in enumerate(names)}
    images = dict(zip(names, list(data.images.values()) * 2, strict=False))
    row = {"bytes": 1000, "sampler": "ddpm", "cfg_scale": 1.5, "seed": 0, **full}
    table = [{**row, "method": name, "bits": 32.0 if name == names[0] else 2.0, "steps": steps, "fd": distances[name]}
             for name in names for steps in (50, 100)]  # fmt: skip
    return dataclasses.replace(data, metrics={**data.metrics, "quality": quality}, images=images, table=table)


@pytest.mark.parametrize(
    ("names", "titles"),
    [
        (("fp", "quantized"), ("full precision", "quantized")),
        (
            ("fp", "kmeans", "balanced & rotated", "vq4dit"),
            ("full precision", "k-means", "balanced & rotated", "VQ4DiT"),
        ),
    ],
)
def test_a_run_of_any_number_of_models_has_all_of_them_in_every_part(tmp_path, data, names, titles):
    page = written(tmp_path, of_models(data, names))
    assert len(page.all("img")) == 6 * len(names)
    alternatives = [image["alt"] for image in page.all("img")]
    assert all(
        f"{title[0].upper() + title[1:]}, seed 2: ship".lower() in map(str.lower, alternatives) for title in titles
    )
    assert ("three models" in page.text) == (len(names) == 3)
    heads = re.findall(r"Measure(.*?)Fr", page.text)
    assert [title.lower() in heads[0].lower() for title in titles] == [True] * len(titles)
    assert all(page.text.lower().count(title.lower()) >= 3 for title in titles)  # tile, pictures, quality
    source = (tmp_path / "report.html").read_text()
    marked = re.findall(r"<strong>(.*?)</strong>", source)
    # The distances of the quantized models differ where there are several, and the last one's is the least.
    assert marked == (["10.0", f"{20.0 + len(names) - 1:.1f}"] if len(names) > 2 else []), marked
    assert ("closes" in page.text) == (len(names) > 2)
    assert "Quality by time steps and bits" in page.text


def test_only_inception_features_are_called_inception(tmp_path, data):
    quality = {name: {**data.metrics["quality"][name], "features": "Inception-v3 pool_3"} for name in MODELS}
    text = written(tmp_path, dataclasses.replace(data, metrics={**data.metrics, "quality": quality})).text
    assert "not FID" not in text and "Inception score" in text and "analogue" not in text


def test_a_run_of_before_a_figure_existed_has_dashes_for_it(tmp_path, data):
    old = {
        name: {key: value for key, value in found.items() if key not in ("mind", "ssim_to_fp", "ms_ssim_to_fp")}
        for name, found in data.metrics["quality"].items()
    }
    text = written(tmp_path, dataclasses.replace(data, metrics={**data.metrics, "quality": old})).text
    for name in "Monge distance", " SSIM to full precision", "MS-SSIM to full precision":
        assert re.search(rf"{name}\s*[↓↑]\s*—\s*—\s*—", text)


def test_missing_figures_are_dashes(tmp_path):
    nothing = {
        name: dict.fromkeys(("fd", "sfd", "is", "precision", "recall", "psnr_to_fp_db", "num_images"))
        for name in MODELS
    }
    page = written(tmp_path, empty(metrics={"quality": nothing, "size": {"fp32_bytes": float("nan")}}))
    assert page.text.count("—") >= 3 * 7
    assert "nan" not in page.text.lower() and "None" not in page.text
    assert "No calibration step was logged" in page.text
    assert "No pictures were sampled" in page.text
    assert "No layer was quantized" in page.text
    assert "No ratio histogram" in page.text
    assert not page.all("img") and not page.all("svg")


@pytest.mark.parametrize(
    "log",
    [
        [{"step": 1}],
        [{"step": 1, "trajectory": 0, "l_d": 0.0, "l_r": None, "frozen_fraction": float("nan")}],
        [
            {
                "step": 7,
                "trajectory": 0,
                "l_d": 1e-9,
                "l_r": 0.0,
                "frozen_fraction": 1.0,
                "seconds": 0.0,
                "ratio_histogram": [0] * 20,
            }
        ],
        [{"step": s, "l_d": 0.5, "l_r": 0.5, "ratio_histogram": [1] * 20} for s in range(2)],
    ],
)
def test_odd_logs_do_not_crash(tmp_path, log):
    source = written(tmp_path, empty(train_log=log))
    assert all("nan" not in d["d"] for d in source.all("path"))


HOSTILE = "<script>alert('x')</script>\"'&<img src=http://evil.example/x onerror=alert(1)>$title"


def test_hostile_strings_are_text(tmp_path, data):
    layer = {**data.layers[0], "path": HOSTILE, "role": HOSTILE}
    metrics = {key: data.metrics[key] for key in ("size", "calibration")}
    metrics["model"] = {"variant": HOSTILE}
    metrics["quality"] = {"fp": {"features": HOSTILE}}
    metrics["recipe"] = {"sampler": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    metrics["time_s"] = {HOSTILE: 1.0}
    changes = {"metrics": metrics, "layers": [layer], "labels": [HOSTILE] * 6, "images": {HOSTILE: data.images["fp"]}}
    page = written(
        tmp_path, dataclasses.replace(data, title=HOSTILE, config={HOSTILE: HOSTILE}, command=HOSTILE, **changes)
    )
    assert not page.all("script")
    assert all(image["src"].startswith("data:") for image in page.all("img"))
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.text.count("<script>") >= 10 and page.text.count("$title") >= 10
    assert page.all("img")[0]["alt"].startswith(HOSTILE)


def test_bytes_that_are_no_text_become_question_marks(tmp_path):
    command = b"--workdir=caf\xe9".decode("utf-8", "surrogateescape")  # as sys.argv has it
    assert "--workdir=caf?" in written(tmp_path, empty(title=command, command=command)).text


def test_nothing_is_fetched(tmp_path, data):
    write_report(tmp_path / "report.html", data)
    source = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?://|@import|url\(", source)
    for tag, attributes in Page(source).elements:
        assert tag not in ("script", "iframe", "object", "embed")
        for name in ("src", "href", "srcset", "data", "action"):
            assert attributes.get(name, "data:").startswith(("data:", "#")), (tag, attributes)


def test_tables_and_pictures_speak(tmp_path, data):
    page = written(tmp_path, data)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("table") == tags.count("caption") > 5
    assert all(th["scope"] in ("row", "col") for th in page.all("th"))
    assert len(page.all("img")) == 3 * 6 and all(image["alt"] for image in page.all("img"))
    assert "VQ4DiT, seed 2: ship" in [image["alt"] for image in page.all("img")]
    assert all(a.get("aria-label") for _, a in page.elements if a.get("role") == "img")
    assert tags.count("h1") == 1


def test_small_pictures_are_stored_exactly(tmp_path, data):
    stored = [image["src"].split(",", 1)[1] for image in written(tmp_path, data).all("img")]
    decoded = [np.asarray(Image.open(io.BytesIO(base64.b64decode(s)))) for s in stored]
    bands = [range(0, 4), range(4, 6)]
    expected = [data.images[name][i] for band in bands for name in MODELS for i in band]
    np.testing.assert_array_equal(decoded, expected)


def test_long_runs_make_small_pages(tmp_path, data):
    rng = np.random.default_rng(0)
    log = [{**data.train_log[0], "step": s, "trajectory": s // 250, "l_d": rng.lognormal()} for s in range(50_000)]
    log = [{k: v for k, v in line.items() if k != "ratio_histogram" or line["step"] % 10 == 0} for line in log]
    layers = [{**data.layers[0], "block": b, "role": f"role/{r}"} for b in range(28) for r in range(7)]
    noise = rng.integers(0, 256, (32, 256, 256, 3), dtype=np.uint8)  # what compresses worst
    write_report(
        tmp_path / "report.html",
        dataclasses.replace(data, train_log=log, layers=layers, images=dict.fromkeys(MODELS, noise)),
    )
    assert (tmp_path / "report.html").stat().st_size < 3_000_000


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_colours_stand_out(tmp_path, mode):
    write_report(tmp_path / "report.html", empty())
    rules = re.findall(r":root \{(.*?)\}", (tmp_path / "report.html").read_text(), re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})\b", rules[mode]))
    for ground in ("page", "card"):
        wanted = dict.fromkeys(("ink", "soft", "vq"), 4.5) | dict.fromkeys(
            ("fp", "kmeans", "books", "other"), 3.0
        )  # text, graphics
        for name, least in wanted.items():
            low, high = sorted((luminance(colours[name]), luminance(colours[ground])))
            assert (high + 0.05) / (low + 0.05) >= least, (name, ground)


def chromium(tmp_path: pathlib.Path, page: pathlib.Path) -> tuple[str, str]:
    """The page's DOM and the browser's log."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
    flags += " --disable-background-networking --disable-component-update --disable-sync"
    command = [shutil.which("chromium"), *flags.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--v=0", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on PATH (Debian: apt-get install chromium)")
def test_browser_has_no_complaint(tmp_path, data):
    bad = tmp_path / "bad.html"
    bad.write_text("<script>console.error('seen by this test')</script>")
    assert "CONSOLE" in chromium(tmp_path, bad)[1]

    write_report(tmp_path / "report.html", data)
    dom, log = chromium(tmp_path, tmp_path / "report.html")
    assert "CONSOLE" not in log
    assert dom.count("<img") == 3 * 6 and "DiT-T/2 in 2 bits</h1>" in dom
    # The browser's own parser found the structure that was meant: nothing moved, dropped or added.
    meant = [tag for tag, _ in Page((tmp_path / "report.html").read_text()).elements]
    assert [tag for tag, _ in Page(dom).elements] == meant


@given(st.floats(min_value=1e-30, max_value=1e30), st.integers(1, 6))
def test_numbers_round_correctly(value, digits):
    text = markup.number(value, digits)
    plain = text.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")).replace("×10", "e")
    assert float(plain) == pytest.approx(value, rel=0.5000001 * 10.0 ** (1 - digits), abs=0)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000))
def test_thinned_curves_keep_their_extremes(ys):
    points = [(float(x), y) for x, y in enumerate(ys)]
    kept = charts.thinned(points)
    assert len(kept) <= charts.MOST_POINTS
    assert kept == sorted(set(kept)) and set(kept) <= set(points)
    assert min(y for _, y in kept) == min(ys) and max(y for _, y in kept) == max(ys)


@given(st.floats(-1e5, 1e5), st.floats(1e-6, 1e6))
def test_linear_ticks_are_few_and_inside(low, width):
    high = low + width
    ticks = charts.linear_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert all(low - 1e-6 * width <= tick <= high + 1e-6 * width for tick in ticks)


@given(st.floats(1e-6, 1e6), st.floats(1.01, 1e6))
def test_log_ticks_are_at_least_two_and_inside(low, ratio):
    ticks = charts.log_ticks(low, low * ratio)
    assert 2 <= len(ticks) <= 20 and ticks == sorted(set(ticks))
    assert all(low * 0.99 <= tick <= low * ratio * 1.01 for tick in ticks)


def test_solved_assignments_are_no_mixture():
    solved, chosen = [0] * 19 + [7], [3] + [0] * 18 + [4]
    page = lambda *counts: markup.ElementTree.tostring(
        process.ratios([{"step": i, "ratio_histogram": c} for i, c in enumerate(counts)]), encoding="unicode"
    )
    assert "No sub-vector had a choice" in page(solved, solved) and "mixture" not in page(solved, solved)
    assert "mixture" in page(chosen, solved) and "No sub-vector" not in page(chosen, solved)


@pytest.mark.parametrize(
    ("count", "columns", "scale", "rows"), [(5, 3, 2, 2), (4, 4, 1, 1), (1, 8, 3, 1), (7, 1, None, 7)]
)
def test_grid_pixels(tmp_path, count, columns, scale, rows):
    images = np.random.default_rng(count).integers(0, 256, (count, 6, 4, 3), dtype=np.uint8)
    write_grid(tmp_path / "grid.png", images, columns, scale)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    scale = 24 if scale is None else scale  # 4 pixels wide to at least 96
    height, width, gap = 6 * scale, 4 * scale, grids.GAP
    columns = min(columns, count)
    assert pixels.shape == (rows * (height + gap) + gap, columns * (width + gap) + gap, 3)
    inside = np.zeros(pixels.shape[:2], bool)
    for i in range(count):
        y, x = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        np.testing.assert_array_equal(
            pixels[y : y + height, x : x + width], np.kron(images[i], np.ones((scale, scale, 1), np.uint8))
        )
        inside[y : y + height, x : x + width] = True
    assert (pixels[~inside] == 255).all()


def test_large_pictures_stay_as_they_are(tmp_path):
    images = np.zeros((2, 256, 256, 3), np.uint8)
    write_grid(tmp_path / "grid.png", images, columns=2)
    assert size(tmp_path / "grid.png") == (2 * 256 + 3 * grids.GAP, 256 + 2 * grids.GAP)


@pytest.mark.parametrize("count", [3, 12, 13, 30])
def test_comparison_puts_a_seed_in_one_column_and_a_model_in_one_row(tmp_path, count):
    rows = {}
    for m, name in enumerate(
        ("full precision", "VQ4DiT")
    ):  # one colour for each picture, none of them a grey like text
        rows[name] = np.tile(np.array([[[[0, 200, 0]]]], np.uint8), (count, 32, 32, 1))
        rows[name][..., 0], rows[name][..., 2] = np.arange(count)[:, None, None], m
    write_comparison(tmp_path / "c.png", rows, [f"a class with a long name {i}" for i in range(count)])
    pixels = np.asarray(Image.open(tmp_path / "c.png")).astype(int)
    corners = np.empty((2, count, 2), int)
    for m in range(2):
        for i in range(count):
            found = np.argwhere((pixels == (i, 200, m)).all(-1))
            assert len(found) == 96 * 96
            corners[m, i] = found.min(0)
            assert (found.max(0) - found.min(0) == 95).all()
    np.testing.assert_array_equal(corners[0, :, 1], corners[1, :, 1])
    assert (corners[0, :, 0] < corners[1, :, 0]).all()
    bands = -(-count // grids.BAND)
    assert len(np.unique(corners[0, :, 0])) == bands
    assert len(np.unique(corners[0, :, 1])) == -(-count // bands)
    first = corners[0, 0]
    assert (pixels[: first[0]] < 128).any(), "no class names on top"
    assert (pixels[first[0] : first[0] + 96, : first[1]] < 128).any(), "no model name at the left"


def test_comparison_without_labels_has_no_line_for_them(tmp_path):
    rows = {"a": np.zeros((2, 8, 8, 3), np.uint8)}
    write_comparison(tmp_path / "with.png", rows, ["x", "y"])
    write_comparison(tmp_path / "without.png", rows)
    assert size(tmp_path / "without.png")[1] < size(tmp_path / "with.png")[1]


def size(path: pathlib.Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def pictures(*shape: int, dtype=np.uint8) -> np.ndarray:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: write_grid(p, pictures(2, 8, 8, 3, dtype=np.float32), 2), "float32"),
        (lambda p: write_grid(p, pictures(2, 8, 8, 4), 2), "(2, 8, 8, 4)"),
        (lambda p: write_grid(p, pictures(0, 8, 8, 3), 2), "(0, 8, 8, 3)"),
        (lambda p: write_grid(p, pictures(2, 8, 8, 3), 0), "columns=0"),
        (lambda p: write_grid(p, pictures(2, 8, 8, 3), 2, 0), "scale=0"),
        (lambda p: write_comparison(p, {}, None), "rows"),
        (lambda p: write_comparison(p, {"a": pictures(2, 8, 8, 3), "b": pictures(3, 8, 8, 3)}), "(3, 8, 8, 3)"),
        (lambda p: write_comparison(p, {"a": pictures(2, 8, 8, 3)}, ["x"]), "labels"),
    ],
)
def test_bad_pictures_are_refused_and_nothing_is_left(tmp_path, call, words):
    with pytest.raises(InputError, match=re.escape(words)):
        call(tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_shows_what_is_left_on_a_terminal(monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    assert list(progress([3, 4, 5], "sampling", "image")) == [3, 4, 5]
    with progress(2_000_000, "download", "B") as bar:
        bar.update(2_000_000)
    shown = sys.stderr.getvalue()
    assert "sampling" in shown and "3/3" in shown and "image/s" in shown and "<" in shown
    assert "download" in shown and "2.00M/2.00M" in shown


def test_progress_is_silent_in_a_log(capfd):
    assert list(progress(iter("ab"), "sampling", "image")) == ["a", "b"]
    with progress(5, "steps", "step") as bar:
        bar.update(5)
    assert capfd.readouterr() == ("", "")
