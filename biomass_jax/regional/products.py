"""Maps of biomass that others publish: how their files are laid out, what their values mean, and their errors."""

import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from biomass_jax.data.raster.warp import MapFile, Part, other_raster
from biomass_jax.data.raster.zonal import UNITS
from biomass_jax.errors import RegionalError

OTHER = "other"


class MapProduct(NamedTuple):
    """The layout of a published map.

    Attributes:
        about: what it is.
        files: pattern of its files' names.
        epsg: of its grid; None where it comes in several.
        pixel: edge of its pixels, in units of that, or in metres on the ground where it comes in several.
        band: which has the biomass, where files have several.
        quality: band that is 1 where that is valid, where files have one.
        error: what in a name becomes what in that of the file of standard errors; None where there is none.
        zero: whether 0 is a value.
        fill: whether its no-data value counts; where not, every number is a value.
        independent: whether its errors are each pixel's own, for the most part.
    """

    about: str
    files: str
    epsg: int | None
    pixel: float
    band: str | None = None
    quality: str | None = None
    error: tuple[str, str] | None = None
    zero: bool = True
    fill: bool = True
    independent: bool = False


PRODUCTS = {
    # Cells without enough tracks for an estimate hold 0 (user guide of GEDI L4B, "Mode of inference" 0).
    "l4b": MapProduct(
        "GEDI L4B, mean of cells of 1 km and its standard error",
        r".*GEDI04_B_\w+_R01000M_MU\w*\.tif",
        6933,
        1000.8950233495561,
        error=("_MU", "_SE"),
        zero=False,
        independent=True,
    ),
    # Bands as Earth Engine's catalogue has them (LARSE/GEDI/GEDI04_D_002): QA 2 to 4 are no data, water and clouds.
    "l4d": MapProduct("GEDI L4D, imputed footprints, 30 m", r".*\.tif", None, 30.0, band="agbd", quality="QA"),
    "cci": MapProduct(
        "ESA CCI Biomass, 100 m, and its standard deviation",
        r".*ESACCI-BIOMASS-L4-AGB-MERGED-100m-\d{4}-fv[\d.]+\w*\.tif",
        4326,
        1 / 1125,
        error=("-AGB-", "-AGB_SD-"),
        fill=False,
    ),
}


@dataclass(frozen=True)
class OtherMap:
    """A map of somebody else's: its file, that of its errors, and which of its numbers are values.

    Attributes:
        mean: the file.
        band: of it that has the biomass.
        error: the file of standard errors, of the same grid, or none.
        about: what it is.
        quality: band of `mean` that is 1 where values are valid, or none.
        zero: whether 0 is a value.
        independent: whether its errors are each pixel's own, as those of "other" are taken to be.
    """

    mean: MapFile
    band: str
    error: MapFile | None
    about: str
    quality: str | None = None
    zero: bool = True
    independent: bool = True

    def read(self, part: Part) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A part of it.

        Returns:
            float64 values and their standard errors, NaN where none is told, and where there are values: (rows,
            columns) each.

        Raises:
            RasterError: it can't be read, or has changed.
        """
        names = [self.band] if self.quality is None else [self.band, self.quality]
        (values, *quality), valid = self.mean.read(names, part)
        errors = np.full(values.shape, np.nan)
        if self.error is not None:
            (told,), known = self.error.read(list(self.error.layers)[:1], part)
            errors[known] = told[known]
        if quality:
            valid &= quality[0] == 1
        if not self.zero:
            valid &= (values != 0) | (errors > 0)
        return values.astype(np.float64), errors, valid


def other_map(
    path: str | os.PathLike[str],
    product: str = OTHER,
    *,
    units: str | None = None,
    error: str | os.PathLike[str] | None = None,
) -> OtherMap:
    """Open a map of somebody else's, and check that it is what it is said to be.

    Args:
        path: the file.
        product: of `PRODUCTS`, or "other".
        units: of "other", where the file tells none.
        error: of "other": the file of its standard errors.

    Raises:
        RegionalError: another layout, or a unit that isn't biomass per hectare.
        RasterError: it can't be read.
    """
    found = _of_any_kind(path, units, error) if product == OTHER else _published(path, PRODUCTS[product], product)
    if found.error is not None and not found.error.grid.same_as(found.mean.grid):
        raise RegionalError(
            f"{found.error.path}: {found.error.grid.describe()}; expected the grid of {path}, whose errors it is to "
            f"hold: {found.mean.grid.describe()}"
        )
    return found


def _of_any_kind(path: str | os.PathLike[str], units: str | None, error: str | os.PathLike[str] | None) -> OtherMap:
    mean = other_raster(path)
    errors = None if error is None else other_raster(error)
    for one in (mean, errors):
        if one is None:
            continue
        found = next(iter(one.layers.values()))
        if found and units and found != units:
            raise RegionalError(f"{one.path}: its unit is {found!r}, but units is {units!r}")
        if not (found or units):
            raise RegionalError(f"{one.path}: it doesn't tell its unit; give --units Mg/ha if that is what it holds")
        check_unit(one.path, found or units or "")
    return OtherMap(mean, next(iter(mean.layers)), errors, os.path.basename(mean.path))


def check_unit(path: str, unit: str) -> None:
    """RegionalError where values in that unit, times hectares, aren't Mg."""
    if unit not in UNITS:
        raise RegionalError(
            f"{path}: its unit is {unit!r}; expected Mg/ha of dry above-ground biomass (not carbon, kg or m3): bring "
            "it to that first"
        )


def _published(path: str | os.PathLike[str], known: MapProduct, name: str) -> OtherMap:
    file = Path(path)
    instead = f"give a file as published, or --product {OTHER}"
    if not re.fullmatch(known.files, file.name):
        raise RegionalError(
            f"{path}: not called as a file of {name} ({known.about}): expected {known.files}; {instead}"
        )
    mean = other_raster(path)
    band = known.band or next(iter(mean.layers))
    if band not in mean.layers or (known.band is None and len(mean.layers) > 1):
        raise RegionalError(
            f"{path}: its bands are {', '.join(mean.layers)}; {name} has {known.band or 'one'}: {instead}"
        )
    beside = None if known.error is None else file.with_name(file.name.replace(*known.error))
    errors = other_raster(beside) if beside is not None and beside.is_file() else None
    for one in (mean, errors):
        if one is not None:
            _check_layout(one, known, name, instead)
    if mean.layers[band]:
        check_unit(mean.path, mean.layers[band])
    if not known.fill:
        mean = replace(mean, nodata=math.nan)
    quality = known.quality if known.quality in mean.layers else None
    return OtherMap(mean, band, errors, known.about, quality, known.zero, known.independent)


def _check_layout(one: MapFile, known: MapProduct, name: str, instead: str) -> None:
    """Refuse a file that hasn't the CRS or the pixels of its product."""
    code, t = one.grid.crs.to_epsg() if one.grid.crs else None, one.grid.transform
    if known.epsg not in (None, code):
        raise RegionalError(f"{one.path}: its CRS is {code}; {name} has EPSG:{known.epsg}: {instead}")
    if known.epsg is None:
        across, down = one.grid.pixel_size() or (0.0, 0.0)
        near, unit = 0.2, " m on the ground"  # what pixels in degrees are by their latitude
    else:
        across, down, near, unit = t.a, -t.e, 1e-4, ""
    if max(abs(across / known.pixel - 1), abs(down / known.pixel - 1)) > near:
        found = f"{across:.6g} x {down:.6g}{unit}"
        raise RegionalError(f"{one.path}: its pixels are {found}; those of {name} are {known.pixel:.6g}: {instead}")
