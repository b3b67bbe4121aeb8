"""`python -m biomass_jax.convert`: PyTorch checkpoints to model bundles and back."""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from biomass_jax.convert.declared import Options
from biomass_jax.runtime import environment
from biomass_jax.runtime.lock import writer_beside

_OPTIONS = tuple(field.name for field in dataclasses.fields(Options) if field.name != "command")
_DESCRIPTION = """\
Turn a PyTorch checkpoint into a model bundle, a bundle back into a checkpoint, or look at either.

  python -m biomass_jax.convert --input biomass_model.ckpt --output bundle --config config.yaml
  python -m biomass_jax.convert --input hf://ibm-granite/granite-geospatial-biomass/biomass_model.ckpt \\
      --config hf://ibm-granite/granite-geospatial-biomass/config.yaml --output bundle
  python -m biomass_jax.convert --input bundle --output model.ckpt --to torch
  python -m biomass_jax.convert --inspect biomass_model.ckpt
  python -m biomass_jax.convert --verify bundle

Layouts are recognised by their keys: granite (terratorch's prithvi_swin with UPerNet), SimMIM, Microsoft and timm Swin.
Nothing in a file is executed. What neither the checkpoint nor config.yaml says must be given as a flag.
"""


def _with_commas(kind: Callable[[str], object], what: str) -> Callable[[str], tuple[object, ...]]:
    def values(text: str) -> tuple[object, ...]:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: expected {what} with commas between them") from None

    return values


def _window(text: str) -> int:
    size = int(text)
    if not 1 <= size <= 64:
        raise argparse.ArgumentTypeError(f"{size}: expected a window of 1 to 64 tokens")
    return size


def parser() -> argparse.ArgumentParser:
    """The command line."""
    numbers, names = _with_commas(float, "numbers"), _with_commas(str.strip, "names")
    result = argparse.ArgumentParser(
        prog="python -m biomass_jax.convert",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    files = result.add_argument_group("files")
    files.add_argument("--input", metavar="FILE", help="checkpoint, hf://OWNER/REPO[@REVISION]/FILE, or a bundle")
    files.add_argument("--output", metavar="PATH", help="bundle folder to make; with --to torch, a file")
    files.add_argument("--config", metavar="YAML", help="the training's config.yaml (a path or hf://...)")
    files.add_argument("--to", choices=("bundle", "torch"), default="bundle", help="what to write (default bundle)")
    files.add_argument("--overwrite", action="store_true", help="replace an existing output")
    files.add_argument("--inspect", metavar="FILE", help="print a checkpoint's tensors and values, and write nothing")
    files.add_argument("--verify", metavar="BUNDLE", help="recompute a bundle's digest and check its output")
    model = result.add_argument_group("model", "what the checkpoint does not say")
    model.add_argument("--drop-path", type=float, metavar="RATE", help="stochastic depth at the last block (training)")
    model.add_argument("--head-dropout", type=float, metavar="RATE", help="channel dropout in the head (training)")
    model.add_argument("--final-act", choices=("relu", "none"), help="activation behind the head")
    model.add_argument(
        "--pool-scales", type=_with_commas(int, "whole numbers"), metavar="N,N,...", help="UPerNet's pooling grids"
    )
    model.add_argument("--window-size", type=_window, metavar="N", help="resize the position biases to this window")
    moments = model.add_mutually_exclusive_group()
    moments.add_argument("--with-optimizer", action="store_true", help="fail where the file has no optimiser's state")
    moments.add_argument("--no-optimizer", action="store_true", help="leave the optimiser's state out")
    data = result.add_argument_group("input images", "what neither the checkpoint nor --config says")
    data.add_argument("--bands", type=names, metavar="A,B,...", help="band names in the weights' order")
    data.add_argument("--means", type=numbers, metavar="X,X,...", help="mean of each band, in digital numbers")
    data.add_argument("--stds", type=numbers, metavar="X,X,...", help="standard deviation of each band")
    data.add_argument("--statistics", choices=("granite", "prithvi"), help="means and stds as published with a model")
    data.add_argument("--fill", type=float, help="value of missing pixels (default -9999, HLS's)")
    data.add_argument("--sensors", type=names, metavar="L30,S30", help="sensors of the training images")
    data.add_argument("--label", metavar="NAME", help="what the model gives: agbd (default), canopy_height, rh98 ...")
    data.add_argument("--dataset", metavar="NAME", help="training data, for the record")
    data.add_argument("--season", metavar="TEXT", help="season of the training images, for the record")
    back = result.add_argument_group("--to torch")
    back.add_argument("--img-size", type=int, metavar="PX", help="image side that SimMIM's shift masks are made for")
    return result


def _check_usage(options: argparse.Namespace, parse: argparse.ArgumentParser) -> None:
    given = {name for name, value in vars(options).items() if value not in (None, False)}
    modes = [name for name in ("inspect", "verify") if name in given]
    if len(modes) == 2 or (modes and given - {*modes, "to"}):
        parse.error(f"--{modes[0]} takes a path and goes with no other flag")
    if not modes and not {"input", "output"} <= given:
        parse.error("give --input and --output, or --inspect FILE, or --verify BUNDLE (--help shows examples)")
    # Flags that only one direction reads; given in the other they would do nothing in silence.
    useless = given & ({"img_size"} if options.to == "bundle" else {"config", *_OPTIONS})
    if useless and not modes:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(useless))
        parse.error(f"{flags}: has no effect with --to {options.to}")


def _inspect(name: str) -> None:
    from biomass_jax.convert import hub, torch_file

    file = torch_file.read(hub.fetch(name) if hub.is_hub_name(name) else Path(name))
    tensors: list[tuple[str, str]] = []
    values: list[tuple[str, str]] = []
    for key, leaf in torch_file.flatten(file.root).items():
        if isinstance(leaf, torch_file.TorchTensor):
            tensors.append((key, f"{leaf.dtype:9} {tuple(leaf.shape)}"))
        else:
            text = repr(leaf)
            values.append((key, text if len(text) <= 100 else text[:97] + "..."))
    _print_table((("format", file.format), ("sha256", file.sha256), ("not built", ", ".join(file.placeholders) or "-")))
    print(f"\n{len(tensors)} tensors")
    _print_table(tensors)
    print(f"\n{len(values)} other values")
    _print_table(values)


def _print_table(lines: Sequence[tuple[str, str]]) -> None:
    width = max((len(label) for label, _ in lines), default=0)
    for label, text in lines:
        print(f"{label:{width}}  {text}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 where it succeeded, 1 with one line on standard error where it did not."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parse = parser()
    options = parse.parse_args(arguments)
    _check_usage(options, parse)
    try:
        environment.settle()
        with writer_beside(Path(options.output)) if options.output else nullcontext():
            _run(options, f"python -m biomass_jax.convert {shlex.join(arguments)}")
    except Exception as error:
        return environment.failed(error, OSError)
    return 0


def _run(options: argparse.Namespace, command: str) -> None:
    if options.inspect:
        _inspect(options.inspect)
    elif options.verify:
        from biomass_jax import bundle

        differences = bundle.verify(options.verify)
        print(f"{options.verify}: the digest is right, and the output agrees with the recorded check:")
        _print_table([(name, f"{value:.1e}") for name, value in differences.items()])
    elif options.to == "torch":
        from biomass_jax.convert.export import export

        _print_table(export(options.input, options.output, img_size=options.img_size, overwrite=options.overwrite))
    else:
        from biomass_jax.convert import convert

        lines = convert.convert(
            options.input,
            options.output,
            config=options.config,
            options=Options(**{name: getattr(options, name) for name in _OPTIONS}, command=command),
            overwrite=options.overwrite,
        )
        _print_table(lines)


if __name__ == "__main__":
    sys.exit(main())
