"""Removes the prefixes that wrapping modules put before parameters' names.

DDP puts `module.` before every name, torch.compile `_orig_mod.`, Lightning the attribute's name (`model.`, `net.`), an EMA
module `ema.` or `ema_model.`, and they nest. One prefix that all names have is taken off where the rest is a known layout.
"""

import dataclasses
import re
from collections.abc import Sequence

from convert.checkpoint import Checkpoint
from convert.wrappers import is_ema
from vq4dit_jax.errors import InputError

# Modules that wrap any part of a network, also single blocks; no layer is called so.
_WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module|_forward_module)\."
)
# Other networks that latent diffusion frameworks keep in the same state dict.
_SIBLINGS = ("first_stage_model.", "cond_stage_model.", "vae.", "loss.")


def strip_prefix(checkpoint: Checkpoint, starts: Sequence[str]) -> Checkpoint:
    """The checkpoint with the names that a layout has; `starts` are the beginnings of its first block's names.

    A checkpoint of no known layout is returned unchanged. Removed prefixes are added to `wrapper`.

    Raises:
      InputError: several models under several prefixes and none of them an EMA, or parameters outside the prefix.
    """
    names = _without_wrappers(checkpoint)
    prefixes = list(dict.fromkeys(p for name in names if (p := _prefix(name, starts)) is not None))
    if not prefixes:
        return checkpoint
    prefix, twins = _choose(checkpoint, prefixes)
    flat = _flat_averages(names, prefix)
    under = f"ema of {prefix[:-1]}" if flat else prefix[:-1]
    outside = [n for n in names if not n.startswith((prefix, *twins, *_SIBLINGS)) and n not in flat.values()]
    if outside:
        raise InputError(
            f"{checkpoint.path}: has the unexpected parameters {', '.join(sorted(outside)[:3])} beside those under "
            f"{prefix[:-1]!r}; save the network alone: torch.save(model.state_dict(), FILE)"
        )
    sources = {n.removeprefix(prefix): names[flat.get(n, n)] for n in names if n.startswith(prefix)}
    return dataclasses.replace(
        checkpoint,
        shapes={name: checkpoint.shapes[source] for name, source in sources.items()},
        read=lambda name: checkpoint.read(sources[name]),
        wrapper=".".join(filter(None, (checkpoint.wrapper, under))),
    )


def _choose(checkpoint: Checkpoint, prefixes: list[str]) -> tuple[str, list[str]]:
    """The prefix of the network to take, and those of the raw models that an EMA is the average of."""
    averages = [p for p in prefixes if _is_average(p)]
    if averages:
        return averages[0], [p for p in prefixes if p != averages[0]]
    if "" in prefixes:
        return "", []
    if len(prefixes) > 1:
        raise InputError(
            f"{checkpoint.path}: holds several models ({', '.join(f'{p}*' for p in prefixes[:5])}) and nothing says "
            "which is wanted; save one of them alone: torch.save(model.state_dict(), FILE)"
        )
    return prefixes[0], []


def _without_wrappers(checkpoint: Checkpoint) -> dict[str, str]:
    names: dict[str, str] = {}
    for source in checkpoint.shapes:
        name = _WRAPPERS.sub("", source)
        if name in names:
            raise InputError(f"{checkpoint.path}: {names[name]} and {source} are both {name} without their wrappers")
        names[name] = source
    return names


def _prefix(name: str, starts: Sequence[str]) -> str | None:
    for start in starts:
        at = name.find(start)
        while at > 0 and name[at - 1] != ".":
            at = name.find(start, at + 1)
        if at >= 0:
            return name[:at]
    return None


def _is_average(prefix: str) -> bool:
    parts = prefix.split(".")
    return any(map(is_ema, parts)) and not any(part.startswith("online") for part in parts)


def _flat_averages(names: dict[str, str], prefix: str) -> dict[str, str]:
    """Parameters of `prefix` to their averages as latent-diffusion's LitEma names them: `model_ema.` and the name
    inside `model.` without its dots. Buffers and untrained parameters have no average there.
    """
    root, dot, _ = prefix.partition(".")
    if not dot or _is_average(prefix):
        return {}
    inside = [n for n in names if n.startswith(prefix)]
    pairs = ((n, f"model_ema.{n.removeprefix(f'{root}.').replace('.', '')}") for n in inside)
    return {name: average for name, average in pairs if average in names}
