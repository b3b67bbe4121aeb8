"""The parts' work, each in a process of its own: `python -m benchmarks.gpu.jobs PART RESULT.json [--tiny]`.

Each figure is in the file as soon as it is there, since the process may be ended at any moment. jax, flax, optax,
orbax and NumPy are all that is needed; the rival's parts want torch.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from benchmarks.jax_work import evaluating, memory, stepping
from benchmarks.programs import trace
from biomass_jax.runtime.files import write_json

SIDE = 224
# Heads as wide as the kernel takes at least.
TINY = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "decoder_channels": 8}
FORWARD_SIZES, STEP_SIZES, RIVAL_SIZES = (128, 256, 512, 32, 1), (64, 128, 32), (128,)
STATISTICS = {"means": common.GRANITE_MEANS, "stds": common.GRANITE_STDS}

Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class GpuJob:
    """What a part is given: where its figures go, and whether they are only to show that it works."""

    path: Path
    tiny: bool = False

    @property
    def fields(self) -> Figures:
        """Of the model: none for Swin-B."""
        return TINY if self.tiny else {}

    def sizes(self, usual: tuple[int, ...]) -> tuple[int, ...]:
        """Batch sizes, the most telling first."""
        return (2,) if self.tiny else usual

    def keep(self, found: Figures) -> None:
        """Write all that was found so far."""
        write_json(self.path, found)


def ceilings(job: GpuJob) -> Iterator[Figures]:
    """Large products of both types, TFLOP/s, and the rate of x + 1, TB/s."""
    found: Figures = {}
    for dtype in ("bfloat16", "float32"):
        found[f"product_{dtype}_tflops"] = common.matmul_peak(dtype, 256 if job.tiny else None)() / 1e3
        yield found
    x = jnp.zeros(2**12 if job.tiny else 2**29, jnp.float32)  # 2 GiB
    seconds = _median(evaluating(jax.jit(jnp.add), x, 1.0))
    yield found | {"copy_tbytes": 2 * x.nbytes / seconds / 1e12}


def _median(turn: Callable[[], float]) -> float:
    """Seconds of a call, of three turns."""
    return common.spread([turn() for _ in range(3)])["median"]


def _module(job: GpuJob, dtype: str, attention: str = "auto", **more: Any) -> Any:
    from biomass_jax.models.build import build_module

    return build_module("biomass", job.fields | more, dtype, attention=attention)


def _predicting(job: GpuJob, dtype: str, attention: str = "auto", **more: Any) -> tuple[Any, Any]:
    """A function of weights and int16 chips, as predictions run it, and the weights."""
    from biomass_jax.models.build import in_compute_dtype

    module = _module(job, dtype, attention, **more)
    variables = in_compute_dtype(common.random_variables(module), dtype)
    return functools.partial(predict, module), jax.device_put(variables)


def predict(module: Any, variables: Any, chips: jax.Array) -> jax.Array:
    """int16 chips [B, H, W, 6] as predictions run them."""
    from biomass_jax.pipeline.augment import normalize, without_fill

    means, stds = (np.asarray(STATISTICS[name], np.float32) for name in ("means", "stds"))
    return module.apply(variables, normalize(without_fill(chips, -9999), means, stds))


def _chips(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 5000, (count, SIDE, SIDE, 6)).astype(np.int16)


def forward(job: GpuJob) -> Iterator[Figures]:
    """The forward pass in bfloat16 over batch sizes: chips/s and seconds to compile."""
    run, variables = _predicting(job, "bfloat16")
    found: Figures = {"batches": {}}
    for size in job.sizes(FORWARD_SIZES):
        chips = jax.device_put(_chips(size))
        began = time.perf_counter()
        program = jax.jit(run).lower(variables, chips).compile()
        compiling = time.perf_counter() - began
        seconds = _median(evaluating(program, variables, chips))
        found["batches"][size] = _timing(size, seconds, compiling, common.CHIP_GFLOP)
        yield found


def _timing(size: int, seconds: float, compiling: float, gflop: float) -> Figures:
    rates = {"chips_per_s": size / seconds, "tflops": size * gflop / seconds / 1e3}
    return {"ms": 1e3 * seconds, **rates, "compile_s": compiling, "memory_gib": memory()}


def attention(job: GpuJob) -> Iterator[Figures]:
    """Both ways to compute attention, alone: milliseconds forward and with the backward pass, a batch of 128."""
    from biomass_jax.models import swin_ops
    from biomass_jax.models.fused import attention as kernel

    found: Figures = {}
    stages = {"stage 1": (56, 4), "stage 3": (14, 16)} if not job.tiny else {"stage 3": (14, 2)}
    for name, (side, heads) in stages.items():
        for shift in (0, 3):
            shape = (2 if job.tiny else 128, side, side, 3 * 32 * heads)
            qkv = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
            bias = jax.random.normal(jax.random.key(1), (heads, 49, 49))
            ways = {
                way: functools.partial(attend, window_size=7, shift=shift)
                for way, attend in (("einsum", swin_ops.attend_map), ("fused", kernel.attend))
            }
            for way, function in ways.items():

                def both(qkv: jax.Array, bias: jax.Array, function: Any = function) -> Any:
                    return jax.grad(lambda *of: (function(*of).astype(jnp.float32) ** 2).sum(), (0, 1))(qkv, bias)

                label = f"{name}, shift {shift}, {way}"
                found[label] = {"forward_ms": 1e3 * _median(evaluating(jax.jit(function), qkv, bias))}
                yield found
                found[label]["both_ms"] = 1e3 * _median(evaluating(jax.jit(both), qkv, bias))
                yield found
            error = jnp.abs(jax.jit(ways["einsum"])(qkv, bias) - jax.jit(ways["fused"])(qkv, bias)).max()
            found[f"{name}, shift {shift}, largest difference"] = {"value": float(error)}
            yield found


def mlp(job: GpuJob) -> Iterator[Figures]:
    """The second half of a block by the kernel and by plain JAX, alone: milliseconds forward, a batch of 128."""
    from biomass_jax.models.fused import mlp as kernel

    found: Figures = {}
    for name, side, c in (("stage 1", 56, 128), ("stage 2", 28, 256)):
        shape = (2 if job.tiny else 128, 7 if job.tiny else side, side, c)
        x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
        sizes = ((c,), (c,), (c, 4 * c), (4 * c,), (4 * c, c), (c,))
        drawn = [jax.random.normal(jax.random.key(1 + i), size) * size[0] ** -0.5 for i, size in enumerate(sizes)]
        weights = kernel.MlpWeights(*[one.astype(jnp.bfloat16) if one.ndim == 2 else one for one in drawn])
        outputs = {}
        for way, function in (("plain", kernel.plain_add_mlp), ("fused", kernel.add_mlp)):
            compiled = jax.jit(function)
            outputs[way] = compiled(x, weights)
            found[f"{name}, {way}"] = {"forward_ms": 1e3 * _median(evaluating(compiled, x, weights))}
            yield found
        difference = jnp.abs(outputs["plain"].astype(jnp.float32) - outputs["fused"].astype(jnp.float32)).max()
        found[f"{name}, largest difference"] = {"value": float(difference)}
        yield found


def step(job: GpuJob) -> Iterator[Figures]:
    """The training step as runs compile it, bfloat16 over float32 weights: chips/s, memory, seconds to compile."""
    found: Figures = {"batches": {}}
    for size in job.sizes(STEP_SIZES):
        began = time.perf_counter()
        state, batch, train = _training(job, size)
        jax.block_until_ready(state)
        drawing = time.perf_counter() - began
        program = train.lower(state, batch).compile()
        compiling = time.perf_counter() - began - drawing
        turn = stepping(program, state, batch)
        del state  # which the step was given
        timing = _timing(size, _median(turn), compiling, common.TRAINING * common.CHIP_GFLOP)
        found["batches"][size] = timing | {"drawing_s": drawing}
        yield found


def _training(job: GpuJob, size: int) -> tuple[Any, dict[str, jax.Array], Any]:
    """State, batch and compiled step of granite's fine-tuning."""
    from biomass_jax.runtime import mesh as sharding
    from biomass_jax.training import state

    mesh = sharding.create_mesh()
    fresh, planned, train = planned_training(_module(job, "bfloat16"), mesh)
    label = np.full((size, SIDE, SIDE), -1, np.float32)
    rng = np.random.default_rng(0)
    for one in label.reshape(size, -1):
        one[rng.choice(SIDE * SIDE, 250, replace=False)] = rng.uniform(0, 300, 250)
    batch = jax.device_put({"image": _chips(size), "label": label}, sharding.batch_sharding(mesh))
    return state.create_train_state(fresh, planned), batch, train


def planned_training(module: Any, mesh: jax.sharding.Mesh) -> tuple[Any, Any, Any]:
    """How a state is drawn, its shapes, and the step of granite's fine-tuning, without a config, shards or files."""
    from biomass_jax.tasks.base import InputStatistics
    from biomass_jax.tasks.regression import Regression
    from biomass_jax.training import optimizer, state, steps

    numbers = {name: np.asarray(values, np.float32) for name, values in STATISTICS.items()}
    task = Regression(module, InputStatistics(**numbers, fill=-9999))
    shapes = jax.eval_shape(lambda: task.init(jax.random.key(0)))["params"]
    adamw = optimizer.create_optimizer(shapes, weight_decay=0.033)
    fresh, planned = state.plan_train_state(task, adamw, mesh, seed=0)
    settings = steps.StepSettings(seed=0, trainable=jax.tree.map(lambda _: True, shapes))
    schedule = optimizer.create_schedule("constant", learning_rate=3e-4)
    return fresh, planned, steps.compile_steps(task, adamw, schedule, settings, mesh, planned).train


def parity(job: GpuJob) -> Iterator[Figures]:
    """Errors of float32, TF32 and bfloat16, by both attentions, against float32 on the CPU; seeded weights.

    In Mg/ha: outputs are scaled so that the exact ones spread by 100 Mg/ha, as a map of forests does. The last layer is
    linear here and float32 in all of them, so errors scale with it.
    """
    host = jax.local_devices(backend="cpu")[0]
    chips = _chips(2)

    def predicted(dtype: str, precision: str, attention: str, device: jax.Device | None = None) -> np.ndarray:
        run, variables = _predicting(job, dtype, attention, final_relu=False)
        with jax.default_device(device), jax.default_matmul_precision(precision):
            values = jax.jit(run)(jax.device_put(variables, device), jax.device_put(chips, device))
        return np.asarray(values).astype(np.float64)

    exact = predicted("float32", "highest", "einsum", host)
    scale = 100 / exact.std()
    found: Figures = {"outputs before scaling": {"mean": float(exact.mean()), "std": float(exact.std())}}
    ways = {"float32": ("float32", "highest"), "TF32": ("float32", "default"), "bfloat16": ("bfloat16", "default")}
    for way, (dtype, precision) in ways.items():
        for attention in ("einsum", "fused"):
            error = scale * (predicted(dtype, precision, attention) - exact)
            rmse, most = float(np.sqrt((error**2).mean())), float(np.abs(error).max())
            found[f"{way}, {attention}, Mg/ha"] = {"rmse": rmse, "max": most}
            yield found


def profile(job: GpuJob) -> Iterator[Figures]:
    """Share of a forward pass and of a training step by kind of operation, of some traced calls each."""
    size = job.sizes(FORWARD_SIZES)[0]
    run, variables = _predicting(job, "bfloat16")
    chips = jax.device_put(_chips(size))
    program = jax.jit(run).lower(variables, chips).compile()
    found: Figures = {"forward": trace.by_kind(program.as_text() or "", evaluating(program, variables, chips))}
    yield found
    state, batch, train = _training(job, job.sizes(STEP_SIZES)[0])
    compiled = train.lower(state, batch).compile()
    yield found | {"step": trace.by_kind(compiled.as_text() or "", stepping(compiled, state, batch))}


def rival(job: GpuJob) -> Iterator[Figures]:
    """The PyTorch original's model, eager and compiled: forward and training step, chips/s."""
    from benchmarks.rival import model, work
    from biomass_jax.models.build import architecture_of

    fields = architecture_of(_module(job, "float32"))
    device = "cpu" if job.tiny else "cuda"
    found: Figures = {}
    for name, run, sizes in (("forward", work.time_forward, RIVAL_SIZES), ("step", work.time_step, STEP_SIZES[:1])):
        for compiled in (False, True):
            if compiled and job.tiny:  # minutes on CPU
                continue
            size = job.sizes(sizes)[0]
            facts, once = run(model.Model(fields).eval().to(device), size, "bfloat16", device, compiled)
            turns = [once() for _ in range(3)]
            seconds = common.spread(common.column(turns, "seconds"))["median"]
            found[f"{name}, {'compiled' if compiled else 'eager'}"] = {
                "batch_size": size,
                "chips_per_s": size / seconds,
                "compile_s": facts["seconds_first"],
                "memory_gib": turns[-1]["memory_gib"],
            }
            yield found


PARTS: dict[str, Callable[[GpuJob], Iterator[Figures]]] = {
    "ceilings": ceilings,
    "forward": forward,
    "attention": attention,
    "mlp": mlp,
    "step": step,
    "rival": rival,
    "parity": parity,
    "profile": profile,
}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("result", type=Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    job = GpuJob(options.result, options.tiny)
    for found in PARTS[options.part](job):
        job.keep(found)


if __name__ == "__main__":
    main()
