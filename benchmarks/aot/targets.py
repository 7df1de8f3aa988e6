"""The devices that programs are compiled for, as XLA is told of them: `*.txtpb` beside this file.

`h200.txtpb` is what XLA wrote of one; the others are made from NVIDIA's public figures (the CUDA programming guide's table of
compute capabilities, data sheets). None is a measurement.
"""

import dataclasses
import functools
import pathlib
import re

from pallas_kernels.selector import Facts


@dataclasses.dataclass(frozen=True)
class Target:
    """A device by the name of its file."""

    name: str

    @functools.cached_property
    def description(self) -> str:
        """For XLA, a GpuTargetConfigProto as text."""
        return pathlib.Path(__file__).with_name(f"{self.name}.txtpb").read_text()

    @functools.cached_property
    def facts(self) -> Facts:
        """For the selector. Without cuDNN, which is not among the wheels that compile."""
        kind = re.search(r'device_description_str: "(.*)"', self.description)[1]
        capability = re.search(r"cuda_compute_capability \{(.*?)\}", self.description, re.DOTALL)[1]
        # A field that is 0 is left out.
        number = lambda field, text: int((re.search(rf"\b{field}: (\d+)", text) or [0, 0])[1])
        version = number("major", capability), number("minor", capability)
        return Facts("gpu", kind, version, number("core_count", self.description), False)


TARGETS = {name: Target(name) for name in ("t4", "a100", "l4", "h200", "b200", "rtx5090")}
H200 = TARGETS["h200"]
