"""The synthetic scene: its maths by closed form, its files as HLS writes them."""

import re
from pathlib import Path

import numpy as np
import pytest
import rasterio

from biomass_jax.data.raster.image import open_image
from biomass_jax.data.raster.inputs import find_inputs
from data_prep.synthetic import granule, scene
from data_prep.synthetic.__main__ import main
from data_prep.synthetic.landscape import Cover, fractal, make_landscape, share_below

SHAPE = (150, 190)


@pytest.fixture(scope="module")
def land():
    return make_landscape(SHAPE, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return granule.write_scene(tmp_path_factory.mktemp("scene"), shape=SHAPE, seed=3)


def read(folder: Path, layer: str) -> np.ndarray:
    with rasterio.open(folder / f"{folder.name}.{layer}.tif") as src:
        return src.read(1)


def test_share_below_ranks_the_values():
    np.testing.assert_allclose(share_below(np.float32([[30, -1], [7, 100]])), [[0.5, 0], [0.25, 0.75]])


def test_a_rougher_field_has_more_difference_between_neighbours():
    rough, smooth = (fractal((90, 120), np.random.default_rng(0), roughness=r, largest=60) for r in (0.5, 2))
    for field in (rough, smooth):
        assert field.shape == (90, 120)
        assert abs(field.mean()) < 1e-5
        assert field.std() == pytest.approx(1, abs=1e-5)
    assert np.abs(np.diff(smooth)).mean() < 0.3 * np.abs(np.diff(rough)).mean()


def test_light_on_tilted_planes_is_the_cosine_of_the_angle_to_the_sun():
    sun = scene.Sun(zenith=30, azimuth=90)  # from the east
    rise_per_pixel = 30 * np.tan(np.radians(20))
    ramp = np.tile(np.arange(8) * rise_per_pixel, (8, 1))  # climbs eastwards, so it faces west
    expected = {"flat": 1, "west": np.cos(np.radians(50)), "east": np.cos(np.radians(10))}
    for name, elevation in {"flat": 0 * ramp, "west": ramp, "east": ramp[:, ::-1]}.items():
        factor = 1 if name == "flat" else 1 / np.cos(np.radians(30))
        np.testing.assert_allclose(scene.hillshade(elevation, sun), expected[name] * factor, rtol=1e-5)
    # Rows run from north to south: what climbs with the row number faces north.
    facing_north = scene.hillshade(ramp.T, scene.Sun(zenith=30, azimuth=0))
    np.testing.assert_allclose(facing_north, np.cos(np.radians(10)) / np.cos(np.radians(30)), rtol=1e-5)


def test_crowns_close_as_biomass_grows():
    cover = scene.canopy_cover(np.float32([0, 70, 300]))
    np.testing.assert_allclose(cover, [0, 1 - np.exp(-1), 1 - np.exp(-300 / 70)], rtol=1e-6)


def test_biomass_is_in_the_forest_and_none_on_water(land):
    assert set(np.unique(land.cover)) == {int(c) for c in Cover}
    assert land.biomass[land.cover == Cover.WATER].max() == 0
    assert land.biomass[land.cover == Cover.FOREST].min() >= 40
    assert land.biomass[land.cover != Cover.FOREST].max() < 40
    assert land.biomass.max() <= 380
    assert 0 <= land.vigour.min() <= land.vigour.max() <= 1


def test_spectra_tell_forest_from_crop_and_water(land):
    image = scene.digital_numbers(land, seed=3).astype(float)
    inside = ~scene.off_swath(SHAPE)
    blue, green, red, nir, swir_1, swir_2 = (image[..., i] for i in range(6))
    mean = {c: image[inside & (land.cover == c)].mean(0) for c in Cover}
    ndvi = {c: (m[3] - m[2]) / (m[3] + m[2]) for c, m in mean.items()}
    assert ndvi[Cover.WATER] < 0.2 < ndvi[Cover.URBAN] < ndvi[Cover.CROP] < 0.7 < ndvi[Cover.FOREST]
    assert mean[Cover.WATER][5] < mean[Cover.FOREST][5] < mean[Cover.CROP][5]
    # Forest darkens in the red as it grows, which is what a model learns from.
    forest = inside & (land.cover == Cover.FOREST)
    assert np.corrcoef(land.biomass[forest], red[forest])[0, 1] < -0.4
    assert 0 < np.percentile(image[inside], 50) < 4000


def test_the_scene_is_cut_by_the_swath_in_every_layer(folder, land):
    off = scene.off_swath(SHAPE)
    assert 0.01 < off.mean() < 0.2
    bands = np.stack([read(folder, f"B0{i}") for i in range(2, 8)], -1)
    assert ((bands == -9999) == off[..., None]).all()
    fmask = read(folder, "Fmask")
    assert ((fmask == 255) == off).all()
    assert (((fmask >> 5) & 1 == 1) == ((land.cover == Cover.WATER) | off)).all()
    assert not (fmask == 0).any()  # the aerosol bits are always set on a clear pixel


def test_files_are_laid_out_and_tagged_as_hls_does(folder):
    assert folder.name == "HLS.L30.T10SFF.2020183T184512.v2.0"
    layers = {"B02": "Blue", "B03": "Green", "B04": "Red", "B05": "NIR_Narrow", "B06": "SWIR1", "B07": "SWIR2"}
    expected = {f"{folder.name}.{layer}.tif" for layer in [*layers, "Fmask"]}
    assert {path.name for path in folder.iterdir()} == expected
    for layer, long_name in layers.items():
        with rasterio.open(folder / f"{folder.name}.{layer}.tif") as src:
            assert (src.count, src.dtypes, src.nodata, src.shape) == (1, ("int16",), -9999, SHAPE)
            assert src.crs.to_epsg() == 32610
            assert tuple(src.transform)[:6] == (30, 0, 600000, 0, -30, 4100040)
            assert src.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
            assert src.block_shapes == [(256, 256)]
            tags = src.tags()
            assert (src.descriptions, tags["long_name"]) == ((long_name,), long_name)
            assert (tags["scale_factor"], tags["add_offset"], tags["_FillValue"]) == ("0.0001", "0", "-9999")
            assert (src.scales, src.offsets) == ((1,), (0,))  # the scale is a tag of the file, not of the band
            assert (tags["SENSOR"], tags["SENTINEL2_TILEID"], tags["NCOLS"]) == ("OLI_TIRS", "10SFF", "190")
            assert re.fullmatch(r"2020-07-01T18:45:12\.\d{7}Z", tags["SENSING_TIME"])
            assert tags["LANDSAT_SCENE_ID"] == "LC80430342020183LGN00"
    with rasterio.open(folder / f"{folder.name}.Fmask.tif") as src:
        assert (src.dtypes, src.nodata, src.tags()["_FillValue"]) == (("uint8",), 255, "255")


def test_a_seed_gives_the_same_bytes_and_another_seed_another_land(folder, tmp_path):
    again = granule.write_scene(tmp_path / "a", shape=SHAPE, seed=3)
    other = granule.write_scene(tmp_path / "b", shape=SHAPE, seed=4)
    for path in sorted(folder.iterdir()):
        assert path.read_bytes() == (again / path.name).read_bytes()
    assert (read(folder, "B05") != read(other, "B05")).mean() > 0.5


def test_a_granule_is_replaced_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    first = granule.write_scene(tmp_path, shape=SHAPE, seed=4)
    (first / "left_over.tif").touch()
    granule.write_scene(tmp_path, shape=SHAPE, seed=3)
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}

    write_cog = granule._write_cog

    def full_disk(path: Path, *args):
        if path.name.endswith("B04.tif"):
            raise OSError("No space left on device")
        write_cog(path, *args)

    monkeypatch.setattr(granule, "_write_cog", full_disk)
    with pytest.raises(OSError, match="No space left"):
        granule.write_scene(tmp_path, shape=SHAPE, seed=4)
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
    assert len(list(first.iterdir())) == 7


def test_command_line(tmp_path, capsys):
    main(["--out", str(tmp_path), "--size", "40x64", "--seed", "1"])
    written = Path(capsys.readouterr().out.strip())
    assert written.parent == tmp_path
    assert read(written, "B02").shape == (40, 64)
    for size, message in {"40": "expected HEIGHTxWIDTH", "8x64": "8 x 64 pixels is too small"}.items():
        with pytest.raises(SystemExit) as stop:
            main(["--out", str(tmp_path), "--size", size])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_the_reader_of_images_takes_the_granule_as_it_is(folder, land):
    (item,) = find_inputs(folder)
    with open_image(item) as image:
        assert (image.sensor, image.season, image.fill) == ("L30", "2020-07-01/2020-07-02", -9999)
        assert (image.grid.height, image.grid.width) == SHAPE
        np.testing.assert_array_equal(image.read_rows(0, SHAPE[0]), scene.digital_numbers(land, seed=3))
        assert image.check_units() is None
        assert image.warnings == []
