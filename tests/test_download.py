"""Official checkpoints and VAEs: downloads survive broken connections, and nothing wrong is ever taken for one."""

import hashlib
import http.server
import io
import json
import subprocess
import sys
import threading
import urllib.request

import numpy as np
import pytest
from safetensors.numpy import save

from convert import download
from convert.download import (
    BASE_URL,
    HUB_URL,
    OFFICIAL_CHECKPOINTS,
    OFFICIAL_EVALUATION,
    OFFICIAL_VAES,
    official,
    official_checkpoint,
    official_evaluation,
    official_vae,
)
from vq4dit_jax.errors import InputError

NAME = "DiT-XL-2-256x256.pt"
VAE = "sd-vae-ft-ema"
WEIGHTS = "diffusion_pytorch_model.safetensors"


class Server:
    """A file server with ranges, and the ways in which one can misbehave."""

    def __init__(self, content: bytes, paths: dict[str, bytes] | None = None):
        self.content = content
        self.paths = paths or {}  # with contents of their own
        self.moved = False  # every path to the same one under /cdn, as the Hugging Face hub does
        self.elsewhere = None  # the server of /cdn, if it is another one
        self.etag = '"1"'
        self.cuts = []  # bytes after which the next connections break
        self.ranges = True
        self.status = 200
        self.requests = []  # the Range header of each
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *args):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, handler) -> None:
        asked = handler.headers.get("Range")
        if self.moved and not handler.path.startswith("/cdn/"):
            handler.send_response(302)
            handler.send_header("Location", f"{self.elsewhere or self.url}/cdn{handler.path}")
            handler.send_header("Content-Length", "0")
            return handler.end_headers()
        self.requests.append(asked)
        content = self.paths.get(handler.path.removeprefix("/cdn"), self.content)
        total = len(content)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if not self.ranges or handler.headers.get("If-Range", self.etag) != self.etag:
            start = 0
        if self.status != 200:
            return handler.send_error(self.status)
        if start >= total:
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{total}")
            handler.send_header("Content-Length", "0")
            return handler.end_headers()
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        handler.send_header("Content-Length", str(total - start))
        handler.send_header("ETag", self.etag)
        handler.end_headers()
        handler.wfile.write(content[start:][: self.cuts.pop(0) if self.cuts else None])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="the official checkpoints are PyTorch files")


@pytest.fixture
def content(tmp_path, torch) -> bytes:
    torch.manual_seed(0)
    torch.save({"blocks.0.weight": torch.randn(300, 1000)}, tmp_path / "whole.pt")
    return (tmp_path / "whole.pt").read_bytes()


@pytest.fixture
def server(content):
    server = Server(content)
    yield server
    server.close()


@pytest.fixture
def get(server, tmp_path):
    return lambda **options: official_checkpoint(NAME, tmp_path / "cache", base_url=server.url, pause=0.0, **options)


def left_in(folder) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_download_is_kept_and_its_checksum_recorded(get, server, content, tmp_path, capsys):
    path = get()
    digest = hashlib.sha256(content).hexdigest()
    assert path == tmp_path / "cache" / NAME and path.read_bytes() == content
    assert left_in(path.parent) == {NAME, f"{NAME}.sha256"}
    assert (path.parent / f"{NAME}.sha256").read_text() == f"{digest}  {NAME}\n"  # as `sha256sum -c` reads it
    assert digest in capsys.readouterr().out
    assert get() == path
    assert server.requests == [None]


def test_broken_connections_are_resumed(get, server, content):
    server.cuts = [100_000, 1, 500_000]
    assert get().read_bytes() == content
    assert server.requests == [None, "bytes=100000-", "bytes=100001-", "bytes=600001-"]


def test_a_killed_download_is_resumed_by_the_next_run(get, server, content, tmp_path):
    server.cuts = [100_000] + [0] * 10
    with pytest.raises(InputError, match="cannot download.*100,000 bytes that came are kept"):
        get()
    assert left_in(tmp_path / "cache") == {f"{NAME}.partial", f"{NAME}.partial.etag"}
    server.cuts, server.requests = [], []
    assert get().read_bytes() == content
    assert server.requests == ["bytes=100000-"]
    assert left_in(tmp_path / "cache") == {NAME, f"{NAME}.sha256"}


def test_a_complete_partial_file_is_finished(get, server, content, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{NAME}.partial").write_bytes(content)
    assert get().read_bytes() == content


def test_a_partial_file_of_another_file_is_not_continued(get, server, content, tmp_path):
    server.cuts = [100_000] + [0] * 10
    with pytest.raises(InputError):
        get()
    server.cuts, server.etag = [], '"2"'
    assert get().read_bytes() == content

    (tmp_path / "cache" / NAME).unlink()
    (tmp_path / "cache" / f"{NAME}.partial").write_bytes(content + b"more than there is")
    assert get().read_bytes() == content


def test_a_server_without_ranges(get, server, content):
    server.ranges, server.cuts = False, [100_000]
    assert get().read_bytes() == content


def test_what_is_no_checkpoint_is_not_kept(get, server, tmp_path):
    server.content = b"<html>Please log in to the hotel's network</html>"
    with pytest.raises(InputError, match="not a whole PyTorch checkpoint"):
        get()
    assert left_in(tmp_path / "cache") <= {f"{NAME}.partial.etag"}


def test_no_network_says_which_file_to_put_where(tmp_path, torch):
    """tests/conftest.py pulls the cable."""
    with pytest.raises(InputError) as caught:
        official_checkpoint(NAME, tmp_path / "cache", pause=0.0)
    message = str(caught.value)
    assert f"{BASE_URL}/{NAME}" in message and f"into {tmp_path / 'cache'} as {NAME}" in message
    assert "\n" not in message
    assert left_in(tmp_path / "cache") == set()


def test_a_file_that_is_not_there_is_not_asked_for_again(get, server):
    server.status = 404
    with pytest.raises(InputError, match="404"):
        get()
    assert len(server.requests) == 1


def test_a_file_put_there_by_hand_is_used_and_watched(get, server, content, tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / NAME).write_bytes(content)
    monkeypatch.setenv("VQ4DIT_CACHE", str(tmp_path / "cache"))
    path = official_checkpoint(NAME)
    assert path == tmp_path / "cache" / NAME and (path.parent / f"{NAME}.sha256").is_file()
    path.write_bytes(content[:-1] + b"?")
    with pytest.raises(InputError, match="recorded at its first use"):
        get()
    assert not server.requests and path.is_file()


def test_a_known_checksum_is_compared(get, monkeypatch, tmp_path):
    monkeypatch.setitem(OFFICIAL_CHECKPOINTS, NAME, "0" * 64)
    with pytest.raises(InputError, match="SHA-256.*0000"):
        get()
    assert NAME not in left_in(tmp_path / "cache")


def test_plain_http_without_a_checksum_is_refused(tmp_path, torch, monkeypatch):
    """Anybody on the way could send other weights. Nothing is asked of such an address, and nothing is written."""
    asked = []
    monkeypatch.setattr(download, "_download", lambda opener, url, *rest: asked.append(url))
    for base in (
        "http://mirror.example.org",
        "HTTP://mirror.example.org",
        "ftp://mirror.example.org",
        "http://127.0.0.1.example.org",
    ):
        for fetch in (
            lambda: official_checkpoint(NAME, tmp_path / "cache", base_url=base),
            lambda: official_vae(VAE, tmp_path / "cache", base_url=base),
            lambda: official_evaluation("imagenet256", tmp_path / "cache", base_url=base),
        ):
            with pytest.raises(InputError, match="no checksum of the file is known; use an https://") as caught:
                fetch()
            assert "\n" not in str(caught.value)
    assert not asked and not (tmp_path / "cache").exists()


def test_plain_http_with_a_checksum_is_checked_by_it(tmp_path, torch, monkeypatch):
    monkeypatch.setitem(OFFICIAL_CHECKPOINTS, NAME, "0" * 64)
    with pytest.raises(
        InputError, match="cannot download http://mirror.example.org"
    ):  # it was tried: there is no network
        official_checkpoint(NAME, tmp_path / "cache", base_url="http://mirror.example.org", pause=0.0)


def test_a_redirect_from_https_to_plain_http_is_not_followed():
    """As a mirror's server may answer: urllib itself would go there without a word."""
    guarded = download._GuardedRedirects()
    request = urllib.request.Request("https://example.org/weights.pt")
    for location in ("http://example.org/weights.pt", "ftp://example.org/weights.pt"):
        with pytest.raises(InputError, match=location):
            guarded.redirect_request(request, None, 302, "Found", {}, location)
    assert guarded.redirect_request(request, None, 302, "Found", {}, "https://cdn.example.org/w").full_url.endswith(
        "/w"
    )


def test_a_redirect_that_is_not_followed_is_said(hub, tmp_path):
    hub.elsewhere = "http://mirror.example.org"
    with pytest.raises(InputError, match="http://mirror.example.org/.*no checksum"):
        official_vae(VAE, tmp_path / "cache", base_url=hub.url, pause=0.0)
    assert left_in(tmp_path / "cache" / VAE) == set()


def test_a_full_disk_is_said_before_the_download(get, monkeypatch, server):
    usage = download.shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="room for 1,000"):
        get()


def test_two_processes_do_not_write_the_same_file(get, tmp_path):
    (tmp_path / "cache").mkdir()
    with download._exclusive(tmp_path / "cache" / f"{NAME}.partial"):
        with pytest.raises(InputError, match="another process"):
            get()


def test_unknown_names():
    with pytest.raises(InputError, match="no official checkpoint 'DiT-XL-2.pt'.*DiT-XL-2-256x256.pt"):
        official_checkpoint("DiT-XL-2.pt")


# ---- VAEs: a folder of files, none of which is PyTorch's


@pytest.fixture
def vae_files() -> dict[str, bytes]:
    tensors = {"decoder.conv_in.weight": np.random.default_rng(0).standard_normal((100, 100, 3, 3), np.float32)}
    return {"config.json": json.dumps({"_class_name": "AutoencoderKL"}).encode(), WEIGHTS: save(tensors)}


@pytest.fixture
def hub(vae_files):
    commit, _ = OFFICIAL_VAES[VAE]
    server = Server(b"", {f"/{commit}/{name}": content for name, content in vae_files.items()})
    server.moved = True
    yield server
    server.close()


@pytest.fixture
def get_vae(hub, tmp_path):
    return lambda: official_vae(VAE, tmp_path / "cache", base_url=hub.url, pause=0.0)


def test_a_vae_is_a_folder_of_checked_files(get_vae, hub, vae_files, tmp_path, capsys):
    folder = get_vae()
    assert folder == tmp_path / "cache" / VAE
    assert left_in(folder) == {name + end for name in vae_files for end in ("", ".sha256")}
    said = capsys.readouterr().out
    for name, content in vae_files.items():
        assert (folder / name).read_bytes() == content
        assert hashlib.sha256(content).hexdigest() in said
    assert len(hub.requests) == 2
    assert get_vae() == folder and len(hub.requests) == 2
    (folder / WEIGHTS).write_bytes(vae_files[WEIGHTS] + b"?")
    with pytest.raises(InputError, match="recorded at its first use"):
        get_vae()


def test_a_broken_vae_download_is_resumed_at_the_file_that_broke(get_vae, hub, vae_files, tmp_path):
    hub.cuts = [None, 100_000] + [0] * 10
    with pytest.raises(InputError, match="100,000 bytes that came are kept"):
        get_vae()
    hub.cuts, hub.requests = [], []
    assert (get_vae() / WEIGHTS).read_bytes() == vae_files[WEIGHTS]
    assert hub.requests == ["bytes=100000-"]


@pytest.mark.parametrize(("name", "reason"), [("config.json", "not JSON"), (WEIGHTS, "not a whole safetensors file")])
def test_what_is_no_vae_is_not_kept(get_vae, hub, tmp_path, name, reason):
    commit, _ = OFFICIAL_VAES[VAE]
    hub.paths[f"/{commit}/{name}"] = b"<html>Please log in to the hotel's network</html>"
    with pytest.raises(InputError, match=reason):
        get_vae()
    assert name not in left_in(tmp_path / "cache" / VAE)


def test_a_vae_with_a_known_checksum(get_vae, monkeypatch, tmp_path):
    commit, checksums = OFFICIAL_VAES[VAE]
    monkeypatch.setitem(OFFICIAL_VAES, VAE, (commit, checksums | {WEIGHTS: "0" * 64}))
    with pytest.raises(InputError, match="SHA-256.*0000"):
        get_vae()
    assert WEIGHTS not in left_in(tmp_path / "cache" / VAE)


def test_no_network_says_where_the_vae_belongs(tmp_path):
    with pytest.raises(InputError) as caught:
        official_vae(VAE, tmp_path / "cache", pause=0.0)
    commit, _ = OFFICIAL_VAES[VAE]
    message = str(caught.value)
    assert f"{HUB_URL}/{commit}/config.json" in message and f"into {tmp_path / 'cache' / VAE} as config.json" in message
    assert "\n" not in message


def test_a_vae_needs_no_torch(get_vae, hub, tmp_path):
    program = f"""
import sys
sys.modules["torch"] = None  # as if it were not installed
from convert.download import official_vae
print(official_vae({VAE!r}, {str(tmp_path / "cache")!r}, base_url={hub.url!r}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "cache" / VAE)


def test_unknown_vaes():
    with pytest.raises(InputError, match="no official VAE 'sdxl'; there are sd-vae-ft-ema, sd-vae-ft-mse"):
        official_vae("sdxl")


# What quality is measured with -----------------------------------------------------------------------------------------


def test_the_reference_statistics_are_found_and_watched(tmp_path):
    archive = io.BytesIO()
    np.savez(archive, mu=np.zeros(3))
    name = OFFICIAL_EVALUATION["imagenet256"][1]
    (tmp_path / name).write_bytes(archive.getvalue())
    found = official_evaluation("imagenet256", tmp_path, base_url="http://127.0.0.1:1")  # put there by hand
    assert found == tmp_path / name and (tmp_path / f"{name}.sha256").exists()
    (tmp_path / name).write_bytes(archive.getvalue()[:-30])
    with pytest.raises(InputError, match="VIRTUAL_imagenet256_labeled"):
        official_evaluation("imagenet256", tmp_path, base_url="http://127.0.0.1:1")


def test_official_names_of_every_kind(monkeypatch, tmp_path):
    monkeypatch.setenv("VQ4DIT_CACHE", str(tmp_path))
    names = [*OFFICIAL_CHECKPOINTS, *OFFICIAL_VAES, *OFFICIAL_EVALUATION]
    for name in names:
        with pytest.raises(InputError, match="nothing is downloaded for this run"):
            official(name, download=False)
    with pytest.raises(InputError, match="imagenet512"):
        official("imagenet1024")
    assert not list(tmp_path.iterdir())
