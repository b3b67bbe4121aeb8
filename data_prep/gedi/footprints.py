"""Footprint tables on disk: GeoParquet with points in EPSG:4326, equal bytes for equal input."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from biomass_jax.errors import PrepError
from data_prep import geoparquet
from data_prep.places import Box, boxes_meet, in_box

# in this order in the file, before the geometry
COLUMNS: dict[str, pa.DataType] = {
    "shot_number": pa.uint64(),
    "lon": pa.float64(),
    "lat": pa.float64(),
    "time": pa.timestamp("us", tz="UTC"),
    "beam": pa.string(),
    "agbd": pa.float32(),
    "agbd_se": pa.float32(),
    "agbd_sigma": pa.float32(),  # Mg/ha, NaN where there is none
    "sensitivity": pa.float32(),
    "l4_quality_flag": pa.uint8(),
    "degrade_flag": pa.uint8(),
    "selected_algorithm": pa.uint8(),
    "pft_class": pa.uint8(),
    "leaf_off_flag": pa.uint8(),
    "granule": pa.string(),
}
_OF_BIOMASS = ("agbd", "agbd_se", "agbd_sigma", "l4_quality_flag")
_LATER = {"agbd_sigma": np.nan}  # columns that tables of earlier versions lack, and what stands there then
_POINT = np.dtype([("order", "u1"), ("kind", "<u4"), ("x", "<f8"), ("y", "<f8")])  # well-known binary, 21 bytes


def columns_of(label: str) -> dict[str, pa.DataType]:
    """The columns of a table with this label: `COLUMNS` of biomass; of heights `rh98` and its quality_flag instead."""
    if label == "agbd":
        return COLUMNS
    found: dict[str, pa.DataType] = {}
    for name, kind in COLUMNS.items():
        if name not in _OF_BIOMASS:
            found[name] = kind
        elif name == "agbd":
            found[label] = kind
        elif name == "l4_quality_flag":
            found["quality_flag"] = kind
    return found


def write_footprints(
    footprints: Mapping[str, np.ndarray], dst: str | os.PathLike[str], metadata: Mapping, *, label: str = "agbd"
) -> Path:
    """Write a footprint table as GeoParquet; it appears under its name only when it is whole.

    Args:
        footprints: the columns of `columns_of`, each (N,); shot_number uint64, time datetime64.
        dst: path of the file; its folder is made if need be.
        metadata: settings and counts, JSON-able, kept in the schema's metadata under `biomass_jax`.
        label: what the footprints tell, `agbd` or a relative height.

    Returns:
        The path.

    Raises:
        PrepError: the disk doesn't take it.
    """
    dst = Path(dst)
    named = columns_of(label)
    columns = [_column(footprints[name], kind) for name, kind in named.items()]
    lon, lat = footprints["lon"], footprints["lat"]
    schema = pa.schema(
        [pa.field(name, kind, nullable=False) for name, kind in named.items()]
        + [pa.field("geometry", pa.binary(), nullable=False)],
        metadata=geoparquet.metadata(["Point"], _box(lon, lat), metadata),
    )
    geoparquet.write_table(pa.Table.from_arrays([*columns, _points(lon, lat)], schema=schema), dst)
    return dst


def read_footprints(
    path: str | os.PathLike[str], *, box: Box | None = None, label: str = "agbd"
) -> dict[str, np.ndarray]:
    """Read a footprint table back.

    Args:
        path: a file written by `write_footprints`.
        box: (west, south, east, north) in degrees: only rows inside. A file whose own box doesn't meet it isn't read.
        label: what the footprints tell.

    Returns:
        The columns of `columns_of`, each (N,); time as datetime64[us] in UTC.

    Raises:
        PrepError: not such a file, or damaged.
    """
    path, named = Path(path), columns_of(label)
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            _check_schema(schema, path, named)
            if box is not None and not _meets(schema, box):
                table = schema.empty_table()
            else:
                table = file.read(columns=[name for name in named if name in schema.names])
    except (OSError, pa.ArrowException) as error:
        raise PrepError(f"{path}: can't be read as a footprint table (Parquet): {error}") from error
    columns = {
        name: _array(table.column(name), kind)
        if name in schema.names
        else np.full(len(table), _LATER[name], np.float32)
        for name, kind in named.items()
    }
    if box is None:
        return columns
    kept = in_box(columns["lon"], columns["lat"], box)
    return {name: values[kept] for name, values in columns.items()}


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings and counts that a Parquet file of data preparation carries.

    Raises:
        PrepError: no such file, or it carries none.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
        return json.loads(metadata[geoparquet.SETTINGS_KEY])
    except (OSError, pa.ArrowException) as error:
        raise PrepError(f"{path}: can't be read as Parquet: {error}") from error
    except (KeyError, ValueError) as error:
        raise PrepError(f"{path}: no settings of biomass_jax in the schema's metadata; write it again") from error


def _column(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    if pa.types.is_timestamp(kind):
        return pa.array(values.astype("datetime64[us]").view("i8"), pa.int64()).cast(kind)
    return pa.array(values, kind)


def _points(lon: np.ndarray, lat: np.ndarray) -> pa.Array:
    points = np.empty(len(lon), _POINT)
    points["order"], points["kind"], points["x"], points["y"] = 1, 1, lon, lat
    fixed = pa.Array.from_buffers(pa.binary(_POINT.itemsize), len(lon), [None, pa.py_buffer(points)])
    return fixed.cast(pa.binary())


def _box(lon: np.ndarray, lat: np.ndarray) -> Box | None:
    if not len(lon):
        return None
    west, east = float(lon.min()), float(lon.max())
    if east - west > 180:  # across the antimeridian: the box's west is the greater number
        west, east = float(lon[lon > 0].min()), float(lon[lon <= 0].max())
    return west, float(lat.min()), east, float(lat.max())


def _check_schema(schema: pa.Schema, path: Path, named: Mapping[str, pa.DataType]) -> None:
    for name, kind in named.items():
        if name not in schema.names and name in _LATER:
            continue
        if name not in schema.names or schema.field(name).type != kind:
            found = schema.field(name).type if name in schema.names else "nothing"
            raise PrepError(
                f"{path}: column {name}: found {found}, expected {kind}; write it again with `data_prep gedi`"
            )


def _meets(schema: pa.Schema, box: Box) -> bool:
    try:
        own = json.loads((schema.metadata or {})[b"geo"])["columns"]["geometry"].get("bbox")
    except (KeyError, ValueError):
        return True  # no box to go by
    return own is not None and boxes_meet(tuple(own), box)


def _array(column: pa.ChunkedArray, kind: pa.DataType) -> np.ndarray:
    if pa.types.is_timestamp(kind):
        return column.cast(pa.int64()).to_numpy().view("datetime64[us]")
    return column.to_numpy()
