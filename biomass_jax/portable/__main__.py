"""`python -m biomass_jax.portable`: a bundle as a program that runs without this package, StableHLO or ONNX."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from biomass_jax.runtime import environment
from biomass_jax.runtime.lock import writer_beside

_SIZE = "224"


def _sides(text: str) -> tuple[int, int]:
    try:
        height, width = (int(part) for part in (text.split("x") if "x" in text else (text, text)))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected pixels as 224 or as HEIGHTxWIDTH, 224x448") from None
    return height, width


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m biomass_jax.portable",
        description="Write a bundle as a program that runs without biomass_jax: digital numbers in, the first band of "
        "its maps out. StableHLO takes images of any size and opens with JAX alone; ONNX takes those of one size and "
        "opens with onnxruntime and its like. To make a PyTorch checkpoint again: biomass-jax convert --to torch.",
        allow_abbrev=False,
    )
    result.add_argument("--bundle", required=True, metavar="BUNDLE", help="the model's folder")
    result.add_argument("--format", required=True, choices=("stablehlo", "onnx"), help="what to write")
    result.add_argument("--output", required=True, metavar="FILE", help="the file to make")
    result.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "int8"),
        default="float32",
        help="of the stored weights; computing is float32 in any case (default float32)",
    )
    result.add_argument(
        "--size",
        type=_sides,
        metavar="PX",
        help=f"of an ONNX model's images, multiples of 32: 224, or HEIGHTxWIDTH (default {_SIZE})",
    )
    result.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 where it succeeded, 1 with one line on standard error where it did not."""
    parse = parser()
    options = parse.parse_args(arguments)
    if options.format == "stablehlo" and options.size is not None:
        parse.error("--size: has no effect with --format stablehlo, which takes images of any size")
    try:
        environment.settle()
        from biomass_jax.portable.formats import export

        with writer_beside(Path(options.output)):
            lines = export(
                options.bundle,
                options.output,
                form=options.format,
                precision=options.precision,
                size=options.size or _sides(_SIZE),
                overwrite=options.overwrite,
            )
    except Exception as error:
        return environment.failed(error, OSError)
    for label, text in lines:
        print(f"{label:8}  {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
