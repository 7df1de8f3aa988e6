"""The part of the report on mixed precision: what every number of bits does in every layer, and which was taken."""

from collections.abc import Sequence

from vq4dit_jax.reporting.markup import Element, Figures, element, note, number, section, table


def sensitivity(passes: Sequence[Figures]) -> Element | None:
    """The map of a run whose passes have one called "mix" (`methods.mixed`); None for another."""
    mix = next((one for one in passes if one.get("name") == "mix"), None)
    if mix is None:
        return None
    tables = [_role(path, errors, mix["bits"][path]) for path, errors in mix["sensitivity"].items()]
    groups = table(
        "Sums of the groups.",
        ["Group", *(f"{bits} bits" for bits in next(iter(mix["groups"].values())))],
        [[name, *(number(value) for value in by_bits.values())] for name, by_bits in mix["groups"].items()],
        css="figures",
    )
    return section(
        "sensitivity",
        "Bits of every layer",
        note(
            "What one layer alone does to the sampler's step with so many bits, all others in full precision. Bold: taken."
        ),
        *(element("div", {"class": "scroll"}, one) for one in (*tables, groups)),
    )


def _role(path: str, errors: dict[str, list[float]], taken: list[int]) -> Element:
    """A table of one role: a line for each number of bits, a column for each block."""

    def cell(value: float, bits: str, block: int) -> Element:
        text = number(value, 2)
        return element("td", None, element("strong", None, text) if int(bits) == taken[block] else text)

    name = path.removesuffix("/kernel").partition("/")[2] or path
    rows = [[f"{bits} bits", *(cell(value, bits, i) for i, value in enumerate(own))] for bits, own in errors.items()]
    return table(name, ["Block", *(str(i) for i in range(len(taken)))], rows, css="figures")
