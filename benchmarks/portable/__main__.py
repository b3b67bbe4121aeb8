"""Size and error of each format and precision of `biomass-jax export`, on Swin-B with seeded weights.

    python -m benchmarks.portable           # the table of docs/export.md; pip install 'biomass-jax[portable]'
    python -m benchmarks.portable --tiny    # a small model in its place: does it run?

Errors are against `predict`'s own forward pass, in Mg/ha: outputs are scaled so that they spread by 100 Mg/ha over the
pixels, as a map of forests does, and no ReLU cuts any off.
"""

import argparse
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common

SPREAD = 100.0  # Mg/ha
TINY = {"embed_dim": 8, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 4]}
HEADER = ("format", "weights", "MB", "rmse, Mg/ha", "max, Mg/ha", "to write, s", "to open and run first, s", "a run, s")


def spread_out(architecture: dict[str, Any], chips: np.ndarray) -> dict[str, Any]:
    """The architecture whose random model's outputs have a standard deviation of `SPREAD`."""
    import jax

    from biomass_jax.models.build import build_module
    from biomass_jax.pipeline.augment import normalize

    linear = architecture | {"final_relu": False}
    module = build_module("biomass", linear)
    means, stds = np.asarray(common.GRANITE_MEANS), np.asarray(common.GRANITE_STDS)
    values = jax.jit(module.apply)(common.random_variables(module), normalize(jax.numpy.asarray(chips), means, stds))
    return linear | {"output_scale": SPREAD / float(np.std(values))}


def opened(path: Path, form: str) -> Callable[[np.ndarray], np.ndarray]:
    """A file of a program as a function, by what its users have."""
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda chips: session.run(None, {"image": chips})[0]
    from jax import export

    with zipfile.ZipFile(path) as file:
        program = export.deserialize(bytearray(file.read("program.jax")))
    return lambda chips: np.asarray(program.call(chips))


def measure(folder: Path, architecture: dict[str, Any], count: int) -> dict[str, dict[str, float]]:
    """Figures of each format and precision."""
    from biomass_jax import bundle
    from biomass_jax.portable.formats import NEEDS, write_onnx, write_stablehlo
    from biomass_jax.portable.program import of_bundle
    from biomass_jax.portable.weights import PRECISIONS
    from biomass_jax.prediction.predictor import Predictor

    chips = np.random.default_rng(0).integers(1, 5000, (count, 224, 224, 6)).astype(np.float32)
    source = common.random_bundle(spread_out(architecture, chips), folder / "bundle")
    model = bundle.load(source)
    exact = Predictor(model).predict_array(chips).astype(np.float64)
    found = {}
    for form in NEEDS:
        for precision in PRECISIONS:
            path = folder / f"{precision}.{form}"
            began = time.perf_counter()
            program = of_bundle(model, form=form, precision=precision)
            write_onnx(program, path, size=(224, 224)) if form == "onnx" else write_stablehlo(program, path)
            writing, began = time.perf_counter() - began, time.perf_counter()
            run = opened(path, form)
            error = run(chips) - exact
            first = time.perf_counter() - began
            found[f"{form}, {precision}"] = {
                "mb": path.stat().st_size / 1e6,
                "rmse": float(np.sqrt((error**2).mean())),
                "max": float(np.abs(error).max()),
                "write_s": writing,
                "first_s": first,
                "run_s": min(common.timed(lambda: run(chips)) for _ in range(3)),  # noqa: B023
            }
            path.unlink()
    return found | {"outputs": {"mean": float(exact.mean()), "std": float(exact.std())}}


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.portable", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a small model")
    parser.add_argument("--chips", type=int, default=2, help="images of 224 x 224 px")
    parser.add_argument("--out", type=Path, default=common.FOLDER / "portable.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), TINY if args.tiny else {}, args.chips)
    rows = [
        (
            *name.split(", "),
            f"{row['mb']:.1f}",
            *(f"{row[what]:.2g}" for what in ("rmse", "max")),
            *(f"{row[what]:.1f}" for what in ("write_s", "first_s")),
            f"{row['run_s']:.2f}",
        )
        for name, row in found.items()
        if name != "outputs"
    ]
    common.print_table(HEADER, rows)
    common.write_json(args.out, {"figures": found, "machine": common.machine()})


if __name__ == "__main__":
    main()
