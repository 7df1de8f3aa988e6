"""Correctness and speed of everything that runs on a Hopper GPU, as one JSON file. `benchmarks/gpu.sh` calls it.

    python -m benchmarks.gpu --output=FILE [--budget=SECONDS] [--only=PATTERN] [--dry-run]

Each case runs in its own process, which compiles everything that needs no GPU, reports that it is ready, and waits. The cases
then get the GPU one after another, the most important first. Every result is written at once, so a crash, a hang
or the end of the time loses no other. Exit code: 0; 1 where a kernel is wrong; 2 where there is no Hopper GPU.

--dry-run: small shapes, kernels in Pallas' interpreter, on any machine; its times mean nothing.
"""

import argparse
import datetime
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from benchmarks import record
from benchmarks.gpu import timing

_STALL_S = 90
"""Seconds without a message after which a checking process is ended, because a kernel hangs."""

# Name of a case -> (module, generator, its argument), most important first.
CHECKS = {f"check {name}": ("kernels", "suite", name) for name in ("bf16", "8-bit", "others", "other kinds")}
# XLA compiles these without trying anything on the GPU, in which others would disturb it.
QUIET = {f"step {name}": ("network", "ours", name) for name in ("W2A8", "VQ2", "W8A8", "W4A8", "VQ3")}
QUIET |= {f"time {name}": ("times", "linear", name) for name in ("fc1", "qkv", "fc2", "proj", "adaLN")}
CASES = {
    **CHECKS,
    "step W2A8": QUIET["step W2A8"],
    "step bf16": ("network", "ours", "bf16"),
    "step VQ2": QUIET["step VQ2"],
    "step torch": ("network", "torchs", "default"),
    **QUIET,
    "time others": ("times", "others", ""),
    "step torch max-autotune": ("network", "torchs", "max-autotune"),
}
_DRY = ("check bf16", "check 8-bit", "check others", "step W2A8", "step bf16", "step torch", "time proj", "time others")


def environment() -> dict[str, Any]:
    """The device as JAX sees it, and versions."""
    import jax

    from pallas_kernels import selector

    found = {"python": platform.python_version()}
    for package in ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "numpy", "torch", "triton"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    facts = selector.facts()
    return {
        "device": str(facts),
        "hopper": facts.capability == (9, 0),
        "cudnn": facts.cudnn,
        "platform_version": jax.devices()[0].client.platform_version,
        "versions": found,
    }


def child(name: str, dry: bool, skip: int) -> None:
    """Runs one case: a JSON document a line on standard output; after READY it waits for a line on standard input."""
    say = lambda message: print(json.dumps(message), flush=True)
    if name == "environment":
        say({"environment": environment()})
        return
    module, function, argument = CASES[name]
    generator = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
    for message in generator(argument, dry, *([skip] if name in CHECKS else [])):
        if message == timing.READY:
            say({"ready": name})
            sys.stdin.readline()
        else:
            say(message)
    say({"done": name})


class Case:
    """A child process; its messages go to `inbox` as (case, message), and at its end (case, None)."""

    def __init__(self, name: str, dry: bool, inbox: queue.Queue, skip: int = 0):
        self.name, self.heard = name, time.monotonic()
        self.begun, self.checked = "", skip  # the check at work, and how many are done
        self.waiting = self.finished = self.ended = False
        command = [sys.executable, "-m", "benchmarks.gpu", f"--case={name}", f"--skip={skip}"]
        variables = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
        variables.pop("JAX_PLATFORMS", None)  # both the GPU and the CPU are wanted
        if dry or "torch" in name:
            # Pallas' interpreter waits for itself where it has few threads.
            variables |= {"JAX_PLATFORMS": "cpu", "NPROC": "8"}
        self.process = subprocess.Popen(
            command + ["--dry-run"] * dry, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables
        )
        threading.Thread(target=self._listen, args=(inbox,), daemon=True).start()

    def _listen(self, inbox: queue.Queue) -> None:
        for line in self.process.stdout:
            try:
                inbox.put((self, json.loads(line)))
            except json.JSONDecodeError:
                print(f"[{self.name}] {line}", end="", flush=True)
        self.process.wait()
        inbox.put((self, None))

    @property
    def resting(self) -> bool:
        """Whether it needs no device now."""
        return self.ended or self.waiting

    def go(self) -> None:
        self.waiting, self.heard = False, time.monotonic()
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except OSError:  # it has ended; its end is in the inbox
            pass


class Run:
    """All cases, and the JSON file with their results so far."""

    def __init__(self, output: pathlib.Path, dry: bool, budget: float, head: dict[str, Any]):
        self.output, self.dry, self.inbox = output, dry, queue.Queue()
        self.start = time.monotonic()
        self.deadline = self.start + budget
        self.result = head | {"complete": False, "checks": [], "times": [], "tiles": [], "steps": [], "failures": []}
        self.cases: dict[str, Case] = {}

    def launch(self, name: str, skip: int = 0) -> Case:
        self.cases[name] = Case(name, self.dry, self.inbox, skip)
        return self.cases[name]

    def save(self) -> None:
        self.result["seconds"] = round(time.monotonic() - self.start, 1)
        beside = self.output.with_name(self.output.name + ".part")
        beside.write_text(json.dumps(self.result, indent=1) + "\n")
        beside.replace(self.output)

    def fail(self, name: str, why: str) -> None:
        print(f"{name}: {why}", flush=True)
        self.result["failures"].append({"case": name, "error": why})

    def listen(self, until: Callable[[], bool], limit: float) -> None:
        """Takes messages of the cases until `until` holds; ends cases that run after the limit or are silent."""
        self.end = min(self.deadline, time.monotonic() + limit)
        while not until():
            now = time.monotonic()
            for case in self.cases.values():
                if not case.resting and (now > self.end or case.name in CHECKS and now > case.heard + _STALL_S):
                    case.process.kill()
            try:
                self.hear(*self.inbox.get(timeout=1))
            except queue.Empty:
                continue

    def hear(self, case: Case, message: Any) -> None:
        case.heard = time.monotonic()
        if message is not None and "environment" in message:
            self.result |= message["environment"]
            case.finished = True
        elif message is None:
            case.ended = True
            if not case.finished:
                self.died(case)
        elif "begin" in message:
            case.begun = message["begin"]
        elif "ready" in message:
            case.waiting = True
        elif "done" in message:
            case.finished = True
        else:
            case.checked += 1
            self.result[message["section"]].append({k: v for k, v in message.items() if k != "section"})
            print(f"{time.monotonic() - self.start:5.0f} s  {line_of(message)}", flush=True)
        self.save()

    def died(self, case: Case) -> None:
        """Continues with the next check where a kernel has ended the process."""
        why = f"ended with code {case.process.returncode}"
        if case.name not in CHECKS or not case.begun:
            self.fail(case.name, why)
            return
        self.result["checks"].append({"name": case.begun, "ok": False, "error": why})
        print(f"{case.begun}: {why}", flush=True)
        if time.monotonic() < self.end:
            self.launch(case.name, case.checked + 1)

    def run(self, names: list[str]) -> None:
        """Checks, and at the same time what can be compiled; then the others, one after the other."""
        for name in names:
            if name in CHECKS or name in QUIET or self.dry:
                self.launch(name)
        self.listen(lambda: all(case.resting for case in self.cases.values()), limit=200)
        for name in names:
            if name in CHECKS:
                continue
            if time.monotonic() > self.deadline:
                self.fail(name, "not run: no time left")
                continue
            case = self.cases.get(name) or self.launch(name)
            self.listen(lambda: case.resting, limit=150)
            case.go()
            self.listen(lambda: case.ended, limit=150)
        for case in self.cases.values():
            case.process.kill()
        self.result["complete"] = not self.result["failures"]
        self.save()


def line_of(message: dict[str, Any]) -> str:
    """A record in a line."""
    if message["section"] == "checks":
        worst = max((r["max_error_relative"] for r in message.get("results", {}).values()), default=float("nan"))
        return f"{'ok   ' if message['ok'] else 'WRONG'} {message['name']}  {message.get('error') or f'{worst:.1e}'}"
    if message["section"] == "steps":
        peak = message.get("peak_bytes")
        memory = f", peak {peak / 1e6:.0f} MB, weights {message['weight_bytes'] / 1e6:.0f} MB" if peak else ""
        hoisted = ", modulations hoisted" * message["modulations_hoisted"]
        size = f"{message['pixels']} px, {message['images']} images"
        return f"step {message['variant']}, {size}{hoisted}: {message['ms']['median']:.3f} ms{memory}"
    if message["section"] == "tiles":
        picked = f"{message['chosen']} takes {message['chosen_over_best']:.2f} of the best, {message['best']}"
        return f"{message['operation']} {message['kind']} M={message['M']}: {picked}"
    found = (f"{name} {1e3 * v['median']:.1f} us ({v['speedup']:.2f})" for name, v in message["ms"].items())
    return f"{message['operation']} {message['shape']}: {', '.join(found)}"


def nvidia_smi() -> list[str] | None:
    """Name, driver and memory of the devices, where the tool is."""
    try:
        command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip().splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results/gpu.json"))
    parser.add_argument("--budget", type=float, default=460, help="seconds for all of it (default: %(default)s)")
    parser.add_argument("--only", default="", help="a regular expression; cases whose names it is found in")
    parser.add_argument("--dry-run", action="store_true", help="small shapes on any machine")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.case:
        child(flags.case, flags.dry_run, flags.skip)
        return 0
    names = [name for name in (_DRY if flags.dry_run else CASES) if re.search(flags.only, name)]
    if importlib.util.find_spec("torch") is None:
        print("no PyTorch here: its steps are left out")
        names = [name for name in names if "torch" not in name]
    head = {
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        "commit": record.commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "dry_run": flags.dry_run,
        "nvidia_smi": nvidia_smi(),
    }
    run = Run(flags.output, flags.dry_run, flags.budget, head)
    probe = run.launch("environment")
    run.listen(lambda: probe.ended, limit=100)
    if not flags.dry_run and not run.result.get("hopper"):
        print(f"wanted a GPU of compute capability 9.0 (H100, H200); found {run.result.get('device')}", file=sys.stderr)
        return 2
    run.run(names)
    wrong = [check["name"] for check in run.result["checks"] if not check["ok"]]
    unfinished = [failure["case"] for failure in run.result["failures"]]
    print(f"{len(run.result['checks'])} checks, {len(wrong)} wrong {wrong}; not finished: {unfinished}; {flags.output}")
    return 1 if wrong or any(name in CHECKS for name in unfinished) else 0


if __name__ == "__main__":
    sys.exit(main())
