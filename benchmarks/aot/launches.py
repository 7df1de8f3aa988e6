"""XLA's list of thunks: the launches of a compiled program in order, with the bodies of loops and branches."""

import dataclasses
import re
from collections.abc import Iterator

# Thunks that only steer others. Everything else puts work on the stream: a kernel, a library call, a copy.
_CONTROL = {"kWhile", "kConditional", "kSequential", "kCommandBuffer", "kWaitForStreams", "kPartitionId", "kReplicaId"}


@dataclasses.dataclass(frozen=True)
class Thunk:
    """One entry of the list. `name`: the kernel where it is known; `instruction`: of the HLO that it came from.

    `bodies` holds the thunks inside, by the label that XLA prints: 'condition' and 'body' of a kWhile; 'true_branch' and
    'false_branch', or 'branch_0' and so on, of a kConditional.
    """

    kind: str
    name: str
    instruction: str
    bodies: dict[str, tuple["Thunk", ...]] = dataclasses.field(default_factory=dict)

    @property
    def is_launch(self) -> bool:
        """Whether it puts work on the GPU itself, copies and fills among it."""
        return self.kind not in _CONTROL


def launches_of(thunks: tuple[Thunk, ...]) -> tuple[Thunk, ...]:
    """The launches of one pass through `thunks`.

    A loop counts as one pass through its body (not its condition, which XLA evaluates on the host where it knows the
    number of iterations), a branch as its longest.
    """
    found: list[Thunk] = []
    for thunk in thunks:
        if thunk.is_launch:
            found.append(thunk)
        elif thunk.kind == "kWhile":
            found += launches_of(thunk.bodies["body"])
        elif thunk.bodies:
            found += max(map(launches_of, thunk.bodies.values()), key=len)
    return tuple(found)


def innermost_body(thunks: tuple[Thunk, ...]) -> tuple[Thunk, ...]:
    """Body of the deepest loop; the longest of those equally deep; the whole list where there is no loop."""

    def bodies(thunks: tuple[Thunk, ...], depth: int) -> Iterator[tuple[int, tuple[Thunk, ...]]]:
        yield depth, thunks
        for thunk in thunks:
            for label, body in thunk.bodies.items():
                if label == "body":
                    yield from bodies(body, depth + 1)
                elif label != "condition":
                    inside = list(bodies(body, depth))
                    yield from inside[1:]

    return max(bodies(thunks, 0), key=lambda found: (found[0], len(launches_of(found[1]))))[1]


def parse_thunks(sequence: str, metadata: str, kernels: dict[str, str]) -> tuple[Thunk, ...]:
    """Reads XLA's dumps `thunk_sequence.txt` and `thunk_metadata.txt`.

    Args:
        sequence: one thunk a line, indented by nesting.
        metadata: text protobuf that gives the HLO instruction of each thunk's number.
        kernels: names of custom kernels by HLO instruction.
    """
    instructions = {
        int(number): name for name, number in re.findall(r'profile_annotation: "([^"]+)"\s+thunk_id: (\d+)', metadata)
    }
    top: dict = {"bodies": {"": []}, "label": "", "indent": -1}
    open_thunks = [top]
    for line in sequence.splitlines():
        indent = len(line) - len(line.lstrip())
        if label := re.fullmatch(r"\s*(\w+):", line):
            # XLA forgets to indent `condition:`. It is always the first thing behind its kWhile.
            while label[1] != "condition" and open_thunks[-1]["indent"] >= indent:
                open_thunks.pop()
            open_thunks[-1]["label"] = label[1]
            open_thunks[-1]["bodies"][label[1]] = []
        elif thunk := re.fullmatch(r"\s*(\d+): (k\w+)\s*\[[^\]]*\]\s*(\S*).*", line):
            while open_thunks[-1]["indent"] >= indent:
                open_thunks.pop()
            instruction = instructions.get(int(thunk[1]), thunk[3] or thunk[2])
            printed = thunk[3] if thunk[3] and thunk[3] != thunk[2] else instruction
            node = {
                "kind": thunk[2],
                "name": kernels.get(instruction, printed),
                "instruction": instruction,
                "bodies": {},
                "label": "",
                "indent": indent,
            }
            open_thunks[-1]["bodies"].setdefault(open_thunks[-1]["label"], []).append(node)
            open_thunks.append(node)
        elif line.strip() not in ("", "No thunks."):
            raise RuntimeError(f"XLA's thunk list has a line of unknown form: {line!r}")
    return _freeze(top["bodies"][""])


def _freeze(nodes: list[dict]) -> tuple[Thunk, ...]:
    return tuple(
        Thunk(
            node["kind"],
            node["name"],
            node["instruction"],
            {label: _freeze(body) for label, body in node["bodies"].items()},
        )
        for node in nodes
    )
