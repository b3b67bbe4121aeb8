"""What files are known by: what changes how they are read counts, what a viewer leaves beside them doesn't."""

import os

import pytest
import rasterio
from rasterio.crs import CRS

from biomass_jax.data.fingerprints import content, fingerprint

STATISTICS = '<Metadata><MDI key="STATISTICS_MEAN">3</MDI></Metadata><Histograms><HistItem/></Histograms>'
PAM = '<PAMDataset>{}<PAMRasterBand band="1">{}</PAMRasterBand></PAMDataset>'


@pytest.fixture
def raster(write, numbers, tmp_path):
    return write(tmp_path / "in" / "a.tif", numbers((1, 8, 9)))


def both(path):
    """By size and time, and by content; of the folder too."""
    return [fingerprint(path), fingerprint(path, content), fingerprint(path.parent)]


def test_a_plain_file_is_its_size_and_time(raster):
    status = raster.stat()
    assert fingerprint(raster) == f"{status.st_size}-{status.st_mtime_ns}"
    assert fingerprint(raster.with_name("absent.tif")) == ""


@pytest.mark.parametrize("text", [PAM.format("", STATISTICS), PAM.format(STATISTICS, ""), "<PAMDataset/>"])
def test_what_a_viewer_counts_changes_nothing(raster, text):
    before = both(raster)
    raster.with_name("a.tif.aux.xml").write_text(text)
    assert both(raster) == before


@pytest.mark.parametrize(
    "text",
    [
        PAM.format("", "<NoDataValue>0</NoDataValue>" + STATISTICS),
        PAM.format("<SRS>EPSG:32611</SRS>", ""),
        PAM.format("", "<Scale>2</Scale>"),
        "<PAMDataset",
    ],
)
def test_what_gdal_reads_beside_a_raster_counts(raster, text):
    before = both(raster)
    raster.with_name("a.tif.aux.xml").write_text(text)
    after = both(raster)
    assert all(one != other for one, other in zip(before, after, strict=True))
    raster.with_name("a.tif.aux.xml").write_text(text.replace(">0<", ">1<").replace("11", "12").replace(">2<", ">3<"))
    assert text == "<PAMDataset" or all(one != other for one, other in zip(after, both(raster), strict=True))


def test_gdals_own_side_cars_count_and_their_statistics_do_not(raster):
    before = fingerprint(raster)
    with rasterio.open(raster) as file, pytest.warns(rasterio.errors.RasterioDeprecationWarning):
        file.statistics(1)  # which writes what it has found
    assert raster.with_name("a.tif.aux.xml").exists()
    assert fingerprint(raster) == before
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(raster, "r+") as file:
        file.write_mask(file.read(1) > 3)
    os.utime(raster, ns=(1, 1))
    masked = fingerprint(raster)
    assert "a.tif.msk:" in masked
    raster.with_name("a.tfw").write_text("30\n0\n0\n-30\n0\n0\n")
    assert "a.tfw:" in fingerprint(raster)


def test_a_shapefile_is_all_its_files(tmp_path):
    geopandas = pytest.importorskip("geopandas")
    from shapely import box

    path = tmp_path / "biomes.shp"

    def write(name):
        geopandas.GeoDataFrame({"name": [name]}, geometry=[box(0, 0, 1, 1)], crs=CRS.from_epsg(4326)).to_file(path)

    write("taiga")
    before, shapes = fingerprint(path), path.read_bytes()
    os.utime(path, ns=(1, 1))
    one = fingerprint(path)
    write("savanna")
    os.utime(path, ns=(1, 1))
    assert path.read_bytes() == shapes
    assert len({before, one, fingerprint(path)}) == 3
