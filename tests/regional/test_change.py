"""Change between two maps: planted changes and errors that go together, by rows; the guards; the command."""

import hashlib
import json
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.crs import CRS
from scipy import ndimage, stats

from biomass_jax.data.raster.cog import MapWriter, write_cog
from biomass_jax.data.raster.grid import Grid
from biomass_jax.errors import ConfigError, RasterError, RegionalError
from biomass_jax.regional import change as module
from biomass_jax.regional.mosaic import mosaic

pytestmark = pytest.mark.slow  # many, of a second and more each

SIDE, STABLE_ROWS = 300, 240  # of these the first have not changed
GRID = Grid(SIDE, SIDE, CRS.from_epsg(32610), Affine(30, 0, 600000, 0, -30, 4200000))
R = 0.6
TAGS = {"SENSORS": "L30", "MODEL_SHA256": "a", "SEASON": "2019-05-01/2019-10-01"}


def write_map(path, mean, sd, grid=GRID, **tags):
    with MapWriter(path, grid, nodata=-1, layers=dict.fromkeys(("agbd", "agbd_sd"), "Mg ha-1"), tags=TAGS | tags) as to:
        to.write_rows(0, np.stack([mean, sd], axis=-1).astype(np.float32))
    return path


def smooth(rng, reach):
    """A field of mean 0 and variance 1 whose neighbours are alike."""
    field = ndimage.gaussian_filter(rng.standard_normal((SIDE + 60, SIDE + 60)), reach)[30:-30, 30:-30]
    return field / math.sqrt((ndimage.gaussian_filter(np.pad([[1.0]], 30), reach) ** 2).sum())


def two_maps(folder, seed=0, *, changed=0.0, offset=0.0, reach=1.0):
    """Maps of 2019 and 2021, errors of which a share goes together; below `STABLE_ROWS` biomass differs."""
    rng = np.random.default_rng(seed)
    truth = 300 + 20 * smooth(rng, 8)
    sd_1, sd_2 = 20 + 0.02 * truth, 10 + 5 * rng.random((SIDE, SIDE))
    shared = smooth(rng, reach)
    errors = [math.sqrt(R) * shared + math.sqrt(1 - R) * smooth(rng, reach) for _ in range(2)]
    later = truth + offset
    later[STABLE_ROWS:] += changed
    before = write_map(folder / "before.tif", truth + sd_1 * errors[0], sd_1)
    after = write_map(folder / "after.tif", later + sd_2 * errors[1], sd_2, SEASON="2021-05-02/2021-10-01")
    stable = np.ones((1, SIDE, SIDE), np.uint8)
    stable[:, STABLE_ROWS:] = 2
    write_cog(folder / "stable.tif", [stable], GRID, np.uint8, ["classes"], 0, {})
    return before, after, folder / "stable.tif"


def read(path):
    with rasterio.open(path) as file:
        return file.read(masked=True), (file.descriptions, file.units, file.nodata)


def test_planted_changes_are_found_and_stable_ground_stays_at_the_rate(tmp_path):
    before, after, stable = two_maps(tmp_path, changed=-90.0, offset=7.0)
    keep = {"stable": str(stable), "stable_keep": (1.0,), "min_area_ha": 0.0}
    found = module.change(before, after, tmp_path / "c.tif", **keep, fdr=0.1)
    assert found.null.r == pytest.approx(R, abs=0.03) and found.null.offset == pytest.approx(7, abs=0.5)
    assert found.null.pixels == STABLE_ROWS * SIDE and found.null.z_variance == pytest.approx(1, abs=1e-9)
    (d, sd, significant), about = read(tmp_path / "c.tif")
    units = ("Mg ha-1", "Mg ha-1", "1")
    assert about == (("agbd_change", "agbd_change_sd", "significant"), units, -9999)
    renderer = ElementTree.parse(tmp_path / "c.qml").find("pipe/rasterrenderer")  # beside it, by its name: for QGIS
    low, high = (float(renderer.get(f"classification{end}")) for end in ("Min", "Max"))
    assert renderer.get("band") == "1" and -low == high >= np.percentile(np.abs(np.ma.getdata(d)), 98)
    z = (d / sd).astype(float)
    rate = (2 * stats.norm.sf(np.abs(z[:STABLE_ROWS])) < 0.05).mean()
    assert 0.04 <= rate <= 0.06  # without r: 0.006 of it
    assert (significant[STABLE_ROWS:] == -1).mean() > 0.9
    false = (significant[:STABLE_ROWS] != 0).sum() / (significant != 0).sum()
    assert 0.06 <= false <= 0.1  # at most 0.1, and 0.8 of that where four fifths are stable
    expected = stats.false_discovery_control(2 * stats.norm.sf(np.abs(z.ravel()))) <= 0.1
    assert np.count_nonzero(expected.reshape(z.shape) != (significant != 0)) <= 5  # next to the step of 0.001
    loss = significant == -1
    assert found.loss == (int(loss.sum()), pytest.approx(float(d[loss].mean()), rel=1e-5))
    assert found.tested == SIDE**2 and found.pixel_ha == pytest.approx(0.09)


def test_most_of_the_ground_is_taken_for_stable_where_nothing_says_which(tmp_path):
    before, after, _ = two_maps(tmp_path, seed=1, changed=90.0)
    found = module.change(before, after, tmp_path / "c.tif")
    assert found.null.offset == 0 and found.null.r == pytest.approx(R, abs=0.08)
    (d, sd, significant), _ = read(tmp_path / "c.tif")
    assert (significant[STABLE_ROWS + 5 :] == 1).mean() > 0.95
    assert (significant[:STABLE_ROWS] != 0).mean() < 0.01


def test_rows_do_not_matter(tmp_path, monkeypatch):
    before, after, stable = two_maps(tmp_path, seed=2, changed=-45.0)
    keep = {"stable": str(stable), "stable_keep": (1.0,), "min_area_ha": 0.6}
    one = module.change(before, after, tmp_path / "a.tif", **keep)
    monkeypatch.setattr(module, "_PIXELS", 17 * SIDE)
    other = module.change(before, after, tmp_path / "b.tif", **keep)
    assert (one.loss[0], one.gain[0], one.errors) == (other.loss[0], other.gain[0], other.errors)
    np.testing.assert_allclose(read(tmp_path / "a.tif")[0], read(tmp_path / "b.tif")[0], rtol=1e-6, atol=1e-5)
    significant = read(tmp_path / "a.tif")[0][2].astype(int)
    for sign in (-1, 1):
        patches, count = ndimage.label(significant == sign, structure=np.ones((3, 3)))
        assert count or sign == 1
        assert not count or np.bincount(patches.ravel())[1:].min() >= 7  # 0.6 ha of 0.09


def test_small_patches_against_a_flood_fill():
    rng = np.random.default_rng(3)
    classes = rng.choice([-1, 0, 1], size=(13, 17), p=[0.3, 0.4, 0.3])
    expected = classes.copy()
    for start in np.ndindex(classes.shape):
        if classes[start] == 0:
            continue
        patch, todo = {start}, [start]
        while todo:
            y, x = todo.pop()
            for place in ((y + j, x + i) for j in (-1, 0, 1) for i in (-1, 0, 1)):
                inside = 0 <= place[0] < 13 and 0 <= place[1] < 17
                if inside and place not in patch and classes[place] == classes[start]:
                    patch.add(place)
                    todo.append(place)
        if len(patch) < 4:
            expected[start] = 0
    assert (expected != classes).any()
    np.testing.assert_array_equal(module.without_small_patches(classes, 4), expected)


def test_no_data_of_either_map_is_no_data(tmp_path):
    mean, sd = np.full((2, SIDE, SIDE), 50.0)
    rng = np.random.default_rng(0)
    before, after = mean + 10 * rng.standard_normal(mean.shape), mean + 10 * rng.standard_normal(mean.shape)
    first, second = before.copy(), after.copy()
    first[2, 3] = second[4, 5] = -1
    found = module.change(
        write_map(tmp_path / "a.tif", first, np.where(first < 0, -1, 10)),
        write_map(tmp_path / "b.tif", second, np.where(second < 0, -1, 10), SEASON="2020-05-01/2020-10-01"),
        tmp_path / "c.tif",
    )
    values, _ = read(tmp_path / "c.tif")
    assert np.argwhere(values.mask.any(0)).tolist() == np.argwhere(values.mask.all(0)).tolist() == [[2, 3], [4, 5]]
    assert found.tested == SIDE**2 - 2
    assert found.null.r == pytest.approx(0, abs=0.05)
    d = (after - before).astype(np.float32)
    np.testing.assert_allclose(values[0].compressed(), d[~values.mask[0]], atol=1e-4)


@pytest.mark.parametrize(
    ("tags", "more", "says"),
    [
        ({"SENSORS": "L30,S30"}, {}, r"in their sensor \(SENSORS is 'L30' and 'L30,S30'\).*--allow sensor"),
        ({"MODEL_SHA256": "b"}, {}, r"in their model .*--allow model"),
        ({"SEASON": "2021-08-01/2021-12-31"}, {}, r"seasons differ \(2019-05-01 to 2019-10-01 and 2021-08-01 to"),
        ({"SEASON": "2018-05-01/2018-10-01"}, {}, "the second of 2018-05-01; exchange them"),
        ({"SEASON": ""}, {}, r"b\.tif: no tag SEASON"),
        ({}, {"allow": ("weather",)}, "allow is 'weather'; expected of sensor, season, model"),
        ({}, {"stable_keep": (1.0,)}, "stable_keep is given without stable"),
        ({}, {"fdr": 0.0}, r"config\.fdr is 0\.0; expected a number above 0 to 0\.5"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, tags, more, says):
    rng = np.random.default_rng(0)
    maps = [50 + rng.random((SIDE, SIDE)) for _ in range(2)]
    sd = np.full((SIDE, SIDE), 9.0)
    tags = {"SEASON": "2021-05-01/2021-10-01"} | tags
    before, after = write_map(tmp_path / "a.tif", maps[0], sd), write_map(tmp_path / "b.tif", maps[1], sd, **tags)
    with pytest.raises((RegionalError, ConfigError), match=says):
        module.change(before, after, tmp_path / "c.tif", **more)
    assert not (tmp_path / "c.tif").exists()


@pytest.mark.parametrize(
    ("guard", "tags"),
    [
        ("sensor", {"SENSORS": "L30,S30"}),
        ("model", {"MODEL_SHA256": "b"}),
        ("season", {"SEASON": "2021-08-01/2021-12-31"}),
        ("season", {"SEASON": ""}),
    ],
)
def test_what_is_allowed_is_compared(tmp_path, guard, tags):
    rng = np.random.default_rng(0)
    maps, sd = 50 + rng.random((2, SIDE, SIDE)), np.full((SIDE, SIDE), 9.0)
    tags = {"SEASON": "2021-05-01/2021-10-01"} | tags
    before, after = write_map(tmp_path / "a.tif", maps[0], sd), write_map(tmp_path / "b.tif", maps[1], sd, **tags)
    with pytest.raises(RegionalError, match=f"--allow {guard} takes it"):
        module.change(before, after, tmp_path / "c.tif")
    assert module.change(before, after, tmp_path / "c.tif", allow=(guard,)).tested == SIDE**2


def test_a_change_has_an_item_of_both_seasons_with_all_bands(tmp_path):
    before, after, _ = two_maps(tmp_path, changed=-90.0)
    for fdr in (0.05, 0.2):  # the second one replaces the first
        module.change(before, after, tmp_path / "c.tif", fdr=fdr)
        item = json.loads((tmp_path / "c.json").read_text())
        about, asset = item["properties"], item["assets"]["agbd_change"]
        checksum = hashlib.sha256((tmp_path / "c.tif").read_bytes()).hexdigest()
        assert asset["file:checksum"] == "1220" + checksum
    assert (about["start_datetime"], about["end_datetime"]) == ("2019-05-01T00:00:00Z", "2021-09-30T23:59:59Z")
    assert [(link["rel"], link["href"]) for link in item["links"]] == [
        ("derived_from", "./before.tif"),
        ("derived_from", "./after.tif"),
    ]
    assert about["keywords"] == ["change"] and about["processing:software"]["model"] == "a"
    assert about["processing:lineage"].startswith("change: after.tif less before.tif; ")
    found = [(band["name"], band["unit"], band["nodata"], band["data_type"]) for band in asset["raster:bands"]]
    names = (("agbd_change", "Mg ha-1"), ("agbd_change_sd", "Mg ha-1"), ("significant", "1"))
    assert found == [(*one, -9999, "float32") for one in names]
    significant = read(tmp_path / "c.tif")[0][2]
    statistics = asset["raster:bands"][2]["statistics"]
    assert statistics["mean"] == pytest.approx(float(significant.mean()), abs=1e-6) and statistics["minimum"] == -1


def test_other_grids_and_maps_without_a_spread_are_refused(tmp_path):
    mean, sd = np.full((2, SIDE, SIDE), 50.0)
    before = write_map(tmp_path / "a.tif", mean, sd)
    shifted = Grid(SIDE, SIDE, GRID.crs, Affine(30, 0, 600030, 0, -30, 4200000))
    other = write_map(tmp_path / "b.tif", mean, sd, shifted, SEASON="2021-05-01/2021-10-01")
    with pytest.raises(RegionalError, match="their grids differ"):
        module.change(before, other, tmp_path / "c.tif")
    with MapWriter(tmp_path / "d.tif", GRID, nodata=-1, layers={"agbd": "Mg ha-1"}, tags=TAGS) as writer:
        writer.write_rows(0, mean)
    with pytest.raises(RegionalError, match=r"d\.tif: no band agbd_sd, found agbd; .*calibrated bundle"):
        module.change(before, tmp_path / "d.tif", tmp_path / "c.tif")


def test_a_raster_of_change_is_no_map(tmp_path):
    before, after, _ = two_maps(tmp_path)
    made = module.change(before, after, tmp_path / "change.tif").path
    with pytest.raises(RegionalError, match=r"change\.tif: a raster of change; expected a map of one date"):
        module.change(made, after, tmp_path / "again.tif")
    with pytest.raises(RasterError, match=r"change\.tif: a raster of change, whose gains and losses have no mean"):
        mosaic([made], tmp_path / "mosaic.tif")


def test_how_errors_go_together_is_told_where_nothing_changed(tmp_path):
    """Errors were smoothed over 3 pixels: near ones go together, those of 30 pixels don't."""
    before, after, stable = two_maps(tmp_path, changed=-90.0, offset=7.0, reach=3.0)
    keep = {"stable": str(stable), "stable_keep": (1.0,)}
    for settings in (keep, {}):
        found = module.change(before, after, tmp_path / "c.tif", **settings).errors
        distance = np.array([30.0, 90, 150, 900])
        expected = np.exp(-((distance / 90) ** 2) / 4)  # of a field smoothed with a normal curve of 3 pixels
        assert found.correlation.decaying(distance) == pytest.approx(expected, abs=0.22)
        assert found.correlation.nugget + found.correlation.sill == pytest.approx(1)
        with rasterio.open(tmp_path / "c.tif") as file:
            assert module.told_by("c.tif", file.tags()) == found
        assert (found.offset_se > 0) == bool(settings)


def test_the_offsets_error_is_the_double_sum_over_stable_ground(tmp_path):
    """By a loop over all pairs: the offset is a mean with weights 1 / (sd_before^2 + sd_after^2)."""
    rng, shape = np.random.default_rng(5), (20, 24)
    grid = Grid(*shape, GRID.crs, GRID.transform)
    sd_1, sd_2 = rng.uniform(10, 20, shape), rng.uniform(5, 30, shape)
    before = write_map(tmp_path / "a.tif", 300 + sd_1 * rng.standard_normal(shape), sd_1, grid)
    after = write_map(
        tmp_path / "b.tif", 300 + sd_2 * rng.standard_normal(shape), sd_2, grid, SEASON="2021-05-01/2021-10-01"
    )
    stable = (rng.random((1, *shape)) < 0.6).astype(np.uint8)
    write_cog(tmp_path / "s.tif", [stable], grid, np.uint8, ["classes"], 0, {})
    found = module.change(before, after, tmp_path / "c.tif", stable=str(tmp_path / "s.tif"), stable_keep=(1.0,))
    (_, sd, _), _ = read(tmp_path / "c.tif")
    rows, columns = np.nonzero(stable[0])
    weight = (
        1 / (sd_1.astype(np.float32).astype(float) ** 2 + sd_2.astype(np.float32).astype(float) ** 2)[rows, columns]
    )
    weight *= sd[rows, columns] / weight.sum()
    correlation, total = found.errors.correlation, 0.0
    for r, c, w in zip(rows, columns, weight, strict=True):
        apart = 30 * np.hypot(rows - r, columns - c)
        total += (w * weight * (correlation.decaying(apart) + correlation.nugget * (apart == 0))).sum()
    assert found.errors.offset_se == pytest.approx(math.sqrt(total), rel=1e-5)


def test_too_few_pixels_tell_no_correlation(tmp_path):
    rng, shape = np.random.default_rng(6), (1, 400)
    grid = Grid(*shape, GRID.crs, Affine(30_000, 0, 600000, 0, -30_000, 4200000))
    sd = np.full(shape, 9.0)
    maps = [50 + 9 * rng.standard_normal(shape) for _ in range(2)]
    before = write_map(tmp_path / "a.tif", maps[0], sd, grid)
    after = write_map(tmp_path / "b.tif", maps[1], sd, grid, SEASON="2021-05-01/2021-10-01")
    assert module.change(before, after, tmp_path / "c.tif").errors.correlation is None
    with rasterio.open(tmp_path / "c.tif") as file:
        assert "ERROR_RANGE_M" not in file.tags() and "Z_THRESHOLD" in file.tags()
        assert module.told_by("c.tif", file.tags()).correlation is None


def test_the_command_tells_what_came_of_it(tmp_path, capsys):
    before, after, stable = two_maps(tmp_path, changed=-90.0)
    words = ["--before", str(before), "--after", str(after), "--out", str(tmp_path / "c.tif")]
    assert module.main([*words, "--stable", str(stable), "--stable-keep", "1"]) == 0
    said = capsys.readouterr().out
    assert "errors go together up to 0." in said
    assert re.search(r"correlation 0\.(59|6)", said) and "\nloss: 1" in said and "Mg ha-1 on average" in said
    with rasterio.open(tmp_path / "c.tif") as file:
        tags = file.tags()
    assert tags["SEASON_AFTER"] == "2021-05-02/2021-10-01" and tags["FDR"] == "0.05"
    assert tags["COMMAND"].startswith("biomass-jax change --before")
    assert module.main([*words, "--stable", str(stable), "--stable-keep", "9"]) == 1
    assert "0 pixels have values on the stable ground of" in capsys.readouterr().err


@pytest.mark.slow
def test_the_rate_on_stable_ground_and_the_share_of_false_ones_over_many_draws(tmp_path, monkeypatch):
    """With errors that reach over pixels, whose scatter single draws show: 30 of them."""
    monkeypatch.setattr(module, "_TELLING", 2000)  # how errors go together isn't looked at here
    rates, false = [], []
    for seed in range(30):
        before, after, stable = two_maps(tmp_path, seed, changed=-90.0, reach=2.0)
        keep = {"stable": str(stable), "stable_keep": (1.0,), "min_area_ha": 0.0}
        module.change(before, after, tmp_path / "c.tif", **keep)
        (d, sd, significant), _ = read(tmp_path / "c.tif")
        rates.append((np.abs(d / sd)[:STABLE_ROWS] > stats.norm.isf(0.025)).mean())
        false.append((significant[:STABLE_ROWS] != 0).sum() / (significant != 0).sum())
    assert 0.04 <= np.mean(rates) <= 0.06
    assert 0.03 <= np.mean(false) <= 0.05
