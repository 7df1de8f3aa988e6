"""Files that are replaced: nothing is lost to a kill, a full disk, or a target that is somebody else's."""

import errno
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from vq4dit_jax import command_line, files
from vq4dit_jax.errors import InputError
from vq4dit_jax.storage import checkpoint

_CALLS = ("rename", "replace", "rmdir", "unlink", "mkdir", "fsync")
_KILLED = """
import os, pathlib, sys
from vq4dit_jax import files

files.is_checkpoint = lambda folder: True

def dying(call):
    def wrapped(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os._exit(9)
        return call(*args, **kwargs)
    return wrapped

for name in {calls}:
    setattr(os, name, dying(getattr(os, name)))

def write(target):
    with files.atomic_path(target, "folder") as partial:
        partial.mkdir()
        (partial / "a").write_text("new")
        (partial / "b").write_text("new")

for number in range(1, 60):
    left = -1
    target = pathlib.Path(sys.argv[1], str(number), "folder")
    target.mkdir(parents=True)
    for name in "ab":
        (target / name).write_text("old")
    if (child := os.fork()) == 0:
        left = number
        write(target)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
print(number)
""".replace("{calls}", repr(_CALLS))


def _content(folder: pathlib.Path) -> list[str]:
    return [(folder / name).read_text() for name in ("a", "b")]


def test_a_folder_is_the_old_one_or_the_new_one_wherever_its_writer_dies(tmp_path):
    """A process ends at its n-th call that changes the disk, for every n until it lives; the reader finds one whole folder."""
    done = subprocess.run([sys.executable, "-c", _KILLED, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen, count = [], int(done.stdout)
    for number in range(1, count + 1):
        target = tmp_path / str(number) / "folder"
        files.recover(target)
        assert _content(target) in (["old"] * 2, ["new"] * 2), number
        seen.append(_content(target)[0])
    assert 10 < count < 59 and seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"}
    assert os.listdir(target.parent) == ["folder"]


def test_a_kill_between_the_two_renames_is_undone_by_the_reader_and_by_the_writer(tmp_path):
    folder, ours = tmp_path / "q", {"format": files.STATE_FORMAT}
    tree = {"a": np.arange(3.0)}
    checkpoint.save_tree(folder, tree, {**ours, "number": 1})
    os.rename(folder, tmp_path / ".q.replaced")
    assert checkpoint.load_tree(folder)[1]["number"] == 1
    os.rename(folder, tmp_path / ".q.replaced")
    checkpoint.save_tree(folder, tree, {**ours, "number": 2})
    assert checkpoint.load_tree(folder)[1]["number"] == 2 and os.listdir(tmp_path) == ["q"]


def test_a_reader_that_restores_while_a_writer_replaces_does_not_stop_it(tmp_path, monkeypatch):
    target, rename = tmp_path / "q", os.rename
    target.mkdir()
    (target / "a").write_text("old")
    monkeypatch.setattr(files, "is_checkpoint", lambda folder: True)

    def hurried(source, to):
        rename(source, to)
        if str(to).endswith(".replaced") and not restored:
            restored.append(rename(to, source))

    restored = []
    monkeypatch.setattr(os, "rename", hurried)
    with files.atomic_path(target, "folder") as partial:
        partial.mkdir()
        (partial / "a").write_text("new")
    assert restored and (target / "a").read_text() == "new" and os.listdir(tmp_path) == ["q"]


def test_contents_are_on_the_disk_before_the_rename_and_the_name_after_it(tmp_path, monkeypatch):
    events, fsync, replace, rename = [], os.fsync, os.replace, os.rename

    def traced(handle):
        events.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", traced)
    for name, call in (("replace", replace), ("rename", rename)):
        monkeypatch.setattr(os, name, lambda *a, call=call: (events.append("RENAME"), call(*a)))
    files.write_text(tmp_path / "a", "text")
    assert events == [str(tmp_path / ".a.partial"), str(tmp_path), "RENAME", str(tmp_path)]
    events.clear()
    with files.atomic_path(tmp_path / "f", "folder") as partial:
        (partial / "deep").mkdir(parents=True)
        (partial / "deep" / "file").write_text("x")
    before, after = events[: events.index("RENAME")], events[events.index("RENAME") + 1 :]
    assert {str(partial / "deep" / "file"), str(partial / "deep"), str(partial)} <= set(before)
    assert after == [str(tmp_path)]


def test_saving_never_deletes_somebodys_files(tmp_path):
    """A folder with anything in it that is no checkpoint of ours is refused, and so is one with a checkpoint and a note."""
    tree = {"a": np.ones(2, np.float32)}
    thesis = tmp_path / "ckpts"
    thesis.mkdir()
    (thesis / "thesis.tex").write_text("years of work")
    ours = tmp_path / "ours"
    checkpoint.save_quantized(ours, {"name": "net"}, tree)
    checkpoint.save_quantized(ours, {"name": "net"}, tree)  # ours may be replaced
    (ours / "notes.txt").write_text("what I found")
    foreign = tmp_path / "foreign"
    from orbax.checkpoint import v1 as ocp

    ocp.save(foreign, tree, custom_metadata={"format": "somebody else's"})
    for folder, kept in ((thesis, "thesis.tex"), (ours, "notes.txt"), (foreign, "commit_success.txt")):
        with pytest.raises(InputError, match=str(folder)):
            files.check_target(folder, "folder")
        with pytest.raises(InputError, match="no checkpoint of ours"):
            checkpoint.save_quantized(folder, {"name": "net"}, tree)
        assert (folder / kept).exists()
    (tmp_path / "empty").mkdir()
    checkpoint.save_quantized(tmp_path / "empty", {"name": "net"}, tree)
    checkpoint.save_state(tmp_path / "empty", tree, {"step": 1})
    checkpoint.save_state(tmp_path / "empty", tree, {"step": 2})
    assert checkpoint.load_metadata(tmp_path / "empty")["step"] == 2


def test_a_checkpoint_of_0_1_0_may_be_replaced(tmp_path):
    from orbax.checkpoint import v1 as ocp

    ocp.save(tmp_path / "step", {"a": np.ones(2)}, custom_metadata={"step": 3, "recipe": {}})
    checkpoint.save_state(tmp_path / "step", {"a": np.zeros(2)}, {"step": 4})
    assert checkpoint.load_metadata(tmp_path / "step")["step"] == 4


def test_targets_of_the_wrong_kind_are_refused_in_one_line(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    for name, kind, words in (
        ("folder", "file", "is a folder"), ("pipe", "file", "no regular file"), ("file", "folder", "is a file"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words), files.atomic_path(tmp_path / name, kind) as partial:
            partial.write_text("x")
    assert (tmp_path / "file").read_text() == "mine" and sorted(os.listdir(tmp_path)) == ["file", "folder", "pipe"]


def test_a_symbolic_link_stays_and_what_it_points_to_is_written(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "file")
    files.write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "far" / "file").read_text() == "text"


def test_room_is_checked_where_the_system_cannot_allocate(tmp_path, monkeypatch):
    """macOS has no posix_fallocate; some file systems refuse it."""
    refuse = lambda *args: (_ for _ in ()).throw(OSError(errno.EOPNOTSUPP, "not supported"))
    missing = lambda: monkeypatch.delattr(os, "posix_fallocate")
    refused = lambda: monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    for change in (missing, refused):
        change()
        files.reserve(tmp_path / "a", 10)
        with pytest.raises(OSError) as caught:
            files.reserve(tmp_path / "a", 1 << 60)
        assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_a_lock_is_held_by_one_and_goes_on_with_a_warning_where_there_are_none(tmp_path, monkeypatch, caplog):
    with files.exclusive(tmp_path / ".lock", "busy"), pytest.raises(InputError, match="busy"):
        with files.exclusive(tmp_path / ".lock", "busy"):
            pass
    import fcntl

    def lustre(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", lustre)
    ran = []
    with files.exclusive(tmp_path / ".lock", "busy"):
        ran.append(True)
    assert ran and "has no locks" in caplog.text


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": NaN}', "[" * 100_000, "\xff"])
def test_json_that_is_not_ours_is_one_line(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"a\.json"):
        files.read_json(tmp_path / "a.json")


def test_json_is_read_from_regular_files_alone(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # reading one waits for ever
    for name in ("pipe", "nothing"):
        with pytest.raises(InputError, match=name):
            files.read_json(tmp_path / name)
    files.write_json(tmp_path / "a.json", {"a": [1, None]})
    assert files.read_json(tmp_path / "a.json") == {"a": [1, None]}


# What the commands print ------------------------------------------------------------------------------------------


def _fails(error: BaseException):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    "number", [errno.EROFS, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES, errno.ENOENT]
)
def test_what_the_file_system_says_of_a_path_is_one_line(capsys, number):
    assert command_line.exit_code(_fails(OSError(number, os.strerror(number), "/data/x"))) == 2
    err = capsys.readouterr().err
    assert "/data/x" in err and err.count("\n") == 1


def test_an_oserror_without_a_path_stays_a_traceback():
    with pytest.raises(OSError, match="socket"):
        command_line.exit_code(_fails(OSError(errno.ECONNRESET, "socket")))


def test_a_message_is_printable_and_of_bounded_length(capsys):
    assert command_line.exit_code(_fails(InputError("\x1b[31m" + "x" * 100_000 + " remedy"))) == 2
    err = capsys.readouterr().err
    assert "\x1b" not in err and len(err) < 1500 and err.endswith("remedy\n")


def test_sigterm_is_one_line_and_143():
    program = "import os, signal, sys, time; from vq4dit_jax.command_line import exit_code\n" \
        "def work():\n  os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\nsys.exit(exit_code(work))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 143 and done.stderr.count("\n") == 1 and "same command" in done.stderr
