"""`python -m biomass_jax.evaluation`: maps beside field plots."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from biomass_jax.evaluation.inventory import COLUMNS, read_plots
from biomass_jax.evaluation.plots import validate
from biomass_jax.runtime import environment
from biomass_jax.runtime.files import expanded


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m biomass_jax.evaluation",
        description="Compare maps with field plots: bias and RMSD by bin, a line with the errors of both, a page.",
        allow_abbrev=False,
    )
    parser.add_argument("--plots", required=True, metavar="FILE", help="CSV, GeoPackage or Parquet of plots")
    parser.add_argument("--maps", required=True, nargs="+", metavar="MAP", help="maps, or patterns of such")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for validation.html and what it shows")
    parser.add_argument("--area-ha", type=float, metavar="HA", help="area of plots that are points without one")
    parser.add_argument(
        "--max-years", type=float, default=2.0, metavar="X", help="between plot and map (2); inf for any"
    )
    parser.add_argument("--min-cover", type=float, default=0.9, metavar="X", help="share of a plot with values (0.9)")
    for what, names in COLUMNS.items():
        flag = "area-column" if what == "area_ha" else what
        text = f"its column ({', '.join(names)})"
        parser.add_argument(f"--{flag}", dest=f"column_{what}", metavar="COLUMN", help=text)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        environment.settle(jax=False)
        maps = expanded(args.maps)
        columns = {what: getattr(args, f"column_{what}") for what in COLUMNS}
        found = validate(
            read_plots(args.plots, columns, args.area_ha),
            maps,
            args.out,
            max_years=args.max_years,
            min_cover=args.min_cover,
        )
    except Exception as error:
        return environment.failed(error)
    everything = found["scores"][0]
    print(
        f"{found['used']} of {found['plots']} plots: bias {everything['bias']:+.1f}, RMSD {everything['rmsd']:.1f} "
        f"Mg/ha; {Path(args.out) / 'validation.html'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
