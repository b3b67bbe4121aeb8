"""From granules to shards for a list of tiles, from one config: `python -m data_prep prepare --help`.

Each step of each tile is a job with a record under `OUT/state`. A tile whose job fails leaves the others alone; what is
finished and unchanged is kept; a run may be ended at any moment and started again.
"""

import argparse
import runpy
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from biomass_jax.errors import STOPPED, PrepError, Stopped
from biomass_jax.runtime.lock import one_writer
from biomass_jax.runtime.settings import add_options, check, config_option, overrides
from biomass_jax.runtime.system import cores, sigterm_stops
from data_prep.commands import command
from data_prep.prepare.chain import prepare
from data_prep.prepare.runner import open_executor
from data_prep.settings import Prepare


def read_config(path: Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """A config's fields, groups as dicts.

    Args:
        path: a file like configs/prepare.py.
        changes: `--config.field=value` each.

    Raises:
        PrepError: no such field, or a value of another type.
        ConfigError: a value that the field can't have.
    """
    from absl import flags
    from ml_collections import config_flags

    values = flags.FlagValues()
    line = ["prepare", *changes]
    made = runpy.run_path(str(path))
    if "get_config" not in made:
        raise PrepError(f"{path}: no function get_config, expected a config such as configs/prepare.py")
    try:
        holder = config_flags.DEFINE_config_dict("config", made["get_config"](), flag_values=values, sys_argv=line)
        left = values(line)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        said: object = error
        while isinstance(said, Exception) and said.args:  # an AttributeError may hold a KeyError, which holds the text
            said = said.args[0]
        raise PrepError(f"{path}: {' '.join(str(said).split())}") from error
    if left[1:]:
        raise PrepError(f"unexpected arguments {left[1:]}; fields are given as --config.field=value")
    check(holder.value, Prepare)
    return dict(holder.value.to_dict())


def table(report: Mapping[str, Any]) -> str:
    """What became of each tile and orbit, as text."""
    head = ("tile", "scenes", "covered", "shots", "labels", "chips", "train", "val", "test", "status")
    rows: list[tuple[str, ...]] = [head]
    for tile, about in report["tiles"].items():
        made, labels = about.get("composite", {}), about.get("labels", {}).get("counts", {})
        splits = about.get("splits", {})
        covered = f"{made['covered'] / made['pixels']:.1%}" if made else "-"
        numbers = [labels.get("used", "-"), labels.get("pixels", "-"), about.get("chips", {}).get("kept", "-")]
        numbers += [splits.get(split, 0) if splits or "chips" in about else "-" for split in head[6:9]]
        rows.append((tile, str(len(made.get("scenes", ()))), covered, *map(str, numbers), about["status"]))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    right = [False, *[True] * (len(head) - 2), False]
    lines = []
    for row in rows:
        cells = zip(row, widths, right, strict=True)
        lines.append(" ".join(text.rjust(width) if to_right else text.ljust(width) for text, width, to_right in cells))
    lines += [f"failed: {name}: {text}" for name, text in report["errors"].items()]
    return "\n".join(line.rstrip() for line in lines)


def _parser(config: Mapping[str, Any], first: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep prepare",
        usage="%(prog)s --out OUT [options]",
        description="HLS granules and GEDI orbits to training shards, for a list of tiles. In brackets: as configured.",
        epilog="Exit codes: 0 finished, 75 stopped by SIGTERM (the same command resumes), 1 something failed.",
        allow_abbrev=False,
        parents=[first],
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for everything")
    parser.add_argument("--workers", type=int, default=1, help="processes (1); the result is the same for any number")
    parser.add_argument(
        "--scheduler", metavar="ADDRESS", help="a Dask scheduler, tcp://HOST:8786, instead of processes"
    )
    parser.add_argument(
        "--discard-granules", action="store_true", help="delete scenes and orbits below OUT once they are used"
    )
    add_options(parser, Prepare, without=("season_table",), config=config)
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    first, chosen = config_option(argv, "prepare")
    args, changes = _parser(read_config(chosen), first).parse_known_args(argv)
    config = read_config(chosen, [*overrides(args, Prepare), *changes])
    if args.workers < 1:
        raise PrepError(f"--workers {args.workers}: expected 1 or more")
    threads = None if args.scheduler else max(1, cores() // args.workers)
    began = time.monotonic()
    with sigterm_stops():
        try:
            with one_writer(args.out), open_executor(args.workers, args.scheduler) as executor:
                report = prepare(config, args.out, executor, discard=args.discard_granules, threads=threads)
        except Stopped:
            print("stopped by SIGTERM; give the same command again to resume", file=sys.stderr)
            return STOPPED
    print(f"{table(report)}\n{args.out / 'report.json'}: done in {time.monotonic() - began:.0f} s")
    return 1 if report["errors"] else 0
