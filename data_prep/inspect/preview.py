"""A picture of a chip or a tile with its labels.

`python -m data_prep preview --out OUT --chip 10SFF_144_2020-06-01` or `--tile 10SFF`; a chip of shards with `--shards`.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rasterio.windows import Window

from biomass_jax.data import bands
from biomass_jax.data.labels import BIOMASS, Label
from biomass_jax.data.raster.image import read_preview, read_tags
from biomass_jax.data.records import Record
from biomass_jax.data.shards import label_of
from biomass_jax.errors import PrepError
from biomass_jax.figures import style
from biomass_jax.runtime.settings import add_options
from data_prep.chips import cells as chips
from data_prep.chips import index as chip_index
from data_prep.chips.windows import TilePair, read_record
from data_prep.commands import command
from data_prep.inspect.check import records_of_shards
from data_prep.settings import LabelSettings

TILE_PIXELS = 915  # of the longer side of a tile's picture: a quarter of an HLS tile
_RGB = [bands.BAND_NAMES.index(name) for name in ("RED", "GREEN", "BLUE")]
SPLIT_COLOURS = {"train": "#93c5fd", "val": "#fde047", "test": "#f472b6", "dropped": "#d1d5db", "": "#ffffff"}


def colours(image: np.ndarray) -> np.ndarray:
    """Digital numbers (H, W, 6) -> RGBA (H, W, 4) in 0..1; no-data (`bands.no_data`, or NaN) is transparent."""
    rgb = image[..., _RGB].astype(np.float64)
    rgb[bands.no_data(image)] = np.nan
    return style.stretch(rgb)


def draw_chip(record: Record, path: str | os.PathLike[str], about: Label = BIOMASS) -> Path:
    """A chip in red, green and blue with its labels as points, as PNG; no-data is transparent.

    Args:
        record: the chip.
        path: the picture.
        about: what its labels are.
    """
    figure = style.new_figure(6.8, 6.2, facecolor="none")
    axes = figure.subplots()
    axes.imshow(colours(record["image"]), interpolation="nearest")
    rows, cols = np.nonzero(record["label"] >= 0)
    labels = record["label"][rows, cols]
    # A point covers about two pixels of a chip of 224: one would be lost in the picture.
    _draw_labels(figure, axes, rows, cols, labels, size=(2 * 330 / record["label"].shape[0]) ** 2, about=about)
    missing = bands.no_data(record["image"]).mean()
    axes.set_title(f"{_labels_text(labels, about)}, {missing:.1%} without data", fontsize=9, color=style.GREY)
    style.quiet_axes(axes)
    known = (record["chip_id"], record["biome"], record["season"], record["sensors"])
    return style.save_titled(path, figure, ", ".join(text for text in known if text))


def draw_tile(
    image: np.ndarray,
    label: np.ndarray,
    path: str | os.PathLike[str],
    *,
    title: str,
    cells: object = None,
    about: Label = BIOMASS,
) -> Path:
    """A tile in red, green and blue with its labels and the outlines of its chips, as PNG.

    Args:
        image: (h, w, 6) digital numbers at reduced size, NaN for no-data.
        label: (H, W) at full size, -1 for none.
        path: the picture.
        title: what it shows.
        cells: rows of the index with row, col, size, split; None for no outlines.
        about: what the labels are.
    """
    figure = style.new_figure(8.4, 7.6, facecolor="none")
    axes = figure.subplots()
    height, width = label.shape
    axes.imshow(colours(image), interpolation="nearest", extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    rows, cols = np.nonzero(label >= 0)
    labels = label[rows, cols]
    _draw_labels(figure, axes, rows, cols, labels, size=4, about=about)
    if cells is not None:
        _draw_cells(axes, cells)
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    axes.set_title(_labels_text(labels, about), fontsize=9, color=style.GREY)
    style.quiet_axes(axes)
    return style.save_titled(path, figure, title)


def _labels_text(labels: np.ndarray, about: Label) -> str:
    if not labels.size:
        return "No labels"
    return f"{labels.size:,} labels, {labels.min():.3g} to {labels.max():.4g} {about.unit}"


def _draw_labels(
    figure: object, axes: Any, rows: np.ndarray, cols: np.ndarray, labels: np.ndarray, size: float, about: Label
) -> None:
    """Points from 0 to the 99th percentile, so that a few extreme labels don't darken the rest."""
    top = float(np.percentile(labels, 99)) if labels.size else 1.0
    drawn = axes.scatter(
        cols, rows, c=labels, s=size, marker="s", linewidths=0, cmap="plasma", vmin=0, vmax=top if top > 0 else 1.0
    )
    style.colour_bar(figure, drawn, axes, f"{about.name} ({about.unit})", extend="max")


def _draw_cells(axes: Any, cells: Any) -> None:
    from matplotlib.patches import Rectangle

    for split, colour in SPLIT_COLOURS.items():
        for index, cell in enumerate(cells[cells["split"] == split].to_dict("records")):
            inset = 0.02 * cell["size"]  # so that neighbours of two splits show both colours
            corner = (cell["col"] - 0.5 + inset, cell["row"] - 0.5 + inset)
            side = cell["size"] - 2 * inset
            name = f"{split or 'chip'}" if index == 0 else None
            axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=colour, linewidth=0.9, label=name))
    if len(cells):
        legend = axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.04), ncols=5, fontsize=8, labelcolor=style.GREY, frameon=True
        )
        legend.get_frame().set(facecolor="#374151", edgecolor="none")
        for text in legend.get_texts():
            text.set_color("#f9fafb")


def find_record(name: str, *, out: Path | None = None, shards: Path | None = None) -> Record:
    """The chip of a chip_id, from a folder of prepared data or from shards.

    Raises:
        PrepError: there is none.
    """
    if out is not None:
        frame = chip_index.read_index(chip_index.path_in(out))
        for _, row in frame[frame["chip_id"] == name].iterrows():
            return read_record(row, out)
        names = frame["chip_id"].tolist()
    else:
        assert shards is not None
        names = []
        for record in records_of_shards(shards):
            if record["chip_id"] == name:
                return record
            names.append(record["chip_id"])
    raise PrepError(f"{out or shards}: found no chip {name!r} among {len(names)}, expected a chip_id like {names[:1]}")


def preview_tile(
    out: Path, tile: str, path: Path | None = None, *, season: str | None = None, label: str = BIOMASS.name
) -> Path:
    """Draw a tile of a folder of prepared data.

    Args:
        out: the folder.
        tile: MGRS tile.
        path: the picture; `preview/{name of the composite}.png` in the folder where None.
        season: `YYYY-MM-DD/YYYY-MM-DD`, where the tile has several.
        label: what is drawn, `agbd` or `rh98`.

    Raises:
        PrepError: no composite with labels, or several, or the two don't belong together.
        RasterError: a file can't be read, or the labels are no real numbers.
    """
    tile = tile.removeprefix("T")
    pairs = [pair for pair in chips.find_pairs(out, [tile], label) if season is None or _season(pair[0]) == season]
    if len(pairs) != 1:
        found = ", ".join(_season(pair[0]) for pair in pairs) or "none"
        raise PrepError(
            f"{out}: tile {tile}: found {len(pairs)} seasons ({found}), expected one; name it with --season"
        )
    composite, label_path, _ = pairs[0]
    image = read_preview(composite, TILE_PIXELS, wanted=bands.BAND_NAMES)
    with TilePair(composite, label_path) as pair:
        values, about = pair.read_label(Window(0, 0, pair.grid.width, pair.grid.height)), pair.about
    index = chip_index.path_in(out)
    cells = None
    if index.is_file():
        cells = chip_index.read_index(index)
        cells = cells[cells["composite"] == composite.relative_to(out).as_posix()]
    return draw_tile(
        image,
        values,
        path or out / "preview" / f"{composite.stem}.png",
        title=f"{tile}, {_season(composite)}",
        cells=cells,
        about=about,
    )


def _season(composite: Path) -> str:
    return read_tags(composite).get("SEASON", "")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module."""
    parser = argparse.ArgumentParser(prog="python -m data_prep preview", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--out", type=Path, help="folder of prepared data")
    source.add_argument("--shards", type=Path, help="folder of shards")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--chip", help="chip_id")
    what.add_argument("--tile", help="MGRS tile, with --out")
    parser.add_argument("--season", help="of the tile, YYYY-MM-DD/YYYY-MM-DD, where it has several")
    add_options(parser, LabelSettings, without=("shot_owner",))
    parser.add_argument("--png", type=Path, help="the picture; in preview/ by default")
    args = parser.parse_args(argv)
    if args.tile and args.shards:
        parser.error("--tile needs --out: shards hold chips alone")
    if args.chip:
        record = find_record(args.chip, out=args.out, shards=args.shards)
        folder = (args.out or args.shards.absolute().parent) / "preview"
        about = label_of(args.shards) if args.shards else chip_index.label_of(chip_index.path_in(args.out))
        path = draw_chip(record, args.png or folder / f"{args.chip}.png", about)
    else:
        path = preview_tile(args.out, args.tile, args.png, season=args.season, label=args.label)
    print(path)
    return 0
