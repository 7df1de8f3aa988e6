"""Sampling at scale: the same bytes on any devices and processes and after any kill, in the memory of one batch."""

import json
import os
import re
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from conftest import ROOT, environment
from models import tiny

import vq4dit_jax
from convert.inception import load_inception
from vq4dit_jax import npz
from vq4dit_jax.diffusion.sampling import to_uint8
from vq4dit_jax.errors import InputError
from vq4dit_jax.files import asset
from vq4dit_jax.methods.kmeans import quantize
from vq4dit_jax.networks import sampling
from vq4dit_jax.networks.conditioning import ClassLabels
from vq4dit_jax.qarray.tree import random_params
from vq4dit_jax.run import generation, seeds
from vq4dit_jax.run.generation import Plan
from vq4dit_jax.storage.identity import Claim

COMMAND = [sys.executable, "-m", "vq4dit_jax.sample"]
SMALL = ("--num-images=60", "--steps=3", "--batch=7", "--labels=random", "--grid-images=6")


def _sample(checkpoint, out, *arguments, devices: int = 1) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*COMMAND, f"--checkpoint={checkpoint}", f"--out={out}", *SMALL, *arguments],
        cwd=ROOT, env=environment(devices), capture_output=True, text=True,
    )  # fmt: skip


TRAINED = "asset:dit_cifar10.safetensors"
"""Its samples are pictures; those of random weights are all black and white, and would hide differences."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A packed model small enough that 50,000 images take seconds."""
    model, params = tiny(input_size=32, patch_size=16, hidden_size=16, depth=1, mlp_ratio=1.0)
    params = random_params(params, jax.random.key(1), scale=0.05)
    path = tmp_path_factory.mktemp("model") / "quantized"
    vq4dit_jax.save_quantized(path, model, quantize(params, bits=2, key=jax.random.key(0)))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The samples of one device in one go."""
    out = tmp_path_factory.mktemp("samples") / "one"
    done = _sample(TRAINED, out)
    assert done.returncode == 0, done.stderr
    return out


def test_what_the_command_leaves(whole):
    assert {p.name for p in whole.iterdir()} == {"samples.npz", "grid.png", "recipe.json", ".lock"}
    with np.load(whole / "samples.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0"]
        images = file["arr_0"]
    assert images.shape == (60, 32, 32, 3) and images.dtype == np.uint8
    assert ((images > 0) & (images < 255)).mean() > 0.5 and len(np.unique(images.reshape(60, -1), axis=0)) == 60
    recipe = json.loads((whole / "recipe.json").read_text())
    assert (recipe["sampler"], recipe["steps"], recipe["labels"], recipe["num_images"]) == ("ddpm", 3, "random", 60)
    assert recipe["versions"]["jax"] == jax.__version__ and len(recipe["model_sha256"]) == 64


def test_the_images_are_those_of_the_library(whole):
    """The command's image i is `vq.sample`'s, wherever the shards begin; one level apart where rounding differs."""
    model, params = vq4dit_jax.load_pretrained(asset(TRAINED.removeprefix("asset:")))
    key, indices = seeds.stream(0, seeds.SAMPLES), np.asarray([0, 6, 7, 31, 59])
    labels = ClassLabels(model.num_classes).choose("random", key, indices)
    x = vq4dit_jax.sample(model, params, labels, key=key, num_steps=3, cfg_scale=1.5, indices=indices)
    ours = to_uint8(np.asarray(x)).astype(int)
    difference = np.abs(ours - np.load(whole / "samples.npz")["arr_0"][indices])
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_eight_devices_make_the_same_file(whole, tmp_path):
    assert _sample(TRAINED, tmp_path / "eight", devices=8).returncode == 0
    assert (tmp_path / "eight" / "samples.npz").read_bytes() == (whole / "samples.npz").read_bytes()


def test_two_processes_make_the_same_file(whole, tmp_path):
    """A `jax.distributed` job on loopback, each process with two devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "two"
    job = ("--distributed", f"--coordinator=127.0.0.1:{port}", "--processes=2")
    processes = [
        subprocess.Popen(
            [*COMMAND, f"--checkpoint={TRAINED}", f"--out={out}", *SMALL, *job, f"--process={i}"],
            cwd=ROOT, env=environment(2), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert (out / "samples.npz").read_bytes() == (whole / "samples.npz").read_bytes()
    assert json.loads((out / "recipe.json").read_text())["devices"].startswith("4 x")


@pytest.mark.once
def test_killed_and_resumed_on_other_devices_it_makes_the_same_file(whole, tmp_path):
    """SIGKILL after some shards; those are kept as they are, and the rest is made."""
    out = tmp_path / "killed"
    shards = out / ".samples-shards"
    process = subprocess.Popen(
        [*COMMAND, f"--checkpoint={TRAINED}", f"--out={out}", *SMALL],
        cwd=ROOT, env=environment(1), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (shards.exists() and len(list(shards.glob("*.npy"))) >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = {p.name: p.stat().st_mtime_ns for p in shards.glob("0*.npy")}
    assert len(made) >= 2 and not (out / "samples.npz").exists()
    (shards / ".000008.npy.partial").write_bytes(b"half")
    # The next run may be killed as well, as soon as it has anything to lose; what was made stays.
    assert _sample(TRAINED, out, devices=3).returncode == 0
    assert (out / "samples.npz").read_bytes() == (whole / "samples.npz").read_bytes()
    assert not shards.exists()


def test_shards_that_are_there_are_not_made_again(checkpoint, tmp_path):
    model, params, _ = vq4dit_jax.load_quantized(checkpoint)
    plan, key = Plan(num_images=5, batch=2, sampler="ddim", steps=1), jax.random.key(0)
    mark = np.full((2, 32, 32, 3), 7, np.uint8)
    (tmp_path / ".a-shards").mkdir()
    np.save(tmp_path / ".a-shards" / "000001.npy", mark)
    generation.generate(plan, model, params, key, tmp_path / "a.npz", lambda x: x)
    images = np.load(tmp_path / "a.npz")["arr_0"]
    assert (images[2:4] == mark).all() and not (images[[0, 1, 4]] == 7).all()


@pytest.mark.once
def test_fifty_thousand_images_in_the_memory_of_one_batch(checkpoint, tmp_path):
    """The images are 154 MB, a batch is 1.5 MB as bytes and 6 MB as floats. The peak of the process grows by far less."""

    def peak_kb(count: int) -> int:
        script = (
            "import resource, sys, runpy; sys.argv = sys.argv[1:]\n"
            "try: runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=False)\n"
            "finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, "vq4dit_jax.sample", f"--checkpoint={checkpoint}", f"--num-images={count}",
             f"--out={tmp_path / str(count)}", "--batch=500", "--sampler=ddim", "--steps=1", "--cfg-scale=1"],
            cwd=ROOT, env=environment(1), capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split()[-1])

    assert resource.getpagesize()  # ru_maxrss is in kB on Linux, where alone this project is tested
    few, many = peak_kb(1000), peak_kb(50_000)
    assert (tmp_path / "50000" / "samples.npz").stat().st_size > 50_000 * 32 * 32 * 3
    assert many - few < 50_000


def test_a_finished_folder_is_left_alone_and_another_recipe_is_refused(whole):
    before = {p: p.stat().st_mtime_ns for p in whole.iterdir() if p.name != ".lock"}
    again = _sample(TRAINED, whole)
    assert again.returncode == 0 and "finished" in again.stdout
    other = _sample(TRAINED, whole, "--steps=4", "--seed=1")
    assert other.returncode == 2 and "steps (4 here, 3 there), seed (1 here, 0 there)" in other.stderr
    assert other.stderr.count("\n") == 1
    assert before == {p: p.stat().st_mtime_ns for p in whole.iterdir() if p.name != ".lock"}


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--steps=0", "steps=0"), ("--num-images=0", "num_images=0"), ("--batch=-1", "batch=-1"),
        ("--sampler=euler", "sampler='euler'"), ("--labels=cats", "labels=cats"), ("--labels=3,5", "classes 0..4"),
        ("--num-images=many", "many"), ("--nonsense", "nonsense"), ("--checkpoint=nowhere", "nowhere"),
        ("--grid-images=0", "grid-images=0"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(argument, words, checkpoint, tmp_path, capsys):
    module = runpy.run_module("vq4dit_jax.sample", run_name="sample_command")
    out = tmp_path / "out"
    code = module["main"]([f"--checkpoint={checkpoint}", f"--out={out}", "--num-images=3", "--steps=1", argument])
    err = capsys.readouterr().err
    assert code == 2 and words in err and err.count("\n") == 1
    assert not list(out.rglob("*.np[yz]"))


def test_help_names_every_option_and_an_example(capsys):
    done = subprocess.run([*COMMAND, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert {"--checkpoint", "--num-images", "--out", "--vae", "--seed"} <= set(re.findall(r"--[a-z-]+", done.stdout))


def test_running_the_command_leaves_the_function_of_the_same_name():
    """`python -m vq4dit_jax.sample` is a module; `vq4dit_jax.sample` has to stay the function."""
    assert vq4dit_jax.sample is sampling.sample


# Parts -----------------------------------------------------------------------------------------------------------


@hypothesis.given(
    st.integers(0, 20), st.lists(st.integers(0, 20), max_size=6), st.sampled_from([np.uint8, np.float32, np.int64])
)
def test_an_npz_written_in_parts_is_that_of_the_whole(tmp_path_factory, count, cuts, dtype):
    array = np.arange(count * 6).reshape(count, 2, 3).astype(dtype)
    parts = np.split(array, sorted(min(c, count) for c in cuts))
    folder = tmp_path_factory.mktemp("npz")
    npz.write_npz(folder / "parts.npz", array.shape, dtype, parts)
    npz.write_npz(folder / "whole.npz", array.shape, dtype, [array])
    assert (folder / "parts.npz").read_bytes() == (folder / "whole.npz").read_bytes()
    with np.load(folder / "parts.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["arr_0"], array)
        assert file["arr_0"].dtype == dtype


def test_parts_that_do_not_fit_leave_no_file(tmp_path):
    for parts in ([np.zeros((2, 3), np.uint8)], [np.zeros((3, 4), np.uint8)], [np.zeros((3, 3), np.int8)]):
        with pytest.raises(InputError, match=r"a\.npz"):
            npz.write_npz(tmp_path / "a.npz", (3, 3), np.uint8, parts)
    assert not list(tmp_path.iterdir())


def test_balanced_labels_differ_by_at_most_one_and_random_ones_do_not_know_the_batch():
    key = jax.random.key(3)
    choose = ClassLabels(10).choose
    counts = np.bincount(choose("balanced", key, np.arange(1003)))
    assert counts.max() - counts.min() <= 1
    whole = choose("random", key, np.arange(1000))
    parts = np.concatenate([choose("random", key, np.arange(i, i + 8)) for i in range(0, 1000, 8)])
    np.testing.assert_array_equal(whole, parts)
    assert np.bincount(whole, minlength=10).min() > 60  # 100 expected, standard deviation 9.5
    np.testing.assert_array_equal(ClassLabels(1000).choose("207,360", key, np.arange(4, 7)), [207, 360, 207])


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5])
def test_a_seed_that_jax_would_wrap_is_refused(seed):
    """2**32 and 0 are one key, so two names gave the same images."""
    with pytest.raises(InputError, match="seed"):
        seeds.check_seed("seed", seed)
    assert seeds.check_seed("seed", 2**32 - 1) == 2**32 - 1


def test_the_command_refuses_a_seed_before_it_makes_its_folder(checkpoint, tmp_path, capsys):
    line = _command(capsys, f"--checkpoint={checkpoint}", f"--out={tmp_path / 'out'}", "--seed=4294967296")
    assert "--seed=4294967296" in line and not (tmp_path / "out").exists()


def _command(capsys, *arguments) -> str:
    """The one line of a refusal."""
    assert runpy.run_module("vq4dit_jax.sample", run_name="sample_command")["main"](list(arguments)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_a_refused_command_does_not_keep_the_folder(checkpoint, tmp_path, capsys):
    out = (f"--checkpoint={checkpoint}", f"--out={tmp_path / 'out'}", "--num-images=2", "--steps=1", "--cfg-scale=1")
    assert "classes 0..4" in _command(capsys, *out, "--labels=7")
    assert "activations" in _command(capsys, *out, "--activations=fp4")
    assert not (tmp_path / "out").exists()


def test_the_parameters_of_a_model_with_other_heads_are_another_recipe(checkpoint, tmp_path, capsys):
    model, params, _ = vq4dit_jax.load_quantized(checkpoint)
    vq4dit_jax.save_quantized(tmp_path / "other", model.clone(num_heads=4), params)
    how = ("--num-images=1", "--steps=1", "--batch=1", "--cfg-scale=1", f"--out={tmp_path / 'out'}")
    main = runpy.run_module("vq4dit_jax.sample", run_name="sample_command")["main"]
    assert main([f"--checkpoint={checkpoint}", *how]) == 0
    capsys.readouterr()
    line = _command(capsys, f"--checkpoint={tmp_path / 'other'}", *how)
    assert "model.fields.num_heads (4 here, 2 there)" in line


def test_somebody_elses_recipe_is_refused_in_one_line(checkpoint, tmp_path, capsys):
    for text in ("flour, eggs", "[]", '{"flour": 1}'):
        (tmp_path / "recipe.json").write_text(text)
        assert "recipe.json" in _command(capsys, f"--checkpoint={checkpoint}", f"--out={tmp_path}") or text[0] == "{"
        assert (tmp_path / "recipe.json").read_text() == text and os.listdir(tmp_path) == ["recipe.json"]


def test_a_process_that_comes_before_the_recipe_waits_for_it_and_compares(tmp_path, monkeypatch):
    """Unless it compares, it adds shards of another seed."""
    monkeypatch.setattr(generation, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    ours = Claim(tmp_path / "recipe.json", {"seed": 1})
    with pytest.raises(InputError, match="process 0"):
        generation.claim(ours, patience=0.05)
    late = threading.Timer(0.2, lambda: Claim(tmp_path / "recipe.json", {"seed": 2}).take())
    late.start()
    with pytest.raises(InputError, match=r"seed \(1 here, 2 there\)"):
        generation.claim(ours, patience=60.0)
    late.join()
    generation.claim(Claim(tmp_path / "recipe.json", {"seed": 2}), patience=60.0)


@pytest.mark.parametrize("index", [0, 1])
def test_a_dead_process_is_named_with_its_shard(checkpoint, tmp_path, monkeypatch, index):
    """Each of two processes makes its own shards and then waits for the other's, which never come."""
    model, params, _ = vq4dit_jax.load_quantized(checkpoint)
    plan = Plan(num_images=5, batch=1, sampler="ddim", steps=1, cfg_scale=1.0)
    monkeypatch.setattr(generation, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    with pytest.raises(InputError, match=rf"00000{1 - index}\.npy, of process {1 - index}, has not come"):
        generation.generate(plan, model, params, jax.random.key(0), tmp_path / "a.npz", lambda x: x, patience=0.3)
    made = {int(p.stem) for p in (tmp_path / ".a-shards").glob("0*.npy")}
    assert made == set(range(index, 5, 2))


def test_whoever_waits_is_patient_while_anything_comes(tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "_POLL_SECONDS", 0.01)
    paths = [tmp_path / f"{i}.npy" for i in range(4)]

    def come():
        for path in paths:
            time.sleep(0.3)
            path.write_bytes(b"")

    other = threading.Thread(target=come)
    other.start()
    generation._wait_for(lambda: all(p.exists() for p in paths), paths, tmp_path / "a.npz", patience=0.8)
    other.join()


def test_a_shard_that_was_cut_is_made_again(checkpoint, tmp_path):
    model, params, _ = vq4dit_jax.load_quantized(checkpoint)
    plan, key = Plan(num_images=4, batch=2, sampler="ddim", steps=1, cfg_scale=1.0), jax.random.key(0)
    generation.generate(plan, model, params, key, tmp_path / "whole.npz", lambda x: x)
    shard = tmp_path / ".a-shards" / "000001.npy"
    shard.parent.mkdir()
    whole = npz.read_head(tmp_path / "whole.npz", 4)
    np.save(shard, whole[2:])
    shard.write_bytes(shard.read_bytes()[:-7])
    generation.generate(plan, model, params, key, tmp_path / "a.npz", lambda x: x)
    np.testing.assert_array_equal(npz.read_head(tmp_path / "a.npz", 9), whole)


def _zeros(path, name: str, size: int, **header) -> None:
    """A deflated member of zeros, a thousandth of its size in the file."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(f"{name}.npy", "w") as member:
        np.lib.format.write_array_header_1_0(
            member, {"descr": "|u1", "fortran_order": False, "shape": (size,), **header}
        )
        for _ in range(size >> 20):
            member.write(bytes(1 << 20))


def test_members_that_inflate_beyond_reason_are_not_read(tmp_path):
    _zeros(tmp_path / "bomb.npz", "mu", 1 << 28)
    _zeros(tmp_path / "row.npz", "arr_0", 1 << 28, shape=(1, 1 << 28))
    _zeros(tmp_path / "small.npz", "mu", 1 << 20)
    assert (tmp_path / "bomb.npz").stat().st_size < 1 << 20
    for read in (
        lambda: npz.read_arrays(tmp_path / "bomb.npz"),
        lambda: npz.read_head(tmp_path / "row.npz", 1),
        lambda: load_inception(tmp_path / "bomb.npz"),
    ):
        tracemalloc.start()
        with pytest.raises(InputError, match="bytes of memory"):
            read()
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
        tracemalloc.stop()
    assert npz.read_arrays(tmp_path / "small.npz")["mu"].shape == (1 << 20,)


@pytest.mark.parametrize("shape", [(-1, 3), (2**64, 1), (10**6,), (0, 2**70), (0, 2**62, 2**62)])
def test_shapes_that_are_not_the_files_are_one_line(tmp_path, shape):
    _zeros(tmp_path / "a.npz", "arr_0", 0, shape=shape)
    for read in (lambda: npz.read_arrays(tmp_path / "a.npz"), lambda: npz.read_head(tmp_path / "a.npz", 2)):
        with pytest.raises(InputError, match=r"a\.npz"):
            read()


def test_arrays_come_back_as_numpy_reads_them(tmp_path):
    arrays = {"c": np.arange(6.0).reshape(2, 3), "f": np.asfortranarray(np.arange(6).reshape(2, 3)), "s": np.asarray("text"),
              "n": np.float32(3), "e": np.zeros((0, 4), np.uint8)}  # fmt: skip
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **arrays)
        found = npz.read_arrays(tmp_path / "a.npz")
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array, strict=True)
        np.testing.assert_array_equal(npz.read_head(tmp_path / "a.npz", 1, "c"), arrays["c"][:1])
        assert npz.read_head(tmp_path / "a.npz", 5, "e").shape == (0, 4)


@hypothesis.given(st.integers(1, 10_000), st.integers(1, 300))
def test_shards_cover_the_images_once(count, batch):
    plan = Plan(num_images=count, batch=batch)
    indices = np.concatenate([plan.indices(shard) for shard in range(plan.num_shards)])
    assert (indices == np.arange(len(indices))).all() and count <= len(indices) < count + plan.batch
