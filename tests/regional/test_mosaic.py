"""Mosaics of maps of several UTM zones: against the surface itself, guarded, resumed to equal bytes."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pyproj
import pytest
import rasterio

from biomass_jax.data.raster.warp import PACIFIC
from biomass_jax.errors import STOPPED, BiomassError, ConfigError, RasterError, UsageError
from biomass_jax.regional import mosaic as module
from biomass_jax.regional import overlap
from biomass_jax.regional.mosaic import main, mosaic
from tests.regional.maps import TAGS, UNIT, degrees, read, surface, write_map, write_surface

PIXEL = 1000.0
STEP, SIZE = 50_000.0, 54  # tiles of 54 km a step apart, as HLS's overlap
# 40 tiles: columns of zone 32, 33 and 34, and four rows, from 60 degrees north on.
COLUMNS = [(32632, 620_000.0), *((32633, 320_000.0 + STEP * n) for n in range(7))]
COLUMNS += [(32634, 326_000.0), (32634, 326_000.0 + STEP)]


@pytest.fixture(scope="module")
def three_zones(tmp_path_factory):
    """Paths of 40 maps of `surface`, their mosaic's biomass, and its CRS and transform."""
    folder = tmp_path_factory.mktemp("zones")
    maps = [
        write_surface(folder / f"{epsg}_{n}_{row}.tif", epsg=epsg, left=left, top=6_800_000 - STEP * row, size=SIZE)
        for n, (epsg, left) in enumerate(COLUMNS)
        for row in range(4)
    ]
    assert len(maps) == 40
    layout = mosaic(maps, folder / "out" / "mosaic.tif", pixel=PIXEL)
    assert sorted(os.listdir(folder / "out")) == ["mosaic.json", "mosaic.qml", "mosaic.tif"]
    values, tags, crs, transform = read(folder / "out" / "mosaic.tif")
    assert (list(values), tags["MAPS"], crs.to_epsg()) == (["agbd"], "40", 6933)
    return maps, layout, values["agbd"], crs, transform


def inside(valid):
    """Pixels whose neighbours all have data."""
    kept = np.zeros_like(valid)
    kept[1:-1, 1:-1] = np.lib.stride_tricks.sliding_window_view(valid, (3, 3)).all(axis=(2, 3))
    return kept


def test_the_mosaic_is_the_surface(three_zones):
    _, _, agbd, crs, transform = three_zones
    direct = surface(*degrees(crs, transform, *agbd.shape))
    kept = inside(agbd != -1)
    assert kept.mean() > 0.9
    assert np.abs(agbd - direct)[kept].max() < 1e-3 * np.ptp(direct[kept])


def test_no_step_at_a_tiles_border_is_larger_than_inside(three_zones):
    maps, _, agbd, crs, transform = three_zones
    column, row = np.meshgrid(np.arange(agbd.shape[1]) + 0.5, np.arange(agbd.shape[0]) + 0.5)
    x, y = (transform.a * column + transform.c).ravel(), (transform.e * row + transform.f).ravel()
    zones = {epsg: pyproj.Transformer.from_crs(6933, epsg, always_xy=True).transform(x, y) for epsg, _ in COLUMNS}
    covers = np.zeros(agbd.size, np.int64)  # the maps that cover a pixel's middle, a bit each
    for number, path in enumerate(maps):
        with rasterio.open(path) as file:
            (east, north), (left, bottom, right, top) = zones[file.crs.to_epsg()], file.bounds
        covers |= ((east > left) & (east < right) & (north > bottom) & (north < top)).astype(np.int64) << number
    covers = covers.reshape(agbd.shape)
    kept, off = inside(agbd != -1), agbd - surface(*degrees(crs, transform, *agbd.shape))
    for axis in (0, 1):
        both = kept & np.roll(kept, -1, axis)
        border = both & (covers != np.roll(covers, -1, axis))
        step = np.abs(np.roll(off, -1, axis) - off)
        assert border.sum() > 500
        assert step[border].max() <= step[both & ~border].max()
        assert step[border].mean() <= 1.1 * step[both & ~border].mean()


def geodesic_total(west, south, east, north, cells=400):
    """Sum of `surface` over a box of degrees, Mg: cells by their geodesic areas (pyproj.Geod)."""
    geod = pyproj.Geod(ellps="WGS84")
    lon, lat = np.linspace(west, east, cells + 1), np.linspace(south, north, cells + 1)
    ring = lon[[0, 1, 1, 0]]
    areas = [geod.polygon_area_perimeter(ring, [a, a, b, b])[0] for a, b in zip(lat[:-1], lat[1:], strict=True)]
    values = surface(*np.meshgrid((lon[1:] + lon[:-1]) / 2, (lat[1:] + lat[:-1]) / 2))
    return float((values * np.array(areas)[:, None]).sum() / 1e4)


def mosaic_total(agbd, transform, crs, rows, columns):
    """The same of a box of the mosaic, and the box: an upright one in degrees, the CRS being cylindrical."""
    part = agbd[rows[0] : rows[1], columns[0] : columns[1]]
    assert (part != -1).all()
    x = [transform.c + transform.a * column for column in columns]
    y = [transform.f + transform.e * row for row in rows]
    lon, lat = pyproj.Transformer.from_crs(crs.to_wkt(), 4326, always_xy=True).transform(x, y)
    return float(part.sum(dtype=float) * transform.a * -transform.e / 1e4), (lon[0], lat[1], lon[1] % 360, lat[0])


def test_totals_are_geodesic_ones_at_60_degrees_north_across_zones(three_zones):
    _, _, agbd, crs, transform = three_zones
    total, (west, south, east, north) = mosaic_total(agbd, transform, crs, (15, 98), (15, 790))
    assert west < 12 and east > 18 and south < 60.5
    assert total == pytest.approx(geodesic_total(west, south, east, north), rel=1e-4)


@pytest.mark.parametrize(
    ("crs", "zones", "edges", "north"),
    [("EPSG:6933", (31, 32), (834_000, 166_000), 0), (PACIFIC, (60, 1), (770_000, 230_000), 4_000_000)],
)
def test_totals_are_geodesic_ones_at_the_equator_and_across_the_antimeridian(tmp_path, crs, zones, edges, north):
    places = ((zones[0], edges[0] - 60_000), (zones[0], edges[0] - 28_000), (zones[1], edges[1] - 4000))
    maps = [
        write_surface(tmp_path / f"{zone}_{n}.tif", epsg=32600 + zone, left=left, top=north + 30_000, size=60)
        for n, (zone, left) in enumerate(places)
    ]
    mosaic(maps, tmp_path / "out.tif", crs=crs, pixel=PIXEL)
    values, _, found, transform = read(tmp_path / "out.tif")
    agbd = values["agbd"]
    edge = [agbd.shape[0] // 2 - 15, agbd.shape[0] // 2 + 15], [agbd.shape[1] // 2 - 30, agbd.shape[1] // 2 + 30]
    total, (west, south, east, top) = mosaic_total(agbd, transform, found, *edge)
    assert west < 6 * zones[0] - 180 < east
    assert total == pytest.approx(geodesic_total(west, south, east, top), rel=1e-4)


def test_maps_across_the_antimeridian_name_the_crs_to_give(tmp_path, capsys):
    write_surface(tmp_path / "fiji.tif", epsg=32660, left=750_000.0, top=4_000_000, size=60)
    assert main(["--maps", str(tmp_path / "fiji.tif"), "--out", str(tmp_path / "out.tif"), "--pixel", "1000"]) == 1
    assert f"fiji.tif: EPSG:6933 cuts it in two at the antimeridian; give another CRS, such as --crs '{PACIFIC}'" in (
        capsys.readouterr().err
    )
    assert sorted(os.listdir(tmp_path)) == ["fiji.tif"]


# Small maps of one zone -----------------------------------------------------------------------------------------------


def pair(folder, tags=({}, {}), units=(None, None), **layers):
    """Two maps side by side with 10 columns in common."""
    given = layers or {"agbd": 100.0, "agbd_sd": 20.0}
    return [
        write_map(
            folder / f"{name}.tif",
            {layer: np.full((30, 40), value) for layer, value in given.items()},
            left=480_000 + 900 * number,
            tags=tags[number],
            units=units[number],
        )
        for number, name in enumerate("ab")
    ]


def test_what_a_mosaic_says_of_itself(tmp_path):
    calibration = {"INTERVAL_LEVEL": "0.9", "CALIBRATION": '{"level": 0.9}', "MODEL": '{"task": "biomass"}'}
    own = [
        {"SEASON": "2020-05-01/2020-08-01", "SOURCE_SIZE": "1", "DATA_SOURCES": "one", "SENSORS": "L30"},
        {"SEASON": "2020-06-15/2020-10-01", "SOURCE_SIZE": "2", "DATA_SOURCES": "two", "SENSORS": "S30"},
    ]
    maps = pair(tmp_path, [calibration | one for one in own])
    mosaic(maps, tmp_path / "out.tif", crs="same", table=tmp_path / "maps.csv")
    with rasterio.open(tmp_path / "out.tif") as file:
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert (file.descriptions, file.units) == (("agbd", "agbd_sd"), (UNIT, UNIT))
        assert (file.nodata, file.dtypes, file.shape) == (-1, ("float32",) * 2, (30, 70))
        assert float(file.tags(1)["STATISTICS_MEAN"]) == 100 and float(file.tags(1)["STATISTICS_VALID_PERCENT"]) == 100
        tags = file.tags()
    assert len(tags.pop("MOSAIC_SHA256")) == 64 and tags.pop("SOFTWARE").startswith("biomass_jax ")
    kept = {name: TAGS[name] for name in ("MODEL_SHA256", "SETTINGS")}
    made = {"MAPS": "2", "OVERLAP": "inverse_variance", "SEASON": "2020-05-01/2020-10-01", "AREA_OR_POINT": "Area"}
    assert tags == calibration | kept | made
    with open(tmp_path / "maps.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["map"], row["season"], row["crs"]) for row in rows] == [
        (str(path), one["SEASON"], "EPSG:32633") for path, one in zip(maps, own, strict=True)
    ]
    assert len({row["identity"] for row in rows}) == 2 and {row["model_sha256"] for row in rows} == {"a" * 64}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": {"agbd": 1.0}}, r"bands: found agbd in Mg ha-1, expected agbd in Mg ha-1, agbd_sd in Mg ha-1, as"),
        ({"units": ("t/ha", UNIT)}, r"bands: found agbd in t/ha, agbd_sd in Mg ha-1, expected agbd in Mg ha-1"),
        ({"tags": {"INTERVAL_LEVEL": "0.8"}}, r"INTERVAL_LEVEL differs from that of .*a\.tif: there 0.9, here 0.8$"),
        ({"tags": {"MODEL_SHA256": "b"}}, r"MODEL_SHA256 differs .* here b; --mixed takes maps of several models"),
        ({"tags": {"CALIBRATION": '{"seed": 2}'}}, r"CALIBRATION differs .*a\.tif: seed: there 1, here 2; --mixed"),
        ({"tags": {"DI_THRESHOLD": "0.2"}}, "DI_THRESHOLD differs .* there none, here 0.2; --mixed"),
    ],
)
def test_maps_that_differ_are_refused_by_what_differs(tmp_path, change, said):
    told = {"INTERVAL_LEVEL": "0.9", "CALIBRATION": '{"seed": 1}'}
    first, second = pair(tmp_path, [told, told])
    values = {name: np.full((30, 40), 50.0) for name in change.get("layers", ("agbd", "agbd_sd"))}
    write_map(second, values, left=480_900, tags=told | change.get("tags", {}), units=change.get("units"))
    with pytest.raises(RasterError, match=rf"b\.tif: {said}"):
        mosaic([first, second], tmp_path / "out.tif", crs="same")
    if "--mixed" in said:
        mosaic([first, second], tmp_path / "out.tif", crs="same", mixed=True)
        _, tags, *_ = read(tmp_path / "out.tif")
        assert tags["MODEL_SHA256"] == ("a" * 64 + "; b" if "MODEL_SHA256" in said else "a" * 64)


def test_a_mosaic_has_an_item_that_names_its_maps(tmp_path):
    (tmp_path / "out").mkdir()
    maps, out = pair(tmp_path, [{}, {"SEASON": "2020-06-15/2020-10-01"}], agbd=3.0), tmp_path / "out" / "all.tif"

    def item():
        return json.loads((tmp_path / "out" / "all.json").read_text())

    mosaic(maps, out, crs="same")
    first = item()
    about, asset = first["properties"], first["assets"]["agbd"]
    assert [(link["rel"], link["href"]) for link in first["links"]] == [
        ("derived_from", "../a.tif"),
        ("derived_from", "../b.tif"),
    ]
    assert about["keywords"] == ["mosaic"] and about["processing:software"]["model"] == "a" * 64
    assert about["processing:lineage"].startswith("mosaic: 2 maps, where they overlap by ")
    assert (about["start_datetime"], about["end_datetime"]) == ("2020-06-01T00:00:00Z", "2020-09-30T23:59:59Z")
    assert asset["file:checksum"] == "1220" + hashlib.sha256(out.read_bytes()).hexdigest()
    (tmp_path / "out" / "all.json").unlink()
    mosaic(maps, out, crs="same")  # kept, and its item made again
    assert item() == first
    mosaic(maps, out, crs="same", overlap="newest", overwrite=True)
    assert item()["assets"]["agbd"]["file:checksum"] == "1220" + hashlib.sha256(out.read_bytes()).hexdigest()
    assert item()["properties"]["processing:lineage"].startswith("mosaic: 2 maps, where they overlap by newest;")


def test_bands_are_found_by_name(tmp_path):
    first, second = pair(tmp_path)
    write_map(second, {"agbd_sd": np.full((30, 40), 5.0), "agbd": np.full((30, 40), 70.0)}, left=480_900)
    mosaic([first, second], tmp_path / "out.tif", crs="same", overlap="mean")
    values, *_ = read(tmp_path / "out.tif")
    assert list(values) == ["agbd", "agbd_sd"] and (values["agbd"][0, -1], values["agbd_sd"][0, -1]) == (70, 5)


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"overlap": "inverse_variance"}, UsageError, r"overlap is inverse_variance, but .*a\.tif has no standard"),
        (
            {"overlap": "median"},
            ConfigError,
            "overlap is 'median'; expected one of auto, inverse_variance, newest, mean",
        ),
        ({"pixel": 0.0}, ConfigError, "pixel is 0.0; expected a number above 0"),
        ({"crs": "EPSG:0"}, RasterError, "CRS 'EPSG:0'"),
    ],
)
def test_settings_that_cannot_be(tmp_path, settings, error, said):
    with pytest.raises(error, match=said):
        mosaic(pair(tmp_path, agbd=3.0), tmp_path / "out.tif", **settings)


def test_maps_without_a_season_have_no_newest(tmp_path):
    maps = pair(tmp_path, [{}, {"SEASON": "unknown"}], agbd=3.0)
    with pytest.raises(
        RasterError, match=r"b\.tif: its tag SEASON is unknown; to tell the newest map expected one as 20"
    ):
        mosaic(maps, tmp_path / "out.tif", overlap="newest")
    mosaic(maps, tmp_path / "out.tif", crs="same")
    assert read(tmp_path / "out.tif")[1]["SEASON"] == "unknown"


def test_maps_of_two_zones_share_no_crs(tmp_path):
    first, second = pair(tmp_path)
    write_map(second, {"agbd": np.ones((9, 9)), "agbd_sd": np.ones((9, 9))}, epsg=32634)
    with pytest.raises(RasterError, match=r"b\.tif: its CRS is EPSG:32634, but that of .*a\.tif is EPSG:32633"):
        mosaic([first, second], tmp_path / "out.tif", crs="same")


def test_no_maps_and_the_mosaic_itself_are_refused(tmp_path):
    maps = pair(tmp_path)
    with pytest.raises(UsageError, match="no maps are given"):
        mosaic([], tmp_path / "out.tif")
    with pytest.raises(UsageError, match=r"a\.tif: is one of the maps"):
        mosaic(maps, maps[0])


def test_a_map_given_twice_counts_once(tmp_path):
    first, second = pair(tmp_path)
    write_map(second, {"agbd": np.full((30, 40), 40.0), "agbd_sd": np.full((30, 40), 20.0)}, left=480_900)
    mosaic([first, second, first], tmp_path / "out.tif", crs="same")
    values, tags, *_ = read(tmp_path / "out.tif")
    assert tags["MAPS"] == "2" and values["agbd"][0, 35] == 70


def test_the_command_makes_keeps_and_replaces(tmp_path, capsys, caplog):
    pair(tmp_path)
    words = ["--maps", str(tmp_path / "?.tif"), "--out", str(tmp_path / "out.tif"), "--crs", "same"]
    assert main(words) == 0
    assert "out.tif: 2 maps, overlaps by inverse_variance; 30 x 70 pixels of 30 x -30" in capsys.readouterr().out
    before = os.stat(tmp_path / "out.tif").st_mtime_ns
    (tmp_path / "out.qml").write_text("my own colours")
    assert main(words) == 0 and os.stat(tmp_path / "out.tif").st_mtime_ns == before
    assert (tmp_path / "out.qml").read_text() == "my own colours"
    assert main([*words, "--overlap", "mean"]) == 1
    assert "out.tif: already exists, made of other maps or settings" in capsys.readouterr().err
    assert main([*words, "--overlap", "mean", "--overwrite"]) == 0
    assert read(tmp_path / "out.tif")[1]["OVERLAP"] == "mean"
    assert (tmp_path / "out.qml").read_text().startswith("<!DOCTYPE qgis")
    assert main(["--maps", str(tmp_path / "none*.tif"), "--out", str(tmp_path / "new.tif")]) == 1
    assert "none*.tif" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["a.tif", "b.tif", "out.json", "out.qml", "out.tif"]


# Stopped and given again ----------------------------------------------------------------------------------------------


@pytest.fixture
def six(tmp_path, monkeypatch):
    """Five maps over six blocks, and the mosaic's options."""
    for one in (module, overlap):
        monkeypatch.setattr(one, "BLOCK", 128)
    rng = np.random.default_rng(2)
    maps = []
    for number in range(5):
        values = {"agbd": rng.gamma(2, 60, (150, 80)), "agbd_sd": rng.uniform(5, 30, (150, 80))}
        maps.append(write_map(tmp_path / f"{number}.tif", values, left=480_000 + 1920 * number))
    return maps, {"crs": "same"}


def stopped(monkeypatch, maps, out, after, **settings):
    """A run that ends with its block after so many."""
    made = []

    def fails(layout, *at):
        if len(made) == after:
            raise RasterError("stopped")
        made.append(at)
        return block_values(layout, *at)

    block_values = module.block_values
    with monkeypatch.context() as patch, pytest.raises(RasterError, match="stopped"):
        patch.setattr(module, "block_values", fails)
        patch.setattr(module, "MOST_THREADS", 1)
        mosaic(maps, out, **settings)
    return made


def counted(monkeypatch):
    """Blocks that are made from now on."""
    made, block_values = [], module.block_values
    monkeypatch.setattr(module, "block_values", lambda layout, *at: made.append(at) or block_values(layout, *at))
    return made


def test_a_stopped_mosaic_goes_on_to_equal_bytes(tmp_path, monkeypatch, six):
    maps, settings = six
    mosaic(maps, tmp_path / "whole.tif", **settings)
    first = stopped(monkeypatch, maps, tmp_path / "out.tif", 4, **settings)
    assert not (tmp_path / "out.tif").exists()
    made = counted(monkeypatch)
    mosaic(maps, tmp_path / "out.tif", **settings)
    assert len(first) == 4 and len(made) == 2 and not set(first) & set(made)
    assert (tmp_path / "out.tif").read_bytes() == (tmp_path / "whole.tif").read_bytes()
    made = (f"{name}.{ending}" for name in ("out", "whole") for ending in ("json", "qml", "tif"))
    assert sorted(os.listdir(tmp_path)) == [*(f"{n}.tif" for n in range(5)), *made]


def test_a_map_that_changed_meanwhile_is_named_and_its_blocks_made_again(tmp_path, monkeypatch, caplog, six):
    maps, settings = six
    first = stopped(monkeypatch, maps, tmp_path / "out.tif", 5, **settings)
    values, tags, *_ = read(maps[0])
    write_map(maps[0], {name: band + 1 for name, band in values.items()}, left=480_000)
    made = counted(monkeypatch)
    mosaic(maps, tmp_path / "out.tif", **settings)
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        f"{maps[0]}: changed since blocks were made of it; they are made again"
    ]
    left = [at for at in first if at[1] == 0]  # the map lies in the first column of blocks
    assert len(left) == 2 and sorted(made) == sorted([*left, (128, 256, 150, 336)])
    mosaic(maps, tmp_path / "whole.tif", **settings)
    assert (tmp_path / "out.tif").read_bytes() == (tmp_path / "whole.tif").read_bytes()


def test_sigterm_stops_a_mosaic_that_goes_on(tmp_path, monkeypatch, six, capsys):
    maps, _ = six
    block_values = module.block_values

    def terminated(layout, *at):
        if at[:2] == (0, 256):
            os.kill(os.getpid(), signal.SIGTERM)
        return block_values(layout, *at)

    words = ["--maps", *map(str, maps), "--out", str(tmp_path / "out.tif"), "--crs", "same"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "block_values", terminated)
        assert main(words) == STOPPED
    assert "stopped by SIGTERM; give the same command again" in capsys.readouterr().err
    kept = len(list((tmp_path / ".out.tif.blocks").glob("*.block")))
    made = counted(monkeypatch)
    assert not (tmp_path / "out.tif").exists() and main(words) == 0
    assert 1 <= kept == 6 - len(made)


def test_a_damaged_block_is_made_again(tmp_path, monkeypatch, six):
    maps, settings = six
    stopped(monkeypatch, maps, tmp_path / "out.tif", 3, **settings)
    kept = sorted((tmp_path / ".out.tif.blocks").glob("*.block"))
    kept[0].write_bytes(kept[0].read_bytes()[:-40])
    made = counted(monkeypatch)
    mosaic(maps, tmp_path / "out.tif", **settings)
    assert len(kept) == 3 and len(made) == 4


def test_other_settings_make_all_blocks_again(tmp_path, monkeypatch, six):
    maps, settings = six
    stopped(monkeypatch, maps, tmp_path / "out.tif", 3, **settings)
    made = counted(monkeypatch)
    mosaic(maps, tmp_path / "out.tif", **settings, overlap="mean")
    assert len(made) == 6 and not (tmp_path / ".out.tif.blocks").exists()


def test_blocks_that_cannot_be_kept_are_told(tmp_path, monkeypatch, six):
    maps, settings = six

    def full(path, suffix=""):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "replacing", full)
    with pytest.raises(BiomassError, match=r"\.out\.tif\.blocks: can't be written: No space left"):
        mosaic(maps, tmp_path / "out.tif", **settings)
    assert not (tmp_path / "out.tif").exists()


KILLED = """
import os, signal, sys
from biomass_jax.regional import mosaic
made, block_values = [], mosaic.block_values
def killed(layout, *at):
    made.append(at)
    if len(made) > int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return block_values(layout, *at)
mosaic.block_values = killed
sys.exit(mosaic.main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_a_killed_mosaic_of_two_zones_goes_on_to_equal_bytes(tmp_path, root):
    maps = []
    for number, (epsg, left) in enumerate(((32633, 640_020), (32633, 646_020), (32634, 310_020), (32634, 333_000))):
        rng = np.random.default_rng(number)
        values = {"agbd": rng.gamma(2, 60, (250, 250)), "agbd_sd": rng.uniform(5, 30, (250, 250))}
        maps.append(str(write_map(tmp_path / f"{number}.tif", values, epsg=epsg, left=left)))

    def run(most, out):
        words = [sys.executable, "-c", KILLED, str(most), "--maps", *maps, "--out", str(tmp_path / out)]
        return subprocess.run(words, cwd=root, capture_output=True, text=True, timeout=300).returncode

    assert run(10_000, "whole.tif") == 0
    assert run(2, "out.tif") == -signal.SIGKILL
    kept = sorted((tmp_path / ".out.tif.blocks").glob("*.block"))
    assert 0 < len(kept) <= 2 and not (tmp_path / "out.tif").exists()
    with open(tmp_path / ".out.tif.blocks" / "made_from.json") as file:
        assert list(json.load(file)["maps"]) == maps
    assert run(10_000, "out.tif") == 0
    assert (tmp_path / "out.tif").read_bytes() == (tmp_path / "whole.tif").read_bytes()
    left = sorted(name for name in os.listdir(tmp_path) if not name[0].isdigit())
    assert left == ["out.json", "out.qml", "out.tif", "whole.json", "whole.qml", "whole.tif"]


MEASURED = """
import resource, sys
from biomass_jax.regional.mosaic import main
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(code)
"""


@pytest.mark.slow
def test_memory_stays_below_2_gib_and_does_not_grow_with_the_maps(tmp_path, root):
    """Maps in a row across three zones: 40 of them at 30 m, 60 blocks wide; fewer between the same ends at 90 m."""
    places = [(32632, 660_000), (32634, 330_000), *((32633, 330_000 + 9000 * n) for n in range(38))]
    for number, (epsg, left) in enumerate(places):
        values = {name: np.full((110, 110), 90.0) for name in ("agbd", "agbd_sd", "agbd_lo", "agbd_hi")}
        write_map(tmp_path / f"{number:02}.tif", values, epsg=epsg, left=left)

    def most_bytes(count, pixel):
        maps = [str(tmp_path / f"{number:02}.tif") for number in range(count)]
        words = ["--maps", *maps, "--out", str(tmp_path / f"{count}_{pixel}.tif"), "--pixel", str(pixel)]
        command = [sys.executable, "-c", MEASURED, *words]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split()[-1])

    assert most_bytes(40, 30) < 2 * 2**30
    assert most_bytes(40, 90) < 1.2 * most_bytes(10, 90)
