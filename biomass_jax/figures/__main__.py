"""Training curves of several runs: `python -m biomass_jax.figures --out curves.png WORKDIR [WORKDIR ...]`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from biomass_jax import figures
from biomass_jax.errors import FigureError


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit code."""
    parser = argparse.ArgumentParser(prog="python -m biomass_jax.figures", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="WORKDIR", help="a run's workdir, or its metrics.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="the picture, a PNG")
    parser.add_argument("--name", action="append", default=[], help="of a run, once for each; else its folder's")
    parser.add_argument("--title", default="", help="above the curves")
    args = parser.parse_args(argv)
    try:
        figures.save(args.out, figures.training_curves(args.runs, names=args.name, title=args.title), args.title)
    except (FigureError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
