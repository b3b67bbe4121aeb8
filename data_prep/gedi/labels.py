"""Footprints to label rasters on the grids of composites: `python -m data_prep labels --help`."""

import argparse
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from biomass_jax.data import bands, labels
from biomass_jax.data.labels import BIOMASS, Label
from biomass_jax.data.raster.cog import write_cog
from biomass_jax.data.raster.grid import Grid
from biomass_jax.data.raster.image import open_image
from biomass_jax.errors import PrepError, refuse_empty
from biomass_jax.runtime.settings import add_options
from data_prep.commands import add_allow_empty, command, refuse_beside_prepare
from data_prep.gedi.filters import inside
from data_prep.gedi.footprints import read_footprints, read_settings
from data_prep.gedi.names import Level, level_of
from data_prep.geoparquet import with_settings, write_table
from data_prep.ground import geocentric
from data_prep.hls.composite import find_composites
from data_prep.places import boxes_meet, grid_box, grid_centre, transformer
from data_prep.season import Season
from data_prep.settings import LabelSettings

NO_LABEL = -1.0
# Bands of a raster of biomass, and those of its table of shots; of heights, which have no error, the first is `rh98`
# and there is no other. Rasters of earlier versions have no band of errors either.
BANDS = ("agbd", "agbd_sigma")
_VALUES = ("agbd", "agbd_se", "agbd_sigma")
ShotOwner = Literal["nearest", "all"]
_ROWS = 512  # read at once
_ANY = "digital_numbers"  # of composites no value is used here, whatever it means
_PLACES = {"shot_number": pa.uint64(), "row": pa.int32(), "col": pa.int32()}  # the table's columns before the values


class Labels(NamedTuple):
    """A label raster and what made it.

    Attributes:
        label: (H, W) float32, mean of the shots in each pixel in the label's unit, -1 where there is none.
        sigma: (H, W) float32, error of that mean, sqrt(sum of agbd_sigma ** 2) / n over the n shots of a pixel, as if
            their errors were independent; Mg/ha, -1 where a shot has no agbd_sigma and where there is no label: all
            of heights.
        shots: the shots used, sorted by shot_number: shot_number uint64, row, col int32, agbd, agbd_se, agbd_sigma
            float32, granule. agbd_se is as given: NaN or -9999 where there is none; agbd_sigma is NaN then. Of heights
            the label alone instead of the three.
        counts: `shots` given; dropped, each under the first that fits: `repeated` (a shot_number again),
            `other_season`, `outside` the grid, `other_tile` (a neighbour owns it), `no_data`; `used`; those of them
            `without_sigma`; `pixels` with a label.
    """

    label: np.ndarray
    sigma: np.ndarray
    shots: dict[str, np.ndarray]
    counts: dict[str, int]


def pixel_of(lon: np.ndarray, lat: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pixels that contain places, projected with the grid's own CRS.

    A pixel reaches from its upper-left corner, which belongs to it, to the next pixels' (PixelIsArea).

    Args:
        lon: (N,) degrees.
        lat: (N,) degrees.
        grid: size and place.

    Returns:
        row, col int64 (N,) and inside bool (N,); row and col are -1 where outside.

    Raises:
        PrepError: the grid has no CRS.
    """
    x, y = transformer(grid).transform(lon, lat)
    t = grid.transform
    east, south = np.asarray(x) - t.c, np.asarray(y) - t.f
    finite = np.isfinite(east) & np.isfinite(south)  # PROJ gives infinity far from the zone
    east, south = np.where(finite, east, -1e12), np.where(finite, south, 1e12)
    area = t.a * t.e - t.b * t.d
    col = np.floor((t.e * east - t.b * south) / area)
    row = np.floor((t.a * south - t.d * east) / area)
    inside = finite & (row >= 0) & (row < grid.height) & (col >= 0) & (col < grid.width)
    return np.where(inside, row, -1).astype(np.int64), np.where(inside, col, -1).astype(np.int64), inside


def owner_tile(lon: np.ndarray, lat: np.ndarray, tiles: Mapping[str, Grid]) -> np.ndarray:
    """The tile that each place belongs to: of those that contain it, the one whose centre is nearest.

    Distances are straight lines through the ellipsoid, so zones and the antimeridian don't matter; of two equally near
    tiles it is the first by name.

    Args:
        lon: (N,) degrees.
        lat: (N,) degrees.
        tiles: grid of each tile.

    Returns:
        (N,) names, empty where no tile contains the place.
    """
    lon, lat = np.asarray(lon, np.float64), np.asarray(lat, np.float64)
    places = geocentric(lon, lat)
    owner = np.full(lon.shape, "", object)
    nearest = np.full(lon.shape, np.inf)
    for name in sorted(tiles):
        centre = geocentric(*(np.asarray(degrees) for degrees in grid_centre(tiles[name])))
        offset = places - centre
        distance = offset[..., 0] ** 2 + offset[..., 1] ** 2 + offset[..., 2] ** 2
        better = pixel_of(lon, lat, tiles[name])[2] & (distance < nearest)
        owner[better], nearest[better] = name, distance[better]
    return owner


def label_raster(
    footprints: Mapping[str, np.ndarray],
    grid: Grid,
    valid: np.ndarray,
    *,
    tile: str = "",
    tiles: Mapping[str, Grid] | None = None,
    shot_owner: ShotOwner = "nearest",
    seasons: Sequence[Season] | None = None,
    label: str = BIOMASS.name,
) -> Labels:
    """Labels on a composite's grid.

    Args:
        footprints: columns (N,) as `orbits.read_granule` gives them, of any number of orbits in any order.
        grid: the composite's.
        valid: (H, W) bool, False on the composite's no-data.
        tile: its name in `tiles`.
        tiles: grids of all tiles that are made, for `shot_owner='nearest'`; None for this tile alone.
        shot_owner: `nearest`: a shot in several tiles belongs to the one whose centre is nearest; `all`: to each.
        seasons: shots outside all of them are dropped; None for no such filter.
        label: what the footprints tell, `agbd` or a relative height.

    Raises:
        PrepError: labels that are negative or not finite, a tile that isn't in `tiles`.
    """
    if shot_owner not in ("nearest", "all"):
        raise PrepError(f"shot_owner: found {shot_owner!r}, expected 'nearest' or 'all'")
    counts = {"shots": len(footprints["shot_number"])}
    table = _sorted(footprints, label)
    wrong = ~(np.isfinite(table[label]) & (table[label] >= 0))
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        keep = "agbd_valid" if label == BIOMASS.name else "rh_valid"
        raise PrepError(
            f"footprints: {int(wrong.sum())} with {label} that is negative or not finite, first shot_number "
            f"{table['shot_number'][first]} with {table[label][first]}; keep `data_prep gedi`'s filter {keep} on"
        )
    again = np.zeros(len(table[label]), bool)
    again[1:] = table["shot_number"][1:] == table["shot_number"][:-1]
    table = _drop(table, again, counts, "repeated")
    if seasons is None:
        counts["other_season"] = 0
    else:
        spans = [(np.datetime64(season.start), np.datetime64(season.stop)) for season in seasons]
        table = _drop(table, ~inside(table["time"], spans), counts, "other_season")
    table["row"], table["col"], held = pixel_of(table["lon"], table["lat"], grid)
    table = _drop(table, ~held, counts, "outside")
    others = np.zeros(len(table[label]), bool)
    if tiles is not None and shot_owner == "nearest":
        others = owner_tile(table["lon"], table["lat"], _neighbours(tile, grid, tiles)) != tile
    table = _drop(table, others, counts, "other_tile")
    table = _drop(table, ~valid[table["row"], table["col"]], counts, "no_data")
    means, sigma = _means(table, grid, label)
    counts["used"] = len(table[label])
    counts["without_sigma"] = int((~(table["agbd_sigma"] >= 0)).sum()) if "agbd_sigma" in table else counts["used"]
    counts["pixels"] = int((means != NO_LABEL).sum())
    kinds = {name: kind.to_pandas_dtype() for name, kind in _shot_columns(label).items()} | {"granule": object}
    return Labels(means, sigma, {name: table[name].astype(kind) for name, kind in kinds.items()}, counts)


def _values_of(label: str) -> tuple[str, ...]:
    """The columns of footprints that tell a label and what is known of its error."""
    return _VALUES if label == BIOMASS.name else (label,)


def _shot_columns(label: str) -> dict[str, pa.DataType]:
    """Columns of the table beside a raster."""
    return _PLACES | dict.fromkeys(_values_of(label), pa.float32())


def _sorted(footprints: Mapping[str, np.ndarray], label: str) -> dict[str, np.ndarray]:
    """By shot_number; of a shot that came twice (two releases of a granule) the latest release first."""
    numbers = footprints["shot_number"]
    order = np.argsort(numbers, kind="stable")
    if (numbers[order][1:] == numbers[order][:-1]).any():
        granules, latest = np.unique(footprints["granule"].astype(str), return_inverse=True)
        order = np.lexsort((len(granules) - latest.reshape(-1), numbers))
    names = ("shot_number", "lon", "lat", "time", *_values_of(label), "granule")
    return {name: footprints[name][order] for name in names}


def _drop(table: dict[str, np.ndarray], gone: np.ndarray, counts: dict[str, int], name: str) -> dict[str, np.ndarray]:
    counts[name] = int(gone.sum())
    return {column: values[~gone] for column, values in table.items()}


def _neighbours(tile: str, grid: Grid, tiles: Mapping[str, Grid]) -> dict[str, Grid]:
    if tile not in tiles or not tiles[tile].same_as(grid):
        raise PrepError(f"tile {tile!r}: its grid isn't among those of the tiles {sorted(tiles)}")
    box = grid_box(grid)
    return {name: other for name, other in tiles.items() if name == tile or boxes_meet(box, grid_box(other))}


def _means(table: Mapping[str, np.ndarray], grid: Grid, label: str) -> tuple[np.ndarray, np.ndarray]:
    """(H, W) float32 each, means and their errors; sums run in float64 in the order of the shots, however given."""
    pixels, place = np.unique(table["row"] * grid.width + table["col"], return_inverse=True)
    shots = np.bincount(place.reshape(-1), minlength=len(pixels))

    def over_shots(values: np.ndarray) -> np.ndarray:
        return np.bincount(place.reshape(-1), weights=values.astype(np.float64), minlength=len(pixels)) / shots

    found = np.full((2, grid.height * grid.width), NO_LABEL, np.float32)
    found[0, pixels] = over_shots(table[label])
    if "agbd_sigma" in table:
        errors = np.sqrt(over_shots(np.square(table["agbd_sigma"], dtype=np.float64)) / shots)
        found[1, pixels] = np.where(np.isnan(errors), NO_LABEL, errors)
    means, sigma = found.reshape(2, grid.height, grid.width)
    return means, sigma


class Composite(NamedTuple):
    """What labels need of a composite: its file, what its tags say, size and place."""

    path: Path
    tile: str
    season: Season
    sensors: str
    grid: Grid


def open_composite(path: str | os.PathLike[str]) -> Composite:
    """Read a composite's grid and tags.

    Raises:
        PrepError: no tag TILE or SEASON.
        RasterError: it can't be read.
    """
    with open_image(path, model_sensors=(), encoding=_ANY) as source:
        for tag in ("TILE", "SEASON"):
            if not source.tags.get(tag):
                raise PrepError(f"{path}: no tag {tag}; expected a composite of `data_prep composite`")
        tags = source.tags
        return Composite(Path(path), tags["TILE"], Season.parse(tags["SEASON"]), tags.get("SENSORS", ""), source.grid)


def read_valid(path: str | os.PathLike[str]) -> np.ndarray:
    """(H, W) bool: where a composite has data, by the rule of `bands.no_data`."""
    with open_image(path, model_sensors=(), encoding=_ANY) as source:
        valid = np.empty((source.grid.height, source.grid.width), bool)
        for start in range(0, source.grid.height, _ROWS):
            stop = min(start + _ROWS, source.grid.height)
            valid[start:stop] = ~bands.no_data(source.read_rows(start, stop), source.fill)
    return valid


def write_labels(
    composite: str | os.PathLike[str],
    footprints: Iterable[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    tiles: Mapping[str, Grid] | None = None,
    shot_owner: ShotOwner = "nearest",
    label_years: int = 0,
    allow_empty: bool = False,
    label: str = BIOMASS.name,
) -> tuple[Path, dict[str, int]]:
    """Write `folder/{tile}/{tile}_{start}_{end}_agbd.tif` (`BANDS`) and the table of its shots, `.parquet`.

    Of heights it ends in `_rh98.tif` and has one band, in metres: GEDI gives them without an error.

    Args:
        composite: a file of data_prep.composite.
        footprints: footprint tables; of them only shots in the box around the composite are read and counted.
        folder: takes a folder for the tile.
        tiles: as in `label_raster`.
        shot_owner: as in `label_raster`.
        label_years: shots of the composite's season in so many years before and after it count too.
        allow_empty: write them as well where fewer than 0.1 % of the shots on the tile are left.
        label: what the footprint tables tell, `agbd` or a relative height.

    Returns:
        The raster's path, and `Labels.counts`.

    Raises:
        PrepError: as `label_raster`; footprint tables made with different filters; (nearly) no shot is left; a disk
            that doesn't take the files.
    """
    image, level = open_composite(composite), level_of(label)
    table, gedi = _gather(sorted(map(Path, footprints)), image.grid, level)
    seasons = image.season.widened(label_years)
    how: dict[str, Any] = {"tiles": tiles, "shot_owner": shot_owner, "seasons": seasons, "label": label}
    made = label_raster(table, image.grid, read_valid(composite), tile=image.tile, **how)
    there = sum(made.counts[name] for name in ("used", "other_season", "no_data"))
    told = ", ".join(f"{count} {name}" for name, count in made.counts.items())
    what = f"{composite}: shots of {' and '.join(season.text for season in seasons)} on its pixels with data ({told})"
    refuse_empty(PrepError, made.counts["used"], there, what, allowed=allow_empty)
    settings = {
        "step": "labels",
        "pixel": "contains the centre",
        "statistic": "mean",
        "sigma": "sqrt(sum of squares) / number of shots" if level.inputs else "none: heights come without an error",
        "shot_owner": shot_owner,
        "seasons": [season.text for season in seasons],
        "tiles": sorted(_neighbours(image.tile, image.grid, tiles)) if tiles is not None else [image.tile],
        "counts": made.counts,
        "gedi": gedi | {"granules": sorted(set(made.shots["granule"].tolist()))},
    }
    return _write(Path(folder), image, made, settings, labels.parse(label)), made.counts


def _write(folder: Path, image: Composite, made: Labels, settings: dict[str, Any], about: Label) -> Path:
    """The raster and the table of its shots; the raster's path."""
    if about != BIOMASS:
        settings["label"] = about.metadata()
    stem = f"{image.tile}_{image.season.start:%Y-%m-%d}_{image.season.stop:%Y-%m-%d}_{about.name}"
    dst = folder / image.tile / f"{stem}.tif"
    schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind in _shot_columns(about.name).items()])
    schema = schema.with_metadata(with_settings(schema, settings))
    write_table(pa.Table.from_pydict(made.shots, schema), dst.with_suffix(".parquet"))
    tags = {"TILE": image.tile, "SEASON": image.season.text, "SENSORS": image.sensors}
    tags["LABELS"] = json.dumps(settings, sort_keys=True)
    names, arrays = (BANDS, [made.label, made.sigma]) if about == BIOMASS else ((about.name,), [made.label])
    units = [about.units] * len(names)
    write_cog(dst, [np.stack(arrays)], image.grid, "float32", names, NO_LABEL, tags, units=units)
    return dst


def _gather(paths: Sequence[Path], grid: Grid, level: Level) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """All footprints in the box around the grid, and what made them."""
    if not paths:
        raise PrepError(f"no footprint tables of GEDI_{level.product}; expected files of `data_prep gedi`")
    box = grid_box(grid)
    tables, filters, versions = [], None, set()
    for path in paths:
        settings = read_settings(path)
        if settings.get("product", "GEDI_L4A") != f"GEDI_{level.product}":
            raise PrepError(
                f"{path}: footprints of {settings['product']}, but labels {level.label} come from "
                f"GEDI_{level.product}; keep the tables of two products in two folders of prepared data, or give "
                "label as `data_prep gedi` had it"
            )
        made = (settings.get("filters"), path)
        filters = filters or made
        if made[0] != filters[0]:
            raise PrepError(f"{path}: made with other filters than {filters[1]}: {made[0]} and {filters[0]}")
        table = read_footprints(path, box=box, label=level.label)
        if len(table["shot_number"]):
            tables.append(table)
            versions.add(f"{settings.get('release', '')} {settings.get('version', '')}".strip())
    tables = tables or [table]
    merged = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    return merged, {
        "product": f"GEDI_{level.product}",
        "versions": sorted(versions),
        "filters": filters[0] if filters else None,
    }


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Write labels for every composite. Exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_prep labels", description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="prepared data: composites/{tile}/*.tif and footprints/*.parquet are read, labels/ is written",
    )
    parser.add_argument("--tile", action="append", help="only this tile; may be given again (all)")
    add_options(parser, LabelSettings)
    parser.add_argument("--label-years", type=int, default=0, help="shots of N years before and after too (0)")
    add_allow_empty(parser)
    args = parser.parse_args(argv)
    refuse_beside_prepare(args.out)
    composites = [open_composite(path) for path in find_composites(args.out)]
    grids: dict[str, Grid] = {}
    for image in composites:
        if not grids.setdefault(image.tile, image.grid).same_as(image.grid):
            raise PrepError(
                f"{image.path}: {image.grid.describe()}, but another composite of tile {image.tile} is "
                f"{grids[image.tile].describe()}"
            )
    missing = sorted(set(args.tile or ()) - set(grids))
    if missing or not composites:
        raise PrepError(f"{args.out / 'composites'}: no composites of tile {', '.join(missing) or 'any'}")
    product = f"GEDI_{level_of(args.label).product}"
    tables = sorted(args.out.glob("footprints/*.parquet"))
    tables = [table for table in tables if read_settings(table).get("product", product) == product]
    for image in composites:
        if not args.tile or image.tile in args.tile:
            dst, counts = write_labels(
                image.path,
                tables,
                args.out / "labels",
                tiles=grids,
                shot_owner=args.shot_owner,
                label_years=args.label_years,
                label=args.label,
                allow_empty=args.allow_empty,
            )
            print(f"{dst}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))
    return 0
