"""The reference's folder layout: `python -m data_prep chip_folders --out OUT --folders DIR`.

Writes the chips of `OUT/chips/chips.parquet`, whose splits are drawn, as `DIR/{split}_images/T10SFF_144_tile_img.tif`
and `DIR/{split}_labels/T10SFF_144_tile_label.tif`, float32, for programs that read the published dataset. 144 is the
number of the cell in its tile, so one season fits into a folder.
"""

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import rasterio
from affine import Affine
from rasterio.errors import RasterioError

from biomass_jax.data import bands, records
from biomass_jax.data.raster.tiff import verify_blocks
from biomass_jax.errors import PrepError
from biomass_jax.runtime.files import replacing
from data_prep.chips import index as chip_index
from data_prep.chips.windows import ChipReader
from data_prep.commands import command
from data_prep.settings import SPLITS


def write_folders(
    out: str | os.PathLike[str], folders: str | os.PathLike[str], *, season: str | None = None
) -> dict[str, int]:
    """Write the chips of an index in the reference's layout.

    Args:
        out: folder of prepared data.
        folders: where to write.
        season: take only chips of this season (`YYYY-MM-DD/YYYY-MM-DD`).

    Returns:
        chips written by split. Dropped chips are left out.

    Raises:
        PrepError: splits aren't drawn, two seasons would get the same names, or a file can't be written.
    """
    path = chip_index.path_in(out)
    chips = chip_index.read_index(path)
    if season is not None:
        chips = chips[chips["season"] == season]
    if (chips["split"] == "").any() or not len(chips):
        raise PrepError(
            f"{path}: found no split drawn for its chips; run `python -m data_prep chips` and `python -m data_prep "
            "splits` first"
        )
    seasons = sorted(set(chips["season"]))
    if len(seasons) > 1:
        raise PrepError(
            f"{path}: found seasons {', '.join(seasons)}, expected one: this layout has no season in its names"
        )
    counts: Counter[str] = Counter()
    label = chip_index.label_of(chip_index.path_in(out)).name
    with ChipReader(out) as reader:
        for _, row in chips[chips["split"].isin(SPLITS)].iterrows():
            record = reader.read(row)
            cell = record["chip_id"].split("_")[1]
            for kind, name in (("images", "img"), ("labels", "label")):
                place = Path(folders, f"{row['split']}_{kind}", f"T{record['tile']}_{cell}_tile_{name}.tif")
                _write(place, record, kind, label)
            counts[row["split"]] += 1
    return {name: counts[name] for name in SPLITS}


def _write(path: Path, record: records.Record, kind: str, label: str) -> None:
    """One GeoTIFF, written beside its place and checked before it gets its name."""
    values = record["image"] if kind == "images" else record["label"][..., None]
    values = np.moveaxis(values, -1, 0).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"crs": rasterio.CRS.from_epsg(record["epsg"]), "transform": Affine(*record["transform"])}
    try:
        with replacing(path, ".tif") as partial:
            with rasterio.open(
                partial,
                "w",
                driver="GTiff",
                count=len(values),
                height=values.shape[1],
                width=values.shape[2],
                dtype="float32",
                nodata=bands.FILL,  # of labels too, though theirs is -1: as the published files have it
                compress="deflate",
                **options,
            ) as dst:
                dst.write(values)
                dst.descriptions = bands.BAND_NAMES if kind == "images" else (label,)
            verify_blocks(partial)
    except (RasterioError, OSError) as error:
        raise PrepError(f"{path}: can't be written: {error}; is the disk full?") from error


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module."""
    parser = argparse.ArgumentParser(prog="python -m data_prep chip_folders", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of prepared data")
    parser.add_argument("--folders", type=Path, required=True, help="folder to write")
    parser.add_argument("--season", help="take only this season, YYYY-MM-DD/YYYY-MM-DD")
    args = parser.parse_args(argv)
    counts = write_folders(args.out, args.folders, season=args.season)
    print(f"{args.folders}: " + ", ".join(f"{number} {name}" for name, number in counts.items()) + " chips")
    return 0
