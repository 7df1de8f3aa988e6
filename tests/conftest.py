"""What every test runs under: two CPU devices, strict dtype and rank promotion, no network."""

import errno
import gc
import importlib.metadata
import os
import pathlib
import socket
import sys
import tempfile

import pytest

# JAX reads these when it is first imported; the processes that tests start inherit them.
assert "jax" not in sys.modules, "something imported jax before tests/conftest.py could set its configuration"
# Most of the suite's time is the compiler's, and these save two thirds of it: LLVM leaves programs as they are, loops are emitted
# without MLIR, and as one module. A flag that the environment has is left alone.
_FLAGS = {
    "xla_force_host_platform_device_count": 2,
    "xla_backend_optimization_level": 0,
    "xla_cpu_parallel_codegen_split_count": 1,
}
# jaxlib 0.12 does not know this one, and a process ends at a flag that it does not know.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _FLAGS["xla_cpu_use_fusion_emitters"] = "false"
for _flag, _value in _FLAGS.items():
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{_flag}={_value}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# XLA's pool of threads has as many as there are cores, and every warpgroup that Pallas' GPU interpreter simulates holds one.
os.environ.setdefault("NPROC", "8")
# A program is compiled once in a worker, whichever test or child process needs it first. Not shared between workers, because
# JAX writes entries in place, and half an entry that is read is a warning.
_COMPILED = tempfile.TemporaryDirectory(prefix="vq4dit-compiled-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# diffusers asks the hub for nothing, not even whether a file is there.
os.environ["HF_HUB_OFFLINE"] = "1"

# Tracing makes many objects that stay, and looking through all of them for cycles took a tenth of the time of a worker.
gc.set_threshold(200_000, 20, 50)

import hypothesis  # noqa: E402

# XLA compiles inside the first example, so a deadline would measure the compiler. CI draws the same examples every time.
hypothesis.settings.register_profile("vq4dit", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("vq4dit")

ROOT = pathlib.Path(__file__).resolve().parent.parent


def environment(devices: int) -> dict[str, str]:
    """Of a child process with so many devices; the compiler's flags are those above."""
    kept = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    return {**os.environ, "XLA_FLAGS": " ".join([*kept, f"--xla_force_host_platform_device_count={devices}"])}


# Files that take minutes come first, so that no worker waits for another at the end.
_LONG = (
    "test_pipeline.py",
    "test_notebooks.py",
    "test_latent_pipeline.py",
    "test_calibration.py",
    "test_generation.py",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: _LONG.index(item.path.name) if item.path.name in _LONG else len(_LONG))


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of data sets and trained models that stands beside the repository on the project's machines."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared (data sets and models that are not in the repository)")
    return folder


@pytest.fixture(scope="module", autouse=True)
def programs_are_dropped():
    """A file's programs leave memory with it: a process may have 65,530 mapped areas, and each program takes some of them."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture(scope="session", autouse=True)
def empty_cache(tmp_path_factory):
    """No test finds what an earlier run has downloaded, or leaves anything in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VQ4DIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def _is_local(host: object) -> bool:
    if isinstance(host, bytes):
        host = host.decode()
    return host in (None, "", "localhost", "::1", "0.0.0.0", "::") or str(host).startswith("127.")


@pytest.fixture(scope="session", autouse=True)
def no_network():
    """Connections leave this machine as they would with the cable pulled: name look-ups and connects fail at once."""
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def reaches_out(sock: socket.socket, address: object) -> bool:
        return sock.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(address[0])

    def local_connect(sock, address):
        if reaches_out(sock, address):
            raise OSError(errno.ENETUNREACH, f"tests have no network: connect to {address}")
        return connect(sock, address)

    def local_connect_ex(sock, address):
        return errno.ENETUNREACH if reaches_out(sock, address) else connect_ex(sock, address)

    def local_getaddrinfo(host, *args, **kwargs):
        if not _is_local(host):
            raise socket.gaierror(socket.EAI_NONAME, f"tests have no network: look-up of {host!r}")
        return getaddrinfo(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_connect)
        patch.setattr(socket.socket, "connect_ex", local_connect_ex)
        patch.setattr(socket, "getaddrinfo", local_getaddrinfo)
        yield
