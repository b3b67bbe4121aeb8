"""Maps of thousands of tiles by many workers: a table of items that each worker takes from until none is left.

    biomass-jax work make TABLE --out maps --bundle granite --tiles tiles.txt --seasons 2019,2020
    biomass-jax work run TABLE          # on as many machines as there are, as often as need be
    biomass-jax work show TABLE --csv items.csv
    biomass-jax work again TABLE

An item is an image, or a tile and a season of NASA's archive, of which a composite is made first. A worker keeps its
model and reads ahead. An item that fails is named and tried again, three times in all; what a lost worker had taken is
taken again. See docs/scaling.md.

Exit codes: 0 finished, 75 stopped by SIGTERM (give the same command again to go on), anything else failed; of `run` 1
where items have failed, too.
"""

import argparse
import dataclasses
import logging
import os
import re
import shutil
import sys
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

from biomass_jax.data.raster.inputs import InputItem, find_inputs
from biomass_jax.errors import STOPPED, Stopped, WorkError, name_list
from biomass_jax.evaluation import tables
from biomass_jax.prediction.config import Predict
from biomass_jax.runtime import environment
from biomass_jax.runtime.files import check_local
from biomass_jax.runtime.lock import writer_beside
from biomass_jax.runtime.settings import Range, add_options, checked, options_of, setting
from biomass_jax.runtime.system import sigterm_stops

from .local import GRACE_STOPPED, choose_gpus
from .work_table import Mark, Row, Table, TableWorker, at_work, make_table

STATES = ("done", "taken", "waiting", "lost", "failed")
REASONS = 20  # reasons of failures that are shown
_TILE = re.compile(r"T?(\d{2}[A-Z]{3})")
_LEFT_OUT = ("overwrite", "mode")  # of a prediction's settings: an item is mapped once

log = logging.getLogger("work")


@dataclasses.dataclass
class WorkSettings:
    """What a table is made of, beside the settings of its maps."""

    tiles: str | None = setting(None, "MGRS tiles with commas, or a file with one a line, in place of --inputs")
    seasons: tuple[str, ...] = setting((), "of each tile: years (dates by latitude) or START/STOP, STOP not included")
    sensors: str = setting("L30", "of the tiles' scenes: L30, S30 or L30+S30")
    max_cloud: float = setting(100.0, "percent of cloud of a scene, at most", within=Range(0))
    min_clear: int = setting(3, "fewest clear scenes of a pixel", within=Range(1))
    tries: int = setting(3, "of an item, before it has failed", within=Range(1))


def make(folder: Path, out: Path, work: WorkSettings, predict: Mapping[str, Any]) -> Table:
    """Make a table of images, or of tiles and seasons.

    Args:
        folder: the table.
        out: where maps go; composites of tiles into its `composites`.
        work: what it is made of.
        predict: fields of `Predict`, `inputs` among them where no tiles are given.

    Raises:
        WorkError: no items, both kinds of them, a tile that is none, or the table is there already.
        ConfigError: a field holds what it can't.
        BundleError, TilingError, PredictionError: see `Predictor`.
        RasterError: no images there, or no mask.
    """
    from biomass_jax.prediction.pixels import MapOptions
    from biomass_jax.prediction.run import map_options, open_predictor

    chosen = checked(Predict, dict(predict))
    if not chosen.bundle:
        raise WorkError("--bundle is not given; add --bundle DIR, the model's folder")
    # What no map could be made with is said now, and not on a hundred machines.
    MapOptions(**map_options(chosen))
    open_predictor(chosen, {})
    settings = dataclasses.asdict(chosen)
    if (settings["inputs"] is None) == (work.tiles is None) or bool(work.tiles) != bool(work.seasons):
        raise WorkError("give either --inputs, the images, or --tiles and --seasons together, of NASA's archive")
    items = _of_archive(work) if work.tiles else _of_files(settings["inputs"])
    for name in ("bundle", "base", "adapters", "mask"):
        settings[name] = settings[name] and os.path.abspath(settings[name])  # a worker may start anywhere
    settings = {name: value for name, value in settings.items() if name not in ("inputs", *_LEFT_OUT)}
    place = {"sensors": work.sensors.replace(",", "+").split("+"), "max_cloud": work.max_cloud}
    place |= {"min_clear": work.min_clear}
    make_table(
        folder, items, settings={"out": os.path.abspath(out), "predict": settings, "composite": place}, tries=work.tries
    )
    return Table(folder)


def _of_archive(work: WorkSettings) -> list[dict[str, Any]]:
    given = str(work.tiles)
    words = Path(given).read_text(encoding="utf-8").split() if Path(given).is_file() else given.split(",")
    tiles = [_TILE.fullmatch(word.strip()) for word in words]
    if None in tiles or not tiles:
        wrong = words[tiles.index(None)] if tiles else "nothing"
        raise WorkError(f"--tiles {given}: found {wrong!r}; expected MGRS tiles as 10SFF, or a file with one a line")
    names = sorted({tile[1] for tile in tiles if tile})
    pairs = [(tile, season) for season in dict.fromkeys(work.seasons) for tile in names]
    return [{"name": f"{tile} {season}", "tile": tile, "season": season} for tile, season in pairs]


def _of_files(inputs: str) -> list[dict[str, Any]]:
    local = "://" not in inputs and not inputs.startswith("/vsi")
    found = find_inputs(os.path.abspath(os.path.expanduser(inputs)) if local else inputs)
    return [{"name": one.name, "paths": one.paths, "relative": one.relative.as_posix()} for one in found]


@dataclasses.dataclass(frozen=True)
class Ready:
    """An item that is taken, and its image, or why there is none."""

    name: str
    claim: Mark
    image: InputItem | Exception


def run(table: Table, share: tuple[int, int] | None = None, stop: Callable[[], bool] = lambda: False) -> int:
    """Work on a table until nothing is left of it; how many maps were made.

    Maps are made in a folder of the worker's own and moved from there, so that one which was taken for dead, and wakes
    up, doesn't write into what another makes.

    Args:
        table: made by `make`.
        share: as for `at_work`, and so `stop`.
        stop: asked before each item.

    Raises:
        BundleError, PredictionError, RasterError: no item could be mapped with these settings.
        FolderError: the table or the maps' folder can't be written.
    """
    out = Path(table.settings["out"])
    out.mkdir(parents=True, exist_ok=True)
    # Read by JAX when it is imported, which happens below; workers of one table compile once together.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(out.parent / ".jax_cache"))
    from biomass_jax.prediction import maps
    from biomass_jax.prediction.pixels import MapOptions
    from biomass_jax.prediction.run import map_options, open_predictor
    from biomass_jax.prediction.stream import read_ahead
    from biomass_jax.runtime.mesh import local_placement

    settings = checked(Predict, table.settings["predict"])
    drafts = out / f".work_{table.id}"
    made = 0
    with at_work(table, share, stop) as worker:
        options = MapOptions(**map_options(settings))
        predictor = open_predictor(settings, local_placement())
        _clear_away(drafts, table)
        mine = drafts / worker.name

        def begin(ready: Ready) -> Callable[[], maps.MapResult]:
            if isinstance(ready.image, Exception):
                raise ready.image
            return maps.OneMap(predictor, ready.image, mine / ready.claim.file, options).finish

        def ended(ready: Ready, result: maps.MapResult | Exception) -> None:
            nonlocal made
            draft = mine / ready.claim.file
            if isinstance(result, Exception):
                state = worker.failed(ready.claim, maps.reason(ready.name, result))
                log.info("%s: try %d of %d failed, %s", ready.name, ready.claim.tries, table.tries, state)
            elif worker.holds(ready.claim):
                _move_into(draft, out)
                made += worker.done(ready.claim)
                log.info("%s: done in %.1f s, %d by this worker", ready.name, result.seconds, made)
            shutil.rmtree(draft, ignore_errors=True)

        # Where this fails nothing is waited for: what is read ahead may be minutes on its way.
        maps.make_maps(read_ahead(_ready(table, worker, out), 1), begin, ended)
    _clear_away(drafts, table)
    return made


def _ready(table: Table, worker: TableWorker, out: Path) -> Iterator[Ready]:
    """What is taken, with its image; in a thread of its own, while the one before is mapped."""
    for claim in worker.claims():
        item = table.items[claim.number]
        try:
            if "tile" in item:
                image = _composite(item, table.settings["composite"], out / "composites")
            else:
                image = InputItem(item["name"], tuple(item["paths"]), PurePath(item["relative"]))
        except Exception as error:
            yield Ready(item["name"], claim, error)
        else:
            yield Ready(item["name"], claim, image)


def _composite(item: Mapping[str, Any], settings: Mapping[str, Any], folder: Path) -> InputItem:
    """A tile's composite of a season, as `biomass-jax stream` makes it; one that is there is kept."""
    from data_prep.archive.stream import stream

    return find_inputs(stream(item["tile"], item["season"], folder, log=log.info, **settings))[0]


def _move_into(source: Path, target: Path) -> None:
    """Give the files below a folder their places below another one, maps last: what lies beside a map is there then."""
    files = [path for path in source.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: path.suffix == ".tif"):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)


def _clear_away(drafts: Path, table: Table) -> None:
    """Delete the drafts of workers that are gone."""
    if drafts.is_dir():
        known = {folder.name for folder in table.workers()}
        for folder in drafts.iterdir():
            if folder.name not in known:
                shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # others are at work
            drafts.rmdir()


def run_on_dask(table: Table, workers: int, scheduler: str | None) -> None:
    """So many workers on a Dask cluster, or on one of this machine; Dask starts those anew that are lost.

    Args:
        table: to work on; the cluster's machines see it under the same path.
        workers: how many.
        scheduler: its address, `tcp://host:8786`; None for a cluster of this machine.

    Raises:
        WorkError: Dask isn't there or doesn't answer, or workers are lost before they have finished an item.
        BiomassError: see `run`.
    """
    try:
        import dask
        import distributed  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise WorkError("--workers and --scheduler want Dask: pip install 'biomass-jax[dask]'") from error
    logging.getLogger("distributed").setLevel(logging.WARNING)  # its own lines tell nothing of the table
    stop = table.folder.absolute() / f"stop_{uuid.uuid4().hex[:12]}"
    here = {"n_workers": workers, "threads_per_worker": 1, "memory_limit": None, "dashboard_address": None}
    try:
        # Variables that Dask sets for NumPy's libraries would stand in the maps' tags.
        with dask.config.set({"distributed.nanny.pre-spawn-environ": {}}):
            client = distributed.Client(scheduler, timeout=30, **({} if scheduler else here))
    except (OSError, ValueError, TimeoutError) as error:
        raise WorkError(f"--scheduler {scheduler}: no Dask scheduler answers there: {error}") from error
    with client:
        finished = -1
        shares = list(range(workers))
        try:
            while shares:
                tasks = [client.submit(_dask_worker, str(stop), (one, workers), pure=False) for one in shares]
                distributed.wait(tasks)
                lost = [isinstance(task.exception(), distributed.KilledWorker) for task in tasks]
                for task in (task for task, gone in zip(tasks, lost, strict=True) if not gone):
                    task.result()
                shares = [one for one, gone in zip(shares, lost, strict=True) if gone]
                before, finished = finished, sum(1 for state in ("done", "failed") for _ in table.marks(state))
                if shares and before == finished:
                    raise WorkError(f"{table.folder}: {len(shares)} workers were lost again without a finished item")
        except Stopped:
            stop.touch()
            distributed.wait(tasks, timeout=GRACE_STOPPED)
            raise
        finally:
            stop.unlink(missing_ok=True)


def _dask_worker(stop: str, share: tuple[int, int]) -> int:
    """What one of Dask's processes does; the table is where `stop` may be."""
    environment.settle()
    return run(Table(Path(stop).parent), share, Path(stop).exists)


def summary(rows: Sequence[Row]) -> list[str]:
    """How many items are in which state, and why items failed."""
    counts = Counter(row.state for row in rows)
    states = ", ".join(f"{counts[state]:,} {state}" for state in STATES if counts[state])
    lines = [f"{len(rows):,} items: {states}"]
    reasons: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.state == "failed":
            reasons[row.error].append(row.item["name"])
    for why, names in sorted(reasons.items(), key=lambda one: -len(one[1]))[:REASONS]:
        lines.append(f"  {len(names)} failed, {name_list(names)}: {why}")
    return lines


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """The table as a file: item, tile, season, state, owner, tries, error."""
    columns = ("item", "tile", "season", "state", "owner", "tries", "error")
    cells = [
        [*(row.item.get(name, "") for name in ("name", "tile", "season")), row.state, row.owner, row.tries, row.error]
        for row in rows
    ]
    tables.write_csv(path, columns, [dict(zip(columns, row, strict=True)) for row in cells])


def _share(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"found {text!r}; expected I/N, from 0/N to N-1/N")
    return int(number), int(count)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.work", description="Maps of thousands of tiles by many workers.", allow_abbrev=False
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, about: str) -> argparse.ArgumentParser:
        found = actions.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.", allow_abbrev=False)
        found.add_argument("table", type=Path, metavar="TABLE", help="the table's folder, which all workers see")
        return found

    one = action("make", "list the items in a new table")
    one.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the maps")
    add_options(one, WorkSettings)
    add_options(one, Predict, without=_LEFT_OUT)
    one = action("run", "take items and map them until none is left")
    one.add_argument("--share", type=_share, metavar="I/N", help="begin with the I-th of N parts, as array jobs do")
    one.add_argument("--workers", type=int, metavar="N", help="so many at once, by Dask")
    one.add_argument("--scheduler", metavar="ADDRESS", help="of a Dask cluster that they are to run on")
    one = action("show", "say how many items are done, and why others failed")
    one.add_argument("--csv", type=Path, metavar="FILE", help="write a row for each item, too")
    action("again", "have the items that failed tried again")
    return parser


def _run(args: argparse.Namespace) -> int:
    """The action `run`."""
    table, began = Table(args.table), time.monotonic()
    if args.share and (args.workers or args.scheduler):
        raise WorkError("--share is of one worker; --workers shares by itself")
    if (1 if args.workers is None and not args.scheduler else args.workers or 0) < 1:
        raise WorkError(f"--workers is {args.workers}; expected a number of 1 or more, with --scheduler too")
    if not args.scheduler and (args.workers or 1) > 1 and choose_gpus(1, dict(os.environ)):
        raise WorkError("--workers on a machine with GPUs: one worker uses all of them; leave it out")
    with sigterm_stops():
        if args.workers:
            run_on_dask(table, args.workers, args.scheduler)
        else:
            run(table, args.share)
    rows = table.rows()
    log.info("nothing is left to take after %.0f s", time.monotonic() - began)
    print("\n".join(summary(rows)))
    return 1 if any(row.state == "failed" for row in rows) else 0


def _do(args: argparse.Namespace) -> int:
    """The action that was asked for; its exit code."""
    if args.action == "make":
        check_local(args.out, "--out")
        with writer_beside(args.table):
            work = checked(WorkSettings, options_of(args, WorkSettings))
            table = make(args.table, args.out, work, options_of(args, Predict, without=_LEFT_OUT))
        print(f"{args.table}: {len(table.items):,} items; `biomass-jax work run {args.table}` works on them")
        return 0
    if args.action == "run":
        return _run(args)
    table = Table(args.table)
    if args.action == "again":
        print(f"{table.again():,} items wait again")
        return 0
    rows = table.rows()
    if args.csv:
        write_csv(rows, args.csv)
    print("\n".join(summary(rows)))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    args = _parser().parse_args(argv)
    try:
        environment.settle(log.warning)
        return _do(args)
    except Stopped:
        log.warning("stopped by SIGTERM; what was taken waits again. Give the same command again to go on")
        logging.shutdown()
        os._exit(STOPPED)  # threads may be reading; nothing half-written is there
    except Exception as error:
        return environment.failed(error)


if __name__ == "__main__":
    sys.exit(main())
