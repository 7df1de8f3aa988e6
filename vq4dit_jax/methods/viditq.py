"""ViDiT-Q (arXiv 2406.02540) as passes: 8-bit activations by token, balance and rotation, and weights that are solved.

    rtn      every matrix rounded to nearest (codebooks: k-means), its operand rotated and rounded: what there is to beat
    w4a8     an exponent of balance for each layer, and weights solved for what they then read, rounded once

What differs from the paper and from its released code, and why, stands in docs/methods.md. `settings` are the keys of a
config's `viditq` section.
"""

from collections.abc import Callable, Mapping
from typing import Any

from vq4dit_jax.errors import InputError
from vq4dit_jax.methods import vq4dit
from vq4dit_jax.methods.balance import Balance
from vq4dit_jax.methods.passes import Pass
from vq4dit_jax.methods.solve_layers import SolveLayers
from vq4dit_jax.networks.network import Role
from vq4dit_jax.networks.rules import codebooks
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
    rotation=-1,
    signs=False,
    solve=True,
)
"""
    weights           "integers", or "codebooks" of `weight_bits` bits a weight (1, 1.5, 2, 3, 4)
    weight_bits       of integers: 2 to 8
    weight_group      inputs that share a scale; 0: the whole row
    weight_grid       "symmetric", "asymmetric" or "centred" (`integer.grids`)
    activation_bits   2 to 8, or 0: activations are not rounded
    activation_grid   "symmetric" or "asymmetric" (`integer.activations`)
    balance           a scale for each input, `Balance`
    rotation          inputs of a group of the rotation; 0: none, -1: the largest group that divides a layer's inputs
    signs             random signs before the rotation
    solve             weights are solved for what they read, `SolveLayers`; False: each is rounded to nearest
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
    try:
        spec(s)(Role(""))
    except InputError as error:
        raise InputError(f"viditq: {error}") from None
    return s


def name(settings: Mapping[str, Any]) -> str:
    """Of the model, in files and metrics: "w4a8", "w2a8"; activations that are not rounded have 16 bits."""
    s = {**SETTINGS, **settings}
    return f"w{s['weight_bits']:g}a{s['activation_bits'] or 16}"


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
    operand = (s["activation_bits"] or None, s["activation_grid"], rotation, s["signs"], s["balance"])
    return lambda role: OperandSpec(inner(role), *operand)


def passes(settings: Mapping[str, Any], calibration: Mapping[str, Any] | None = None) -> tuple[Pass, ...]:
    """The passes after the first rounding. `calibration`: settings of `vq4dit.passes`, which solve and train codebooks."""
    s, rest = check(settings), {**vq4dit.defaults(), **(calibration or {})}
    batch = dict(images=rest["batch"], cfg_scale=rest["cfg_scale"])
    balance = (Balance(**batch),) if s["balance"] else ()
    if s["weights"] == "codebooks":
        return (*balance, *vq4dit.passes(rest))
    return (*balance, *((SolveLayers(**batch),) if s["solve"] else ()))
