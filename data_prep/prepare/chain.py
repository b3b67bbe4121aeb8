"""The order of `prepare`: which jobs there are, what each needs, and what the report says of them."""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from biomass_jax.data.biomes import read_polygons
from biomass_jax.errors import PrepError, refuse_empty
from data_prep.archive.download import log_in, plan_gedi, plan_hls
from data_prep.archive.fetch import fetch_all
from data_prep.archive.search import GEDI_COVERAGE, Area, search_archive, search_gedi, search_hls
from data_prep.chips import index as chip_index
from data_prep.chips.splits import PICTURE, as_metadata
from data_prep.gedi.filters import BIOMASS, as_dict
from data_prep.gedi.labels import Composite, open_composite
from data_prep.gedi.names import EXAMPLE, level_of, other_product, product_of
from data_prep.gedi.orbits import find_granules, granules_below, no_granules
from data_prep.hls.composite import composite_path, select
from data_prep.hls.granules import tile_grid_key
from data_prep.places import Box, boxes_meet, check_box, grid_box
from data_prep.prepare import steps
from data_prep.prepare.runner import Runner
from data_prep.prepare.state import StepJob, StepRecords, write_json
from data_prep.season import DEFAULT_TABLE, Season, resolve_season, season_of_year
from data_prep.settings import Filters, SplitSettings

WHOLE = "all"  # name of the jobs that take all tiles together
LogLine = Callable[[str], None]


def prepare(
    config: Mapping[str, Any],
    out: Path,
    executor: Executor,
    *,
    discard: bool = False,
    threads: int | None = None,
    log: LogLine = print,
) -> dict[str, Any]:
    """Do what isn't done yet of the whole chain.

    Args:
        config: the fields of configs/prepare.py.
        out: the folder; one run at a time (see `lock.one_writer`).
        executor: runs the jobs.
        discard: delete scenes and orbits below `out` once their composites and footprints are written and checked.
        threads: of each composite; one for each core where None. No setting of the result.
        log: takes a line for each job.

    Returns:
        what is written to `out/report.json`: tiles, orbits, splits, shards, errors, config. Nothing in it tells how
        the work was cut, so it is the same for any number of workers and of restarts.

    Raises:
        PrepError: settings that no tile could be made with.
    """
    check_given(config)
    runner = Runner(StepRecords(out), executor, log)
    if config["granules"]["download"]:
        download_tiles(config, runner)
    chain = Chain(config, out, runner, threads)
    chain.footprints()
    chain.composites()
    if discard:
        chain.discard()
    chain.labels()
    chain.chips()
    chain.splits_and_shards()
    chain.checks()
    report = chain.report()
    write_json(out / "report.json", report)
    return report


def check_given(config: Mapping[str, Any]) -> None:
    """Look at the files that are named, hours before they are needed.

    Raises:
        PrepError: a folder that isn't there, or one of two settings that go together.
        BiomeError: polygons that can't be used.
    """
    for name in ("hls", "gedi"):
        folder = config["granules"][name]
        if folder and not Path(folder).is_dir():
            raise PrepError(f"granules.{name}: {folder}: no such folder; leave it empty for OUT/granules/{name}")
    chips = config["chips"]
    if bool(chips["biomes"]) != bool(chips["biome_field"]):
        raise PrepError("chips.biomes and chips.biome_field go together: a polygon file, and its column of names")
    if chips["biomes"]:
        read_polygons(chips["biomes"], chips["biome_field"], rows=1)


class Chain:
    """The state of one run."""

    def __init__(self, config: Mapping[str, Any], out: Path, runner: Runner, threads: int | None) -> None:
        self.config, self.out, self.runner, self.threads = config, out, runner, threads
        self.state, self.done, self.errors, self.log = runner.state, runner.done, runner.errors, runner.log
        self.allow_empty: bool = config["allow_empty"]
        self.level = level_of(config["labels"]["label"])
        # among what a step's result depends on; of biomass as earlier versions had it
        self.label = {} if self.level is BIOMASS else {"label": self.level.label}
        self.season, self.year, self.season_table = _season(config)
        hls = Path(config["granules"]["hls"] or out / "granules" / "hls")
        self.granules = steps.granules_by_tile(hls)
        known = set(self.granules) | set(self.state.names("composite"))
        self.tiles = sorted({tile.removeprefix("T") for tile in config["tiles"]} or known)
        if not self.tiles:
            raise PrepError(f"{hls}: no granules there; expected folders named HLS.L30.T10SFF.2020183T184512.v2.0")
        self.images: dict[str, Composite] = {}

    def footprints(self) -> None:
        """`gedi` for each orbit."""
        settings = dict(self.config["gedi"])
        box: Box | None = check_box(settings["box"]) if settings["box"] else None
        del settings["box"]
        filters = as_dict(Filters(**settings), self.level)
        seasons = self._shot_seasons()
        folder = Path(self.config["granules"]["gedi"] or self.out / "granules" / "gedi")
        files = find_granules([folder]) if folder.is_dir() and granules_below(folder) else []
        present = self._orbits(files)
        gone = [name for name in self.state.names("gedi") if name not in present and self.state.discarded("gedi", name)]
        jobs = []
        for name in sorted([*present, *gone]):
            path, dst = present.get(name), self.out / "footprints" / f"{name}.parquet"
            arguments: dict[str, Any] = {"path": path, "folder": dst.parent, "box": box, "seasons": seasons}
            arguments |= {"filters": settings, "label": self.level.label}
            chosen = {"box": box and list(box), "seasons": seasons, "filters": filters, **self.label}
            inputs = () if path is None else (path,)
            jobs.append(StepJob("gedi", name, steps.footprints_of_orbit, arguments, chosen, inputs, (dst,)))
        if not jobs and not files:
            self.runner.fail("gedi", WHOLE, no_granules(folder))
        self.runner.run("gedi", jobs, lambda result: _arrows(result["counts"]))
        counts = [dict(part.record.result["counts"]) for part in self.done["gedi"].values()]
        if counts and not self.allow_empty and not any(list(found.values())[-1] for found in counts):
            self.runner.fail("gedi", WHOLE, f"no shot of {len(counts)} orbits is left; the filters' counts say why")

    def _orbits(self, paths: Sequence[Path]) -> dict[str, Path]:
        """Orbits by the name that their footprint tables will have; a file of another name fails alone."""
        found = {}
        for path in paths:
            product = product_of(path.name)
            wanted = self.level.product
            if product is not None and product.level == wanted:
                found[product.granule] = path
                continue
            like = EXAMPLE if wanted == "L4A" else EXAMPLE.replace("GEDI04", "GEDI02")
            meaning = other_product(path.name, expected=wanted)
            meaning = meaning or f"not a GEDI {wanted} granule's name; expected one like {like}"
            self.runner.fail("gedi", path.stem, f"{path}: {meaning}")
        return found

    def composites(self) -> None:
        """`composite` for each tile."""
        jobs = []
        for tile in self.tiles:
            with self.runner.failing("composite", tile):
                jobs.append(self._composite_job(tile))
        self.runner.run("composite", jobs, _composite_line)
        for tile, part in self.done["composite"].items():
            self.images[tile] = open_composite(part.job.outputs[0])

    def _composite_job(self, tile: str) -> StepJob:
        scenes = list(self.granules.get(tile, {}).values())
        season = self._season_of(tile, scenes)
        settings = dict(self.config["composite"])
        try:
            folders = select(scenes, season=season, sensors=settings["sensors"], tile=tile).folders
        except PrepError:
            if not self.state.discarded("composite", tile):
                raise
            folders = []
        path = composite_path(self.out / "composites", tile, season)
        arguments = {"folders": folders, "path": path, "tile": tile, "season": season.text, "settings": settings}
        arguments |= {"threads": self.threads, "allow_empty": self.allow_empty}
        chosen = {"season": season.text, **settings, "sensors": sorted(set(settings["sensors"]))}
        return StepJob("composite", tile, steps.composite_of_tile, arguments, chosen, tuple(folders), (path,))

    def _season_of(self, tile: str, scenes: Sequence[Path]) -> Season:
        if self.season is not None:
            return self.season
        record = self.state.read("composite", tile)
        latitude = (
            record.result["latitude"] if record else steps.latitude_of(scenes, self.config["composite"]["encoding"])
        )
        return season_of_year(self.year, latitude, self.season_table)

    def _shot_seasons(self) -> list[str]:
        """All seasons that shots may belong to, whatever the tiles are; `labels` keeps each tile's own."""
        years: int = self.config["label_years"]
        table = self.season_table
        own = [self.season] if self.season else [season_of_year(self.year, float(row[0]), table) for row in table]
        return sorted({season.text for one in own for season in one.widened(years)})

    def discard(self) -> None:
        """Delete the inputs of finished composites and footprints that lie in the folder of prepared data."""
        granules = self.out.resolve() / "granules"
        for step in ("gedi", "composite"):
            number = sum(self.state.discard(step, name, granules) for name in self.done[step])
            self.log(f"discarded {number} {'orbits' if step == 'gedi' else 'scenes'}")

    def labels(self) -> None:
        """`labels` for each composite."""
        tables = {part.job.outputs[0]: _table_box(part.job.outputs[0]) for part in self.done["gedi"].values()}
        boxes = {tile: grid_box(image.grid) for tile, image in self.images.items()}
        settings = {"shot_owner": self.config["labels"]["shot_owner"], "label_years": self.config["label_years"]}
        jobs = []
        for tile, image in self.images.items():
            if not tables:
                self.runner.fail("labels", tile, "no footprint tables; see the errors of gedi")
                continue
            near = tuple(path for path, box in sorted(tables.items()) if box and boxes_meet(box, boxes[tile]))
            near = near or tuple(sorted(tables)[:1])
            beside = {name: self.images[name] for name in self.images if boxes_meet(boxes[name], boxes[tile])}
            grids = {name: _grid_key(other) for name, other in beside.items()}
            folder = self.out / "labels"
            label = folder / tile / f"{image.path.stem}_{self.level.label}.tif"
            arguments = {
                "path": image.path,
                "footprints": near,
                "folder": folder,
                "label": self.level.label,
                **settings,
            }
            arguments |= {"allow_empty": self.allow_empty}
            arguments |= {"composites": {name: other.path for name, other in beside.items()}}
            outputs = (label, label.with_suffix(".parquet"))
            chosen = settings | {"tiles": grids, **self.label}
            jobs.append(StepJob("labels", tile, steps.labels_of_tile, arguments, chosen, (image.path, *near), outputs))
        self.runner.run("labels", jobs, lambda r: f"{r['counts']['used']:,} shots on {r['counts']['pixels']:,} pixels")

    def chips(self) -> None:
        """`chips` for each label raster."""
        settings = self.config["chips"]
        jobs = []
        for tile, part in self.done["labels"].items():
            image, (label, shots) = self.images[tile].path, part.job.outputs
            index = self.out / "state" / "chips" / f"{tile}.parquet"
            arguments = {"out": self.out, "image": image, "label": label, "index": index, "settings": settings}
            inputs = (image, label, shots, *([Path(settings["biomes"])] if settings["biomes"] else []))
            chosen = {name: value for name, value in settings.items() if name != "biomes"}
            jobs.append(StepJob("chips", tile, steps.chips_of_tile, arguments, chosen, inputs, (index,)))
        self.runner.run("chips", jobs, lambda r: f"{r['counts']['kept']} of {r['counts']['cells']} cells")

    def splits_and_shards(self) -> None:
        """`splits`, then `stats` and `shards`, of all tiles that have chips."""
        tiles = {tile: part for tile, part in self.done["chips"].items() if part.record.result["counts"]["kept"]}
        self.done |= {"splits": {}, "shards": {}}
        found = [part.record.result["counts"] for part in self.done["chips"].values()]
        kept, cells = (sum(counts[name] for counts in found) for name in ("kept", "cells"))
        try:
            what = "no tile has chips" if not kept else "cells of all tiles that are chips"
            refuse_empty(PrepError, kept, cells, f"{what}; there is nothing to train on", allowed=self.allow_empty)
        except PrepError as error:
            self.runner.fail("splits", WHOLE, str(error))
            return
        if not tiles:
            return
        parts = {self.state.key(self.images[tile].path): part.job.outputs[0] for tile, part in tiles.items()}
        chips = {**self.config["chips"], "biomes": Path(self.config["chips"]["biomes"]).name}
        splits = self.config["splits"]
        index = chip_index.path_in(self.out)
        outputs = (index, index.with_name(PICTURE))
        arguments = {"parts": parts, "index": index, "settings": chips, "splits": splits, "label": self.level.label}
        chosen = {"chips": chips, "splits": as_metadata(SplitSettings(**splits)), "parts": list(parts)}
        job = StepJob("splits", WHOLE, steps.index_with_splits, arguments, chosen, tuple(parts.values()), outputs)
        self.runner.run("splits", [job], _counts, here=True)
        if not self.done["splits"]:
            return
        settings = dict(self.config["shards"])
        folder = self.out / "shards"
        arguments = {"index": index, "folder": folder, "settings": settings, "executor": self.runner.executor}
        arguments |= {"allow_empty": self.allow_empty}
        rasters = [
            path for tile in tiles for path in (self.images[tile].path, self.done["labels"][tile].job.outputs[0])
        ]
        job = StepJob("shards", WHOLE, steps.shards_of_index, arguments, settings, (index, *rasters), (folder,))
        self.runner.run("shards", [job], lambda r: f"{_counts(r)} in {len(r['shards'])} files", here=True)

    def checks(self) -> None:
        """`check` for each tile with chips."""
        jobs = []
        for tile in self.done["splits"][WHOLE].record.result["tiles"] if self.done["splits"] else ():
            picture = self.out / "check" / f"{tile}.png"
            inputs = (chip_index.path_in(self.out), self.images[tile].path, self.done["labels"][tile].job.outputs[0])
            arguments = {"out": self.out, "tile": tile, "picture": picture}
            jobs.append(StepJob("check", tile, steps.check_of_tile, arguments, {}, inputs, (picture,)))
        self.runner.run("check", jobs, lambda r: f"labels fit best at a shift of {r['peak']}")

    def report(self) -> dict[str, Any]:
        """See `prepare`."""
        failed = {name.split(" ")[1] for name in self.errors if " " in name}
        tiles: dict[str, dict[str, Any]] = {}
        for tile in self.tiles:
            about: dict[str, Any] = {
                step: self.done[step][tile].record.result
                for step in ("composite", "labels", "check")
                if tile in self.done[step]
            }
            if tile in self.done["chips"]:
                about["chips"] = self.done["chips"][tile].record.result["counts"]
            if self.done["splits"]:
                about["splits"] = self.done["splits"][WHOLE].record.result["tiles"].get(tile, {})
            about["status"] = "failed" if tile in failed else "finished"
            tiles[tile] = about
        made = {step: part[WHOLE].record.result for step in ("splits", "shards") if (part := self.done[step])}
        records = [[part.record for part in parts.values()] for parts in self.done.values()]
        splits = {key: value for key, value in made.get("splits", {}).items() if key != "tiles"}
        return {
            "tiles": tiles,
            "orbits": {name: dict(part.record.result) for name, part in self.done["gedi"].items()},
            "splits": splits,
            "shards": made.get("shards", {}),
            "errors": dict(sorted(self.errors.items())),
            "warnings": sorted({text for parts in records for record in parts for text in record.warnings}),
            "config": json.loads(json.dumps(self.config)),
        }


def _season(config: Mapping[str, Any]) -> tuple[Season | None, int, Sequence[Sequence[Any]]]:
    """(season, or None where it depends on latitude; its year; the table that tells it then)."""
    text, table = str(config["season"] or "").strip(), config["season_table"] or DEFAULT_TABLE
    if not text:
        raise PrepError("season is not set; expected a year or START/STOP, as --config.season=2020")
    if len(text) == 4 and text.isdigit():
        season_of_year(int(text), 90, table)  # says what is wrong with a table before any work is done
        return None, int(text), table
    return Season.parse(text), 0, table


def _table_box(path: Path) -> Box | None:
    """The box around a footprint table; None where it is empty."""
    metadata = pq.read_schema(path).metadata or {}
    box = json.loads(metadata[b"geo"])["columns"]["geometry"].get("bbox")
    return None if box is None else tuple(box)


def _grid_key(image: Composite) -> list[float]:
    grid = image.grid
    return [grid.height, grid.width, *tile_grid_key(grid.crs, grid.transform, str(image.path))]


def _composite_line(result: Mapping[str, Any]) -> str:
    said = f"{len(result['scenes'])} scenes, {result['covered'] / result['pixels']:.1%} covered"
    few = result.get("below_min_clear", 0)  # older records have none
    return f"{said}, {few / result['pixels']:.1%} less than {result['min_clear']} times clear" if few else said


def _arrows(counts: Sequence[tuple[str, int]]) -> str:
    return " -> ".join(f"{count:,} {name}" for name, count in counts)


def _counts(result: Mapping[str, Any]) -> str:
    return ", ".join(f"{count} {name}" for name, count in result["counts"].items())


def download_tiles(config: Mapping[str, Any], runner: Runner) -> None:
    """Get what the config's tiles need into `granules/`; tiles that have been searched with these settings are left.

    Args:
        config: the fields of configs/prepare.py.
        runner: takes records and errors; jobs run in this process.

    Raises:
        PrepError: no tiles are named, or granules are said to be elsewhere.
    """
    given = config["granules"]
    if given["hls"] or given["gedi"]:
        raise PrepError("granules.download fills OUT/granules; leave granules.hls and granules.gedi empty with it")
    if not config["tiles"]:
        raise PrepError("granules.download needs tiles, as --config.tiles=\"('10SFF', '10SGF')\"")
    names = ("season", "season_table", "label_years")
    settings = {name: config[name] for name in names} | {"max_cloud": given["max_cloud"]}
    settings |= {"sensors": sorted(set(config["composite"]["sensors"]))}
    label = config["labels"]["label"]
    settings |= {} if level_of(label) is BIOMASS else {"label": label}  # of biomass as earlier versions had it
    jobs = []
    for tile in sorted({tile.removeprefix("T") for tile in config["tiles"]}):
        arguments = {"tile": tile, "settings": settings, "runner": runner}
        jobs.append(StepJob("download", tile, download_tile, arguments, settings, (), ()))
    runner.run("download", jobs, lambda r: f"{len(r['scenes'])} scenes, {len(r['orbits'])} orbits", here=True)


def download_tile(tile: str, settings: Mapping[str, Any], runner: Runner) -> dict[str, Any]:
    """One tile's granules; names of its scenes and orbits.

    Raises:
        PrepError: nothing is found, or a file can't be had.
    """
    area, granules = Area(tile=tile), runner.state.out / "granules"
    season = resolve_season(settings["season"], area.latitude, settings["season_table"] or DEFAULT_TABLE)
    scenes = plan_hls(
        search_hls(area, season, sensors=settings["sensors"], search=search_archive),
        granules,
        season=season,
        tile=tile,
        max_cloud=settings["max_cloud"],
    )
    how: dict[str, Any] = {"search": search_archive, "label": settings.get("label", BIOMASS.label)}
    orbits = plan_gedi(search_gedi(area, season.widened(settings["label_years"]), **how), granules)
    for what, plan in (("scenes", scenes), ("orbits", orbits)):
        if plan.incomplete:
            name, why = min(plan.incomplete.items())
            raise PrepError(f"{len(plan.incomplete)} {what} can't be had, first {name}: {why}")
        if not plan.granules:
            coverage = f"; {GEDI_COVERAGE}" if what == "orbits" else ""
            raise PrepError(
                f"the archive has no {what} of tile {tile} in {season.text} within these settings{coverage}"
            )
    wanted = [*scenes.files, *(file for file in orbits.files if not _discarded(runner, file.path))]
    found = fetch_all(wanted, log_in, log=runner.log)
    if found.failed:
        path, why = min(found.failed.items())
        raise PrepError(f"{len(found.failed)} of {len(wanted)} files were not downloaded, first {path.name}: {why}")
    return {"scenes": sorted(scenes.granules), "orbits": sorted(orbits.granules)}


def _discarded(runner: Runner, path: Path) -> bool:
    """Whether an orbit has been used for another tile, and then deleted."""
    product = product_of(path.name)
    return product is not None and runner.state.discarded("gedi", product.granule)
