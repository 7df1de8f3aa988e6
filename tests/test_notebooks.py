"""The notebooks run from top to bottom, in a kernel of their own, without a network."""

import os
import pathlib
import re

import pytest
from conftest import environment

pytestmark = pytest.mark.once

pytest.importorskip("nbclient", reason="needs nbclient and ipykernel, of the extra `test`")
nbformat = pytest.importorskip("nbformat")

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"


def _read(name: str):
    return nbformat.read(FOLDER / name, as_version=4)


def _text(cell) -> str:
    return "".join(out.get("text", "") for out in cell.outputs if out.output_type == "stream" and out.name == "stdout")


def _images(notebook) -> int:
    return sum("image/png" in out.get("data", {}) for c in notebook.cells if c.cell_type == "code" for out in c.outputs)


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Runs a notebook as a user would, in an empty folder, but for its sizes, the compiler's flags and this tree's library.

    Its models are not tiny: programs that LLVM has gone over once are worth their compilation, a quarter of the time is saved.
    """
    from nbclient import NotebookClient

    for name in ("JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION"):
        monkeypatch.delenv(name, raising=False)
    flags = re.sub(r"(--xla_backend_optimization_level)=\d", r"\1=1", environment(1)["XLA_FLAGS"])
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("VQ4DIT_NOTEBOOK_SMALL", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # Nothing is read from or left in the user's settings.
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    working = tmp_path / "working"
    working.mkdir()

    def run(name: str):
        notebook = _read(name)
        client = NotebookClient(
            notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(working)}}
        )
        client.execute()
        return notebook, working

    return run


# Of zmq's and jupyter_client's event loops, in the process that drives the kernel.
@pytest.mark.filterwarnings("default")
def test_quickstart_runs(execute):
    notebook, working = execute("quickstart.ipynb")
    out = "\n".join(_text(cell) for cell in notebook.cells if cell.cell_type == "code")
    assert re.search(r"2\.1\d bits for each of [\d,]+ quantized weights", out)
    assert "the same as ours: True" in out and "The same pictures: True" in out
    assert _images(notebook) == 1
    assert {p.name for p in (working / "vq4dit_quickstart").iterdir()} == {
        "comparison.png", "mine", "model.safetensors", "quantized",
    }  # fmt: skip


@pytest.mark.filterwarnings("default")
def test_xl2_runs_small_and_without_a_network(execute):
    notebook, working = execute("xl2_256.ipynb")
    assert _images(notebook) == 1
    from PIL import Image

    with Image.open(working / "vq4dit_xl2_256" / "comparison.png") as picture:
        assert picture.width > 2 * 64 and picture.height > 3 * 64
    assert (working / "vq4dit_xl2_256" / "calibration" / "00_tune_steps" / "step_000003").is_dir()


def test_notebooks_are_small_and_name_no_path_of_a_machine():
    found = sorted(p.name for p in FOLDER.glob("*.ipynb"))
    assert found == ["quickstart.ipynb", "xl2_256.ipynb"]
    for name in found:
        assert (FOLDER / name).stat().st_size < 1_000_000
        text = (FOLDER / name).read_text(encoding="utf-8")
        assert not re.search(r"/(work|root|home)/", text), name


def test_links_in_notebooks_and_their_page_lead_somewhere():
    for file in (*FOLDER.glob("*.ipynb"), ROOT / "docs" / "your_own_model.md"):
        text = file.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if "://" not in target and re.fullmatch(r"[\w./-]+\.(md|ipynb)", target):
                assert (file.parent / target).exists(), (file.name, target)
                assert os.path.relpath(file.parent / target, ROOT)[:2] != ".."
