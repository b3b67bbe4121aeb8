"""Our jobs, each in a process of its own: `python -m benchmarks.jax_work JOB ARGUMENTS` (see `common.Worker`)."""

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from benchmarks.programs import trace

Once = Callable[[], dict[str, Any]]


def describe() -> tuple[dict[str, Any], Once]:
    """What computes."""
    device = jax.devices()[0]
    return {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()}, dict


def peak(dtype: str = "float32") -> tuple[dict[str, Any], Once]:
    """The matmul peak alone, the median of three."""
    rate = common.matmul_peak(dtype)
    return {"gflops_peak": common.spread([rate() for _ in range(3)])["median"]}, dict


def memory() -> float:
    """Peak, GiB: of the process on CPU, of JAX's buffers on a GPU."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in stats else common.peak_rss_gib()


def reference(bundle: str, shared: str, count: int = 2) -> tuple[dict[str, Any], Once]:
    """Images, our output and the architecture, for `torch_rival.check`."""
    from biomass_jax import bundle as bundles

    opened = bundles.load(bundle)
    images = np.random.default_rng(0).standard_normal((count, 224, 224, 6), np.float32)
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(opened.module().apply)(opened.variables, images)
    fields = json.dumps(opened.meta["architecture"])
    np.savez(shared, images=images, ours=np.asarray(ours), fields=fields)
    return {"fields": fields}, dict


def forward(bundle: str, batch_size: int, dtype: str) -> tuple[dict[str, Any], Once]:
    """Seconds of the program that predictions run, on int16 chips that are there, and the matmul peak beside it."""
    from biomass_jax import bundle as bundles
    from biomass_jax.prediction.forward import Forward

    opened = bundles.load(bundle)
    predict = Forward(opened, dtype=dtype, matmul_precision="highest")
    chips = np.random.default_rng(0).integers(1, 5000, (batch_size, 224, 224, 6)).astype(np.int16)
    images = jax.device_put(chips)
    seconds_compile = common.timed(lambda: jax.block_until_ready(predict(images, opened.fill)))
    results: list[Any] = []

    def call() -> None:
        results[:] = [predict(images, opened.fill)]

    once = common.per_call(call, lambda: jax.block_until_ready(results))
    facts = {"seconds_compile": seconds_compile, "memory_gib": memory()}
    rate = common.matmul_peak(dtype)
    return facts, lambda: {"gflops_peak": rate(), "seconds": once()}


def uncertainty(bundle: str, ensemble: str, samples: int, side: int, dtype: str) -> tuple[dict[str, Any], Once]:
    """Seconds of the program that predictions run, `plain` and by each way of being sure, one after another a round.

    Tiles of `side` px, a batch as large as maps have it; `ensemble` is a bundle whose members share an encoder.
    """
    from biomass_jax import bundle as bundles
    from biomass_jax.prediction.forward import Forward
    from biomass_jax.uncertainty.spread import Spread

    ways = {"plain": (bundle, "none"), "dropout": (bundle, "dropout"), "symmetries": (bundle, "symmetries")}
    ways["ensemble"] = (ensemble, "model")
    opened = {path: bundles.load(path) for path in (bundle, ensemble)}
    programs = {
        name: Forward(opened[path], dtype=dtype, spread=Spread(way, samples)) for name, (path, way) in ways.items()
    }
    batch_size = programs["plain"].batch_size(None)
    tiles = np.random.default_rng(0).integers(1, 5000, (batch_size, side, side, 6)).astype(np.int16)
    images = jax.device_put(tiles)

    def timing(program: Forward) -> Callable[[], float]:
        results: list[Any] = []

        def call() -> None:
            results[:] = [program(images, -9999)]

        return common.per_call(call, lambda: jax.block_until_ready(results))

    timings = {name: timing(program) for name, program in programs.items()}
    channels = {name: list(program.channels) for name, program in programs.items()}
    facts = {"batch_size": batch_size, "channels": channels}
    return facts, lambda: {name: once() for name, once in timings.items()}


def training(shards: str, batch_size: int, dtype: str, fields: dict[str, Any], steps: int = 1) -> Any:
    """The config of the released model's training, on the benchmark's shards; `fields` of another model than Swin-B."""
    from configs import finetune_all_biomes

    config = finetune_all_biomes.get_config()
    config.data.path = shards
    config.data.threads = min(8, 2 * (os.cpu_count() or 1))
    config.batch_size, config.dtype, config.epochs, config.steps = batch_size, dtype, None, steps
    config.log_every = 1
    for name, value in fields.items():
        config.model[name] = tuple(value) if isinstance(value, list) else value
    return config


def built(config: Any) -> tuple[Any, dict[str, jax.Array]]:
    """A run as `biomass_jax.main` builds it, closed, and its first batch."""
    from biomass_jax.training.run import set_up

    with tempfile.TemporaryDirectory() as folder:
        run = set_up(config, Path(folder), command="")
        batch = next(run.feed.batches(start=0)).arrays
        run.close()
    return run, batch


def stepping(program: Any, state: Any, batch: Any) -> Callable[[], float]:
    """Seconds of the step, whose state goes from one call to the next."""
    held: list[Any] = [state]
    metrics: list[Any] = []

    def call() -> None:
        held[0], found = program(held[0], batch)
        metrics[:] = [found]

    return common.per_call(call, lambda: jax.block_until_ready(metrics))


def step(
    shards: str, batch_size: int, dtype: str, fields: dict[str, Any], settings: dict[str, Any] | None = None
) -> tuple[dict[str, Any], Once]:
    """Seconds of the step that `biomass_jax.main` compiles: int16 chips in; everything up to AdamW inside.

    `settings` are fields of the config by their dotted names.
    """
    from biomass_jax.training.steps import compiled

    config = training(shards, batch_size, dtype, fields)
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in (settings or {}).items()}
    config.update_from_flattened_dict(given)
    run, batch = built(config)
    trained = trained_weights(config, run.state.params)
    began = time.perf_counter()
    program, state = compiled(run.steps.train, run.state, batch), run.state
    seconds_compile = time.perf_counter() - began
    del run  # holds the first state, which the step is given
    once = stepping(program, state, batch)
    del state
    facts: dict[str, Any] = {"seconds_compile": seconds_compile, "memory_gib": memory()}
    facts |= {"program_gib": program_memory(program), "trained": trained}
    rate = common.matmul_peak(dtype)
    return facts, lambda: {"gflops_peak": rate(), "seconds": once()}


def program_memory(program: Any) -> float:
    """What a compiled program holds at its peak by the compiler's own count, GiB: arguments, results, all between."""
    sizes = program.memory_analysis()
    ours = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return (ours + sizes.temp_size_in_bytes) / 2**30


def trained_weights(config: Any, params: Any) -> dict[str, list[int]]:
    """Of the encoder, and of decoder and head: how many weights a config trains, and how many there are."""
    from biomass_jax.training.optimizer import trainable_mask
    from biomass_jax.training.run import frozen
    from biomass_jax.trees import flatten

    sizes = {path: leaf.size for path, leaf in flatten(params).items()}
    trained = flatten(trainable_mask(params, frozen(config, params)))
    parts = {"encoder": ("encoder/",), "decoder and head": ("decoder/", "head/")}
    return {
        name: [
            sum(size for path, size in sizes.items() if path.startswith(start) and (trained[path] or not only))
            for only in (True, False)
        ]
        for name, start in parts.items()
    }


def breakdown(shards: str, batch_size: int, dtype: str, fields: dict[str, Any]) -> tuple[dict[str, Any], Once]:
    """Seconds of growing parts of a training step: inputs, with forward, with backward, all of it.

    `kinds` among the facts: share of the step by kind of operation, of one traced step.
    """
    from biomass_jax.runtime import cpu
    from biomass_jax.training.steps import StepSettings, accumulated_sums

    on_cpu = jax.default_backend() == "cpu"  # there the step is traced and compiled by other means
    run, batch = built(training(shards, batch_size, dtype, fields))
    task, state, key = run.task, run.state, jax.random.key(0)
    settings = StepSettings(seed=0, trainable=jax.tree.map(lambda _: True, state.params))

    def inputs(state: Any, batch: Any) -> Any:
        return task.inputs(batch, key)

    def loss(state: Any, batch: Any) -> Any:
        return task.loss_sums(state.evaluated(), inputs(state, batch), key)

    def gradient(state: Any, batch: Any) -> Any:
        return accumulated_sums(state, inputs(state, batch), key, task=task, settings=settings)

    parts: dict[str, Callable[[], float]] = {}
    for name, function in (("inputs", inputs), ("forward", loss), ("backward", gradient)):
        parts[name] = evaluating(
            jax.jit(
                cpu.for_training(function) if on_cpu else function,
                compiler_options=cpu.COMPILER_OPTIONS if on_cpu else None,
            )
            .lower(state, batch)
            .compile(),
            state,
            batch,
        )
    held = {name: timing() for name, timing in parts.items()}  # warm, and before the step takes the state away
    program = run.steps.train.lower(state, batch).compile()
    copy = jax.tree.map(jnp.copy, state)
    parts["step"] = stepping(program, copy, batch)
    held["step"] = parts["step"]()
    kinds = trace.by_kind(program.as_text(), parts["step"])
    return {"kinds": kinds, "first": held}, lambda: {name: timing() for name, timing in parts.items()}


def evaluating(program: Any, state: Any, batch: Any) -> Callable[[], float]:
    """Seconds of a function of state and batch."""
    results: list[Any] = []

    def call() -> None:
        results[:] = [program(state, batch)]

    return common.per_call(call, lambda: jax.block_until_ready(results))


def load_chips(shards: str, batch_size: int, chips: int) -> tuple[dict[str, Any], Once]:
    """Chips/s of the pipeline alone, shards in the page cache: `chips` of them a round."""
    from biomass_jax.data import sources
    from biomass_jax.pipeline import batches as pipeline

    threads = training(shards, batch_size, "float32", {}).data.threads
    batches = pipeline.train_batches(
        sources.open_source(shards, "train"), batch_size=batch_size, seed=0, threads=threads
    )
    count = -(-chips // batch_size)

    def several() -> None:
        for _ in range(count):
            next(batches)

    several()
    return {"threads": threads}, lambda: {"chips_per_s": count * batch_size / common.timed(several)}


def waiting(
    shards: str, batch_size: int, dtype: str, fields: dict[str, Any], steps: int
) -> tuple[dict[str, Any], Once]:
    """What a run of the loop says of itself, without its first lines: share of the time waited for data."""
    from biomass_jax.training.run import train_and_evaluate

    with tempfile.TemporaryDirectory(dir=common.FOLDER) as folder:
        train_and_evaluate(training(shards, batch_size, dtype, fields, steps), Path(folder), stop=lambda: False)
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "perf/waiting" in line][3:]
    facts = {name: common.column(found, f"perf/{name}") for name in ("waiting", "chips_per_s")}
    return facts | {"memory_gib": memory()}, dict


def map_scene(bundle: str, scene: str, out: str) -> tuple[dict[str, Any], Once]:
    """Seconds of a map in a running process, and where they go; stages overlap."""
    from biomass_jax.prediction.predictor import Predictor
    from biomass_jax.runtime.mesh import local_placement

    predictor = Predictor.open(bundle, **local_placement())
    predictor.warm_up()

    def once() -> dict[str, Any]:
        result = predictor.predict_file(scene, out, overwrite=True)
        facts = {"seconds": result.seconds, "chips": result.chips, "stages": result.timings}
        return facts | {"memory_gib": common.peak_rss_gib()}

    return {"batch_size": predictor.batch_size}, once


def costs(
    shards: str, forward_sizes: list[int], step_sizes: list[int], dtype: str, fields: dict[str, Any]
) -> tuple[dict[str, Any], Once]:
    """FLOPs and bytes that the compiler counts in our programs, by batch size; nothing is run."""
    from biomass_jax.models.build import abstract_variables, build_module

    module = build_module("biomass", fields, dtype)
    variables = abstract_variables(module)
    found: dict[str, dict[int, Any]] = {"forward": {}, "step": {}}
    for size in forward_sizes:
        images = jax.ShapeDtypeStruct((size, 224, 224, 6), jnp.float32)
        found["forward"][size] = counted(jax.jit(module.apply).lower(variables, images))
    if step_sizes:
        run, batch = built(training(shards, 1, dtype, fields))
        for size in step_sizes:
            rows = {name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for name, x in batch.items()}
            found["step"][size] = counted(run.steps.train.lower(run.state, rows))
    return found, dict


def counted(lowered: Any) -> dict[str, float]:
    """The compiler's own count for a compiled program, and its temporary memory."""
    program = lowered.compile()
    cost, sizes = program.cost_analysis(), program.memory_analysis()
    return {"flops": cost["flops"], "bytes": cost["bytes accessed"], "temporary_bytes": sizes.temp_size_in_bytes}


JOBS: dict[str, common.Job] = {
    "describe": describe,
    "peak": peak,
    "reference": reference,
    "forward": forward,
    "uncertainty": uncertainty,
    "step": step,
    "breakdown": breakdown,
    "load": load_chips,
    "waiting": waiting,
    "map": map_scene,
    "costs": costs,
}

if __name__ == "__main__":
    common.serve(JOBS)
