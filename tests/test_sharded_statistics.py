"""Statistics of images do not depend, to the last bit, on how many devices and processes have computed them."""

import pathlib
import pickle
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import environment

from vq4dit_jax.evaluation import StreamingMoments, iterate_features, load_classifier, streaming

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Writes the moments of a range of the images to a file, as a process of a job, or alone.
PROGRAM = """
import pickle, sys
import jax, numpy as np
first, end, target, *job = sys.argv[1:]
if job:
    jax.distributed.initialize(job[0], int(job[1]), int(job[2]))
from vq4dit_jax.evaluation import StreamingMoments, iterate_features, load_classifier, streaming
streaming.CHUNK = 128
images = np.random.default_rng(0).integers(0, 256, (500, 32, 32, 3), np.uint8)[int(first) : int(end)]
state = StreamingMoments(int(first))
for outputs in iterate_features(load_classifier("cifar10_resnet56"), [images]):
    state = state.update(outputs["pool"])
with open(target, "wb") as file:
    pickle.dump((jax.device_count(), state), file)
"""


def start(devices: int, *arguments: str | pathlib.Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *map(str, arguments)], cwd=ROOT, env=environment(devices))


@pytest.mark.once
def test_one_device_eight_devices_and_two_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "CHUNK", 128)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    halves = tmp_path / "a", tmp_path / "b"
    # 400 is a multiple of the network's batch, as the shards of a job are, and no border of a chunk of the moments.
    jobs = [start(1, 0, 400, halves[0], address, 2, 0), start(1, 400, 500, halves[1], address, 2, 1)]
    assert [job.wait(300) for job in jobs] == [0, 0]
    assert start(8, 0, 500, tmp_path / "eight").wait(300) == 0
    # Our own children wrote these pickles.
    (count, a), (_, b), (eight, alone) = (pickle.loads(p.read_bytes()) for p in (*halves, tmp_path / "eight"))
    assert (count, eight) == (2, 8)
    here = StreamingMoments()
    images = np.random.default_rng(0).integers(0, 256, (500, 32, 32, 3), np.uint8)
    for outputs in iterate_features(load_classifier("cifar10_resnet56"), [images]):
        here = here.update(outputs["pool"])
    for state in (a.merge(b), alone):
        for ours, theirs in zip(here.finalize(), state.finalize()):
            assert ours.tobytes() == theirs.tobytes()
