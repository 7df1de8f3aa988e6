"""A run's folder: what may change between two starts, what may not, and what is said before work begins."""

import contextlib
import copy
import importlib.util
import json
import os
import types

import jax
import numpy as np
import pytest
from conftest import ROOT
from models import tiny

from vq4dit_jax import main as command
from vq4dit_jax.errors import InputError
from vq4dit_jax.methods import allocate
from vq4dit_jax.qarray.rules import abstract_quantized
from vq4dit_jax.qarray.tree import block_path, matrices, sizes
from vq4dit_jax.run import checks, programs, sources
from vq4dit_jax.run import config as configs
from vq4dit_jax.run.pipeline import Pipeline
from vq4dit_jax.run.workdir import READS, STAGES, Workdir

DIGESTS = {"model.checkpoint": "sha256 aaaa", "model.vae": "sha256 bbbb"}


def _config(**changes) -> dict:
    """A resolved config; keys of changes as `section__name`."""
    config = configs.as_json(configs.default())
    config["model"] |= {"checkpoint": "a.pt", "vae": "v"}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            config[section][name] = value
        else:
            config[section] = value
    return config


def _start(workdir: Workdir, config: dict | None = None, digests: dict = DIGESTS, done: tuple[str, ...] = ()) -> bool:
    """Claims the folder, finishes some stages, and says whether the run was finished."""
    with workdir.claim(config or _config(), lambda: digests) as finished:
        for stage in done:
            workdir.finish(stage, 1.0)
    return finished


@pytest.fixture
def workdir(tmp_path) -> Workdir:
    return Workdir(tmp_path / "w")


def _refused(workdir: Workdir, config: dict | None = None, digests: dict = DIGESTS) -> str:
    before = {p: p.read_bytes() for p in workdir.root.rglob("*") if p.is_file()}
    with pytest.raises(InputError) as caught:
        _start(workdir, config, digests)
    assert before == {p: p.read_bytes() for p in workdir.root.rglob("*") if p.is_file()}
    return str(caught.value)


def test_config_json_is_the_resolved_config_with_its_format_and_the_digests_of_its_files(workdir):
    _start(workdir)
    written = json.loads(workdir.config.read_text())
    assert {key: written[key] for key in _config()} == _config()
    assert (written["format"], written["sources"]) == (2, DIGESTS)


# What a killed run leaves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [(), (".lock",), (".lock", ".config.json.partial")])
def test_killed_inside_the_first_write_it_starts_anew(workdir, left):
    workdir.root.mkdir()
    for name in left:
        (workdir.root / name).write_text('{"se')
    assert not _start(workdir)
    assert json.loads(workdir.config.read_text())["format"] == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": "my-package"}', '{"model": 3}', '{"format": 2}'])
def test_a_config_json_that_is_damaged_or_anothers_is_one_line(workdir, text):
    workdir.root.mkdir()
    workdir.config.write_text(text)
    assert "config.json" in _refused(workdir)


@pytest.mark.parametrize("text", ["", "[]", '{"load": "x"}'])
def test_a_damaged_stages_json_is_one_line(workdir, text):
    _start(workdir)
    workdir.stages.write_text(text)
    assert "stages.json" in _refused(workdir)


# Versions --------------------------------------------------------------------------------------------------------


def _of_0_1_0(workdir: Workdir, *done: str) -> None:
    workdir.root.mkdir()
    old = _config()
    old["calibration"]["a_key_that_is_gone"] = 3
    workdir.config.write_text(json.dumps(old))
    workdir.stages.write_text(json.dumps(dict.fromkeys(done, 1.0)))


def test_an_unfinished_run_of_0_1_0_is_refused_and_a_finished_one_is_said_to_be_finished(workdir):
    _of_0_1_0(workdir, "load", "quantize")
    assert "was begun by vq4dit-jax 0.1.0" in _refused(workdir)
    workdir.stages.write_text(json.dumps(dict.fromkeys(STAGES, 1.0)))
    before = workdir.config.read_bytes()
    assert _start(workdir) and workdir.config.read_bytes() == before
    assert "calibration.steps" in _refused(workdir, _config(calibration__steps=77))


def test_a_run_of_a_newer_version_is_refused_by_its_name(workdir):
    _start(workdir)
    held = json.loads(workdir.config.read_text())
    workdir.config.write_text(json.dumps({**held, "format": 3, "version": "9.9"}))
    assert "vq4dit-jax 9.9 (format 3)" in _refused(workdir)


def test_a_key_that_is_younger_than_the_run_has_its_default(workdir):
    _start(workdir, done=("load", "quantize", "calibrate"))
    held = json.loads(workdir.config.read_text())
    del held["calibration"]["budget"], held["quantize"]["other_dtype"], held["beside"]
    workdir.config.write_text(json.dumps(held))
    assert "calibration.budget (3.0 here, 1.05 there)" in _refused(workdir, _config(calibration__budget=3.0))
    _start(workdir)


# Keys that may change --------------------------------------------------------------------------------------------


CHANGES = {
    "calibration__steps": (7, "calibrate"),
    "quantize__bits": (3.0, "quantize"),
    "sample__labels": ("1,2", "sample"),
    "evaluation__classifier": ("net", "evaluate"),
    "evaluation__class_names": (["a"], "sample"),
    "model__variant": ("DiT-S/2", "quantize"),
    "model__vae": ("other", "sample"),
    "seed": (1, "quantize"),
    "beside": (["x"], "evaluate"),
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_key_may_change_until_a_stage_that_reads_it_is_done(tmp_path, key):
    """For every number of finished stages: accepted and written down, or refused by the key and the stage, and unchanged."""
    value, reader = CHANGES[key]
    digests = {k: v for k, v in DIGESTS.items() if k != "model.vae"}
    for count in range(len(STAGES)):
        workdir, done = Workdir(tmp_path / str(count)), STAGES[:count]
        _start(workdir, digests=digests, done=done)
        changed = _config(**{key: value})
        if reader in done:
            message = _refused(workdir, changed, digests)
            assert key.replace("__", ".") in message and f"stage {reader} is done" in message
        else:
            _start(workdir, changed, digests)
            written = json.loads(workdir.config.read_text())
            assert {k: written[k] for k in changed} == changed
            assert "load" not in workdir.done() and set(workdir.done()) == set(done) - {"load"}


def test_samples_that_have_begun_keep_their_keys(workdir):
    """Shards and sets of another number of steps would be taken for this config's."""
    _start(workdir, done=("load", "quantize", "calibrate", "export"))
    shard = workdir.samples / ".fp-shards" / "000000.npy"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"")
    message = _refused(workdir, _config(sample__steps=7))
    assert "sample.steps (7 here, 50 there)" in message and f"remove {workdir.samples}" in message
    _start(workdir, _config(evaluation__reference="other"))


def test_every_key_of_a_config_is_read_by_some_stage():
    config = configs.as_json(configs.default())
    keys = [f"{section}.{name}" for section in config if isinstance(config[section], dict) for name in config[section]]
    every = READS["report"]
    assert all(any(key == name or key.startswith(f"{name}.") for name in every) for key in [*keys, "seed", "beside"])


# Files are known by their content --------------------------------------------------------------------------------


def test_the_same_file_at_another_path_is_no_other_config(workdir):
    _start(workdir, done=("load", "quantize"))
    _start(workdir, _config(model__checkpoint="./a.pt"))
    assert set(workdir.done()) == {"load", "quantize"}


def test_another_file_at_the_same_path_is_refused_once_it_was_used(workdir):
    other = {**DIGESTS, "model.checkpoint": "sha256 cccc"}
    _start(workdir, done=("load",))
    _start(workdir, digests=other)
    _start(workdir, done=("load", "quantize"), digests=other)
    assert "model.checkpoint (sha256 aaaa here, sha256 cccc there); stage quantize" in _refused(workdir)
    _start(workdir, digests={**other, "model.vae": "sha256 dddd"})


def test_a_file_that_is_gone_is_still_known(workdir):
    _start(workdir, done=("load", "quantize"))
    _start(workdir, digests={})
    assert json.loads(workdir.config.read_text())["sources"] == DIGESTS
    assert "model.checkpoint" in _refused(workdir, digests={"model.checkpoint": "sha256 cccc"})


def test_a_finished_run_needs_none_of_its_files(workdir):
    _start(workdir, done=STAGES)

    def gone():
        raise AssertionError("read")

    with workdir.claim(_config(), gone) as finished:
        assert finished
    assert _start(workdir, _config(model__checkpoint="./a.pt"))
    assert "model.checkpoint" in _refused(
        workdir, _config(model__checkpoint="b.pt"), {"model.checkpoint": "sha256 cccc"}
    )


def test_a_finished_run_in_a_folder_that_may_only_be_read(workdir):
    _start(workdir, done=STAGES)
    workdir.root.chmod(0o555)
    (workdir.root / ".lock").unlink() if os.geteuid() == 0 else None
    before = sorted(os.listdir(workdir.root))
    assert _start(workdir) and sorted(os.listdir(workdir.root)) == before
    workdir.root.chmod(0o755)


def test_two_runs_at_once_are_refused_and_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with Workdir("~/w").claim(_config(), lambda: DIGESTS):
        assert (tmp_path / "w" / "config.json").exists()
        with pytest.raises(InputError, match="in use"), Workdir(tmp_path / "w").claim(_config(), lambda: DIGESTS):
            pass


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"model__checkpoint": "./a.pt"}, True),
        ({"calibration__steps": 7, "quantize__bits": 3.0}, True),
        ({"seed": 1}, False),
        ({"sample__cfg_scale": 3.0}, False),
        ({"model__num_heads": 3}, False),
        ({"model.checkpoint": "sha256 cccc"}, False),
        ({"model.vae": "sha256 cccc"}, False),
    ],
)
def test_samples_are_borrowed_from_the_same_files_seed_and_sampling_alone(workdir, change, same):
    _start(workdir)
    digests = DIGESTS | {key: value for key, value in change.items() if "." in key}
    config = _config(**{key: value for key, value in change.items() if "." not in key})
    assert sources.same_samples(workdir, config, digests) is same


def test_a_run_beside_that_says_nothing_of_its_files_lends_nothing(tmp_path):
    old = Workdir(tmp_path / "old")
    _of_0_1_0(old, *STAGES)
    assert not sources.same_samples(old, _config(), DIGESTS)
    sources.check_beside(old, DIGESTS)
    _start(other := Workdir(tmp_path / "other"), digests={"model.checkpoint": "sha256 cccc"})
    with pytest.raises(InputError, match="another model"):
        sources.check_beside(other, DIGESTS)


@pytest.mark.parametrize("same", [True, False])
def test_a_run_takes_samples_of_the_same_checkpoint_alone_and_refuses_another_in_the_load_stage(tmp_path, same):
    """Another file at the same path, as a run beside has it: in the stages themselves, and not in what they ask."""

    def pipeline(name: str, beside: tuple[str, ...] = ()) -> Pipeline:
        config = configs.cifar10()
        config.evaluation.classifier = config.evaluation.reference = ""
        config.beside = beside
        return Pipeline(config, Workdir(tmp_path / name), "")

    theirs = pipeline("theirs")
    changed = {} if same else {"model.checkpoint": "sha256 of what stood there"}
    with theirs.dir.claim(theirs.resolved, lambda: {**theirs.digests, **changed}):
        theirs.dir.samples.mkdir()
        np.savez(theirs.dir.samples / "fp.npz", np.zeros(1, np.uint8))
    ours = pipeline("ours", (str(theirs.dir.root),))
    with ours.dir.claim(ours.resolved, lambda: ours.digests):
        ours.dir.samples.mkdir()
        assert ours._borrow(ours.config.sample.steps) is same
        assert (ours.dir.samples / "fp.npz").exists() is same
        with contextlib.nullcontext() if same else pytest.raises(InputError, match="another model"):
            ours.load()


# Before work -----------------------------------------------------------------------------------------------------


def _model_config(**changes):
    config = configs.cifar10()
    config.calibration.allocation = "given"
    for key, value in changes.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    return config


@pytest.mark.parametrize("labels", ["abc", "3,5", "-1", "", "99999999999"])
def test_labels_are_held_against_the_classes_of_the_model(labels):
    model, params = tiny()
    checks.check(_model_config(sample__labels="4,0"), model, params)
    with pytest.raises(InputError, match=f"--config.sample.labels={labels}"):
        checks.check(_model_config(sample__labels=labels), model, params)


@pytest.mark.parametrize("activations", ["bfloat16", "int8", "e4m3"])
def test_activations_without_a_form_are_refused_in_the_load_stage(activations):
    """Kernels want multiples of 64 rows; the tiny model's projections have 32. Nothing is refused that has a form."""
    narrow, wide = tiny(), tiny(hidden_size=64)
    config = _model_config(sample__activations=activations)
    checks.check(config, *wide)
    with pytest.raises(InputError, match=f"sample.activations={activations}.*no form"):
        checks.check(config, *narrow)
    with pytest.raises(InputError, match="sample.activations"):
        kept = ((r"blocks/\d+/mlp/fc1/kernel", (256, 4)), (".*", ()))
        checks.check(_model_config(sample__activations=activations, quantize__rules=kept), *wide)
    linears = r"blocks/\d+/(attn/(qkv|proj)|mlp/fc[12]|adaLN_modulation/1)/kernel"
    mixed = ((r"blocks/0/mlp/fc1/kernel", (64, 2)), (linears, (256, 4)), (".*", ()))
    checks.check(_model_config(sample__activations=activations, quantize__rules=mixed), *wide)


@pytest.mark.parametrize("allocation", ["layers", "roles"])
def test_the_least_budget_is_named_and_is_the_least(allocation):
    """What the message names is accepted, and a thousandth less is not; `spread` itself says the same."""
    model, params = tiny(hidden_size=64)
    config = lambda budget: _model_config(calibration__allocation=allocation, calibration__budget=budget)
    with pytest.raises(InputError, match="calibration.budget=0.1:") as caught:
        checks.check(config(0.1), model, params)
    wanted = float(str(caught.value).split("wanted ")[1].split()[0])
    checks.check(config(wanted), model, params)
    with pytest.raises(InputError):
        checks.check(config(wanted - 0.001), model, params)
    shapes = abstract_quantized(params, configs.rules(config(1.0)), None, config(1.0).quantize.codebook_dtype)
    packed = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
    layers = [
        allocate.Layer(block_path(path, block), *leaf.matrix, leaf.spec(), 1.0)
        for path, block, leaf in matrices(packed)
    ]
    codes = 8 * sizes(packed).assignment_bytes
    allocate.spread(layers, int(wanted * codes), together=allocation == "roles")
    with pytest.raises(InputError):
        allocate.spread(layers, int((wanted - 0.001) * codes), together=allocation == "roles")


def test_a_vae_of_other_channels_is_refused_before_work(monkeypatch):
    import convert.vae

    monkeypatch.setattr(convert.vae, "load_vae", lambda path: (types.SimpleNamespace(latent_channels=16), {}))
    with pytest.raises(InputError, match="16 channels, and the model samples 4"):
        sources.open_decoder("flux", 4)


def test_gray_pixels_need_no_vae():
    decode, name = sources.open_decoder("", 1)
    gray = np.linspace(-1, 1, 8, dtype=np.float32).reshape(1, 2, 4, 1)
    np.testing.assert_array_equal(decode(gray), np.concatenate([gray] * 3, axis=-1))
    assert "pixels" in name


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("calibration.tuned", "final_layer/(", "calibration.tuned"),
        ("quantize.rules", (("blocks/(", (256, 4)),), "quantize.rules"),
        ("quantize.rules", ((".*", (256, 0)),), "quantize.rules"),
        ("quantize.rules", ((".*", ("256", 4)),), "quantize.rules"),
        ("quantize.rules", ((".*", (256,)),), "quantize.rules"),
        ("quantize.rules", (".*",), "quantize.rules"),
        ("seed", -1, "seed=-1"),
        ("seed", 2**32, "seed=4294967296"),
        ("sample.cfg_scale", float("nan"), "sample.cfg_scale=nan"),
        ("calibration.cfg_scale", float("inf"), "calibration.cfg_scale=inf"),
    ],
)
def test_values_that_no_stage_can_use_are_refused_by_their_key(key, value, words):
    config = configs.cifar10()
    section, _, name = key.rpartition(".")
    (config[section] if section else config)[name] = value
    with pytest.raises(InputError) as caught:
        configs.validate(config)
    assert words in str(caught.value)


@pytest.mark.parametrize("file", sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").rglob("*.py")))
def test_the_shipped_configs_are_valid(file):
    config = programs.load(file)["get_config"]()
    configs.validate(config)
    assert config.is_locked


# Config files ----------------------------------------------------------------------------------------------------


def test_the_config_json_of_a_run_is_a_config(tmp_path):
    """So is that of a run of 0.1.0, which has neither format nor sources."""
    config = configs.cifar10()
    config.quantize.rules = ((".*/kernel", (256, 4)), (".*", ()))
    config.sample.more_steps = (10, 20)
    values = configs.as_json(config)
    for number, extra in enumerate(
        ({}, {"format": 2, "version": "0.2.0", "sources": {"model.checkpoint": "sha256 a"}})
    ):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps({**extra, **values}))
        loaded = programs.load(str(file))["get_config"]()
        assert loaded.is_locked and loaded.to_dict() == config.to_dict()


def test_a_shorter_config_json_has_defaults_and_a_longer_one_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"sample": {"steps": 7}}')
    config = programs.load(str(tmp_path / "a.json"))["get_config"]()
    assert config.sample.steps == 7 and config.quantize.bits == 2
    for text, words in (('{"sample": {"stepz": 7}}', "sample.stepz"), ('{"sample": {"steps": "x"}}', "sample.steps")):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(InputError, match=words):
            programs.load(str(tmp_path / "a.json"))["get_config"]()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: DiT\nsteps: 3\n", "a.py"),
        ("def get_config(:\n", "line 1"),
        ("x = 1\nx.y\ndef get_config(): pass\n", "line 2: AttributeError"),
        ("def get_config():\n  return 1 / 0\n", "line 2: ZeroDivisionError"),
        ("\x00", "a.py"),
        ("x = 3\n", "get_config"),
        ("import no_such_module\n", "no_such_module"),
        (
            "from vq4dit_jax.calibration.recipe import CANDIDATES\n",
            "calibration.recipe.CANDIDATES is now vq4dit_jax.methods.vq4dit.CANDIDATES",
        ),
        ("import vq4dit_jax.quantization as q\n", "vq4dit_jax.quantization is now vq4dit_jax.qarray"),
        ("from vq4dit_jax import calibration\n", "vq4dit_jax.calibration is now vq4dit_jax.methods"),
    ],
)
def test_a_config_that_is_no_program_is_one_line(tmp_path, capsys, text, words):
    (tmp_path / "a.py").write_text(text)
    assert command.main([f"--config={tmp_path / 'a.py'}", f"--workdir={tmp_path / 'w'}"]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not (tmp_path / "w").exists()


def test_a_config_of_0_1_0_goes_on_working(tmp_path):
    lines = ("from vq4dit_jax.config import cifar10", "def get_config():", "    c = cifar10()", "    c.sample.steps = 7",
             "    return c.lock()")  # fmt: skip
    (tmp_path / "a.py").write_text("\n".join(lines))
    assert programs.load(str(tmp_path / "a.py"))["get_config"]().sample.steps == 7


def test_what_has_moved_is_where_the_table_says():
    for old, new in programs.MOVED.items():
        assert importlib.util.find_spec(new) is not None, old
        parent = old.rpartition(".")[0]
        assert importlib.util.find_spec(parent) is None or importlib.util.find_spec(old) is None
    for name, home in programs.NAMES.items():
        assert hasattr(importlib.import_module(home), name)


def test_the_config_that_is_copied_is_not_the_one_that_is_kept(workdir):
    """`claim` writes what it is given and keeps no reference."""
    config = _config()
    given = copy.deepcopy(config)
    _start(workdir, config)
    assert config == given
