"""What the commands share: known errors as one line and exit code 1, warnings as one line each."""

import functools
import sys
import warnings
from collections.abc import Callable, Sequence

from biomass_jax.errors import BiomassError

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
            except BiomassError as error:
                print(f"error: {error}", file=sys.stderr)
                return 1

    return run
