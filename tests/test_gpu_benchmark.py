"""`python -m benchmarks.gpu` where there is no GPU: its dry run, how it counts, and what it does when a kernel ends a process."""

import json
import math
import subprocess
import sys
import types

import jax
import pytest
from conftest import ROOT

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import timing


@pytest.mark.once
def test_a_dry_run_checks_and_times_one_of_each_kind(tmp_path):
    output = tmp_path / "gpu.json"
    arguments = ["--dry-run", "--only=check others|step W2A8|step torch|time proj", f"--output={output}"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(output.read_text())
    assert result["complete"] and not result["failures"] and result["dry_run"] and result["device"] == "cpu"
    assert {"commit", "date", "versions", "nvidia_smi", "seconds", "command"} <= set(result)
    assert {check["name"].split()[0] for check in result["checks"]} == {
        "ln_modulate_quantize", "attention", "soft_decode", "codebook_grad"
    }  # fmt: skip
    for check in result["checks"]:
        assert check["ok"] and all(
            0 < part["max_error_relative"] <= part["tolerance"] for part in check["results"].values()
        )
    (times,) = result["times"]
    assert list(times["ms"]) == ["bf16", "VQ2", "VQ3", "W2A8", "W2A8 e4m3", "W8A8", "W4A8"] and not times["errors"]
    for entry in times["ms"].values():
        low, high = entry["quartiles"]
        assert 0 < low <= entry["median"] <= high
        assert entry["floor"]["larger"] == max(entry["floor"]["compute"], entry["floor"]["memory"]) > 0
        assert math.isclose(entry["speedup"], times["ms"]["bf16"]["median"] / entry["median"])
    assert {tiles["kind"] for tiles in result["tiles"]} == {"VQ2", "W2A8"}
    assert all(tiles["chosen"] in tiles["ms"] and tiles["best"] in tiles["ms"] for tiles in result["tiles"])
    ours = [step for step in result["steps"] if step["variant"] == "W2A8"]
    assert [(step["pixels"], step["images"], step["modulations_hoisted"]) for step in ours] == [
        (256, 1, False), (256, 1, True)
    ]  # fmt: skip
    for step in result["steps"]:
        assert step["ms"]["median"] > 0 and step.get("finite", True)


def test_a_machine_without_a_hopper_gpu_is_refused(tmp_path):
    arguments = ["--only=nothing", f"--output={tmp_path / 'gpu.json'}"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "wanted a GPU of compute capability 9.0 (H100, H200)" in done.stderr


def test_a_check_that_ends_its_process_is_wrong_and_the_next_runs(tmp_path, monkeypatch):
    run, launched = command.Run(tmp_path / "gpu.json", True, 100, {}), []
    monkeypatch.setattr(run, "launch", lambda name, skip=0: launched.append((name, skip)))
    run.end = math.inf
    case = types.SimpleNamespace(
        name="check bf16",
        begun="",
        checked=3,
        finished=False,
        ended=False,
        process=types.SimpleNamespace(returncode=-11),
    )
    run.hear(case, {"begin": "product"})
    run.hear(case, None)
    assert launched == [("check bf16", 4)]
    assert json.loads((tmp_path / "gpu.json").read_text())["checks"] == [
        {"name": "product", "ok": False, "error": "ended with code -11"}
    ]


KERNELS = {"": ["flush"], "a": ["one", "two"], "b": ["one"]}


def test_kernels_are_given_to_the_calls_that_ran_them():
    order = ["", "a", "", "b", "", "a", "", "b"]
    names = [kernel for call in order for kernel in KERNELS[call]]
    found = [(name, float(i)) for i, name in enumerate(names)]
    assert timing.split(found, order, KERNELS) == {"a": [1.0 + 2.0, 6.0 + 7.0], "b": [4.0, 9.0]}


@pytest.mark.parametrize("names", [["flush", "one"], ["flush", "two", "one"], ["flush", "one", "two", "one"], []])
def test_other_kernels_than_those_of_the_calls_are_refused(names):
    with pytest.raises(RuntimeError, match="ran"):
        timing.split([(name, 1.0) for name in names], ["", "a"], KERNELS)


def test_the_floor_is_that_of_the_design_study():
    """gpu-kernels.md: fc1 of XL/2 at M = 512 takes 6.9 us of arithmetic in bfloat16 and 3.8 us of memory."""
    moved = 2 * (512 * 1152 + 1152 * 4608 + 512 * 4608)
    floor = timing.floors(2 * 512 * 1152 * 4608, moved, "NVIDIA H200", False)
    assert round(1e3 * floor["compute"], 1) == 6.9 and round(1e3 * floor["memory"], 1) == 3.8
    halved = timing.floors(2 * 512 * 1152 * 4608, moved, "NVIDIA H200", True)
    assert halved["compute"] == floor["compute"] / 2
    assert timing.floors(0, moved, "NVIDIA H100 80GB HBM3", False)["memory"] > floor["memory"]


def test_calls_take_turns_on_a_flushed_cache(monkeypatch):
    """With a profiler that sees what the calls put down: each kernel takes as many milliseconds as have run before it."""
    log = []

    class Trace:
        def __enter__(self):
            self.start = len(log)
            return self

        def __exit__(self, *_):
            self.found = [(name, float(i)) for i, name in enumerate(log[self.start :])]

    monkeypatch.setattr(timing, "_Trace", Trace)
    monkeypatch.setattr(timing, "_flush_buffer", lambda: None)
    monkeypatch.setattr(timing, "_flush", lambda: lambda _: log.append("flush"))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    calls = {"a": lambda: log.extend(["one", "two"]), "b": lambda: log.append("one")}
    samples, clock = timing.kernel_times(calls, 2)
    assert clock == "cupti" and samples == {"a": [1.0 + 2.0, 6.0 + 7.0], "b": [4.0, 9.0]}
    # A call that does not always run the same kernels is not split, but timed by the host's clock.
    calls["b"] = lambda: log.append(f"kernel {len(log)}")
    samples, clock = timing.kernel_times(calls, 2)
    assert clock == "wall" and set(samples) == {"a", "b"}
