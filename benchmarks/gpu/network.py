"""A sampler step of DiT-XL/2 with random weights: guidance, one evaluation of the network on 2B rows, one DDPM step.

Each variant in a process of its own, because a device's peak of memory never falls: it is read after every size, smallest
first. A step is timed by the host's clock in bursts that end when the device has finished, so gaps between kernels count.
"""

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks.gpu import timing

CONFIGURATIONS = ((256, 1), (512, 1), (256, 8), (512, 8))
"""(pixels, images), fewest tokens first."""
VARIANTS = {
    "bf16": None,
    "VQ2": {},
    "VQ3": {},
    "W8A8": {"activations": "int8", "weights": "int8"},
    "W4A8": {"activations": "int8", "weights": "int4"},
    "W2A8": {"activations": "int8"},
}
"""Arguments of `prepare_for_inference`; None: the ordinary network in bfloat16."""
_CODEBOOKS = {"VQ2": (256, 4), "VQ3": (64, 2), "W2A8": (256, 4)}
_RANGE = 4.0
"""Ranges of the inputs of proj and fc2, for the fixed scales of 8-bit variants."""
_STEPS, _STEP = 250, 125


def _model(pixels: int, dry: bool) -> Any:
    import jax.numpy as jnp

    from vq4dit_jax.networks import dit

    if dry:
        return dit.DiT(input_size=pixels // 64, hidden_size=128, depth=2, num_heads=2, dtype=jnp.bfloat16)
    return dit.variant("DiT-XL/2", input_size=pixels // 8, dtype=jnp.bfloat16)


def _random_weights(model: Any, codebooks: tuple[int, int] | None) -> dict[str, Any]:
    """In float32; with `codebooks` (K, d) the Linears of the blocks are packed, codes and codewords drawn at random."""
    import jax
    import jax.numpy as jnp
    from flax import traverse_util

    from vq4dit_jax.qarray.vq import from_codes

    rng = np.random.default_rng(0)
    x = jnp.zeros((1, model.input_size, model.input_size, model.in_channels))
    none = jnp.zeros(1, jnp.int32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, none, none))["params"]

    numbers = lambda shape: 0.02 * rng.standard_normal(shape, np.float32)

    def draw(path: tuple[str, ...], shape: tuple[int, ...]) -> Any:
        if codebooks is None or path[0] != "blocks" or path[-1] != "kernel":
            return numbers(shape)
        (codewords, length), (layers, columns, rows) = codebooks, shape
        codes = rng.integers(0, codewords, (layers, rows, columns // length), dtype=np.uint8)
        return from_codes(jnp.asarray(numbers((layers, 3 if "qkv" in path else 1, codewords, length))), codes)

    flat = traverse_util.flatten_dict(shapes)
    return traverse_util.unflatten_dict({path: draw(path, leaf.shape) for path, leaf in flat.items()})


def ours(variant: str, dry: bool) -> Iterator[Any]:
    """Records of our network. Packed variants are compiled before READY, the ordinary one, whose products XLA times while
    it compiles them, after."""
    import jax
    import jax.numpy as jnp

    from vq4dit_jax.diffusion import schedule as diffusion
    from vq4dit_jax.networks.inference import prepare_for_inference

    schedule = diffusion.make_schedule(_STEPS)
    sizes = {pixels: _model(pixels, dry) for pixels in (256, 512)}
    with jax.default_device(jax.devices("cpu")[0]):  # intermediate arrays must not count as the device's memory
        raw = _random_weights(sizes[256], _CODEBOOKS.get(variant))
        how, depth = VARIANTS[variant], sizes[256].depth
        if how is None:
            params = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), raw)
        else:
            ranges = {name: np.full(depth, _RANGE) for name in ("attn/proj", "mlp/fc2")} if how else None
            params = prepare_for_inference(raw, ranges=ranges, **how)
        del raw

    def step(model: Any, params: Any, x: Any, i: Any, labels: Any, noise: Any, modulations: Any = None) -> Any:
        t, y = conditions(model, x, i, labels)
        both = jnp.concatenate([x, x])
        out = model.apply({"params": params}, both, t, y, 4.0, modulations, method="forward_with_cfg")
        return diffusion.ddpm_step(schedule, i, x, out[: x.shape[0]], noise)

    def conditions(model: Any, x: Any, i: Any, labels: Any) -> tuple[Any, Any]:
        y = jnp.concatenate([labels, jnp.full_like(labels, model.num_classes)])
        return jnp.full(y.shape, schedule.timesteps[i], jnp.int32), y

    def modulations(model: Any, params: Any, x: Any, i: Any, labels: Any) -> Any:
        return model.apply({"params": params}, *conditions(model, x, i, labels), method="modulations")

    positions = {pixels: np.zeros((model.grid**2, model.hidden_size), np.float32) for pixels, model in sizes.items()}
    shape_of = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)

    def inputs(pixels: int, images: int) -> tuple[Any, ...]:
        rng, size = np.random.default_rng(images), sizes[pixels].input_size
        draw = lambda: rng.standard_normal((images, size, size, 4), np.float32)
        return draw(), np.int32(_STEP), np.arange(images, dtype=np.int32), draw()

    def lowered(name: str, pixels: int, images: int) -> Any:
        model, given = sizes[pixels], shape_of(inputs(pixels, images))
        weights = {**shape_of(params), "pos_embed": jax.ShapeDtypeStruct(positions[pixels].shape, jnp.bfloat16)}
        hoist, run = jax.jit(functools.partial(modulations, model)), jax.jit(functools.partial(step, model))
        if name == "modulations":
            return hoist.lower(weights, *given[:3])
        return run.lower(weights, *given, *([jax.eval_shape(hoist, weights, *given[:3])] if name == "hoisted" else []))

    configurations = CONFIGURATIONS[: 1 if dry else None]
    names = [(name, *c) for c in configurations for name in ("step", "modulations", "hoisted")]
    programs = {}
    if how is not None:
        with ThreadPoolExecutor(8) as pool:
            waiting = {key: pool.submit(lowered(*key).compile) for key in names}
        programs = {key: future.result() for key, future in waiting.items()}
    program = lambda *key: programs.get(key) or lowered(*key).compile()
    yield timing.READY
    device = jax.devices()[0]
    put = lambda tree: jax.device_put(tree, device)
    params = put(params)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    bursts = 3 if dry else 9
    for hoisted in (False, True):
        for configuration in configurations:
            weights = params | {"pos_embed": put(jnp.asarray(positions[configuration[0]], jnp.bfloat16))}
            operands = weights, *map(put, inputs(*configuration))
            if hoisted:
                operands += (program("modulations", *configuration)(*operands[:4]),)
            run = program("hoisted" if hoisted else "step", *configuration)
            found = timing.wall_times({"": functools.partial(run, *operands)}, jax.block_until_ready, bursts)
            record = _record(variant, configuration, hoisted, found[""])
            if not hoisted:
                memory, planned = device.memory_stats() or {}, run.memory_analysis()
                record |= {
                    "weight_bytes": size,
                    "peak_bytes": memory.get("peak_bytes_in_use"),
                    "program_bytes": planned.argument_size_in_bytes + planned.temp_size_in_bytes,
                    "finite": bool(jnp.isfinite(run(*operands)).all()),
                }
            yield record


def _record(variant: str, configuration: tuple[int, int], hoisted: bool, samples: list[float]) -> dict[str, Any]:
    pixels, images = configuration
    return {
        "section": "steps",
        "variant": variant,
        "pixels": pixels,
        "images": images,
        "modulations_hoisted": hoisted,
        "ms": timing.summary(samples),
    }


def schedule_table(schedule: Any) -> np.ndarray:
    """The `table` of `torch_dit.sampler_step`."""
    s = schedule
    rows = (s.timesteps, s.sqrt_one_minus_alpha_bar, s.sqrt_alpha_bar, s.posterior_x0, s.posterior_xt)
    rows += (s.log_variance_min, s.log_variance_max)
    return np.stack([np.asarray(row, np.float32) for row in rows])


def torchs(mode: str, dry: bool) -> Iterator[Any]:
    """Records of the peer: compiled by torch.compile (in a dry run not at all) and replayed as one CUDA graph.

    mode "default": each block is compiled, once for all 28. "max-autotune": the whole network, at 256 pixels alone; it takes
    minutes.
    """
    import torch

    from benchmarks.gpu import torch_dit
    from vq4dit_jax.diffusion import schedule as diffusion

    yield timing.READY
    device, small = ("cpu", dict(width=128, depth=2, heads=2)) if dry else ("cuda", {})
    torch.manual_seed(0)
    table = torch.from_numpy(schedule_table(diffusion.make_schedule(_STEPS))).to(device)
    wait = lambda _: None if dry else torch.cuda.synchronize()
    configurations = CONFIGURATIONS[: 1 if dry else None] if mode == "default" else ((256, 8), (256, 1))
    for pixels, images in configurations:
        side = pixels // (64 if dry else 8)
        with torch.device(device):
            model = torch_dit.DiT(side, **small).to(torch.bfloat16).eval().requires_grad_(False)
            x, noise = torch.randn(images, 4, side, side), torch.randn(images, 4, side, side)
            i, labels = torch.tensor([_STEP]), torch.arange(images)
        size = sum(p.nbytes for p in model.parameters())
        step = functools.partial(torch_dit.sampler_step, model, table)
        if not dry and mode == "default":
            model.blocks = torch.nn.ModuleList([torch.compile(block, dynamic=False) for block in model.blocks])
        elif not dry:
            step = torch.compile(step, mode="max-autotune-no-cudagraphs", dynamic=False)
        with torch.inference_mode():
            call = functools.partial(step, x, i, labels, noise)
            call = call if dry else _graph(call)
            found = timing.wall_times({"": call}, wait, bursts=3 if dry else 9)
        yield _record(f"torch {mode}", (pixels, images), False, found[""]) | {
            "weight_bytes": size,
            "peak_bytes": None if dry else torch.cuda.max_memory_allocated(),
            "compiled_graphs": None if dry else torch._dynamo.utils.counters["stats"]["unique_graphs"],
        }
        del model, step, call
        if not dry:
            torch._dynamo.reset()
            torch.cuda.empty_cache()


def _graph(call: Any) -> Any:
    """A replay of the kernels that `call` launches, captured after the warm-up that compiles them."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.reset_peak_memory_stats()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
