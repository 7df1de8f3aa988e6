"""Official checkpoints: downloads survive broken connections, and nothing wrong is ever taken for a checkpoint."""

import hashlib
import http.server
import threading

import pytest

from convert import download
from convert.download import BASE_URL, OFFICIAL_CHECKPOINTS, official_checkpoint
from vq4dit_jax.errors import InputError

torch = pytest.importorskip("torch", reason="the official checkpoints are PyTorch files")

NAME = "DiT-XL-2-256x256.pt"


class Server:
    """A file server with ranges, and the ways in which one can misbehave."""

    def __init__(self, content: bytes):
        self.content = content
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
        self.requests.append(asked)
        total = len(self.content)
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
        handler.wfile.write(self.content[start:][: self.cuts.pop(0) if self.cuts else None])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def content(tmp_path) -> bytes:
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


def test_no_network_says_which_file_to_put_where(tmp_path):
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
