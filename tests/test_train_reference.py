"""`python -m examples.train_reference`: the objective against its definition, runs that are killed, what is written."""

import io
import json
import math
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from models import tiny
from PIL import Image

import vq4dit_jax as vq
from examples import data, export, objective, train_reference, training
from vq4dit_jax.diffusion import sampling
from vq4dit_jax.diffusion import schedule as diffusion
from vq4dit_jax.errors import InputError
from vq4dit_jax.methods.loop import read_log
from vq4dit_jax.storage import checkpoint

SCHED = diffusion.make_schedule(1000)
ALPHA = 1 - np.linspace(1e-4, 0.02, 1000)
A_BAR = np.cumprod(ALPHA)


def posterior(t: int, x0: np.ndarray, x_t: np.ndarray) -> tuple[np.ndarray, float]:
    """Mean and variance of x_{t-1} given x_t, by conditioning the joint Gaussian of the two given x_0, t >= 1."""
    previous = A_BAR[t - 1]
    covariance = np.sqrt(ALPHA[t]) * (1 - previous)
    gain = covariance / (1 - A_BAR[t])
    return np.sqrt(previous) * x0 + gain * (x_t - np.sqrt(A_BAR[t]) * x0), (1 - previous) - gain * covariance


def log_variance(t: int, interpolation: np.ndarray) -> np.ndarray:
    """Eq 15 of the paper, with the variance of t = 1 for that of t = 0, which is zero."""
    low = posterior(max(t, 1), np.zeros(1), np.zeros(1))[1]
    return (interpolation + 1) / 2 * np.log(1 - ALPHA[t]) + (1 - interpolation) / 2 * np.log(low)


def expected_bound(t: int, output: np.ndarray, x0: np.ndarray, noise: np.ndarray) -> float:
    """L_vlb of one image in bits, float64: the KL as an expectation of log densities, the decoder as a mass."""
    eps, interpolation = np.split(output, 2, axis=-1)
    x_t = np.sqrt(A_BAR[t]) * x0 + np.sqrt(1 - A_BAR[t]) * noise
    sigma = np.exp(0.5 * log_variance(t, interpolation))
    x0_hat = (x_t - np.sqrt(1 - A_BAR[t]) * eps) / np.sqrt(A_BAR[t])
    if t == 0:
        p = scipy.stats.norm(x0_hat, sigma)
        low, high = np.where(x0 < -0.999, -np.inf, x0 - 1 / 255), np.where(x0 > 0.999, np.inf, x0 + 1 / 255)
        return float(np.mean(-np.log2(p.cdf(high) - p.cdf(low))))
    q_mean, q_variance = posterior(t, x0, x_t)
    p = scipy.stats.norm(posterior(t, x0_hat, x_t)[0], sigma)
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)  # exact for the quadratic that is integrated
    q_sigma = np.sqrt(q_variance)
    log_ratio = sum(
        w * (scipy.stats.norm.logpdf(z) - np.log(q_sigma) - p.logpdf(q_mean + q_sigma * z))
        for z, w in zip(nodes, weights, strict=True)
    )
    return float(np.mean(log_ratio)) / math.sqrt(2 * math.pi) / math.log(2)


def levels(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (rng.integers(0, 256, shape) / 127.5 - 1).astype(np.float32)


@pytest.mark.parametrize("t", [0, 1, 10, 500, 999])
def test_loss_is_its_definition_in_float64(t):
    rng = np.random.default_rng(t)
    x0 = levels(rng, 3, 4, 4, 3)
    x0[0, 0, 0] = [-1, 1, 0]  # the outermost levels
    noise = rng.standard_normal(x0.shape).astype(np.float32)
    close = noise + 0.3 * rng.standard_normal(x0.shape)
    output = np.concatenate([close, rng.uniform(-1, 1, x0.shape)], -1).astype(np.float32)
    mse, vb = objective.losses(SCHED, jnp.asarray(output), x0, noise, jnp.full(3, t))
    wide = lambda a: a.astype(np.float64)
    np.testing.assert_allclose(mse, np.square(wide(output[..., :3]) - wide(noise)).mean((1, 2, 3)), rtol=1e-5)
    expected = [expected_bound(t, *map(wide, one)) for one in zip(output, x0, noise, strict=True)]
    np.testing.assert_allclose(vb, expected, rtol=2e-4)


def test_noised_images_have_the_moments_of_the_forward_process():
    t = jnp.asarray([0, 500, 999])
    x0, noise = jnp.full((3, 2, 2, 1), 0.5), jnp.full((3, 2, 2, 1), -2.0)
    expected = 0.5 * np.sqrt(A_BAR[np.asarray(t)]) - 2.0 * np.sqrt(1 - A_BAR[np.asarray(t)])
    np.testing.assert_allclose(objective.diffuse(SCHED, x0, noise, t)[:, 0, 0, 0], expected, rtol=1e-5)


def test_loss_is_zero_for_the_true_noise_and_the_posterior_variance():
    x0, noise = levels(np.random.default_rng(0), 5, 4, 4, 3), np.random.default_rng(1).standard_normal((5, 4, 4, 3))
    noise = noise.astype(np.float32)
    t = jnp.asarray([1, 2, 100, 700, 999])
    mse, vb = objective.losses(SCHED, jnp.concatenate([noise, jnp.full_like(noise, -1)], -1), x0, noise, t)
    np.testing.assert_array_equal(mse, 0)
    np.testing.assert_allclose(vb, 0, atol=1e-6)
    _, other = objective.losses(SCHED, jnp.concatenate([noise, jnp.full_like(noise, 0)], -1), x0, noise, t)
    assert (other[:3] > 1e-5).all()  # later the variances that it is between are equal to float32


def test_bound_is_least_at_the_variance_that_the_error_asks_for_and_trains_the_variance_alone():
    """d KL / d log p = 0 where p = q + gap^2; and the noise prediction has the gradient of the squared error alone."""
    shape, t = (1, 2, 2, 1), jnp.asarray([3])
    noise = jnp.zeros(shape)
    eps = jnp.full(shape, 0.5)
    q, highest = np.exp(float(SCHED.log_variance_min[3])), float(SCHED.log_variance_max[3])
    gap = float(SCHED.posterior_x0[3] * SCHED.sqrt_one_minus_alpha_bar[3] / SCHED.sqrt_alpha_bar[3]) * 0.5
    best = 2 * (np.log(q + gap**2) - np.log(q)) / (highest - np.log(q)) - 1

    def bound(eps, v):
        return objective.losses(SCHED, jnp.concatenate([eps, v], -1), jnp.zeros(shape), noise, t)[1].sum()

    for_eps, for_v = jax.grad(bound, (0, 1))(eps, jnp.full(shape, best))
    np.testing.assert_array_equal(for_eps, 0)
    np.testing.assert_allclose(for_v, 0, atol=1e-5)
    assert (jax.grad(bound, 1)(eps, jnp.full(shape, best + 0.5)) > 1e-3).all()


def test_learning_rate_rises_linearly_and_falls_along_a_cosine():
    recipe = training.Recipe(100, 2, 0.1, 10, 0.9, 1.0, "float32", 0)
    rate = [float(training.learning_rate(recipe, jnp.int32(step))) for step in range(101)]
    np.testing.assert_allclose(rate[0], 0.01)
    np.testing.assert_allclose(rate[50], 0.05, rtol=1e-5)
    np.testing.assert_allclose(rate[100], 0, atol=1e-8)
    assert np.argmax(rate) in (9, 10)


def test_every_epoch_shows_every_image_once_in_an_order_of_its_own():
    epochs = [
        np.concatenate([training.batch_indices(0, step, 4, 12) for step in range(3 * e, 3 * e + 3)]) for e in (0, 1)
    ]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert (epochs[0] != epochs[1]).any()


def dataset(count: int = 16, seed: int = 0) -> data.Dataset:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 2, 2, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    return data.Dataset(images, np.arange(count, dtype=np.int32) % 5, tuple("abcde"), "0" * 64)


# One recipe and one model for all tests, because compiling a step is what takes the time.
RECIPE = training.Recipe(steps=120, batch=8, learning_rate=3e-3, warmup=10, ema=0.75, clip=1.0, dtype="float32", seed=0)
FLAGS = ("--steps=120", "--batch=8", "--learning-rate=3e-3", "--warmup=10", "--ema=0.75", "--eval-images=0")


@pytest.fixture(scope="module")
def model():
    return tiny()[0]


@pytest.fixture(scope="module")
def first(model):
    return training.init_params(model, jax.random.key(0))


@pytest.fixture(scope="module")
def whole(model, first, tmp_path_factory):
    """(state, log) of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    state = training.train(model, RECIPE, dataset(), first, folder / "steps", folder / "log.jsonl", save_every=45)
    return state, read_log(folder / "log.jsonl")


def equal(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)))


def test_a_tiny_model_learns_its_images(whole):
    lines = whole[1]
    assert np.mean([line["mse"] for line in lines[-3:]]) < 0.7 * lines[0]["mse"]
    assert np.mean([line["vb"] for line in lines[-3:]]) < lines[0]["vb"]


def test_a_killed_run_ends_with_the_bits_and_the_log_of_one_that_was_not(model, first, whole, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    save = training._save

    def save_and_die(folder, step, state):
        if step == 90:
            raise Killed  # this one is lost
        save(folder, step, state)

    run = lambda: training.train(
        model, RECIPE, dataset(), first, tmp_path / "steps", tmp_path / "log.jsonl", save_every=45
    )
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training, "_save", save_and_die)
        run()
    assert [path.name for path in (tmp_path / "steps").iterdir()] == ["step_0000045"]
    assert read_log(tmp_path / "log.jsonl")[-1]["step"] == 90
    state, log = run(), read_log(tmp_path / "log.jsonl")
    assert equal(state, whole[0])
    assert [path.name for path in (tmp_path / "steps").iterdir()] == ["step_0000120"]
    without_times = [[{**line, "images_per_second": None} for line in lines] for lines in (log, whole[1])]
    assert without_times[0] == without_times[1]
    assert [line["step"] for line in log] == [10, 20, 30, 40, 45, 50, 60, 70, 80, 90, 100, 110, 120]


def test_two_devices_take_the_step_that_one_takes_and_the_ema_follows(model, first):
    update = training.make_update(model, RECIPE)
    rows = jax.sharding.NamedSharding(sampling.batch_mesh(), jax.sharding.PartitionSpec("batch"))
    batch = dataset(8).images, dataset(8).labels
    sharded = jax.device_put(batch, rows)
    assert len(sharded[0].addressable_shards) == 2
    two, metrics_two = update(jax.device_put(training.init(RECIPE, first), sampling.replicated()), *sharded)
    one, metrics_one = update(training.init(RECIPE, first), *batch)
    for name in ("loss", "mse", "vb", "grad_norm"):
        np.testing.assert_allclose(metrics_two[name], metrics_one[name], rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), two.optimizer, one.optimizer)

    start = {name: leaf for name, leaf in first.items() if name != "pos_embed"}
    assert not equal(start, one.params)
    mean = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, start, one.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), one.ema, mean)
    final = training.finalize(model, one)
    assert jax.tree.map(jnp.shape, final) == jax.tree.map(jnp.shape, first)
    np.testing.assert_array_equal(final["pos_embed"], first["pos_embed"])


@pytest.mark.parametrize("dtype, computes_in", [("float32", False), ("bfloat16", True)])
def test_bfloat16_is_of_the_computation_and_not_of_the_state(model, first, dtype, computes_in):
    update = training.make_update(model.clone(dtype=jnp.dtype(dtype)), RECIPE)
    inputs = training.init(RECIPE, first), dataset(8).images, dataset(8).labels
    state, metrics = jax.eval_shape(update, *inputs)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((state.params, state.ema, metrics))} == {"float32"}
    assert ("bf16" in str(jax.make_jaxpr(update)(*inputs))) == computes_in


def test_load_pretrained_reads_what_is_written_to_the_bit(tmp_path):
    model, params = tiny(hidden_size=48, patch_size=4, depth=3)
    export.write_pretrained(tmp_path / "m.safetensors", model, params, {"licence": "Apache-2.0"})
    theirs, read = vq.load_pretrained(tmp_path / "m.safetensors")
    assert theirs == model
    rounded = jax.tree.map(lambda a: a.astype(jnp.float16).astype(jnp.float32), params)
    assert equal(read, rounded)
    with pytest.raises(InputError, match="float16"):
        export.write_pretrained(tmp_path / "m.safetensors", model, jax.tree.map(lambda a: a * 1e6, params), {})


def test_the_file_is_laid_out_as_the_shipped_model(tmp_path):
    from safetensors import safe_open

    from vq4dit_jax.files import asset

    shipped = asset("dit_cifar10.safetensors")
    model, params = vq.load_pretrained(shipped)
    export.write_pretrained(tmp_path / "m.safetensors", model, params, {})
    with safe_open(shipped, "numpy") as old, safe_open(tmp_path / "m.safetensors", "numpy") as new:
        assert set(old.keys()) == set(new.keys())
        for name in old.keys():
            a, b = old.get_tensor(name), new.get_tensor(name)
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def make_tar(file, members: dict[str, np.ndarray]) -> None:
    with tarfile.open(file, "w:xz") as archive:
        for name, pixels in members.items():
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, format="PNG")
            entry = tarfile.TarInfo(name)
            entry.size = png.tell()
            png.seek(0)
            archive.addfile(entry, png)
        link = tarfile.TarInfo("train/a/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)


def make_folder(folder, members: dict[str, np.ndarray]) -> None:
    for name, pixels in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)


PICTURES = {f"x/train/{'edcba'[i % 5]}/{i:02d}.png": image for i, image in enumerate(dataset(16).images)}
OTHERS = {"x/test/c/9.png": dataset(1).images[0]}


def test_a_tar_file_and_a_folder_give_the_training_images_by_class(tmp_path):
    make_tar(tmp_path / "d.tar.xz", {**OTHERS, **PICTURES})
    make_folder(tmp_path / "d", {**OTHERS, **PICTURES})
    make_folder(tmp_path / "flat", {name.removeprefix("x/train/"): image for name, image in PICTURES.items()})
    sets = [data.open_dataset(tmp_path / name, tmp_path / f"cache_{name}") for name in ("d.tar.xz", "d", "flat")]
    assert len({found.sha256 for found in sets}) == 1
    assert sets[0].classes == tuple("abcde")
    for name, image in PICTURES.items():
        same = [np.array_equal(image, row) for row in sets[0].images]
        assert sets[0].classes[sets[0].labels[same.index(True)]] == name.split("/")[2]
    before = (tmp_path / "cache_d.tar.xz/images.npy").stat().st_mtime_ns
    data.open_dataset(tmp_path / "d.tar.xz", tmp_path / "cache_d.tar.xz")
    assert (tmp_path / "cache_d.tar.xz/images.npy").stat().st_mtime_ns == before  # read from the cache


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    sizes = dict(hidden_size=32, depth=2, num_heads=2, patch_size=2, mlp_ratio=2.0)
    monkeypatch.setitem(train_reference.VARIANTS, "small", sizes)
    monkeypatch.setitem(export.PROTOCOL, "steps", 2)  # 50 are for a real model
    make_tar(tmp_path / "d.tar.xz", PICTURES)

    def run(*more: str, source="d.tar.xz") -> tuple[int, str]:
        arguments = [f"--data={tmp_path / source}", f"--workdir={tmp_path / 'w'}", *FLAGS, *more]
        code = train_reference.main(arguments)
        return code, capsys.readouterr().err

    return run


def test_the_command_writes_a_model_that_runs_as_the_averaged_weights(command, tmp_path):
    assert command() == (0, "")
    w = tmp_path / "w"
    names = {path.name for path in w.iterdir()}
    assert {"model.safetensors", "metrics.json", "samples.png", "train_log.jsonl", "config.json"} <= names
    model, params = vq.load_pretrained(w / "model.safetensors")
    state, _ = checkpoint.load_state(w / "checkpoints/step_0000120", training.init(RECIPE, params))
    narrow = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float16).astype(jnp.float32), tree)
    assert equal(params, narrow(training.finalize(model, state)))
    assert not equal(params, narrow({**state.params, "pos_embed": params["pos_embed"]}))
    assert json.loads((w / "metrics.json").read_text()) == {"step": 120}
    card = (w / "model_card.md").read_text()
    assert f"`python -m examples.train_reference --data={tmp_path}" in card and "| from | random weights |" in card
    assert "| classes | a, b, c, d, e, in this order |" in card

    (w / "model.safetensors").rename(tmp_path / "start.safetensors")
    log = (w / "train_log.jsonl").read_text()
    assert command("--evaluate-only") == (0, "")
    assert (w / "model.safetensors").read_bytes()[-1000:] == (tmp_path / "start.safetensors").read_bytes()[-1000:]
    assert (w / "train_log.jsonl").read_text() == log
    code, err = command("--learning-rate=0.1")
    assert code == 2 and "learning_rate (0.1 here, 0.003 there)" in err

    flags = train_reference.parser().parse_args(["--data=d", "--workdir=w", f"--init={tmp_path / 'start.safetensors'}"])
    assert equal(train_reference._first_weights(flags, model), params)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--batch=17"], "--batch=17"),
        (["--batch=7"], "multiple of the 2 devices"),
        (["--steps=0"], "--steps=0"),
        (["--learning-rate=-1"], "--learning-rate=-1"),
        (["--eval-images=100"], "--eval-images=0"),
        (["--evaluate-only"], "no checkpoint"),
        (["--data=/nowhere"], "/nowhere"),
        (["--variant=huge"], "--help"),
        (["--init=asset:dit_cifar10.safetensors"], "input_size=32"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(command, tmp_path, arguments, words):
    code, err = command(*arguments)
    assert code == 2 and err.count("\n") == 1 and words in err
    assert not (tmp_path / "w/model.safetensors").exists()


@pytest.mark.parametrize("content", [b"", b"no tar file", "cut"])
def test_a_damaged_tar_file_is_one_line(command, tmp_path, content):
    whole = (tmp_path / "d.tar.xz").read_bytes()
    (tmp_path / "bad.tar.xz").write_bytes(whole[: len(whole) // 2] if content == "cut" else content)
    code, err = command(source="bad.tar.xz")
    assert code == 2 and err.count("\n") == 1 and "bad.tar.xz" in err


def test_images_that_cannot_be_used_are_named(tmp_path):
    wide = np.zeros((4, 8, 3), np.uint8)
    for members, words in (
        ({"a/1.png": wide}, "8x4"),
        ({"a/1.png": wide[:, :4], "b/2.png": np.zeros((8, 8, 3), np.uint8)}, "b/2.png"),
        ({"1.png": wide}, "CLASS/x.jpg"),
    ):
        folder = tmp_path / words.replace("/", "_")
        make_folder(folder, members)
        with pytest.raises(InputError, match=words):
            data.open_dataset(folder, tmp_path / "cache")
    (tmp_path / "t/a").mkdir(parents=True)
    (tmp_path / "t/a/1.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match="a/1.jpg is not readable"):
        data.open_dataset(tmp_path / "t", tmp_path / "cache")
