"""The command: what it writes, that it resumes after SIGKILL with the same figures, and what it says of bad input."""

import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from models import SOFT
from safetensors.numpy import load_file, save_file

import vq4dit_jax
from vq4dit_jax import main as command
from vq4dit_jax.files import asset
from vq4dit_jax.methods import agreement
from vq4dit_jax.run import pipeline
from vq4dit_jax.run.workdir import Workdir

CONFIG = "--config=configs/cifar10_w2.py"
SMALL = (
    "--config.calibration.steps=4",
    *SOFT,
    "--config.calibration.batch=2",
    "--config.calibration.trajectory_steps=3",
    "--config.calibration.save_every=1",
    "--config.quantize.kmeans_iterations=2",
    "--config.sample.num_images=6",
    "--config.sample.batch=4",
    "--config.sample.steps=2",
    "--config.sample.grid_images=6",
)


# `python -m vq4dit_jax.main`, with a shorter held-out trajectory: 16 images and 10 steps take longer than all else.
COMMAND = [
    sys.executable,
    "-c",
    "from vq4dit_jax.methods import agreement; agreement.HELD_OUT_IMAGES, agreement.HELD_OUT_STEPS = 2, 2\n"
    "from vq4dit_jax.main import run; run()",
]


@pytest.fixture(scope="module", autouse=True)
def short_trajectory():
    """In this process what `COMMAND` has in a child."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "HELD_OUT_IMAGES", 2)
        patch.setattr(agreement, "HELD_OUT_STEPS", 2)
        yield


def _run(*arguments, **popen) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, **popen)


def _programs_to_spoil(folder: pathlib.Path) -> dict[str, str]:
    """An environment with the compiled programs of this one in a folder of its own, where a killed process may leave half
    a file."""
    folder.mkdir()
    for file in pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).iterdir():
        os.link(file, folder / file.name)
    return {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder)}


def _metrics(workdir) -> dict:
    return json.loads((workdir / "metrics.json").read_text())


def _workdir(tmp_path_factory, number: int):
    """Workdirs whose names are equally long: orbax notes the path in a file, which `quantized_bytes` counts."""
    return tmp_path_factory.getbasetemp() / f"run_{number}" / "w"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One small run of the demo, from end to end."""
    workdir = _workdir(tmp_path_factory, 0)
    done = _run(CONFIG, f"--workdir={workdir}", *SMALL)
    assert done.returncode == 0, done.stderr
    return workdir


def test_a_run_leaves_everything_that_the_contract_names(finished):
    names = {
        "config.json", "metrics.json", "train_log.jsonl", "calibration", "quantized", "model.safetensors", "report.html",
        "samples/fp.png", "samples/vq4dit.png", "samples/comparison.png", "samples/fp.npz", "samples/vq4dit.npz",
    }  # fmt: skip
    assert not {name for name in names if not (finished / name).exists()}
    assert not list(finished.rglob("*.partial"))
    with np.load(finished / "samples" / "vq4dit.npz") as file:
        assert file["arr_0"].shape == (6, 32, 32, 3) and file["arr_0"].dtype == np.uint8
    log = [json.loads(line) for line in (finished / "train_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4]


def test_metrics_follow_the_schema_and_the_files(finished):
    m = _metrics(finished)
    assert set(m) == {"format", "model", "size", "quality", "calibration", "time_s", "recipe"} and m["format"] == 1
    assert m["model"]["parameters"] == 5_534_304 and m["model"]["quantized_parameters"] == 5_308_416
    on_disk = sum(f.stat().st_size for f in (finished / "quantized").rglob("*") if f.is_file())
    counted = sum(m["size"][key] for key in ("assignment_bytes", "codebook_bytes", "other_bytes"))
    assert m["size"]["quantized_bytes"] == on_disk == pytest.approx(counted, rel=0.05)
    assert m["size"]["bits_per_quantized_weight"] == pytest.approx(
        8 * (m["size"]["assignment_bytes"] + m["size"]["codebook_bytes"]) / 5_308_416
    )
    to_fp = {"psnr_to_fp_db", "ssim_to_fp", "ms_ssim_to_fp"}
    quality = {"fd", "sfd", "mind", "is", "precision", "recall", *to_fp, "num_images", "features"}
    assert set(m["quality"]) == {"fp", "kmeans", "vq4dit"} and all(set(q) == quality for q in m["quality"].values())
    assert all(m["quality"]["fp"][name] is None for name in to_fp) and m["quality"]["vq4dit"]["num_images"] == 6
    for name in ("kmeans", "vq4dit"):
        found = m["quality"][name]
        assert found["mind"] > 0 and 0 < found["psnr_to_fp_db"] <= 99
        assert -1 <= found["ssim_to_fp"] <= 1 and 0 <= found["ms_ssim_to_fp"] <= 1
    assert set(m["calibration"]) == {
        "steps", "l_d_last", "l_r_last", "frozen_fraction", "kmeans_l_d", "hard_l_d", "kmeans_eps_error", "hard_eps_error"
    }  # fmt: skip
    assert set(m["time_s"]) == {"load", "kmeans", "calibrate", "export", "sample", "evaluate"}
    steps = sum(json.loads(line)["seconds"] for line in (finished / "train_log.jsonl").read_text().splitlines())
    assert m["time_s"]["calibrate"] > steps + 0.01  # the pass after the steps, too
    assert set(m["recipe"]) == {"sampler", "steps", "cfg_scale", "seed", "batch", "devices", "versions"}


def test_both_files_hold_the_model_that_was_sampled(finished):
    """Loaded with no config, they give the saved pictures again."""
    model, packed, manifest = vq4dit_jax.load_quantized(finished / "quantized")
    again, same, _ = vq4dit_jax.load_safetensors(finished / "model.safetensors")
    assert again == model and manifest["extra"]["config"]["quantize"]["bits"] == 2
    x, t, y = jnp.zeros((2, 32, 32, 3)), jnp.full((2,), 500), jnp.asarray([1, 10])
    np.testing.assert_array_equal(
        np.asarray(model.apply({"params": packed}, x, t, y)), np.asarray(model.apply({"params": same}, x, t, y))
    )


def test_a_finished_run_says_so_and_leaves_the_files_alone(finished):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and p.name != ".lock"}
    done = _run(CONFIG, f"--workdir={finished}", *SMALL)
    assert done.returncode == 0 and "finished" in done.stdout
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and p.name != ".lock"}


def test_the_sample_command_reproduces_a_runs_images_by_its_seed(finished, tmp_path):
    """A run's recipe (seed, sampler, steps, guidance, batch) makes the run's very images from the model that it left."""
    recipe = _metrics(finished)["recipe"]
    flags = [
        f"--{name.replace('_', '-')}={recipe[name]}" for name in ("sampler", "steps", "cfg_scale", "seed", "batch")
    ]
    done = subprocess.run(
        [sys.executable, "-m", "vq4dit_jax.sample", f"--checkpoint={finished}", f"--out={tmp_path}", "--num-images=6", *flags],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours, theirs = (np.load(f)["arr_0"] for f in (tmp_path / "samples.npz", finished / "samples" / "vq4dit.npz"))
    np.testing.assert_array_equal(ours, theirs)


def test_an_interrupted_run_says_what_has_changed_of_its_teacher(tmp_path, capsys):
    """The same file elsewhere is the same teacher; another file at the same path is not, once k-means was of the first."""
    _checkpoint(tmp_path / "a.safetensors")
    arguments = [
        CONFIG,
        f"--workdir={tmp_path / 'w'}",
        *SMALL,
        f"--config.model.checkpoint={tmp_path / 'a.safetensors'}",
    ]
    run = pipeline.Pipeline(command.parse(arguments)[0], Workdir(tmp_path / "w"), "")
    with run.dir.claim(run.resolved, lambda: run.digests):
        run.load()
        run.quantize()

    def other(tensors):
        tensors["blocks.0.mlp.fc1.bias"] += 1

    _checkpoint(tmp_path / "a.safetensors", other)
    capsys.readouterr()
    assert command.main(arguments) == 2
    err = capsys.readouterr().err
    assert "model.checkpoint (sha256" in err and "stage quantize is done" in err and err.count("\n") == 1
    _checkpoint(tmp_path / "b.safetensors")
    moved = pipeline.Pipeline(command.parse([*arguments[:-1], f"--config.model.checkpoint={tmp_path / 'b.safetensors'}"])[0],
                              Workdir(tmp_path / "w"), "")  # fmt: skip
    with moved.dir.claim(moved.resolved, lambda: moved.digests):
        assert "quantize" in moved.dir.done()


def _figures(workdir) -> dict:
    """All that must not depend on interruptions: everything but times."""
    return {key: value for key, value in _metrics(workdir).items() if key != "time_s"}


@pytest.mark.once
def test_killed_in_every_stage_it_ends_with_the_same_figures(finished, tmp_path_factory, tmp_path):
    """SIGKILL in each stage in turn, and the same command again after each."""
    workdir, environment = _workdir(tmp_path_factory, 1), _programs_to_spoil(tmp_path / "programs")
    done = lambda stage: (workdir / "stages.json").exists() and stage in (workdir / "stages.json").read_text()
    signs = {
        "load": (workdir / "config.json").exists,
        "quantize": lambda: done("load"),
        "calibrate": (workdir / "calibration" / "vq4dit_passes" / "00_tune_steps" / "step_000002").exists,
        "export": (workdir / "quantized").exists,
        "sample": (workdir / "samples" / "fp.npz").exists,
        "evaluate": lambda: done("sample"),
        "report": (workdir / "metrics.json").exists,
    }
    for stage, begun in signs.items():
        process = subprocess.Popen(
            [*COMMAND, CONFIG, f"--workdir={workdir}", *SMALL],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline and not begun():
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert begun(), stage
    assert done("sample")
    # In this process, which has TensorFlow loaded; the first run was one of its own.
    assert command.main([CONFIG, f"--workdir={workdir}", *SMALL]) == 0
    assert _figures(workdir) == _figures(finished)
    for name in ("fp.npz", "kmeans.npz", "vq4dit.npz"):
        assert (workdir / "samples" / name).read_bytes() == (finished / "samples" / name).read_bytes()


# Bad input ------------------------------------------------------------------------------------------------------


def _refused(capsys, tmp_path, *arguments) -> str:
    """Runs the command in this process; one line on stderr, exit code 2, and no workdir half made. Returns the line."""
    code = command.main([CONFIG, f"--workdir={tmp_path / 'new'}", *arguments])
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and "Traceback" not in err
    return err


def _checkpoint(path, change=lambda tensors: None):
    tensors = load_file(asset("dit_cifar10.safetensors"))
    change(tensors)
    save_file(tensors, path, metadata={"num_heads": "6"})
    return f"--config.model.checkpoint={path}"


def test_no_such_checkpoint(capsys, tmp_path):
    line = _refused(capsys, tmp_path, f"--config.model.checkpoint={tmp_path / 'nowhere.pt'}")
    assert "nowhere.pt" in line


def test_a_truncated_checkpoint(capsys, tmp_path):
    pytest.importorskip("torch")
    whole = tmp_path / "whole.pt"
    import torch

    torch.save({"a": torch.zeros(1000)}, whole)
    (tmp_path / "half.pt").write_bytes(whole.read_bytes()[:2000])
    assert "half.pt" in _refused(capsys, tmp_path, f"--config.model.checkpoint={tmp_path / 'half.pt'}")


class _Malice:
    """Unpickled naively, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_that_would_run_code(capsys, tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"model": _Malice(tmp_path / "ran")}, tmp_path / "evil.pt", pickle_module=pickle)
    assert "evil.pt" in _refused(capsys, tmp_path, f"--config.model.checkpoint={tmp_path / 'evil.pt'}")
    assert not (tmp_path / "ran").exists()


def test_wrong_shapes(capsys, tmp_path):
    def cut(tensors):
        tensors["blocks.3.mlp.fc1.weight"] = tensors["blocks.3.mlp.fc1.weight"][:-1].copy()

    line = _refused(capsys, tmp_path, _checkpoint(tmp_path / "cut.safetensors", cut))
    assert "blocks.3.mlp.fc1.weight" in line and "767" in line and "768" in line


def test_nan_weights(capsys, tmp_path):
    def spoil(tensors):
        tensors["blocks.2.attn.proj.weight"][3, 4] = np.nan

    line = _refused(capsys, tmp_path, _checkpoint(tmp_path / "nan.safetensors", spoil))
    assert "blocks.2.attn.proj.weight" in line and "NaN" in line


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.calibration.stepz=3", "stepz"),
        ("--config.nonsense.steps=3", "nonsense"),
        ("--config.calibration.steps=many", "steps"),
        ("--config.calibration.steps=0", "calibration.steps=0"),
        ("--config.sample.sampler=plms", "sample.sampler=plms"),
        ("--config.quantize.bits=7", "quantize.bits=7"),
        ("--config.sample.steps=2000", "sample.steps=2000"),
        ("--unknown=3", "unknown"),
        ("stray", "stray"),
        ("--config.evaluation.reference=", "evaluation"),
    ],
)
def test_arguments_that_make_no_sense(capsys, tmp_path, argument, words):
    assert words in _refused(capsys, tmp_path, argument)
    assert not (tmp_path / "new").exists()


def test_a_sampler_of_another_process_is_refused_by_its_key(capsys, tmp_path):
    """Known by name, and of flows alone: told once the model is there, before any work."""
    line = _refused(capsys, tmp_path, "--config.sample.sampler=euler")
    assert "--config.sample.sampler='euler'" in line and "ddpm, ddim, dpm++" in line
    assert not (tmp_path / "new" / "calibration").exists()


def test_a_config_or_workdir_that_is_not_there(capsys, tmp_path):
    for arguments, words in (
        ([f"--workdir={tmp_path / 'w'}"], "--config"),
        (["--config=configs/nothing.py", f"--workdir={tmp_path / 'w'}"], "configs/nothing.py"),
        ([CONFIG], "--workdir"),
    ):
        assert command.main(arguments) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1


def test_a_workdir_of_another_config(capsys, finished):
    code = command.main([CONFIG, f"--workdir={finished}", *SMALL[1:], "--config.calibration.steps=5"])
    err = capsys.readouterr().err
    assert code == 2 and "calibration.steps (5 here, 4 there)" in err and err.count("\n") == 1


def test_a_workdir_with_somebody_elses_files(capsys, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert command.main([CONFIG, f"--workdir={tmp_path}", *SMALL]) == 2
    assert "no config.json" in capsys.readouterr().err and os.listdir(tmp_path) == ["thesis.tex"]


def test_a_workdir_that_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below"):
        assert command.main([CONFIG, f"--workdir={workdir}", *SMALL]) == 2
        err = capsys.readouterr().err
        assert str(tmp_path / "file") in err and err.count("\n") == 1


@pytest.mark.once
def test_a_full_disk_is_one_line_and_leaves_no_half_written_file(tmp_path):
    """Files may not grow past 200 kB, which the k-means result does not fit in."""
    arguments = [CONFIG, f"--workdir={tmp_path / 'w'}", *SMALL]
    limited = ["bash", "-c", 'ulimit -f 200; exec "$@"', "bash", sys.executable, "-m", "vq4dit_jax.main", *arguments]
    done = subprocess.run(
        limited, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "0"}
    )
    assert done.returncode == 2, done.stderr
    assert "disk is full" in done.stderr and done.stderr.count("\n") == 1
    assert not list((tmp_path / "w" / "calibration").glob("*")) and not list((tmp_path / "w").rglob("*.partial"))
    again = pipeline.Pipeline(command.parse(arguments)[0], Workdir(tmp_path / "w"), "")
    with again.dir.claim(again.resolved, lambda: again.digests):
        again.load()
        again.quantize()
        assert "quantize" in again.dir.done()


def test_the_official_checkpoint_without_a_network_says_what_to_put_where(capsys, tmp_path):
    pytest.importorskip("torch")  # without it, that is what the line says, before anything is downloaded
    code = command.main(["--config=configs/xl2_256_w2.py", f"--workdir={tmp_path / 'w'}"])
    err = capsys.readouterr().err
    assert code == 2 and "DiT-XL-2-256x256.pt" in err and os.environ["VQ4DIT_CACHE"] in err and err.count("\n") == 1


def test_help_tells_the_keys(capsys):
    assert command.main(["--help"]) == 0 and "--workdir" in capsys.readouterr().out
    assert command.main(["--config=configs/xl2_256_w3.py", "--help"]) == 0
    out = capsys.readouterr().out
    assert "random_init" in out and "DiT-XL/2 at 256x256" in out


# Other models ----------------------------------------------------------------------------------------------------


@pytest.mark.once
def test_a_block_of_xl2_width_goes_through_the_whole_pipeline(tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "HELD_OUT_IMAGES", 1)
    monkeypatch.setattr(agreement, "HELD_OUT_STEPS", 1)
    workdir = tmp_path / "w"
    small = [a for a in SMALL if "num_images" not in a and "batch" not in a and "grid" not in a and "steps=4" not in a]
    code = command.main([
        "--config=configs/xl2_256_w2.py", f"--workdir={workdir}", *small,
        *SOFT[:-1], "--config.model.random_init=True", "--config.model.depth=1", "--config.calibration.steps=1",
        "--config.calibration.batch=1", "--config.sample.num_images=2", "--config.sample.batch=2",
        "--config.sample.more_steps=()",
    ])  # fmt: skip
    assert code == 0
    m = _metrics(workdir)
    assert m["model"]["quantized_parameters"] == 668_860_416 // 28
    assert m["size"]["bits_per_quantized_weight"] == pytest.approx(2, rel=0.01)
    assert m["quality"]["fp"]["fd"] is None and m["quality"]["fp"]["features"].startswith("none")
    assert (workdir / "report.html").exists()
