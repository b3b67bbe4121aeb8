"""Chips: the cells of a tile's grid with enough labels and little no-data.

`python -m data_prep chips --out OUT` goes through `OUT/composites/{tile}/*.tif`, each with its label raster
`OUT/labels/{tile}/{stem}_agbd.tif` and its table of shots `..._agbd.parquet` (`..._rh98` of heights), and writes
`OUT/chips/chips.parquet`.
That is an index: pixels stay where they are, and `read_record` reads a chip's window. Splits are drawn afterwards.
"""

import argparse
import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rasterio.windows import Window

from biomass_jax.data import bands, labels, records
from biomass_jax.data.biomes import Biomes
from biomass_jax.data.labels import BIOMASS, Label
from biomass_jax.data.raster.chips import Oddities, tell
from biomass_jax.data.raster.grid import Grid
from biomass_jax.errors import PrepError, refuse_empty
from biomass_jax.runtime.settings import add_options, options_of
from data_prep import ground
from data_prep.chips import index as chip_index
from data_prep.chips.windows import TilePair, moved
from data_prep.commands import add_allow_empty, alone_in, command
from data_prep.hls.composite import find_composites
from data_prep.settings import ChipSettings, LabelSettings

_SHOT_COLUMNS = ("shot_number", "row", "col")  # and the label


def index_tile(
    composite: str | os.PathLike[str],
    label: str | os.PathLike[str],
    settings: ChipSettings,
    *,
    root: str | os.PathLike[str],
    shots: str | os.PathLike[str] | None,
    biomes: Biomes | None,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The chips of one composite.

    A cell is one of the grid of `size` px that starts at the tile's upper-left pixel; what is left at the right and
    bottom edges makes none. Labels count where the composite has data.

    Args:
        composite: its six bands, with the tags TILE, SEASON and SENSORS.
        label: on the same grid, -1 for none; its tags tell what it is.
        settings: which cells become chips.
        root: folder to which the index's paths are relative; both rasters lie in it.
        shots: Parquet table of the shots behind the labels (shot_number uint64, row, col, and the label as
            `agbd` or `rh98`), or None.
        biomes: what names the biome at a place; `unknown` without.

    Returns:
        rows for `chip_index.write_index`, and counts: cells, kept, few_labels, no_data (cells with both faults count
        under few_labels).

    Raises:
        PrepError: grids differ, a tag is missing, or shots and labels contradict each other.
        RasterError: the composite can't be read or holds no digital numbers, or labels are above `label_max`.
    """
    size, min_labels, max_nodata = _checked(settings)
    counts = {"cells": 0, "kept": 0, "few_labels": 0, "no_data": 0}
    rows = []
    odd = Oddities()
    with TilePair(composite, label, encoding=settings.encoding, label_max=settings.label_max) as pair:
        grid = pair.grid
        table = None if shots is None else _ShotTable(shots, grid, pair.about.name)
        for row in range(0, grid.height - size + 1, size):
            window = Window(0, row, grid.width, size)
            missing, (values, gone, reasons) = bands.no_data(pair.read_image(window)), pair.read_labels(window)
            odd += reasons
            if table is not None:
                table.leave_out(row, gone)
                table.check(row, values, str(label))
            for col in range(0, grid.width - size + 1, size):
                cell = np.s_[:, col : col + size]
                found = values[cell][(values[cell] >= 0) & ~missing[cell]].astype(np.float64)
                share = float(missing[cell].mean())
                fate = "few_labels" if found.size < min_labels else "no_data" if share > max_nodata else "kept"
                counts["cells"] += 1
                counts[fate] += 1
                if fate == "kept":
                    place = {"row": row, "col": col, "nodata_share": share}
                    behind = {"shot_numbers": [] if table is None else table.inside(row, col, size)}
                    rows.append(place | _label_fields(found, pair.about) | behind)
        _add_places(rows, pair, Path(root), size, biomes)
    tell(odd, label)
    return rows, counts


def _checked(settings: ChipSettings) -> tuple[int, int, float]:
    size, min_labels, max_nodata = settings.size, settings.min_labels, settings.max_nodata
    if not (size > 0 and min_labels >= 1 and 0 <= max_nodata <= 1):
        raise PrepError(
            f"settings: found size {size}, min_labels {min_labels}, max_nodata {max_nodata}, expected a size above 0, "
            "min_labels from 1 on, max_nodata from 0 to 1"
        )
    return size, min_labels, max_nodata


def _label_fields(found: np.ndarray, label: Label) -> dict[str, Any]:
    return {
        "n_labels": found.size,
        "label_mean": float(found.mean()),
        "label_max": float(found.max()),
        "label_counts": np.histogram(found, [*label.edges, np.inf])[0].tolist(),
    }


def _add_places(rows: list[dict[str, Any]], pair: TilePair, root: Path, size: int, biomes: Biomes | None) -> None:
    """Fill in where the chips of a tile lie and where their pixels are."""
    if not rows:
        return
    grid = pair.grid
    places = np.array([(row["row"], row["col"]) for row in rows])
    outlines = ground.chip_outlines(pair.epsg, tuple(grid.transform)[:6], places, size)
    slugs = [records.UNKNOWN_BIOME] * len(rows) if biomes is None else biomes.at(ground.centres(outlines))
    files = {"composite": pair.composite, "label": pair.label_path}
    paths = {name: os.path.relpath(path.resolve(), root.resolve()) for name, path in files.items()}
    common = {"tile": pair.tile, "season": pair.season, "sensors": pair.sensors, "epsg": pair.epsg, "size": size}
    for row, outline, slug in zip(rows, outlines, slugs, strict=True):
        start = pair.season.split("/")[0]
        row |= {"geometry": outline, "biome": slug, "split": "", **paths, **common}
        row["chip_id"] = records.chip_id(pair.tile, row["row"], row["col"], grid.width, start, size)
        row["transform"] = moved(grid.transform, row["row"], row["col"])


class _ShotTable:
    """The shots behind a label raster, by row of pixels."""

    def __init__(self, path: str | os.PathLike[str], grid: Grid, label: str) -> None:
        self._path = path
        columns = (*_SHOT_COLUMNS, label)
        try:
            table = pq.read_table(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise PrepError(f"{path}: no readable Parquet table of shots: {error}") from error
        missing = [name for name in columns if name not in table.column_names]
        if missing:
            raise PrepError(
                f"{path}: a table of shots without {', '.join(missing)}; run `python -m data_prep labels` again"
            )
        if table.schema.field("shot_number").type != pa.uint64():
            raise PrepError(f"{path}: shot_number: found {table.schema.field('shot_number').type}, expected uint64")
        self._number, self._row, self._col, self._value = (table[name].to_numpy() for name in columns)
        self._width = grid.width

    def inside(self, row: int, col: int, size: int) -> list[int]:
        """The numbers of a window's shots, sorted."""
        rows, cols = self._row - row, self._col - col
        here = (rows >= 0) & (rows < size) & (cols >= 0) & (cols < size)
        return sorted(self._number[here].tolist())

    def leave_out(self, start: int, gone: np.ndarray) -> None:
        """Forget the shots of pixels (rows, width) from row `start` on, whose labels the raster itself takes away."""
        if not gone.any():
            return
        here = (self._row >= start) & (self._row < start + len(gone))
        here[here] = gone[self._row[here] - start, self._col[here]]
        columns = (self._number, self._row, self._col, self._value)
        self._number, self._row, self._col, self._value = (values[~here] for values in columns)

    def check(self, start: int, label: np.ndarray, path: str) -> None:
        """PrepError where the label (rows, width) from row `start` on isn't the mean of the shots in each pixel."""
        here = (self._row >= start) & (self._row < start + len(label))
        place = (self._row[here] - start) * self._width + self._col[here]
        total = np.bincount(place, self._value[here].astype(np.float64), label.size)
        number = np.bincount(place, minlength=label.size)
        expected = np.where(number > 0, total / np.maximum(number, 1), records.NO_LABEL).reshape(label.shape)
        wrong = np.argwhere(~np.isclose(label, expected, rtol=1e-5, atol=1e-5))
        if len(wrong):
            row, col = wrong[0]
            raise PrepError(
                f"{self._path}: {len(wrong)} pixels of rows {start} to {start + len(label)} differ from {path}: at row "
                f"{start + row}, col {col} the shots give {expected[row, col]:g}, the label is {label[row, col]:g}; "
                "expected a table and a raster of one run: run `python -m data_prep labels` again"
            )


def index_folder(
    out: str | os.PathLike[str],
    settings: ChipSettings,
    *,
    tiles: Sequence[str] = (),
    allow_empty: bool = False,
    label: str = BIOMASS.name,
) -> dict[str, dict[str, int]]:
    """Write the index of a folder of prepared data.

    Args:
        out: the folder.
        settings: which cells become chips.
        tiles: MGRS tiles to take; all where empty.
        allow_empty: write it as well where fewer than 0.1 % of the cells are chips.
        label: what the label rasters' names end with.

    Returns:
        counts of `index_tile` by composite, as path in the folder.

    Raises:
        PrepError: nothing to take, (nearly) no chip, or see `index_tile`.
    """
    biomes = Biomes(settings.biomes, settings.biome_field) if settings.biomes else None
    rows: list[dict[str, Any]] = []
    counts: dict[str, dict[str, int]] = {}
    for composite, raster, shots in find_pairs(out, tiles, label):
        found, counted = index_tile(composite, raster, settings, root=out, shots=shots, biomes=biomes)
        rows += found
        counts[composite.relative_to(out).as_posix()] = counted
    cells = sum(found["cells"] for found in counts.values())
    what = f"{out}: cells with {settings.min_labels} labels and enough data, which are chips"
    refuse_empty(PrepError, len(rows), cells, what, allowed=allow_empty)
    if not rows:
        warnings.warn(
            f"{out}: no cell has {settings.min_labels} labels and enough data: the index is empty", stacklevel=2
        )
    chip_index.write_index(chip_index.path_in(out), rows, metadata(dataclasses.asdict(settings), counts, label))
    return counts


def metadata(settings: Mapping[str, Any], counts: Mapping[str, Any], label: str) -> dict[str, Any]:
    """What the index says of how its chips were made: fields of `ChipSettings`, counts by composite, the label."""
    known = labels.parse(label)
    about = {"biomes": Path(settings["biomes"]).name, "label_edges": list(known.edges), "counts": counts}
    return {"chips": {**settings, **about}} | ({} if known == BIOMASS else {"label": known.metadata()})


def find_pairs(
    out: str | os.PathLike[str], tiles: Sequence[str] = (), label: str = BIOMASS.name
) -> list[tuple[Path, Path, Path | None]]:
    """(composite, label raster, table of shots or None) of the folder; a warning for each that lacks one.

    Raises:
        PrepError: no composite has labels, or a tile that was asked for has none.
        DataError: a label of another name than there are.
    """
    root, label = Path(out), labels.parse(label).name
    wanted = [tile.removeprefix("T") for tile in tiles]
    pairs: list[tuple[Path, Path, Path | None]] = []
    for composite in find_composites(root):
        if wanted and composite.parent.name not in wanted:
            continue
        raster = root / "labels" / composite.parent.name / f"{composite.stem}_{label}.tif"
        shots = raster.with_suffix(".parquet")
        if not raster.is_file():
            warnings.warn(f"{composite}: left out, it has no label raster {raster}", stacklevel=2)
            continue
        if not shots.is_file():
            warnings.warn(f"{raster}: no table of shots {shots.name} beside it: shot_numbers stay empty", stacklevel=2)
        pairs.append((composite, raster, shots if shots.is_file() else None))
    missing = sorted(set(wanted) - {composite.parent.name for composite, _, _ in pairs})
    if missing or not pairs:
        raise PrepError(
            f"{root}: found no composite with labels{' for ' + ', '.join(missing) if missing else ''}, expected "
            f"composites/{{tile}}/*.tif and labels/{{tile}}/*_{label}.tif; "
            "run `python -m data_prep composite` and `python -m data_prep labels` first"
        )
    return pairs


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module."""
    parser = argparse.ArgumentParser(prog="python -m data_prep chips", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of prepared data")
    parser.add_argument("--tile", action="append", default=[], help="take only this tile (repeatable)")
    add_options(parser, ChipSettings)
    add_options(parser, LabelSettings, without=("shot_owner",))
    add_allow_empty(parser)
    args = parser.parse_args(argv)
    if (args.biomes == "") != (args.biome_field == ""):
        parser.error("--biomes and --biome-field go together")
    settings = ChipSettings(**options_of(args, ChipSettings))
    with alone_in(args.out):
        counts = index_folder(args.out, settings, tiles=args.tile, allow_empty=args.allow_empty, label=args.label)
    for name, found in counts.items():
        print(f"{name}: " + ", ".join(f"{number} {what.replace('_', ' ')}" for what, number in found.items()))
    print(f"{sum(found['kept'] for found in counts.values())} chips in {chip_index.path_in(args.out)}")
    return 0
