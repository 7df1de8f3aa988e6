"""ViDiT-Q (arXiv 2406.02540) as passes: 8-bit activations by token, balance and rotation, and weights that are solved.

    rtn      every matrix rounded to nearest (codebooks: k-means), its operand rotated and rounded: what there is to beat
    w4a8     centres, an exponent of balance for each layer, and weights solved for what they then read, rounded once

What differs from the paper and from its released code, and why, stands in docs/methods.md. `settings` are the keys of a
config's `viditq` section.
"""

from collections.abc import Callable, Mapping
from typing import Any

from vq4dit_jax.errors import InputError
from vq4dit_jax.methods import vq4dit
from vq4dit_jax.methods.activation_bits import MixActivations
from vq4dit_jax.methods.allocate import Allocate
from vq4dit_jax.methods.balance import Balance
from vq4dit_jax.methods.mixed import Mix
from vq4dit_jax.methods.passes import Pass
from vq4dit_jax.methods.solve_layers import SolveLayers
from vq4dit_jax.networks.network import Network, Role
from vq4dit_jax.networks.rules import codebooks
from vq4dit_jax.networks.values import rotate_values
from vq4dit_jax.qarray.operand import OperandSpec
from vq4dit_jax.qarray.spec import IntSpec, Spec

SETTINGS: dict[str, Any] = dict(
    weights="integers",
    weight_bits=8.0,
    weight_group=0,
    weight_grid="symmetric",
    activation_bits=8,
    activation_grid="symmetric",
    balance=True,
    centre=True,
    rotation=-1,
    rotate_values=True,
    signs=False,
    solve=True,
    budget=0.0,
    mixed_bits=(2, 3, 4, 8),
    mixed_by="layers",
    mixed_error="step",
    activation_budget=0.0,
    mixed_activation_bits=(4, 6, 8),
    time_ranges=4,
)
"""
    weights           "integers", or "codebooks" of `weight_bits` bits a weight (1, 1.5, 2, 3, 4)
    weight_bits       of integers: 2 to 8
    weight_group      inputs that share a scale; 0: the whole row
    weight_grid       "symmetric", "asymmetric" or "centred" (`integer.grids`)
    activation_bits   2 to 8, or 0: activations are not rounded
    activation_grid   "symmetric", "asymmetric" or "clipped" (`integer.activations`)
    balance           a scale for each input, `Balance`
    centre            the mean of each input is taken out before rounding, `Balance`
    rotation          inputs of a group of the rotation; 0: none, -1: the largest group that divides a layer's inputs
    rotate_values     with a rotation: what attention makes of values is rotated head by head where they are made
                      (`networks.values`), and not where it is read; no launch is spent on it
    signs             random signs before the rotation, but of Linears that read time and condition alone
    solve             weights are solved for what they read, `SolveLayers`; False: each is rounded to nearest
    budget            bits a weight of integers, everything counted, that are spread over the layers (`Mix`); 0: all alike
    mixed_bits        with a budget: what each layer's weights may have
    mixed_by          with a budget: "layers", or "roles", whose blocks have the same bits and stay one stack
    mixed_error       with a budget: bits are given by the error of the sampler's "step", or of the "prediction" (the paper's MSE)
    activation_budget mean bits of an activation, spread over the layers and ranges of time (`MixActivations`); 0: all alike
    mixed_activation_bits, time_ranges    with it: what there is to choose from, and how many ranges
"""


def check(settings: Mapping[str, Any]) -> dict[str, Any]:
    """All settings, those that are left out with their own values; InputError for one that is unknown or out of range."""
    if unknown := sorted(set(settings) - set(SETTINGS)):
        raise InputError(f"viditq.{unknown[0]}: no such setting; there are {', '.join(SETTINGS)}")
    s = {**SETTINGS, **settings}
    if s["weights"] not in ("integers", "codebooks"):
        raise InputError(f"viditq.weights={s['weights']!r}: wanted integers or codebooks")
    if s["weights"] == "integers" and s["weight_bits"] not in range(2, 9):
        raise InputError(f"viditq.weight_bits={s['weight_bits']:g} of integers: wanted a whole number from 2 to 8")
    for name in ("weight_group", "rotation"):
        if s[name] < (-1 if name == "rotation" else 0):
            raise InputError(f"viditq.{name}={s[name]}: wanted a number of inputs, or 0")
    if s["budget"] and (s["weights"] == "codebooks" or not s["solve"]):
        raise InputError(
            f"viditq.budget={s['budget']:g}: bits are mixed of integers that are solved; wanted weights=integers and solve=True "
            "with it (codebooks have calibration.allocation)"
        )
    if s["activation_budget"] and s["activation_bits"] != max(s["mixed_activation_bits"], default=0):
        raise InputError(
            f"viditq.activation_budget={s['activation_budget']:g}: bits of activations are spread from "
            f"viditq.activation_bits={s['activation_bits']} downwards; wanted the largest of "
            f"viditq.mixed_activation_bits={tuple(s['mixed_activation_bits'])}"
        )
    try:
        spec(s)(Role(""))
        if s["budget"]:
            _mix(s)
        if s["activation_budget"]:
            _mix_activations(s)
    except InputError as error:
        raise InputError(f"viditq: {error}") from None
    return s


def _mix(s: Mapping[str, Any], **batch: Any) -> Mix:
    return Mix(s["budget"], tuple(s["mixed_bits"]), s["mixed_by"], s["mixed_error"], **batch)


def _mix_activations(s: Mapping[str, Any], **how: Any) -> MixActivations:
    bits = tuple(s["mixed_activation_bits"])
    return MixActivations(s["activation_budget"], bits, s["time_ranges"], s["mixed_error"], **how)


def name(settings: Mapping[str, Any]) -> str:
    """Of the model, in files and metrics: "w4a8", "w2a8", "w4a8-mp"; activations that are not rounded have 16 bits."""
    s = {**SETTINGS, **settings}
    mixed = "-mp" if s["budget"] or s["activation_budget"] else ""
    return f"w{s['weight_bits']:g}a{s['activation_budget'] or s['activation_bits'] or 16:g}{mixed}"


def spec(settings: Mapping[str, Any]) -> Callable[[Role], Spec]:
    """Role -> the spec of its Linears."""
    s = {**SETTINGS, **settings}
    inner: Callable[[Role], Spec]
    if s["weights"] == "codebooks":
        inner = codebooks(s["weight_bits"])
    else:
        integers = IntSpec(int(s["weight_bits"]), s["weight_group"] or None, s["weight_grid"])
        inner = lambda role: integers
    rotation = None if s["rotation"] == -1 else s["rotation"]
    rounded = dict(bits=s["activation_bits"] or None, grid=s["activation_grid"], rotation=rotation, centred=s["centre"])

    def one(role: Role) -> Spec:
        if role.reads == "conditioning" and s["weights"] == "codebooks":
            # Its few rows cost nothing to read in 16 bits, and codewords of 16 bits take no more than those of 8.
            return inner(role)
        if role.values and _rotates_values(s):
            return OperandSpec(inner(role), scaled=s["balance"], **rounded | {"rotation": 0})
        # Linears that read time and condition alone are one product for all blocks, so one operand has to serve them all.
        signed = s["signs"] and role.reads != "conditioning"
        return OperandSpec(inner(role), signed=signed, scaled=s["balance"], **rounded)

    return one


def _rotates_values(s: Mapping[str, Any]) -> bool:
    return bool(s["rotation"] and s["rotate_values"])


def source(settings: Mapping[str, Any], network: Network, teacher: Any) -> Any:
    """What is quantized: the teacher's parameters, with values rotated where the settings say so."""
    return rotate_values(network, teacher) if _rotates_values({**SETTINGS, **settings}) else teacher


def passes(settings: Mapping[str, Any], calibration: Mapping[str, Any] | None = None) -> tuple[Pass, ...]:
    """The passes after the first rounding. `calibration`: settings of `vq4dit.passes`, which solve and train codebooks."""
    s, rest = check(settings), {**vq4dit.defaults(), **(calibration or {})}
    batch = dict(images=rest["batch"], cfg_scale=rest["cfg_scale"])
    balance = (Balance(**batch),) if s["balance"] or s["centre"] else ()
    last = (_mix_activations(s, cfg_scale=rest["cfg_scale"]),) if s["activation_budget"] else ()
    if s["weights"] == "codebooks":
        # An allocation makes its leaves anew, so that what their operands have is chosen after it.
        first, *more = vq4dit.passes(rest)
        return (first, *balance, *more, *last) if isinstance(first, Allocate) else (*balance, first, *more, *last)
    if s["budget"]:
        return (*balance, _mix(s, **batch), *last)
    solve = (SolveLayers(**batch, shift=True, alike=True),) if s["solve"] else ()
    return (*balance, *solve, *last)
