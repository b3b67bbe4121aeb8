"""GEDI orbits (HDF5) to footprint tables (GeoParquet): `python -m data_prep gedi --help`."""

import argparse
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from biomass_jax.errors import PrepError, refuse_empty
from biomass_jax.runtime import content
from biomass_jax.runtime.settings import add_options, options_of
from data_prep.commands import add_allow_empty, command, refuse_beside_prepare
from data_prep.gedi.filters import BIOMASS, DEFAULT, EPOCH, Step, Table, as_dict, steps
from data_prep.gedi.footprints import columns_of, write_footprints
from data_prep.gedi.names import (
    BEAMS,
    EXAMPLE,
    HEIGHTS,
    NO_VALUE,
    Field,
    Level,
    Product,
    level_of,
    naming,
    other_product,
    product_of,
)
from data_prep.gedi.sigma import FAULTS, NO_SLOPE, StratumModel, agbd_sigma, read_models
from data_prep.places import Box, check_box, grid_box, grid_centre, in_box, tile_grid
from data_prep.season import Season, resolve_season
from data_prep.settings import Filters, LabelSettings

_BLOCK = 2**14  # rows read at once of a dataset without chunks
_LATEST = 100 * 365.25 * 86400.0  # seconds of delta_time: what is later is no time


class Orbit(NamedTuple):
    """What was read of one orbit.

    Attributes:
        footprints: columns (N,) sorted by shot_number: shot_number uint64, lon, lat float64 degrees, time
            datetime64[us] UTC, beam, agbd, agbd_se, agbd_sigma (NaN where there is none) float32, sensitivity,
            l4_quality_flag, degrade_flag, selected_algorithm, pft_class, leaf_off_flag, granule. Of heights `rh98` (or
            the relative height that was asked for, float32 metres) instead of agbd and its errors, and quality_flag.
        counts: shots left after each step, in order: `shots` (all), `placed` where any lacks a value that is
            needed, as a place or a time, `box` where there is one, then each enabled filter.
        product: what the granule's name tells.
        skipped: beam -> why it can't be used.
        without_sigma: why footprints have no agbd_sigma -> how many, see `sigma.FAULTS`; {} of heights, which L2A
            gives without an error.
    """

    footprints: dict[str, np.ndarray]
    counts: dict[str, int]
    product: Product
    skipped: dict[str, str]
    without_sigma: dict[str, int]


def read_granule(
    path: str | os.PathLike[str],
    *,
    bbox: Box | None = None,
    season: Sequence[Season] | None = None,
    filters: Filters = DEFAULT,
    label: str = BIOMASS.label,
) -> Orbit:
    """Read the shots of one orbit that the filters leave.

    With a box, coordinates are read first, and of everything else only the chunks that hold a shot inside it. What is
    left out is told by warnings (UserWarning): beams that lack something, shots without a number, place or time, a
    filter that leaves nothing, what agbd_sigma can't be made without.

    Args:
        path: GEDI L4A file, version 2, 2.1 or 3; of heights an L2A file, version 2 or 3.
        bbox: (west, south, east, north) in degrees, west > east across the antimeridian; None for the whole orbit.
        season: shots inside any of them are kept; None for all times.
        filters: what is kept.
        label: `agbd`, or of L2A a relative height `rh0` to `rh100`.

    Raises:
        PrepError: not such a file, truncated or damaged, or without a beam that can be used.
    """
    path, box, level = Path(path), None if bbox is None else check_box(bbox), level_of(label)
    with _opened(path, level) as file:
        groups, skipped = _beams(file, path, level)
        product, models = _product(file, path, filters, level), read_models(file)
        version = max(map(naming, groups.values()), default=2)
        chain = steps(filters, naming=version, release=product.release, seasons=season, level=level)
        beams: dict[str, _Beam] = {}
        for name, group in groups.items():
            try:
                beams[name] = _read_beam(group, version, chain, box, models, level)
            except _Unusable as why:
                skipped[name] = str(why)
    skipped = {name: skipped[name] for name in sorted(skipped)}
    _tell_skipped(beams, skipped, path)
    counts, table = _joined(beams, version, path, level)
    if box is None:
        del counts["box"]
    for step in chain:
        before = len(table["shot_number"])
        kept = step.keep(table)
        table = {name: values[kept] for name, values in table.items()}
        counts[step.name] = len(table["shot_number"])
        if before and not counts[step.name]:
            _warn(f"{path.name}: filter {step.name} drops all of the {before} shots left before it")
    if filters.max_relative_se is not None and level is BIOMASS:
        _warn(
            f"{path.name}: max_relative_se removes low biomass, not bad shots, because agbd_se is nearly constant; "
            f"{counts['max_relative_se']} shots are left"
        )
    without_sigma = _without_sigma(table.pop("sigma_fault"), path) if level.inputs else {}
    return Orbit(_footprints(table, product.granule, level), counts, product, skipped, without_sigma)


def convert_granule(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    bbox: Box | None = None,
    season: Sequence[Season] | None = None,
    filters: Filters = DEFAULT,
    label: str = BIOMASS.label,
) -> tuple[Path, dict[str, int]]:
    """Write one orbit's footprints to `out/{granule}.parquet`, settings and counts in its schema's metadata.

    Returns:
        The file, and the counts of `Orbit`.

    Raises:
        PrepError: as `read_granule` and `write_footprints`.
    """
    level = level_of(label)
    how: dict[str, Any] = {"bbox": bbox, "season": season, "filters": filters, "label": label}
    footprints, counts, product, skipped, without = read_granule(path, **how)
    metadata = {
        "step": "gedi",
        "product": f"GEDI_{level.product}",
        "granule": product.granule,
        "release": product.release,
        "version": product.version,
        "filters": as_dict(filters, level),
        "counts": [[name, count] for name, count in counts.items()],  # their order tells
        "skipped_beams": skipped,
        "without_sigma": without,
        "season": [one.text for one in season or ()],
        "box": None if bbox is None else list(check_box(bbox)),
    }
    metadata |= {} if level is BIOMASS else {"label": label}
    return write_footprints(footprints, Path(out) / f"{product.granule}.parquet", metadata, label=label), counts


def find_granules(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The HDF5 files among paths and below folders, sorted by name.

    Raises:
        PrepError: a path isn't there, nothing is found, or two files are of one granule.
    """
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise PrepError(f"{path}: no such file or folder")
        for file in granules_below(path) if path.is_dir() else [path]:
            product = product_of(file.name)
            name = product.granule if product else file.stem
            if found.setdefault(name, file) != file:
                raise PrepError(f"{file}: the same granule as {found[name]}; give one of them")
    if not found:
        raise PrepError(no_granules(*map(Path, paths)))
    return [found[name] for name in sorted(found)]


def granules_below(folder: Path) -> list[Path]:
    """The .h5 files below a folder; hidden ones, such as macOS puts beside others (`._NAME`), aren't any."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".h5" and not path.name.startswith("."))


def no_granules(*folders: Path) -> str:
    """What to say of folders without granules."""
    others = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    others.sort(key=lambda path: not content.unfinished(path))
    found = ""
    if others:
        end = ", a download that has not ended" if content.unfinished(others[0]) else ""
        found = f"; found {len(others)} other files, first {others[0].name}{end}"
    return f"no .h5 files in {', '.join(map(str, folders))}{found}; expected GEDI L4A granules (L2A for heights)"


@contextmanager
def _opened(path: Path, level: Level) -> Iterator[h5py.File]:
    """Open a file; what HDF5 has to say about a damaged one becomes a PrepError that names it."""
    if not path.is_file():
        raise PrepError(f"{path}: no such file")
    try:
        with open(path, "rb"):  # HDF5 would blame the content
            pass
        # A lock is of no use to a reader, and many file systems have none.
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except PermissionError as error:
        raise PrepError(f"{path}: can't be read: {error.strerror}") from error
    except (OSError, RuntimeError, KeyError) as error:
        meaning = content.mistaken(path, *content.HDF5)
        if meaning is not None:
            what = other_product(path.name, expected=level.product) or meaning
            raise PrepError(f"{path}: can't be read as HDF5, it is {what}") from error
        if re.search("filter .* registered|plugin", str(error)):
            raise PrepError(
                f"{path}: compressed in a way that this HDF5 library doesn't know: {error}; get NASA's own file, or "
                "`pip install hdf5plugin` and set HDF5_PLUGIN_PATH to its folder of plugins"
            ) from error
        end = "; its name is that of a download that has not ended" if content.unfinished(path) else ""
        raise PrepError(
            f"{path}: can't be read as HDF5, truncated or damaged ({path.stat().st_size:,} bytes{end}); download it "
            f"again: {error}"
        ) from error


def _product(file: h5py.File, path: Path, filters: Filters, level: Level) -> Product:
    """From the file's name, else from the name that its metadata hold."""
    inside = _attribute(file, "METADATA/DatasetIdentification", "fileName")
    product = product_of(path.name) or product_of(inside)
    if product is None and level is BIOMASS and filters.algorithm_10 == "auto":
        raise PrepError(
            f"{path}: release unknown, neither its name nor METADATA/DatasetIdentification fileName ({inside!r}) is "
            f"like {EXAMPLE}; algorithm 10 is wrong in release 002_01: "
            "give the file NASA's name, or set algorithm_10 to 'drop' or 'keep'"
        )
    return product or Product(level.product, path.stem, "", "")


def _attribute(file: h5py.File, group: str, name: str) -> str:
    """An attribute as text, empty where there is none."""
    found = file[group].attrs.get(name, "") if group in file else ""
    found = found.reshape(-1)[0] if isinstance(found, np.ndarray) and found.size else found
    return found.decode(errors="replace") if isinstance(found, bytes) else str(found)


def _beams(file: h5py.File, path: Path, level: Level) -> tuple[dict[str, h5py.Group], dict[str, str]]:
    """The groups of beams, and {name: why it is none} of what only looks like one.

    Raises:
        PrepError: another product than the label's, or no beams.
    """
    names = [name for name in file if name.startswith("BEAM")]
    found = {name: file[name] for name in BEAMS if isinstance(file.get(name), h5py.Group)}
    others = {name: f"{name} is no group of one of GEDI's eight beams" for name in names if name not in found}
    datasets = {name for group in found.values() for name in group}
    if level.fields[level.label].datasets[2] not in datasets:
        said = [_attribute(file, "METADATA/DatasetIdentification", "shortName"), _attribute(file, "/", "short_name")]
        other = other_product(*said, path.name, datasets=datasets, expected=level.product)
        if other is not None:
            raise PrepError(f"{path}: {other}")
    if not found:
        raise PrepError(f"{path}: no beams; found {sorted(file)}, expected groups such as {BEAMS[-1]}")
    absent = [name for name in BEAMS if name not in found and name not in others]
    if absent:
        _warn(f"{path.name}: beams absent: {', '.join(absent)}")
    return found, others


class _Unusable(Exception):
    """Why a beam can't be used; the orbit's other beams can."""


class _Beam(NamedTuple):
    """What was read of one beam."""

    table: Table  # of the shots that lack nothing, in the box where there is one
    shots: int  # all of them
    placed: int  # less those that were dropped because they lack a value that is needed
    absent: tuple[str, ...]  # fields without a dataset, which nothing needs


def _read_beam(
    beam: h5py.Group, version: int, chain: list[Step], box: Box | None, models: dict[bytes, StratumModel], level: Level
) -> _Beam:
    """A beam's columns. _Unusable where something that is needed is absent, or isn't what it has to be."""
    fields = level.fields
    needed = {
        field: f"filter {step.name} needs; get the whole granule, or turn that filter off"
        for step in reversed(chain)
        for field in step.needs
    }
    needed |= dict.fromkeys((field for field in level.columns if fields[field].missing is None), "is needed")
    wanted = dict.fromkeys([*level.columns, *level.inputs, *needed])
    found = {field: _dataset(beam, field, fields[field], version) for field in wanted}
    absent = [field for field, dataset in found.items() if dataset is None]
    for field in absent:
        if field in needed:
            raise _Unusable(f"{_name(beam)} has no dataset {fields[field].datasets[version]}, which {needed[field]}")
    datasets = {field: dataset for field, dataset in found.items() if dataset is not None}
    shape = datasets["shot_number"].shape
    for field, dataset in datasets.items():
        expected = shape if fields[field].column is None else (*shape, HEIGHTS)
        if len(shape) != 1 or dataset.shape != expected:
            columns = "" if fields[field].column is None else f", and {HEIGHTS} columns are expected"
            raise _Unusable(f"{_name(dataset)} has shape {dataset.shape}, shot_number {shape}{columns}")
    lon, lat = (_values(datasets[field], fields[field], None)[0] for field in ("lon", "lat"))
    placed = (np.abs(lon) <= 180) & (np.abs(lat) <= 90) & ((lon != 0) | (lat != 0))  # 0, 0 is HDF5's fill
    rows = np.flatnonzero(placed if box is None else placed & in_box(lon, lat, box))
    chosen = None if len(rows) == len(lon) else rows
    table, whole = {"lon": lon[rows], "lat": lat[rows]}, np.ones(len(rows), bool)
    for field in found:
        if field in absent:
            table[field] = np.full(len(rows), fields[field].missing, fields[field].dtype)
        elif field not in table:
            table[field], known = _values(datasets[field], fields[field], chosen)
            whole &= known | (field not in needed)
    whole &= (table["shot_number"] > 0) & (table["delta_time"] > 0) & (table["delta_time"] < _LATEST)
    table["beam"] = np.full(len(rows), _name(beam))
    if level.inputs:
        t, t_se, strata = map(table.pop, level.inputs)
        table["agbd_sigma"], table["sigma_fault"] = agbd_sigma(t, t_se, strata, models)
    absent = [field for field in absent if field not in level.inputs]  # told with the shots that have no agbd_sigma
    dropped = int((~placed).sum() + (~whole).sum())
    return _Beam({name: values[whole] for name, values in table.items()}, len(lon), len(lon) - dropped, tuple(absent))


def _dataset(beam: h5py.Group, name: str, field: Field, version: int) -> h5py.Dataset | None:
    inside = field.datasets[version]
    found = beam.get(inside) if inside else None
    if not isinstance(found, h5py.Dataset):
        return None
    try:
        kind = found.dtype
    except TypeError as error:  # HDF5 has types that NumPy hasn't
        raise _Unusable(f"{_name(found)}: {error}, expected {field.dtype}") from error
    wanted = {"u": "iu", "f": "iuf", "S": "SO"}[field.dtype.kind]
    # Whole numbers are no metres: heights of single algorithms are centimetres.
    wanted = "f" if field.column is not None else wanted
    if kind.kind not in wanted or (name == "shot_number" and kind.itemsize != 8):
        raise _Unusable(f"{_name(found)} is {kind}, expected {field.dtype}")
    return found


def _name(node: h5py.Group | h5py.Dataset) -> str:
    return str(node.name).strip("/")


def _values(dataset: h5py.Dataset, field: Field, rows: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """A field's values at the wanted rows (None: all), and which of them aren't -9999 where the type has no room."""
    column = () if field.column is None else (field.column,)
    try:
        stored = dataset[(slice(None), *column)] if rows is None else _read_rows(dataset, rows, column)
    except OSError as error:
        raise OSError(f"{_name(dataset)}: {error}") from error
    values = stored.astype(field.dtype)
    known = np.ones(len(values), bool)
    if field.dtype.kind == "u" and dataset.dtype != field.dtype:
        known = stored != NO_VALUE
        values[~known] = field.missing or 0
        odd = known & (values != stored)
        if odd.any():
            raise _Unusable(f"{_name(dataset)} holds {stored[odd][0]}, which is no {field.dtype}")
    return values, known


def _read_rows(dataset: h5py.Dataset, rows: np.ndarray, column: tuple[int, ...]) -> np.ndarray:
    """Values at ascending rows, of one column where one is given, decoding only the chunks that hold them."""
    chunk = dataset.chunks[0] if dataset.chunks else _BLOCK
    values = np.empty(len(rows), dataset.dtype)
    for number in np.unique(rows // chunk):
        start = number * chunk
        part = slice(*np.searchsorted(rows, (start, start + chunk)))
        values[part] = dataset[(slice(start, start + chunk), *column)][rows[part] - start]
    return values


def _tell_skipped(beams: dict[str, _Beam], skipped: dict[str, str], path: Path) -> None:
    """Warn of beams that can't be used. PrepError where no other has shots."""
    if not skipped:
        return
    first, *others = skipped.values()
    if not any(beam.shots for beam in beams.values()):
        more = f"; {len(others)} more beams can't be used, and the others have no shots" if others else ""
        raise PrepError(f"{path}: {first}{more}")
    _warn(f"{path.name}: {len(skipped)} of {len(skipped) + len(beams)} beams skipped: {'; '.join(skipped.values())}")


def _joined(beams: dict[str, _Beam], version: int, path: Path, level: Level) -> tuple[dict[str, int], Table]:
    """Counts and columns over all beams."""
    counts = {"shots": sum(beam.shots for beam in beams.values())}
    lost = {name: beam.shots - beam.placed for name, beam in beams.items() if beam.placed < beam.shots}
    if lost:
        counts["placed"] = counts["shots"] - sum(lost.values())
        where = ", ".join(f"{count} of {beams[name].shots} in {name}" for name, count in lost.items())
        said = f"shots without a value that is needed (number, place, time, what filters ask for): {where}"
        if not counts["placed"]:
            raise PrepError(f"{path}: no shot can be used; {said}")
        _warn(f"{path.name}: dropped {said}")
    tables = [beam.table for beam in beams.values()]
    table = {name: np.concatenate([part[name] for part in tables]) for name in tables[0]}
    counts["box"] = len(table["shot_number"])
    for field in dict.fromkeys(field for beam in beams.values() for field in beam.absent):
        lacking = ", ".join(name for name, beam in beams.items() if field in beam.absent)
        _warn(
            f"{path.name}: no dataset {level.fields[field].datasets[version]} in {lacking}: column {field} holds "
            f"{level.fields[field].missing!r} there"
        )
    return counts, table


def _without_sigma(fault: np.ndarray, path: Path) -> dict[str, int]:
    """How many footprints have no agbd_sigma for which reason; a warning where something can't be known."""
    found = {why: int((fault == number).sum()) for number, why in enumerate(FAULTS) if number}
    found = {why: count for why, count in found.items() if count}
    told = ", ".join(f"{count} of {len(fault)} {why}" for why, count in found.items() if why != NO_SLOPE)
    if told:
        _warn(f"{path.name}: agbd_sigma is NaN for shots {told}; get the whole granule if you need it")
    return found


def _footprints(table: Table, granule: str, level: Level) -> dict[str, np.ndarray]:
    """The table's columns in their order, sorted by shot number."""
    order = np.argsort(table["shot_number"], kind="stable")
    table = {name: values[order] for name, values in table.items()}
    # rounded down, so that a time before a season's end stays before it
    table["time"] = np.datetime64(EPOCH, "us") + np.floor(table["delta_time"] * 1e6).astype("timedelta64[us]")
    table["granule"] = np.full(len(order), granule, object)
    return {name: table[name] for name in columns_of(level.label)}


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m data_prep gedi", description=__doc__)
    made.add_argument(
        "paths",
        nargs="*",
        type=Path,
        metavar="PATH",
        help="GEDI L4A files, L2A for heights, or folders of them (OUT/granules/gedi)",
    )
    made.add_argument("--out", type=Path, required=True, help="prepared data: takes footprints/{granule}.parquet")
    where = made.add_mutually_exclusive_group()
    where.add_argument("--bbox", nargs=4, type=float, metavar=("WEST", "SOUTH", "EAST", "NORTH"), help="degrees")
    where.add_argument("--tile", help="an HLS tile such as 10SFF instead of a box")
    made.add_argument("--season", help="2020-06-01/2020-09-16 (end not included), or a year with --bbox or --tile")
    made.add_argument("--label-years", type=int, default=0, help="the same days of N years before and after too (0)")
    add_options(made, LabelSettings, without=("shot_owner",))
    add_options(made, Filters)
    add_allow_empty(made)
    return made


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Convert every granule; one that can't be read is named and doesn't stop the rest. Exit code."""
    args = _parser().parse_args(argv)
    refuse_beside_prepare(args.out)
    bbox, latitude, season = None, None, None
    if args.bbox is not None:
        bbox = check_box(tuple(args.bbox))
        latitude = (bbox[1] + bbox[3]) / 2
    if args.tile is not None:
        grid = tile_grid(args.tile)
        bbox, latitude = grid_box(grid), grid_centre(grid)[1]
    if args.season is not None:
        season = resolve_season(args.season, latitude).widened(args.label_years)
    filters = Filters(**options_of(args, Filters))
    granules = find_granules(args.paths or [args.out / "granules" / "gedi"])
    failed = left = read = 0
    for path in granules:
        try:
            how: dict[str, Any] = {"bbox": bbox, "season": season, "filters": filters, "label": args.label}
            dst, counts = convert_granule(path, args.out / "footprints", **how)
        except PrepError as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
            continue
        print(f"{dst}: " + " -> ".join(f"{count:,} {name}" for name, count in counts.items()))
        read, left = read + counts.get("box", counts["shots"]), left + list(counts.values())[-1]
    if failed:
        raise PrepError(f"{failed} of {len(granules)} granules failed")
    what = f"{args.out / 'footprints'}: shots there that the filters leave"
    refuse_empty(PrepError, left, read, what, allowed=args.allow_empty)
    return 0
