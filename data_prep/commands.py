"""What the commands share: known errors and warnings as one line each, exit codes, who may write beside whom."""

import argparse
import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from biomass_jax.runtime import environment
from biomass_jax.runtime.lock import one_writer, refuse_if_held

Main = Callable[[Sequence[str] | None], int]


def command(main: Main) -> Callable[..., int]:
    """A `main(argv) -> int` whose known errors and warnings reach the user as one line each."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print(f"warning: {message}", file=sys.stderr)

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = show
            try:
                return main(argv)
            except Exception as error:
                return environment.failed(error)

    return run


def alone_in(out: Path) -> AbstractContextManager[None]:
    """Have prepared data for oneself, as `prepare` does; a folder that isn't there is not made."""
    return one_writer(out) if out.is_dir() else nullcontext()


def refuse_beside_prepare(out: str | Path) -> None:
    """Refuse to change prepared data, or a folder in it, while `prepare` or another step has them for itself.

    Steps that write files of single tiles or orbits may go on beside each other, but not beside those.

    Raises:
        FolderError: a live run holds the folder or the one that it lies in.
    """
    folder = Path(out).absolute()
    refuse_if_held(folder)
    refuse_if_held(folder.parent)


def add_allow_empty(parser: argparse.ArgumentParser) -> None:
    """The flag of every step whose result may come out empty."""
    parser.add_argument("--allow-empty", action="store_true", help="take a result with (nearly) nothing in it, too")
