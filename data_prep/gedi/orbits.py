"""GEDI L4A orbits (HDF5) to footprint tables (GeoParquet): `python -m data_prep gedi --help`."""

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from biomass_jax.errors import PrepError
from biomass_jax.runtime.settings import add_options, options_of
from data_prep.commands import command, refuse_beside_prepare
from data_prep.gedi.filters import DEFAULT, EPOCH, Step, Table, as_dict, steps
from data_prep.gedi.footprints import write_footprints
from data_prep.gedi.names import BEAMS, COLUMNS, FIELDS, Product, naming, product_of
from data_prep.places import Box, check_box, grid_box, grid_centre, in_box, tile_grid
from data_prep.season import Season, resolve_season
from data_prep.settings import Filters

_BLOCK = 2**14  # rows read at once of a dataset without chunks


def read_granule(
    path: str | os.PathLike[str],
    *,
    bbox: Box | None = None,
    season: Sequence[Season] | None = None,
    filters: Filters = DEFAULT,
) -> tuple[dict[str, np.ndarray], dict[str, int], Product]:
    """Read the shots of one orbit that the filters leave.

    With a box, coordinates are read first, and of everything else only the chunks that hold a shot inside it.

    Args:
        path: GEDI L4A file, version 2, 2.1 or 3.
        bbox: (west, south, east, north) in degrees, west > east across the antimeridian; None for the whole orbit.
        season: shots inside any of them are kept; None for all times.
        filters: what is kept.

    Returns:
        Columns (N,) sorted by shot_number: shot_number uint64, lon, lat float64 degrees, time datetime64[us] UTC, beam,
        agbd, agbd_se float32 Mg/ha, sensitivity, l4_quality_flag, degrade_flag, selected_algorithm, pft_class,
        leaf_off_flag, granule. And how many shots were left after each step, in order: `shots` (all), `box` where there
        is one, then each enabled filter. A filter that leaves nothing is a warning (UserWarning). And what the
        granule's name tells.

    Raises:
        PrepError: not such a file, truncated, or without a dataset that is needed.
    """
    path, box = Path(path), None if bbox is None else check_box(bbox)
    with _opened(path) as file:
        product = _product(file, path, filters)
        found = _beams(file, path)
        version = max(naming(beam) for beam in found.values())
        chain = steps(filters, naming=version, release=product.release, seasons=season)
        fields = list(dict.fromkeys([*COLUMNS, *(field for step in chain for field in step.needs)]))
        counts = {"shots": sum(len(beam["shot_number"]) for beam in found.values())}
        table = _read_beams(found, fields, version, chain, box, path)
    if box is not None:
        counts["box"] = len(table["shot_number"])
    for step in chain:
        before = len(table["shot_number"])
        kept = step.keep(table)
        table = {name: values[kept] for name, values in table.items()}
        counts[step.name] = len(table["shot_number"])
        if before and not counts[step.name]:
            _warn(f"{path.name}: filter {step.name} drops all of the {before} shots left before it")
    if filters.max_relative_se is not None:
        _warn(
            f"{path.name}: max_relative_se removes low biomass, not bad shots, because agbd_se is nearly constant; "
            f"{counts['max_relative_se']} shots are left"
        )
    return _footprints(table, product.granule, path), counts, product


def convert_granule(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    bbox: Box | None = None,
    season: Sequence[Season] | None = None,
    filters: Filters = DEFAULT,
) -> tuple[Path, dict[str, int]]:
    """Write one orbit's footprints to `out/{granule}.parquet`, settings and counts in its schema's metadata.

    Returns:
        The file, and `read_granule`'s counts.

    Raises:
        PrepError: as `read_granule` and `write_footprints`.
    """
    footprints, counts, product = read_granule(path, bbox=bbox, season=season, filters=filters)
    metadata = {
        "step": "gedi",
        "product": "GEDI_L4A",
        "granule": product.granule,
        "release": product.release,
        "version": product.version,
        "filters": as_dict(filters),
        "counts": [[name, count] for name, count in counts.items()],  # their order tells
        "season": [one.text for one in season or ()],
        "box": None if bbox is None else list(check_box(bbox)),
    }
    return write_footprints(footprints, Path(out) / f"{product.granule}.parquet", metadata), counts


def find_granules(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The HDF5 files among paths and below folders, sorted by name.

    Raises:
        PrepError: a path isn't there, nothing is found, or two files are of one granule.
    """
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise PrepError(f"{path}: no such file or folder")
        for file in sorted(path.rglob("*.h5")) if path.is_dir() else [path]:
            product = product_of(file.name)
            name = product.granule if product else file.stem
            if found.setdefault(name, file) != file:
                raise PrepError(f"{file}: the same granule as {found[name]}; give one of them")
    if not found:
        raise PrepError(f"no .h5 files in {', '.join(map(str, paths))}; expected GEDI L4A granules")
    return [found[name] for name in sorted(found)]


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """Open a file; what HDF5 has to say about a damaged one becomes a PrepError that names it."""
    if not path.is_file():
        raise PrepError(f"{path}: no such file")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError) as error:
        raise PrepError(
            f"{path}: can't be read as HDF5, truncated or damaged ({path.stat().st_size:,} bytes); download it again: "
            f"{error}"
        ) from error


def _product(file: h5py.File, path: Path, filters: Filters) -> Product:
    """From the file's name, else from the name that its metadata hold."""
    attributes = file["METADATA/DatasetIdentification"].attrs if "METADATA/DatasetIdentification" in file else {}
    inside = attributes.get("fileName", "")
    inside = inside.decode() if isinstance(inside, bytes) else str(inside)
    product = product_of(path.name) or product_of(inside)
    if product is None and filters.algorithm_10 == "auto":
        raise PrepError(
            f"{path}: release unknown, neither its name nor METADATA/DatasetIdentification fileName ({inside!r}) is "
            "like GEDI04_A_2021150031254_O13948_03_T06447_02_002_01_V002.h5; algorithm 10 is wrong in release 002_01: "
            "give the file NASA's name, or set algorithm_10 to 'drop' or 'keep'"
        )
    return product or Product(path.stem, "", "")


def _beams(file: h5py.File, path: Path) -> dict[str, h5py.Group]:
    found = {name: file[name] for name in BEAMS if isinstance(file.get(name), h5py.Group)}
    absent = [name for name in BEAMS if name not in found]
    if not found:
        raise PrepError(f"{path}: no beams; found {sorted(file)}, expected groups such as {BEAMS[-1]}")
    if absent:
        _warn(f"{path.name}: beams absent: {', '.join(absent)}")
    for name, beam in found.items():
        if not isinstance(beam.get("shot_number"), h5py.Dataset):
            raise PrepError(f"{path}: {name} has no dataset shot_number, which is needed")
    return found


def _read_beams(
    beams: dict[str, h5py.Group], fields: Sequence[str], version: int, chain: list[Step], box: Box | None, path: Path
) -> Table:
    """Columns over all beams, in the box where there is one."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in [*fields, "beam"]}
    absent: dict[str, list[str]] = {}
    for name, beam in beams.items():
        rows = None if box is None else _rows_inside(beam, version, box, path)
        count = len(beam["shot_number"]) if rows is None else len(rows)
        for field in fields:
            values = _read(beam, field, version, rows, path)
            if values is None:
                _check_dispensable(field, name, version, chain, path)
                absent.setdefault(field, []).append(name)
                values = np.full(count, FIELDS[field].missing, FIELDS[field].dtype)
            parts[field].append(values)
        parts["beam"].append(np.full(count, name))
    for field, names in absent.items():
        _warn(
            f"{path.name}: no dataset {FIELDS[field].datasets[version]} in {', '.join(names)}: column {field} holds "
            f"{FIELDS[field].missing} there"
        )
    return {name: np.concatenate(values) for name, values in parts.items()}


def _check_dispensable(field: str, beam: str, version: int, chain: list[Step], path: Path) -> None:
    lacks = f"{path}: {beam} has no dataset {FIELDS[field].datasets[version]}, which"
    if FIELDS[field].missing is None:
        raise PrepError(f"{lacks} is needed")
    for step in chain:
        if field in step.needs:
            raise PrepError(f"{lacks} filter {step.name} needs; get the whole granule, or turn that filter off")


def _rows_inside(beam: h5py.Group, version: int, box: Box, path: Path) -> np.ndarray:
    lon, lat = _read(beam, "lon", version, None, path), _read(beam, "lat", version, None, path)
    if lon is None or lat is None:
        raise PrepError(f"{path}: {beam.name.strip('/')} has no lon_lowestmode or lat_lowestmode, which are needed")
    return np.flatnonzero(in_box(lon, lat, box))


def _read(beam: h5py.Group, field: str, version: int, rows: np.ndarray | None, path: Path) -> np.ndarray | None:
    """A field's values at the wanted rows (None: all), or None where the beam lacks it."""
    spec = FIELDS[field]
    path_inside = spec.datasets[version]
    dataset = beam.get(path_inside) if path_inside else None
    if not isinstance(dataset, h5py.Dataset):
        return None
    name = dataset.name.strip("/")
    if dataset.shape != beam["shot_number"].shape or dataset.ndim != 1:
        raise PrepError(f"{path}: {name} has shape {dataset.shape}, shot_number {beam['shot_number'].shape}")
    wanted = "iu" if spec.dtype.kind == "u" else "iuf"
    if dataset.dtype.kind not in wanted or (field == "shot_number" and dataset.dtype.itemsize != 8):
        raise PrepError(f"{path}: {name} is {dataset.dtype}, expected {spec.dtype}")
    stored = dataset[:] if rows is None else _read_rows(dataset, rows)
    values = stored.astype(spec.dtype)
    if spec.dtype.kind == "u" and (values != stored).any():
        raise PrepError(f"{path}: {name} holds {stored[values != stored][0]}, which is no {spec.dtype}")
    return values


def _read_rows(dataset: h5py.Dataset, rows: np.ndarray) -> np.ndarray:
    """Values at ascending rows, decoding only the chunks that hold them."""
    chunk = dataset.chunks[0] if dataset.chunks else _BLOCK
    values = np.empty(len(rows), dataset.dtype)
    for number in np.unique(rows // chunk):
        start = number * chunk
        part = slice(*np.searchsorted(rows, (start, start + chunk)))
        values[part] = dataset[start : start + chunk][rows[part] - start]
    return values


def _footprints(table: Table, granule: str, path: Path) -> dict[str, np.ndarray]:
    """The table's columns in their order, sorted by shot number."""
    order = np.argsort(table["shot_number"], kind="stable")
    table = {name: values[order] for name, values in table.items()}
    lon, lat, seconds = table["lon"], table["lat"], table["delta_time"]
    bad = ~((np.abs(lon) <= 180) & (np.abs(lat) <= 90) & np.isfinite(seconds))
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        raise PrepError(
            f"{path}: {int(bad.sum())} shots that the filters keep have no place or time, first shot_number "
            f"{table['shot_number'][at]} with lon {lon[at]}, lat {lat[at]}, delta_time {seconds[at]}; keep the "
            "algorithm_run_flag filter on"
        )
    # rounded down, so that a time before a season's end stays before it
    table["time"] = np.datetime64(EPOCH, "us") + np.floor(seconds * 1e6).astype("timedelta64[us]")
    table["granule"] = np.full(len(lon), granule, object)
    names = ("shot_number", "lon", "lat", "time", "beam", *COLUMNS[4:], "granule")
    return {name: table[name] for name in names}


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m data_prep gedi", description=__doc__)
    made.add_argument(
        "paths", nargs="*", type=Path, metavar="PATH", help="GEDI L4A files or folders of them (OUT/granules/gedi)"
    )
    made.add_argument("--out", type=Path, required=True, help="prepared data: takes footprints/{granule}.parquet")
    where = made.add_mutually_exclusive_group()
    where.add_argument("--bbox", nargs=4, type=float, metavar=("WEST", "SOUTH", "EAST", "NORTH"), help="degrees")
    where.add_argument("--tile", help="an HLS tile such as 10SFF instead of a box")
    made.add_argument("--season", help="2020-06-01/2020-09-16 (end not included), or a year with --bbox or --tile")
    made.add_argument("--label-years", type=int, default=0, help="the same days of N years before and after too (0)")
    add_options(made, Filters)
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
    failed = 0
    for path in granules:
        try:
            dst, counts = convert_granule(path, args.out / "footprints", bbox=bbox, season=season, filters=filters)
        except PrepError as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
            continue
        print(f"{dst}: " + " -> ".join(f"{count:,} {name}" for name, count in counts.items()))
    if failed:
        raise PrepError(f"{failed} of {len(granules)} granules failed")
    return 0
