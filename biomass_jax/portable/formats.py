"""Programs as files: StableHLO for any size of image, opened by JAX alone, and ONNX for one, opened by any runtime."""

import contextlib
import importlib.util
import io
import logging
import warnings
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import export as jax_export

from biomass_jax import bundle
from biomass_jax.errors import ConvertError
from biomass_jax.portable.program import INPUT, STEP, Program, of_bundle
from biomass_jax.runtime import numerics
from biomass_jax.runtime.files import replacing

# What writes a format, beside JAX.
NEEDS = {"stablehlo": "flatbuffers", "onnx": "jax2onnx"}
PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAM = "program.jax"  # in the zip
OPSET = 21  # of ONNX 1.16, of 2024: what reads models today reads it


def export(
    source: str | Path,
    output: str | Path,
    *,
    form: str,
    precision: str = "float32",
    size: tuple[int, int] = (224, 224),
    overwrite: bool = False,
) -> list[tuple[str, str]]:
    """Write a bundle as a program: `image` [batch, height, width, bands] -> its label, [batch, height, width], float32.

    Args:
        source: the bundle's folder.
        output: the file to be.
        form: `stablehlo` or `onnx`.
        precision: of the stored weights: `float32`, `bfloat16` or `int8`.
        size: height and width of the images of an ONNX model.
        overwrite: replace an existing file.

    Returns:
        What was done, one (label, text) a line.

    Raises:
        ConvertError: the file exists, a library is missing, a setting or a size isn't one of those that there are.
        PredictionError: a bundle of another task.
        BundleError: no bundle there, or a damaged one.
    """
    output = Path(output)
    if output.exists() and not overwrite:
        raise ConvertError(f"{output} is there already; --overwrite replaces it")
    if form not in NEEDS:
        raise ConvertError(f"format is {form!r}; expected one of {', '.join(NEEDS)}")
    if importlib.util.find_spec(NEEDS[form]) is None:
        raise ConvertError(f"format {form} needs {NEEDS[form]}; pip install 'biomass-jax[portable]'")
    if any(side < STEP or side % STEP for side in size):
        raise ConvertError(f"size is {size[0]}x{size[1]} px; expected multiples of {STEP}")
    program = of_bundle(bundle.load(source), form=form, precision=precision)
    output.parent.mkdir(parents=True, exist_ok=True)
    if form == "onnx":
        write_onnx(program, output, size=size)
    else:
        write_stablehlo(program, output)
    sides = "{}, {}".format(*size) if form == "onnx" else f"{STEP} * any, {STEP} * any"
    done = [
        ("file", f"{output}, {output.stat().st_size / 1e6:.1f} MB"),
        ("input", f"{INPUT}, float32 [batch, {sides}, {len(program.bands)}]: {', '.join(program.bands)}"),
        ("output", f"{program.output}, float32 [batch, height, width]"),
        ("weights", precision),
    ]
    if program.left_out:
        done.append(("left out", f"{', '.join(program.left_out)}: {program.output} is the model's own answer alone"))
    return done


def for_any_size(program: Program) -> jax_export.Exported:
    """The program for any batch, any height and width that are multiples of `STEP`, and all `PLATFORMS`."""
    sizes = jax_export.symbolic_shape(f"batch, {STEP}*height, {STEP}*width, {len(program.bands)}")
    with numerics.fixed(), _without_folders():
        image = jax.ShapeDtypeStruct(sizes, jnp.float32)
        return jax_export.export(jax.jit(program.__call__), platforms=PLATFORMS)(image)


@contextlib.contextmanager
def _without_folders() -> Iterator[None]:
    """Of each operation a program says in which file it was written: by name, without this machine's folders."""
    setting = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, setting)
    jax.config.update(setting, r".*[\\/]")
    try:
        yield
    finally:
        jax.config.update(setting, before)


def write_stablehlo(program: Program, path: Path) -> None:
    """Write a zip of `program.jax`, which `jax.export.deserialize` reads, and the texts of `program.meta`.

    The zip is not compressed: weights hardly become smaller.

    Args:
        program: of a bundle.
        path: the file, whole or not at all; one that is there is replaced.
    """
    data = for_any_size(program).serialize()
    with replacing(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as file:
        _add(file, PROGRAM, bytes(data))
        for name, text in program.meta.items():
            _add(file, name, text.encode())


def _add(file: zipfile.ZipFile, name: str, data: bytes) -> None:
    """With a fixed time: equal programs give equal files."""
    file.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)


def write_onnx(program: Program, path: Path, *, size: tuple[int, int]) -> None:
    """Write an ONNX model of opset `OPSET` for any batch of images of one size; metadata_props hold `program.meta`.

    Args:
        program: of a bundle.
        path: the file, whole or not at all; one that is there is replaced.
        size: height and width of its images, multiples of `STEP`.

    Raises:
        ConvertError: this version of jax2onnx doesn't go with this version of JAX.
    """
    with numerics.fixed(), _quietly():
        import onnx
        from jax2onnx import to_onnx  # which says so where it can't load what it knows of other libraries

        try:
            model = to_onnx(
                program.__call__,
                [("batch", *size, len(program.bands))],
                model_name=program.output,
                opset=OPSET,
                input_names=[INPUT],
                output_names=[program.output],
            )
        except Exception as error:  # it reaches into JAX, and fails in ways of each version's own
            raise ConvertError(
                f"jax2onnx {version('jax2onnx')} can't convert with JAX {jax.__version__} ({type(error).__name__}: "
                f"{str(error).strip().partition(chr(10))[0]}); docs/export.md says which versions go together"
            ) from error
    onnx.helper.set_model_props(model, dict(program.meta))
    onnx.checker.check_model(model)
    with replacing(path) as partial:
        onnx.save(model, partial)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what jax2onnx prints of each layer, and warns of types that it leaves open inside a graph."""
    levels = {log: log.level for log in (logging.getLogger("onnx_ir"), logging.getLogger("jax2onnx"))}
    for log in levels:
        log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in levels.items():
            log.setLevel(level)
