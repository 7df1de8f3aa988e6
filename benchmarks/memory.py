"""Memory of calibrating DiT-XL/2, from programs that are compiled and never run: `python -m benchmarks.memory`.

XLA says what a program's arguments, results and temporaries take (`memory_analysis`). Blocks are one scan, so bytes are linear in
their number: two depths give the share of a block, and from that the bytes of all 28. Weights are shapes, but for the codes of
the student. The CPU's compiler is asked; those of GPUs and TPUs fuse and schedule otherwise, so temporaries differ there.
"""

import argparse
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from vq4dit_jax import files
from vq4dit_jax.diffusion import trajectory
from vq4dit_jax.diffusion.samplers import sampler_for
from vq4dit_jax.methods import loop, moments, solve_layers, tune
from vq4dit_jax.networks.dit import parameter_shapes, variant
from vq4dit_jax.networks.network import as_network, random_problem
from vq4dit_jax.networks.rules import dit_rules
from vq4dit_jax.qarray.rules import Rule, abstract_quantized
from vq4dit_jax.qarray.spec import VQSpec
from vq4dit_jax.qarray.tree import quantized_paths
from vq4dit_jax.run import config as configs
from vq4dit_jax.storage import provenance

BLOCKS, DEPTHS = 28, (2, 3)
PARTS = ("arguments", "results", "temporaries", "peak")
KEY = jax.eval_shape(lambda: jax.random.key(0))


def shapes_of(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def mixed_rules(depth: int) -> tuple[Rule, ...]:
    """No two neighbouring blocks alike, as an allocation to single layers leaves them."""
    specs = (VQSpec(256, 4), VQSpec(64, 4))
    return (*((rf"blocks/{i}/.*/kernel", specs[i % 2]) for i in range(depth)), *dit_rules(2))


def analysed(lowered: Any) -> dict[str, int]:
    """Bytes of a program. What a result shares with an argument is counted once, as the argument."""
    found = lowered.compile().memory_analysis()
    arguments, temporaries = found.argument_size_in_bytes, found.temp_size_in_bytes
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    return dict(zip(PARTS, (arguments, results, temporaries, arguments + results + temporaries), strict=True))


def step(depth: int, rules: Callable[[int], tuple[Rule, ...]]) -> dict[str, int]:
    """One gradient step of the XL/2 config, with the student that these rules make."""
    method, _ = _passes()
    model = variant("DiT-XL/2", depth=depth)
    network, teacher = as_network(model, remat=method.remat), parameter_shapes(model)
    packed = abstract_quantized(teacher, rules(depth), network.prefixes)
    packed = jax.tree.map(lambda a: np.broadcast_to(np.zeros((), a.dtype), a.shape), packed)
    student = tune.initial_student(method, teacher, packed)
    state = jax.eval_shape(lambda: tune.init(method, student))
    walk = jax.eval_shape(lambda t, k: loop.begin(method, network, t, k, jnp.int32(0)), teacher, KEY)
    return analysed(loop.step.lower(method, network, state, walk, shapes_of(student), teacher, KEY))


def input_moments(depth: int) -> dict[str, int]:
    """All moments of a trajectory's inputs, which the layers are then solved with."""
    _, solving = _passes()
    model = variant("DiT-XL/2", depth=depth)
    network, teacher = as_network(model, remat=True), parameter_shapes(model)
    paths = tuple(quantized_paths(abstract_quantized(teacher, dit_rules(2), network.prefixes)))
    steps = solve_layers._MOMENT_STEPS
    shares = tuple(solve_layers._DIFFERENCES * network.reads_conditioning(path) for path in paths)
    observe = moments._Collect(network, paths, shares, steps)
    weights = {path: jax.ShapeDtypeStruct((steps,), jnp.float32) for path in paths}
    how = dict(images=solving.images, cfg_scale=solving.cfg_scale)
    problem = jax.eval_shape(lambda t, k: random_problem(network, t, k, **how), teacher, KEY)
    sched = network.process.schedule(steps)
    scale, given = jnp.float32(solving.cfg_scale), (moments.flatten(teacher), weights)
    arguments = (network, sampler_for(network.process), sched, teacher, problem, scale, given)
    return analysed(trajectory._observed.lower(*arguments, observe=observe, reduce="sum", blocks=False))


def _passes() -> tuple[tune.Tune, solve_layers.SolveLayers]:
    passes = {one.name: one for one in configs.models(configs.xl2(256, 2.0))[-1].passes}
    return passes["tune"], passes["solve_layers"]


PROGRAMS = {
    "step, blocks alike (allocation to roles)": lambda depth: step(depth, lambda _: dit_rules(2)),
    "step, every block another (allocation to layers)": lambda depth: step(depth, mixed_rules),
    "moments of all inputs": input_moments,
}


def measure() -> list[dict[str, Any]]:
    """A row for each program: bytes at both depths and at 28 blocks, by part."""
    rows = []
    for name, program in PROGRAMS.items():
        few, more = (program(depth) for depth in DEPTHS)
        share = {part: (more[part] - few[part]) // (DEPTHS[1] - DEPTHS[0]) for part in PARTS}
        whole = {part: few[part] + (BLOCKS - DEPTHS[0]) * share[part] for part in PARTS}
        rows.append({"what": name, f"depth_{DEPTHS[0]}": few, f"depth_{DEPTHS[1]}": more, f"depth_{BLOCKS}": whole})
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    depths = (f"depth_{DEPTHS[0]}", f"depth_{BLOCKS}")
    head = ["What", *(f"{part}, {depth.replace('depth_', '')} blocks" for depth in depths for part in PARTS)]
    lines = [head, ["---"] * len(head)]
    lines += [
        [row["what"], *(f"{row[depth][part] / 1e9:.2f} GB" for depth in depths for part in PARTS)] for row in rows
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=pathlib.Path, default="benchmarks/results/memory_xl2.json", help="JSON file")
    flags = parser.parse_args()
    rows = measure()
    print(markdown(rows))
    about = {"command": "python -m benchmarks.memory", "commit": record.commit(), "date": time.strftime("%Y-%m-%d")}
    files.write_json(flags.output, {**about, "versions": provenance.versions(), "rows": rows})


if __name__ == "__main__":
    main()
