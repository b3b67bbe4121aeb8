"""`chips/chips.parquet`: the index of chips on disk, a GeoParquet table."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from biomass_jax.data.labels import BIOMASS, Label, described
from biomass_jax.errors import PrepError
from data_prep import geoparquet

LABEL_EDGES = BIOMASS.edges  # of chips of biomass; the last bin is open. Finer where most labels lie.
COLUMNS = pa.schema(
    [
        ("geometry", pa.binary()),
        ("chip_id", pa.string()),
        ("tile", pa.string()),
        ("row", pa.int32()),
        ("col", pa.int32()),
        ("size", pa.int32()),  # pixels along its side
        ("split", pa.string()),  # empty until `data_prep splits` has drawn it
        ("biome", pa.string()),
        ("n_labels", pa.int32()),
        ("nodata_share", pa.float64()),
        ("label_mean", pa.float64()),
        ("label_max", pa.float64()),
        ("label_counts", pa.list_(pa.int32())),  # in the bins of the label's `edges`
        ("shot_numbers", pa.list_(pa.uint64())),
        ("composite", pa.string()),
        ("label", pa.string()),
        ("season", pa.string()),
        ("sensors", pa.string()),
        ("epsg", pa.int32()),
        ("transform", pa.list_(pa.float64())),  # of the chip, not of its tile
    ]
)


def path_in(out: str | os.PathLike[str]) -> Path:
    """Place of the index in a folder of prepared data."""
    return Path(out, "chips", "chips.parquet")


def write_index(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]], metadata: Mapping[str, Any]) -> None:
    """Write an index, sorted by tile, season, row and column.

    Args:
        path: the file; its folder is made, and it is written beside its place and renamed.
        rows: one mapping a chip with the fields of COLUMNS; geometry as shapely geometry in EPSG:4326.
        metadata: settings and counts, JSON-able, stored in the schema.

    Raises:
        PrepError: two chips of one chip_id.
    """
    rows = sorted(rows, key=lambda row: (row["tile"], row["season"], row["row"], row["col"]))
    names = [row["chip_id"] for row in rows]
    doubled = sorted({one for one, other in zip(sorted(names), sorted(names)[1:], strict=False) if one == other})
    if doubled:
        raise PrepError(f"{path}: found {len(doubled)} chip_ids twice, first {doubled[0]}; expected one composite each")
    outlines = np.array([row["geometry"] for row in rows], object)
    columns = {name: [row[name] for row in rows] for name in COLUMNS.names if name != "geometry"}
    table = pa.table({"geometry": shapely.to_wkb(outlines).tolist(), **columns}, schema=COLUMNS)
    about = geoparquet.metadata(
        sorted({outline.geom_type for outline in outlines}),
        shapely.total_bounds(outlines) if rows else None,
        metadata,
        orientation="counterclockwise",
        edges="planar",
    )
    geoparquet.write_table(table.replace_schema_metadata(about), Path(path))


def read_index(path: str | os.PathLike[str]) -> Any:
    """The index as a GeoDataFrame in EPSG:4326. PrepError where there is none or it lacks columns."""
    import geopandas

    _open(path)
    return geopandas.read_parquet(path)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Settings and counts stored in an index: `chips`, and `split` once splits are drawn."""
    return geoparquet.read_settings(_open(path))


def label_of(path: str | os.PathLike[str]) -> Label:
    """What the labels of an index's chips are; biomass where it tells nothing."""
    return described(read_metadata(path).get("label", {}), os.fspath(path))


def set_split(path: str | os.PathLike[str], split: Sequence[str], metadata: Mapping[str, Any]) -> None:
    """Put splits into an index, and how they were drawn into its metadata under `split`."""
    path = Path(path)
    schema = _open(path)
    table = pq.read_table(path)
    values = pa.array(list(split), pa.string())
    table = table.set_column(table.schema.get_field_index("split"), COLUMNS.field("split"), values)
    stored = geoparquet.with_settings(schema, {**geoparquet.read_settings(schema), "split": dict(metadata)})
    geoparquet.write_table(table.replace_schema_metadata(stored), path)


def _open(path: str | os.PathLike[str]) -> pa.Schema:
    if not Path(path).is_file():
        raise PrepError(f"{path}: no such file, expected an index of chips; make it with python -m data_prep chips")
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise PrepError(
            f"{path}: not a readable Parquet file ({error}); make it again with `data_prep chips`"
        ) from error
    missing = [name for name in COLUMNS.names if name not in schema.names]
    if missing or b"geo" not in (schema.metadata or {}):
        raise PrepError(f"{path}: no index of chips, it lacks {', '.join(missing) or 'GeoParquet metadata'}")
    return schema
