"""`python -m benchmarks.quality`: the whole table on a tiny model, resumed where it was killed, and what it refuses."""

import dataclasses
import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT
from evaluation_cases import images, linear_classifier, needs_tfgan
from models import tiny
from safetensors.numpy import save_file

import vq4dit_jax as vq
from benchmarks import record
from benchmarks.quality import __main__ as command
from benchmarks.quality import chart, figures, rows, stages, table, worth
from convert.facebook import FACEBOOK
from convert.layout import CONV, LINEAR, POSITIONS
from vq4dit_jax import evaluation, methods
from vq4dit_jax.qarray.tree import sizes
from vq4dit_jax.run import generation, pipeline, seeds
from vq4dit_jax.storage import checkpoint

pytestmark = [pytest.mark.once, needs_tfgan]

_CONFIG = """
from benchmarks.quality.rows import Row, Table
from vq4dit_jax.config import cifar10

def get_config():
    c = cifar10()
    c.model.checkpoint = {checkpoint!r}
    c.calibration.update(steps=3, batch=2)
    c.sample.update(num_images=8, batch=2, steps=2)
    c.evaluation.update(classifier="linear", reference={reference!r})
    short = {{"quantize.kmeans_iterations": 2, "calibration.trajectory_steps": 2, "calibration.save_every": 1}}
    return Table(c.lock(), (
        Row("fp", "full precision", "fp"),
        Row("rtn", "round to nearest", "rtn", 4, group=16),
        Row("kmeans", "k-means", "kmeans", 2),
        Row("ours", "VQ4DiT", "vq4dit", 2, config="configs/cifar10_w2.py", overrides=short | {{"calibration.budget": 3.0}}),
    ))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> pathlib.Path:
    """A table of a model of two blocks on 8x8 pixels, evaluated with a network that anyone can check."""
    model, params = tiny()
    # Outputs as small as those of a trained network: variances are exponentials of them.
    last = {**params["final_layer"], "linear": jax.tree.map(lambda a: 0.1 * a, params["final_layer"]["linear"])}
    params = {**params, "final_layer": last}
    folder = tmp_path_factory.mktemp("quality")
    back = {LINEAR: lambda w: w.T, CONV: lambda w: w.transpose(3, 2, 0, 1), POSITIONS: lambda w: w[None]}
    flat, tensors = checkpoint.flatten(params), {}
    for rule in FACEBOOK.rules:
        leaf = flat[rule.path]
        for i, name in enumerate(rule.names(model.depth)):
            one = leaf[i] if rule.stacked else leaf
            tensors[name] = np.ascontiguousarray(back.get(rule.kind, lambda w: w)(one))
    save_file(tensors, folder / "tiny.safetensors", metadata={"num_heads": "2"})
    np.savez(folder / "real.npz", images(50, seed=2))
    file = folder / "table.py"
    file.write_text(_CONFIG.format(checkpoint=str(folder / "tiny.safetensors"), reference=str(folder / "real.npz")))
    return file


@pytest.fixture(scope="module", autouse=True)
def network():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "load_classifier", lambda name: linear_classifier())
        yield linear_classifier()


def _in_this_process(flags, case, stage):
    """For `run_child`, without the seconds that a process takes to start."""
    stages.STAGES[stage](case)


def _arguments(config, workdir, *more) -> list[str]:
    return [f"--config={config}", f"--workdir={workdir}", *more]


def _read(path) -> dict:
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory) -> pathlib.Path:
    """The workdir of a table of two seeds that was made in two goes."""
    workdir = tmp_path_factory.mktemp("table")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "run_child", _in_this_process)
        assert command.main(_arguments(config, workdir, "--seeds=2", "--rows=kmeans|rtn")) == 0
        partial = _read(workdir / "table.json")
        assert [row["name"] for row in partial["rows"]] == ["rtn", "kmeans"]
        lacking = [(item["row"], item["seed"]) for item in partial["missing"]]
        assert lacking == [("fp", 0), ("fp", 1), ("ours", 0), ("ours", 1)]
        # There is no full precision yet to compare with; the finished table has the figure.
        assert partial["rows"][0]["mean"]["psnr_to_fp_db"] is None and partial["rows"][0]["mean"]["mind"] > 0
        assert "Missing: fp, ours (quantize is not done)." in (workdir / "table.md").read_text()
        assert command.main(_arguments(config, workdir, "--seeds=2")) == 0
    return workdir


def _images(workdir, row, seed) -> np.ndarray:
    return np.load(workdir / row / str(seed) / "samples" / "images.npz")["arr_0"]


def test_the_seeds_of_a_row_share_one_stream_of_images(config, finished, tmp_path):
    base = rows.load_table(str(config)).base
    model, params = pipeline.load_teacher(base.model, jax.random.key(0))
    key = jax.random.fold_in(jax.random.key(base.seed), seeds.SAMPLES)
    plan = generation.Plan(8, 2, "balanced", "ddpm", 2, 1.5)
    generation.generate(plan, model, params, key, tmp_path / "all.npz", lambda x: x)
    whole = np.load(tmp_path / "all.npz")["arr_0"]
    assert len(np.unique(whole.reshape(8, -1), axis=0)) == 8
    np.testing.assert_array_equal(np.concatenate([_images(finished, "fp", seed) for seed in (0, 1)]), whole)
    np.testing.assert_array_equal(np.load(finished / "fp" / "pooled" / "images.npz")["arr_0"], whole)


def test_figures_are_those_of_evaluate(finished, network):
    result = _read(finished / "table.json")
    assert result["missing"] == [] and result["seeds"] == 2
    assert {"command", "commit", "date", "devices", "versions", "config"} <= set(result)
    found = {row["name"]: row for row in result["rows"]}
    assert list(found) == ["fp", "rtn", "kmeans", "ours"]
    reference = evaluation.compute_reference(images(50, seed=2), network, "50 images of real.npz")
    for name in ("fp", "ours"):
        joined = np.concatenate([_images(finished, name, seed) for seed in (0, 1)])
        expected = evaluation.evaluate(joined, network, reference)
        assert expected["num_images"] == 8
        assert found[name]["pooled"]["features"] == expected.pop("features")
        known = {key: value for key, value in expected.items() if value is not None}
        assert {key: found[name]["pooled"][key] for key in known} == pytest.approx(known, rel=1e-6)
        assert "fd" in known and found["fp"]["seeds"][0]["psnr_to_fp_db"] is None
    second = evaluation.evaluate(_images(finished, "ours", 1), network, reference, _images(finished, "fp", 1))
    del second["features"], second["ssim_to_fp"], second["ms_ssim_to_fp"]  # not of images of 8 x 8 pixels
    assert found["ours"]["mean"]["ssim_to_fp"] is None
    assert {key: found["ours"]["seeds"][1][key] for key in second} == pytest.approx(second, rel=1e-6)
    fds = [seed["fd"] for seed in found["ours"]["seeds"]]
    assert fds[0] != fds[1]  # another model and other images
    assert found["ours"]["mean"]["fd"] == pytest.approx(np.mean(fds))
    assert found["ours"]["std"]["fd"] == pytest.approx(np.std(fds, ddof=1))


def test_models_are_those_of_their_methods(finished):
    found = {row["name"]: row for row in _read(finished / "table.json")["rows"]}
    assert found["fp"]["size"]["bits_per_quantized_weight"] == 32 and found["fp"]["mean"]["l_d"] == 0
    counted = sizes(methods.rtn(tiny()[1], 4, 16, other_dtype="float16"))
    assert found["rtn"]["size"]["bits_per_quantized_weight"] == counted.bits_per_quantized_weight > 4
    for row in found.values():
        size = row["size"]
        assert size["bytes"] == size["assignment_bytes"] + size["codebook_bytes"] + size["other_bytes"]
        assert size["bits_per_parameter"] == 8 * size["bytes"] / size["parameters"]
        assert all(seed["peak_gb"] > 0.05 for seed in row["seeds"])
    assert found["kmeans"]["mean"]["l_d"] > found["rtn"]["mean"]["l_d"] > 0
    assert "calibrate_s" not in found["kmeans"]["mean"] and found["ours"]["mean"]["calibrate_s"] > 0
    # Round to nearest draws nothing; k-means does.
    assert found["rtn"]["std"]["l_d"] == 0 < found["kmeans"]["std"]["l_d"]


def test_table_and_plot_say_what_the_json_says(finished):
    result = _read(finished / "table.json")
    text = (finished / "table.md").read_text()
    assert text == table.markdown(result) and "biased upward" in text and "Missing" not in text
    row = result["rows"][2]
    assert f"| k-means | {row['size']['bits_per_quantized_weight']:.2f} |" in text
    fewer = [
        {"row": "fp", "seed": 1, "what": "why"},
        *({"row": "ours", "seed": seed, "what": "why"} for seed in (0, 1)),
    ]
    assert "Missing: fp seed 1, ours (why)." in table.markdown({**result, "missing": fewer})
    shorter = {**result, "rows": [*result["rows"][:2], {**row, "overrides": {"calibration.steps": 7}}]}
    assert "; k-means 7." in table.markdown(shorter)
    gaps = np.array([[row["seeds"][i]["fd"] / result["rows"][0]["seeds"][i]["fd"] - 1 for i in (0, 1)]]) * 100
    assert f"| {gaps.mean():+.1f} ± {gaps.std(ddof=1):.1f} % |" in text
    drawing = (finished / "table.svg").read_text()
    assert drawing == chart.svg(result)
    for label in ("k-means", "VQ4DiT", "round to nearest", "full precision"):
        assert label in drawing
    assert chart.svg({**result, "rows": result["rows"][:1]}) is None


def test_a_second_run_makes_nothing_again(config, finished, capsys, monkeypatch):
    monkeypatch.setattr(command, "run_child", lambda *_: pytest.fail("there is nothing to do"))
    before = _read(finished / "table.json")["rows"]
    assert command.main(_arguments(config, finished, "--seeds=2")) == 0
    assert _read(finished / "table.json")["rows"] == before
    assert "4 of 4 rows" in capsys.readouterr().out


def test_figures_outlive_models_and_images(config, finished, tmp_path, monkeypatch, capsys):
    """What a repository keeps of a table: the table is the same without them, and another row still finds its originals."""
    for file in finished.rglob("*"):
        kept = file.name in ("definition.json", "figures.json", "first.npz")
        if kept and not (file.is_relative_to(finished / "kmeans") and "pooled" not in file.parts):
            target = tmp_path / "kept" / file.relative_to(finished)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    monkeypatch.setattr(command, "run_child", _in_this_process)
    assert command.main(_arguments(config, tmp_path / "kept", "--seeds=2")) == 0
    assert [len(list((tmp_path / "kept").glob(f"{row}/*/samples/images.npz"))) for row in ("fp", "kmeans")] == [0, 2]
    made, before = (_read(folder / "table.json")["rows"] for folder in (tmp_path / "kept", finished))
    of_time = ("seconds", "quantize_s", "peak_gb", "date", "commit")
    plain = lambda row: {key: value for key, value in row.items() if key not in of_time}
    for one, other in zip(made, before, strict=True):
        assert one["pooled"] == other["pooled"] and one["size"] == other["size"]
        assert [plain(seed) for seed in one["seeds"]] == [plain(seed) for seed in other["seeds"]]
    # A seed's images made anew leave the pooled figures without the other's images.
    shutil.rmtree(tmp_path / "kept" / "rtn" / "0" / "samples")
    (tmp_path / "kept" / "rtn" / "pooled" / "figures.json").write_text('{"of": null}')
    assert "1/samples/images.npz is not there" in _refused(capsys, *_arguments(config, tmp_path / "kept", "--seeds=2"))


def test_psnr_is_that_of_as_many_images_as_are_kept(config, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "COMPARED", 3)
    found = rows.load_table(str(config))
    exact, ours = (rows.cases(found, row, 2, tmp_path)[0] for row in (found.rows[0], found.rows[3]))
    for case, name in ((exact, "fp"), (ours, "ours")):
        shutil.copytree(finished / name / "0", case.model.parent)
    exact.first_images.unlink()
    assert not stages.is_done(exact, "sample")
    stages.sample(exact)
    assert stages.is_done(exact, "sample")
    given, kept = _images(tmp_path, "fp", 0)[:3], np.load(exact.first_images)["arr_0"]
    np.testing.assert_array_equal(kept, given)
    expected = np.median(evaluation.psnr_db(_images(tmp_path, "ours", 0)[:3], given))
    assert figures.Evaluator(found).of_seed(ours, exact)["psnr_to_fp_db"] == pytest.approx(expected)


def test_figures_kept_before_one_existed_are_made_anew_where_the_images_are(config, finished, tmp_path):
    """Without the images they are as they were, and the table has a dash, or no column if no row has the figure."""
    found = rows.load_table(str(config))
    every = rows.cases(found, found.rows[2], 2, tmp_path)
    shutil.copytree(finished / "kmeans", tmp_path / "kmeans")
    kept = [every[0].samples / "figures.json", tmp_path / "kmeans" / "pooled" / "figures.json"]
    fresh = [_read(file) for file in kept]
    old = [{**one, "figures": {k: v for k, v in one["figures"].items() if k != "mind"}} for one in fresh]
    evaluate = lambda: figures.Evaluator(found).of_all(every)
    for file, content in zip(kept, old, strict=True):
        file.write_text(json.dumps(content))
    assert evaluate() == fresh[1]["figures"] and "mind" in _read(kept[1])["figures"]
    kept[1].write_text(json.dumps(old[1]))
    for case in every:
        case.images.unlink()
    assert evaluate() == old[1]["figures"]
    shutil.copytree(finished / "fp", tmp_path / "fp")
    result = figures.collect(dataclasses.replace(found, rows=(found.rows[0], found.rows[2])), 2, tmp_path) | {
        "command": ""
    }
    assert result["rows"][1]["pooled"]["mind"] is None and not result["missing"]
    head, cells = zip(*table._quality(result["rows"]), strict=True)
    assert cells[head.index("MD ↓ pooled")](result["rows"][1]) == "—"
    older = [{**row, "mean": {k: v for k, v in row["mean"].items() if k != "mind"}} for row in result["rows"]]
    assert "MD ↓" in table.markdown(result) and "MD ↓" not in table.markdown({**result, "rows": older})


def test_a_row_with_8_bit_activations_is_sampled_and_timed_in_its_prepared_form(config, tmp_path, monkeypatch):
    bare = {
        f"viditq.{part}": off
        for part, off in (("balance", False), ("centre", False), ("rotation", 0), ("solve", False))
    }
    other = tmp_path / "table.py"
    text = config.read_text()
    row = f'Row("w8a8", "W8A8", "viditq", 8, config="configs/cifar10_w8a8.py", overrides={bare}),'
    other.write_text(text[: text.index('        Row("rtn"')] + f"        {row}\n    ))\n")
    monkeypatch.setattr(command, "run_child", _in_this_process)
    arguments = _arguments(other, tmp_path / "work", "--seeds=1", "--stages=quantize,sample,time")
    assert command.main(arguments) == 0
    case = rows.cases(found := rows.load_table(str(other)), found.rows[1], 1, tmp_path / "work")[0]
    model, packed, _ = checkpoint.load_quantized(case.model / "packed")
    ranges = vq.activation_ranges(model, packed, key=jax.random.key(0), cfg_scale=found.base.sample.cfg_scale)
    prepared = vq.prepare_for_inference(packed, "int8", ranges=ranges)
    plan, key = generation.Plan(8, 2, "balanced", "ddpm", 2, 1.5), case.key(seeds.SAMPLES)
    generation.generate(plan, model, prepared, key, tmp_path / "own.npz", lambda x: x)
    np.testing.assert_array_equal(_images(tmp_path / "work", "w8a8", 0), np.load(tmp_path / "own.npz")["arr_0"])
    result = _read(tmp_path / "work" / "table.json")
    means = {row["name"]: row["mean"] for row in result["rows"]}
    kept = _read(tmp_path / "work" / "w8a8" / "0" / "samples" / "speed.json")
    taken = kept["milliseconds"]
    assert means["w8a8"]["step_ms"] == taken["this"] > 0 and kept["images"] == 2
    assert means["w8a8"]["speed"] == taken["full_precision"] / taken["this"]
    assert f"| {taken['this']:.0f} | {means['w8a8']['speed']:.2f} |" in table.markdown(result)
    untimed = {**result, "rows": [{**row, "mean": {}} for row in result["rows"]]}
    assert "Step, ms" in table.markdown(result) and "Step, ms" not in table.markdown(untimed)


def test_stopped_between_steps_it_ends_with_the_same_model(config, finished, tmp_path, monkeypatch):
    """After the second step of calibration, and in the middle of writing the model."""
    found = rows.load_table(str(config))
    case = rows.cases(found, found.rows[-1], 2, tmp_path)[0]
    saves, models = [], []

    def save_state(*args):
        saves.append(checkpoint_save_state(*args))
        if len(saves) == 2:
            raise KeyboardInterrupt

    def save_quantized(path, *args):
        models.append(path.name)
        if path.name == "packed" and models.count("packed") == 1:
            raise KeyboardInterrupt
        checkpoint_save_quantized(path, *args)

    checkpoint_save_state, checkpoint_save_quantized = checkpoint.save_state, checkpoint.save_quantized
    monkeypatch.setattr(checkpoint, "save_state", save_state)
    monkeypatch.setattr(checkpoint, "save_quantized", save_quantized)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            stages.quantize(case)
    stages.quantize(case)
    assert len(saves) == 3  # each step once
    theirs = rows.cases(found, found.rows[-1], 2, finished)[0]
    one, other = (_read(folder / "figures.json") for folder in (case.model, theirs.model))
    assert one["held_out"] == other["held_out"] and one["size"] == other["size"]
    one, other = (checkpoint.flatten(checkpoint.load_quantized(c.model / "packed")[1]) for c in (case, theirs))
    assert list(one) == list(other) and all(np.array_equal(one[name], other[name]) for name in one)


def test_processes_end_together_and_the_next_run_goes_on(config, finished, tmp_path):
    """One seed, whose first four images are those of seed 0 of two."""
    other = tmp_path / "table.py"
    other.write_text(config.read_text().replace('"linear"', '""'))
    workdir = tmp_path / "work"
    process = [sys.executable, "-m", "benchmarks.quality", *_arguments(other, workdir, "--seeds=1", "--rows=fp")]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = subprocess.Popen(process, cwd=ROOT, **quiet)
    deadline = time.monotonic() + 120
    while not (workdir / "fp" / "0" / "model" / "definition.json").exists():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    with open(workdir / "fp" / "0" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the child's, for as long as it lives
    assert not (workdir / "fp" / "0" / "model" / "figures.json").exists()
    done = subprocess.run(process, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 of 4 rows" in done.stdout
    row = _read(workdir / "table.json")["rows"][0]
    assert row["pooled"]["fd"] is None and row["std"]["l_d"] is None
    assert row["seeds"][0]["devices"]["model"].startswith("1 x cpu")
    np.testing.assert_allclose(_images(workdir, "fp", 0)[:4].astype(int), _images(finished, "fp", 0), atol=1)


@pytest.mark.parametrize(
    ("cpuinfo", "wanted"),
    [
        ("model name\t: AMD EPYC 9R14\nflags\t\t: fpu avx avx2 avx512f avx512bw\n", "AMD EPYC 9R14, avx512f"),
        ("model name\t: AMD EPYC\nflags\t\t: fpu avx avx2\n", "AMD EPYC, avx2"),
        ("BogoMIPS\t: 50.00\nFeatures\t: fp asimd sve\n", "asimd"),
        ("", ""),
    ],
)
def test_seconds_come_with_the_processor_they_were_measured_on(cpuinfo, wanted):
    assert record.describe_processor(cpuinfo) == wanted


def test_what_was_remarked_of_a_model_stands_below_the_table():
    """Once for all seeds that share it; rows without a remark say nothing, and rows of the same nominal bits are told apart."""
    seed = lambda number, remark=None: {"seed": number, "remark": remark}
    row = lambda label, bits, *seeds: {"label": label, "size": {"bits_per_quantized_weight": bits}, "seeds": seeds}
    rows = [
        row("VQ4DiT", 1.572, seed(0, "stopped"), seed(1, "slow"), seed(2, "slow")),
        row("VQ4DiT", 1.5, seed(0, "slow")),
        row("k-means", 2.173, seed(0)),
    ]
    assert table._remarks(rows) == [
        "VQ4DiT, 1.57 bits, seed 0: stopped",
        "VQ4DiT, 1.57 bits, seeds 1 and 2: slow",
        "VQ4DiT, 1.50 bits, seed 0: slow",
    ]


def _refused(capsys, *arguments) -> str:
    code = command.main(list(arguments))
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1
    return err


def test_a_choice_is_compared_with_its_form_seed_by_seed():
    """Figures scatter, their differences need not: what is added to every seed has no deviation."""

    def row(label, psnrs, errors):
        seeds = [{"psnr_to_fp_db": p, "l_d": e, "noise_error": 2 * e} for p, e in zip(psnrs, errors, strict=True)]
        return {"label": label, "seeds": seeds}

    soft, ours = row("soft", [30, 20], [0.1, 0.4]), row("ours", [1, 1], [1, 1])
    changed = [row("soft: n1", [28.5, 18.5], [0.2, 0.6]), row("ours: alone", [2, 4], [1, 1]), row("else: n1", [1], [1])]
    head, cells = worth.compared([soft, *changed, ours])
    assert head == ["Form", "Changed", "PSNR, dB", "L_d", "Noise error"]
    assert cells == [
        ["soft", "n1", "-1.50 ± 0.00", "+75.0 ± 35.4 %", "+75.0 ± 35.4 %"],
        ["ours", "alone", "+2.00 ± 1.41", "+0.0 ± 0.0 %", "+0.0 ± 0.0 %"],
    ]
    assert worth.compared([soft, ours]) is None
    del soft["seeds"][1]["psnr_to_fp_db"]
    assert worth.compared([soft, changed[0]])[1][0][2:4] == ["—", "+75.0 ± 35.4 %"]


def test_what_was_made_from_another_definition_is_refused_by_its_folder(
    config, finished, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(command, "run_child", lambda *_: pytest.fail("refused before any work"))
    other = tmp_path / "table.py"
    other.write_text(config.read_text().replace('"quantize.kmeans_iterations": 2', '"quantize.kmeans_iterations": 3'))
    error = _refused(capsys, *_arguments(other, finished, "--seeds=2"))
    assert (
        f"{finished / 'ours' / '0' / 'model'} was made from something else: quantize.kmeans_iterations (3 here, 2"
        in error
    )
    # Full precision and the other rows have nothing to do with that recipe.
    assert command.main(_arguments(other, finished, "--seeds=2", "--report-only", f"--output={tmp_path / 'out'}")) == 0
    result = _read(tmp_path / "out.json")
    assert [row["name"] for row in result["rows"]] == ["fp", "rtn", "kmeans"]
    assert all("was made from something else" in item["what"] for item in result["missing"])
    more = tmp_path / "more.py"
    more.write_text(config.read_text().replace("steps=2)", "steps=3)"))
    assert f"{finished / 'fp' / '0' / 'samples'} was made" in _refused(capsys, *_arguments(more, finished, "--seeds=2"))


def test_bad_input_is_one_line(config, capsys, tmp_path):
    assert "wanted a divisor of the config's 8" in _refused(capsys, *_arguments(config, tmp_path, "--seeds=3"))
    assert "matches none of fp" in _refused(capsys, *_arguments(config, tmp_path, "--seeds=2", "--rows=nothing"))
    assert "no such file" in _refused(capsys, *_arguments(tmp_path / "no.py", tmp_path))
    assert "'x' is none" in _refused(capsys, *_arguments(config, tmp_path, "--stages=x"))
    assert not list(tmp_path.iterdir())


def test_a_case_that_fails_is_named_and_the_others_are_made(config, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "run_child", lambda flags, case, stage: f"{stage} ended with code -9: killed")
    error = _refused(capsys, *_arguments(config, tmp_path, "--seeds=2", "--rows=fp|rtn"))
    assert "4 of the cases failed; the first is fp, seed 0: quantize ended with code -9: killed" in error
    assert "quantize ended with code -9" in (tmp_path / "table.md").read_text()


def test_the_readme_and_its_page_have_the_figures_of_the_results():
    """Also where the table is being made: its rows so far."""
    kept = _read(ROOT / "benchmarks" / "results" / "quality_cifar10" / "table.json")
    five = table.short(kept, table.README)
    assert five.count("\n") == 6 and five in (ROOT / "README.md").read_text()
    assert table.short(kept) in (ROOT / "docs" / "quality.md").read_text()
    assert table.markdown(kept) == (ROOT / "benchmarks" / "results" / "quality_cifar10" / "table.md").read_text()


def test_the_shipped_table_resolves(tmp_path):
    """Every row's config is one that a run would take, and asks for what its name says."""
    found = rows.load_table(str(ROOT / "benchmarks/quality/cifar10.py"))
    assert found.rows[0].method == "fp" and found.base.sample.num_images == 5100
    for row in found.rows:
        for case in rows.cases(found, row, 3, tmp_path):
            c = case.config.calibration
            assert case.num_images == 1700 and c.batch == 16 and c.steps == (325 if row.label == "VQ4DiT" else 500)
            assert case.config.seed == case.seed and case.made_from["method"] == row.method
            if row.bits != 32:
                assert case.config.quantize.bits == row.bits


@pytest.mark.parametrize("name", ["cifar10", "ablations"])
def test_committed_results_are_of_the_rows_that_the_tables_have_now(name):
    """A key that is younger than they are changes nothing; a value that is another one does."""
    found = rows.load_table(str(ROOT / f"benchmarks/quality/{name}.py"))
    folder = ROOT / "benchmarks" / "results" / {"cifar10": "quality_cifar10", "ablations": "ablations_cifar10"}[name]
    every = [case for row in found.rows for case in rows.cases(found, row, 3, folder)]
    assert [figures._lacks(case) for case in every] == [None] * len(every)
    kept = _read(folder / "table.json")
    assert [row["name"] for row in kept["rows"]] == [row.name for row in found.rows] and not kept["missing"]
    calibrated = next(case for case in every if case.row.name in ("ours", "ours_w2"))
    for key, value in (("variance", False), ("steps", 7)):
        other = {**calibrated.made_from, "calibration": {**calibrated.made_from["calibration"], key: value}}
        ((differing, _),) = stages.claim(calibrated.model, other).differing()
        assert differing == f"calibration.{key}"


def test_every_ablation_is_another_model(tmp_path):
    """Each resolves to a config that a run would take, and none is what another one is."""
    found = rows.load_table(str(ROOT / "benchmarks/quality/ablations.py"))
    made = {row.name: rows.cases(found, row, 1, tmp_path)[0].made_from for row in found.rows}
    assert {"soft_n1", "soft_n3", "soft_n4", "ours_no_steps"} <= set(made) and len(made) > 20
    assert len({json.dumps(value, sort_keys=True) for value in made.values()}) == len(made)


def test_children_sample_on_a_device_for_each_core(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--a=1 --xla_force_host_platform_device_count=7")
    cores = len(os.sched_getaffinity(0))
    assert command.environment("quantize")["XLA_FLAGS"] == "--a=1"
    assert command.environment("sample")["XLA_FLAGS"] == f"--a=1 --xla_force_host_platform_device_count={cores}"
