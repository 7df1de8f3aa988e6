"""The part of the report on mixed precision: what every number of bits does in every layer, and which was taken."""

from collections.abc import Iterator, Sequence

from vq4dit_jax.reporting.markup import Element, Figures, element, note, number, section, table


def sensitivity(passes: Sequence[Figures]) -> Element | None:
    """The maps of a run whose passes have one called "mix" or "mix_activations" (`methods.mixed`, `methods.activation_bits`);
    None for another."""
    found = {one["name"]: one for one in passes if one.get("name") in ("mix", "mix_activations")}
    tables = [*_of_weights(found.get("mix")), *_of_activations(found.get("mix_activations"))]
    if not tables:
        return None
    return section(
        "sensitivity",
        "Bits of every layer",
        note(
            "The error that one layer alone makes with so many bits, all others in full precision: of the sampler's step, or of "
            "the prediction where the run was told so. Bold: taken."
        ),
        *(element("div", {"class": "scroll"}, one) for one in tables),
    )


def _of_weights(mix: Figures | None) -> Iterator[Element]:
    """For each role a line for each number of bits, a column for each block; and the sums of the groups."""
    if mix is None:
        return
    for path, errors in mix["sensitivity"].items():
        taken = mix["bits"][path]
        rows = [
            [f"{bits} bits", *(_cell(value, int(bits) == taken[i]) for i, value in enumerate(own))]
            for bits, own in errors.items()
        ]
        yield table(_name(path), ["Block", *(str(i) for i in range(len(taken)))], rows, css="figures")
    yield table(
        "Sums of the groups.",
        ["Group", *(f"{bits} bits" for bits in next(iter(mix["groups"].values())))],
        [[name, *(number(value) for value in by_bits.values())] for name, by_bits in mix["groups"].items()],
        css="figures",
    )


def _of_activations(mix: Figures | None) -> Iterator[Element]:
    """For each role a line for each range of time and number of bits, a column for each block."""
    if mix is None:
        return
    for path, errors in mix["sensitivity"].items():
        taken = mix["bits"][path]
        rows = [
            [f"range {r + 1}, {bits} bits", *(_cell(block[r], int(bits) == taken[i][r]) for i, block in enumerate(own))]
            for r in range(len(taken[0]))
            for bits, own in errors.items()
        ]
        head = ["Activations, from noise to data", *(str(i) for i in range(len(taken)))]
        yield table(f"{_name(path)}, what it reads", head, rows, css="figures")


def _cell(value: float, taken: bool) -> Element:
    text = number(value, 2)
    return element("td", None, element("strong", None, text) if taken else text)


def _name(path: str) -> str:
    return path.removesuffix("/kernel").partition("/")[2] or path
