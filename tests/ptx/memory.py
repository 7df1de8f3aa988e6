"""Address spaces of a kernel: global, shared, local, parameters, and the windows by which generic addresses reach them."""

import numpy as np

from ptx.numbers import UNSIGNED
from ptx.parser import PtxError

# Generic addresses. A global address is its own generic address; the others are apart from their windows' start.
GLOBAL = 0x7000_0000_0000
WINDOWS = {"shared": 0x5000_0000_0000, "local": 0x4000_0000_0000, "param": 0x3000_0000_0000}
_WINDOW_BYTES = 1 << 40
# The driver keeps the first KiB of shared memory for itself on Hopper. It also makes address 0 invalid.
SHARED_START = 0x400
# Memory that nobody has written: NaN in every float type, -1 in integers.
POISON = 0xFF


class GlobalMemory:
    """Buffers far enough apart that running over the end of one is noticed."""

    def __init__(self, buffers: list[np.ndarray]):
        self.starts = np.zeros(len(buffers), np.uint64)
        self.ends = np.zeros(len(buffers), np.uint64)
        at = 4096
        for i, buffer in enumerate(buffers):
            self.starts[i], self.ends[i] = GLOBAL + at, GLOBAL + at + buffer.nbytes
            at = (at + buffer.nbytes + 2 * 4096) // 4096 * 4096
        self.data = np.full(at, POISON, np.uint8)
        for start, buffer in zip(self.starts, buffers):
            self.data[int(start) - GLOBAL :][: buffer.nbytes] = np.ascontiguousarray(buffer).reshape(-1).view(np.uint8)

    def contents(self, index: int) -> np.ndarray:
        """Bytes of a buffer."""
        return self.data[int(self.starts[index]) - GLOBAL : int(self.ends[index]) - GLOBAL]

    def check(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Offsets of `addresses` in `data`; PtxError where an access of `size` bytes leaves the buffers."""
        buffer = np.searchsorted(self.starts, addresses, "right") - 1
        outside = (buffer < 0) | (addresses + np.uint64(size) > self.ends[np.maximum(buffer, 0)])
        if outside.any():
            raise PtxError(f"global address {int(addresses[outside][0]):#x} is in no buffer")
        return addresses - np.uint64(GLOBAL)


class Memory:
    """What the threads of one CTA can address.

    Attributes:
        shared: bytes of shared memory by shared-space address (the first KiB is not the kernel's).
        tensor_maps: TMA descriptors by generic address.
    """

    def __init__(self, buffers: GlobalMemory, parameters: np.ndarray, tensor_maps: dict, shared: int, local: int):
        self.buffers = buffers
        self.parameters = parameters
        self.tensor_maps = {WINDOWS["param"] + offset: tensor_map for offset, tensor_map in tensor_maps.items()}
        self.shared = np.full((SHARED_START + shared + 15) // 16 * 16, POISON, np.uint8)
        self.shared_end = SHARED_START + shared
        self.local_bytes = (local + 15) // 16 * 16
        self.local = np.zeros(0, np.uint8)

    def begin(self, threads: int) -> None:
        """A new CTA."""
        self.shared[:] = POISON
        self.local = np.full(threads * self.local_bytes, POISON, np.uint8)

    def locate(
        self, space: str, addresses: np.ndarray, size: int, threads: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The bytes that hold `addresses` of a space ("" is generic), and the offsets in them; checked."""
        if not len(addresses):
            return self.shared, addresses.astype(np.uint64)
        addresses = addresses.astype(np.uint64)
        if (addresses % np.uint64(size)).any():
            raise PtxError(f"an access of {size} bytes at an address that is no multiple of {size}")
        if space == "":
            for name, start in WINDOWS.items():
                inside = (addresses >= start) & (addresses < start + _WINDOW_BYTES)
                if inside.all():
                    return self.locate(name, addresses - np.uint64(start), size, threads)
                if inside.any():
                    raise PtxError("threads of one access address different spaces")
            space = "global"
        if space == "global":
            return self.buffers.data, self.buffers.check(addresses, size)
        low, high = {
            "shared": (SHARED_START, self.shared_end),
            "local": (0, self.local_bytes),
            "param": (0, len(self.parameters)),
        }[space]
        outside = (addresses < low) | (addresses + np.uint64(size) > high)
        if outside.any():
            raise PtxError(f"{space} address {int(addresses[outside][0]):#x} is outside [{low:#x}, {high:#x})")
        if space == "local":
            return self.local, addresses + threads.astype(np.uint64) * np.uint64(self.local_bytes)
        return (self.shared if space == "shared" else self.parameters), addresses

    def load(self, space: str, addresses: np.ndarray, size: int, count: int, threads: np.ndarray) -> list[np.ndarray]:
        """`count` consecutive unsigned integers of `size` bytes from each address."""
        data, offsets = self.locate(space, addresses, size * count, threads)
        words, first = _words(data, size), (offsets // np.uint64(size)).astype(np.int64)
        return [words[first + i] for i in range(count)]

    def store(self, space: str, addresses: np.ndarray, values: list[np.ndarray], threads: np.ndarray) -> None:
        size = values[0].dtype.itemsize
        data, offsets = self.locate(space, addresses, size * len(values), threads)
        if space == "param":
            raise PtxError("a store to a parameter")
        words, first = _words(data, size), (offsets // np.uint64(size)).astype(np.int64)
        for i, value in enumerate(values):
            words[first + i] = value

    def shared_bytes(self, addresses: np.ndarray) -> np.ndarray:
        """Single bytes, for the tensor cores and TMA; any shape."""
        self.check_shared(addresses)
        return self.shared[addresses]

    def check_shared(self, addresses: np.ndarray) -> None:
        if addresses.size and (addresses.min() < SHARED_START or addresses.max() >= self.shared_end):
            raise PtxError(f"shared addresses {addresses.min():#x} to {addresses.max():#x} leave shared memory")


def _words(data: np.ndarray, size: int) -> np.ndarray:
    return data[: len(data) // size * size].view(UNSIGNED[8 * size])
