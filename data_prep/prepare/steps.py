"""The steps of `prepare` as functions that a worker calls by name: plain arguments in, JSON-able results out."""

import functools
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import shapely

from biomass_jax.data.biomes import Biomes
from biomass_jax.errors import PrepError, RasterError
from data_prep.chips import cells
from data_prep.chips import index as chip_index
from data_prep.chips.splits import run
from data_prep.gedi.footprints import read_settings
from data_prep.gedi.labels import open_composite, write_labels
from data_prep.gedi.orbits import Filters, convert_granule
from data_prep.hls.composite import composite
from data_prep.hls.granules import Granule, open_scene, parse_granule_name
from data_prep.inspect.check import check_records, draw, records_of_index
from data_prep.places import Box, grid_centre
from data_prep.season import Season
from data_prep.settings import ChipSettings, SplitSettings
from data_prep.shards.items import index_metadata, items_of
from data_prep.shards.write import write_shards

_biomes = functools.lru_cache(maxsize=1)(Biomes)  # a worker reads the polygons once for all its tiles


def footprints_of_orbit(
    path: Path, folder: Path, box: Box | None, seasons: Sequence[str], filters: Mapping[str, Any], label: str = "agbd"
) -> dict[str, Any]:
    """`gedi`: an orbit to `folder/{granule}.parquet`."""
    chosen = [Season.parse(text) for text in seasons] or None
    how: dict[str, Any] = {"bbox": box, "season": chosen, "filters": Filters(**filters), "label": label}
    table, counts = convert_granule(path, folder, **how)
    skipped = read_settings(table)["skipped_beams"]
    return {"counts": [list(pair) for pair in counts.items()], "skipped_beams": skipped}


def composite_of_tile(
    folders: Sequence[Path],
    path: Path,
    tile: str,
    season: str,
    settings: Mapping[str, Any],
    threads: int | None,
    allow_empty: bool,
) -> dict[str, Any]:
    """`composite`: a tile's scenes to one image."""
    how: dict[str, Any] = {"season": Season.parse(season), "tile": tile, "threads": threads, "allow_empty": allow_empty}
    made = composite(folders, path, **how, **settings)
    names = ["scenes", "sensors", "season", "duplicates", "used", "counts", "pixels", "covered", "min_clear"]
    names += ["below_min_clear", "warnings"]
    return {name: getattr(made, name) for name in names} | {"latitude": grid_centre(open_composite(path).grid)[1]}


def labels_of_tile(
    path: Path,
    footprints: Sequence[Path],
    folder: Path,
    composites: Mapping[str, Path],
    shot_owner: Any,
    label_years: int,
    allow_empty: bool,
    label: str = "agbd",
) -> dict[str, Any]:
    """`labels`: a composite's label raster and its table of shots.

    Args:
        path: the composite.
        footprints: tables of all orbits that may have shots there.
        folder: takes a folder for the tile.
        composites: tile -> composite of this tile and all that may share ground with it.
        shot_owner: as for `write_labels`.
        label_years: the same.
        allow_empty: the same.
        label: the same.
    """
    grids = {tile: open_composite(other).grid for tile, other in composites.items()}
    how: dict[str, Any] = {"shot_owner": shot_owner, "label_years": label_years, "allow_empty": allow_empty}
    how["label"] = label
    _, counts = write_labels(path, footprints, folder, tiles=grids, **how)
    return {"counts": counts}


def chips_of_tile(out: Path, image: Path, label: Path, index: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`chips`: the tile's part of the index."""
    chosen = ChipSettings(**settings)
    biomes = _biomes(chosen.biomes, chosen.biome_field) if chosen.biomes else None
    shots = label.with_suffix(".parquet")
    rows, counts = cells.index_tile(image, label, chosen, root=out, shots=shots, biomes=biomes)
    chip_index.write_index(index, rows, {"chips": counts})
    return {"counts": counts}


def index_with_splits(
    parts: Mapping[str, Path], index: Path, settings: Mapping[str, Any], splits: Mapping[str, Any], label: str = "agbd"
) -> dict[str, Any]:
    """`splits`: the tiles' parts to one index, with the splits drawn, and their picture beside it.

    Args:
        parts: composite, as path in the folder -> that tile's part of the index.
        index: takes the whole.
        settings: fields of `ChipSettings`, for the index's metadata.
        splits: fields of `SplitSettings`.
        label: what the labels are.
    """
    rows: list[dict[str, Any]] = []
    for part in parts.values():
        rows += pq.read_table(part).to_pylist()
    for row in rows:
        row["geometry"] = shapely.from_wkb(row["geometry"])
    counts = {name: chip_index.read_metadata(part)["chips"] for name, part in parts.items()}
    partial = index.with_name(".with_splits.parquet")  # under its name it has its splits
    try:
        chip_index.write_index(partial, rows, cells.metadata(settings, counts, label))
        made = run(partial, SplitSettings(**splits))
        os.replace(partial, index)
    finally:
        partial.unlink(missing_ok=True)
    by_tile: dict[str, Counter[str]] = defaultdict(Counter)
    for row, split in zip(rows, chip_index.read_index(index)["split"], strict=True):
        by_tile[row["tile"]][split] += 1
    names = ("counts", "dropped", "lost_to_buffer", "strata", "distances")
    return {**{name: made[name] for name in names}, "tiles": by_tile}


def shards_of_index(
    index: Path, folder: Path, settings: Mapping[str, Any], executor: Executor | None, allow_empty: bool
) -> dict[str, Any]:
    """`stats` and `shards`: the index's chips to a data set, written by the executor's workers."""
    how: dict[str, Any] = {"executor": executor, "overwrite": True, "labelled": True, "allow_empty": allow_empty}
    info = write_shards(items_of(index), folder, metadata=index_metadata(index), **how, **settings)
    names = ("means", "stds", "stat_pixels", "season", "sensors", "shards")
    return {"counts": info["chips"]["counts"], **{name: info[name] for name in names}}


def check_of_tile(out: Path, tile: str, picture: Path) -> dict[str, Any]:
    """`check`: whether a tile's labels lie where its image says, with a picture."""
    unit = chip_index.label_of(chip_index.path_in(out)).unit
    (found,) = check_records(records_of_index(out, (tile,)), unit)
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(found, picture)
    if found.fault:
        warnings.warn(found.fault, stacklevel=2)
    return found.summary()


def granules_by_tile(folder: Path) -> dict[str, dict[Granule, Path]]:
    """Granules below a folder by tile; none where there is no such folder.

    Raises:
        PrepError: two folders of one granule, or a name that is none.
    """
    found: dict[str, dict[Granule, Path]] = {}
    if not folder.is_dir():
        return found
    for parent, names, _ in os.walk(folder):
        for name in sorted(name for name in names if name.startswith("HLS.")):
            granule, path = parse_granule_name(name), Path(parent, name)
            if found.setdefault(granule.tile, {}).setdefault(granule, path) != path:
                raise PrepError(f"{path}: the same granule as {found[granule.tile][granule]}; give one of them")
        names[:] = sorted(name for name in names if not name.startswith((".", "HLS.")))
    return found


def latitude_of(folders: Sequence[Path], encoding: str) -> float:
    """Latitude of a tile's centre from the first of its scenes that can be read.

    Raises:
        PrepError: none can.
    """
    errors = []
    for folder in folders:
        try:
            return grid_centre(open_scene(folder, encoding).grid)[1]
        except (PrepError, RasterError) as error:
            errors.append(error)
    raise errors[0] if errors else PrepError("no granules, so nothing tells the season by latitude")
