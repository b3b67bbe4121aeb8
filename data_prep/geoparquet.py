"""Parquet and GeoParquet tables, written whole and with fixed settings: equal tables give equal bytes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from biomass_jax.errors import PrepError
from biomass_jax.runtime.files import replacing

SETTINGS_KEY = b"biomass_jax"  # of the schema's metadata: one JSON text
_VERSION = "1.1.0"  # of GeoParquet
_ROW_GROUP = 2**17  # rows; fixed, so that a library's default doesn't change the bytes

# Spelled out, so that the bytes don't depend on the PROJ at hand. Axes are EPSG's; GeoParquet stores x = longitude.
_EPSG_4326: dict[str, Any] = {
    "$schema": "https://proj.org/schemas/v0.7/projjson.schema.json",
    "type": "GeographicCRS",
    "name": "WGS 84",
    "datum": {
        "type": "GeodeticReferenceFrame",
        "name": "World Geodetic System 1984",
        "ellipsoid": {"name": "WGS 84", "semi_major_axis": 6378137, "inverse_flattening": 298.257223563},
    },
    "coordinate_system": {
        "subtype": "ellipsoidal",
        "axis": [
            {"name": "Geodetic latitude", "abbreviation": "Lat", "direction": "north", "unit": "degree"},
            {"name": "Geodetic longitude", "abbreviation": "Lon", "direction": "east", "unit": "degree"},
        ],
    },
    "id": {"authority": "EPSG", "code": 4326},
}


def metadata(
    geometry_types: Sequence[str], box: Sequence[float] | None, settings: Mapping[str, Any], **column: object
) -> dict[bytes, bytes]:
    """Metadata of a schema whose column `geometry` holds well-known binary in EPSG:4326, longitude first.

    Args:
        geometry_types: as GeoParquet names them.
        box: (west, south, east, north) in degrees, west > east across the antimeridian; None for an empty table.
        settings: kept under `SETTINGS_KEY`.
        **column: more that GeoParquet says of the column.
    """
    about = {"encoding": "WKB", "geometry_types": list(geometry_types), "crs": _EPSG_4326, **column}
    if box is not None:
        about["bbox"] = [float(degrees) for degrees in box]
    geo = {"version": _VERSION, "primary_column": "geometry", "columns": {"geometry": about}}
    return {b"geo": _json(geo), SETTINGS_KEY: _json(settings)}


def with_settings(schema: pa.Schema, settings: Mapping[str, Any]) -> dict[bytes, bytes]:
    """A schema's metadata with other settings."""
    return {**(schema.metadata or {}), SETTINGS_KEY: _json(settings)}


def read_settings(schema: pa.Schema) -> dict[str, Any]:
    """What `settings` were, {} where there are none."""
    return json.loads((schema.metadata or {}).get(SETTINGS_KEY, b"{}"))


def write_table(table: pa.Table, dst: Path) -> None:
    """Write a table as Parquet; its folder is made if need be.

    Raises:
        PrepError: the folder or the disk doesn't take it.
    """
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        with replacing(dst) as partial:
            pq.write_table(
                table,
                partial,
                version="2.6",
                data_page_version="1.0",
                compression="zstd",
                compression_level=3,
                row_group_size=_ROW_GROUP,
            )
            if pq.read_metadata(partial).num_rows != table.num_rows:  # a full disk, swallowed
                raise PrepError(f"{dst}: not written whole; is the disk full?")
    except (OSError, pa.ArrowException) as error:
        raise PrepError(f"{dst}: can't write: {error}") from error


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
