"""The forest world: its truth, what a model can and can't know of it, read back by plain rasterio and h5py."""

import json
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
import rasterio
from rasterio.warp import transform as project

from data_prep.synthetic.__main__ import main
from data_prep.synthetic.forest.land import Forest, hashed, smooth
from data_prep.synthetic.forest.view import CLOSING_BIOMASS, CROWN_SHADOW, Day, shadowed_biomass, surface
from data_prep.synthetic.forest.world import write_forest_world
from data_prep.synthetic.world import TILES

SHAPE = (300, 460)
LEFT, TOP = 600000.0, 4100040.0


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("forest")
    write_forest_world(out, shape=SHAPE, seed=1)
    return out


@pytest.fixture(scope="module")
def plan(world) -> dict:
    return json.loads((world / "plan.json").read_text())


@pytest.fixture(scope="module")
def scenes(world) -> tuple[np.ndarray, np.ndarray]:
    """(scenes, H, W, 6) digital numbers and (scenes, H, W) Fmask."""
    folders = sorted(world.glob("granules/hls/*"))

    def read(folder: Path, layer: str) -> np.ndarray:
        with rasterio.open(folder / f"{folder.name}.{layer}.tif") as src:
            return src.read(1)

    images = [np.stack([read(folder, f"B0{k}") for k in range(2, 8)], -1) for folder in folders]
    return np.stack(images), np.stack([read(folder, "Fmask") for folder in folders])


@pytest.fixture(scope="module")
def composite(scenes) -> np.ndarray:
    """(H, W, 6) mean of clear pixels, NaN where there is none."""
    images, fmask = scenes
    clear = ((fmask != 255) & (fmask & 0b11110 == 0))[..., None]
    count = clear.sum(0)
    return np.where(count > 0, np.where(clear, images, 0).sum(0) / np.maximum(count, 1), np.nan)


@pytest.fixture(scope="module")
def label(world) -> np.ndarray:
    """(H, W) mean agbd of good shots, NaN where there is none."""
    total, count = np.zeros(SHAPE), np.zeros(SHAPE)
    for path in world.glob("granules/gedi/*.h5"):
        with h5py.File(path) as file:
            for beam in (file[name] for name in file if name.startswith("BEAM")):
                good = (beam["l4_quality_flag"][:] == 1) & (beam["land_cover_data/leaf_off_flag"][:] != 1)
                good &= np.isin(beam["degrade_flag"][:], (0, 3, 8, 38))
                x, y = project(
                    "EPSG:4326", "EPSG:32610", beam["lon_lowestmode"][:][good], beam["lat_lowestmode"][:][good]
                )
                at = np.floor((TOP - np.array(y)) / 30).astype(int), np.floor((np.array(x) - LEFT) / 30).astype(int)
                np.add.at(total, at, beam["agbd"][:][good])
                np.add.at(count, at, 1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def r2(image: np.ndarray, label: np.ndarray, neighbours: tuple = ((0, 0),), log: bool = True) -> float:
    """R2 of least squares of log label on a constant and the logs of bands, here and at neighbours (row, column)."""
    features = [np.log(np.maximum(np.roll(image, (-r, -c), (0, 1)), 50)) for r, c in neighbours]
    x = np.concatenate([np.ones((*label.shape, 1)), *features], -1)
    use = np.isfinite(x).all(-1) & (label > 0)
    use[[0, -1]] = use[:, [0, -1]] = False
    y = np.log(label[use]) if log else label[use]
    weights = np.linalg.lstsq(x[use], y, rcond=None)[0]
    return 1 - ((y - x[use] @ weights) ** 2).mean() / y.var()


def test_random_fields_are_even_smooth_and_functions_of_place():
    i, j = np.mgrid[-200:200, -150:150]
    numbers = hashed(i, j, 5, 0)
    assert numbers.mean() == pytest.approx(0.5, abs=0.005)
    assert numbers.var() == pytest.approx(1 / 12, rel=0.01)
    for shifted in (
        numbers[1:, 1:],
        hashed(i, j, 6, 0)[1:, 1:],
        hashed(i, j, 5, 1)[1:, 1:],
        hashed(j, i, 5, 0)[1:, 1:],
    ):
        assert abs(np.corrcoef(numbers[:-1, :-1].ravel(), shifted.ravel())[0, 1]) < 0.015
    x, y = np.mgrid[-2e5:2e5:70, 0:3e4:70]
    field = smooth(x, y, 270.0, 1, 0)
    assert abs(field.mean()) < 0.02
    assert field.std() == pytest.approx(1, abs=0.03)
    assert np.abs(smooth(x + 1, y + 1, 270.0, 1, 0) - field).max() < 0.05


def test_biomass_belongs_to_the_place_not_to_the_window_and_is_fine_grained():
    forest = Forest(2)
    whole = forest.pixel_biomass(LEFT, TOP, (120, 160))
    part = forest.pixel_biomass(LEFT + 30 * 40, TOP - 30 * 50, (60, 70))
    np.testing.assert_array_equal(part, whole[50:110, 40:110])
    # A pixel's biomass is the mean over points in it; the smooth part changes a little within.
    x, y = np.meshgrid(LEFT + 30 * 7 + np.arange(0.5, 30), TOP - 30 * 9 - np.arange(0.5, 30))
    assert forest.biomass(x, y).mean() == pytest.approx(whole[9, 7], rel=0.01)
    # At least half of the variance differs from one pixel of 30 m to the next.
    for a, b in ((whole[1:], whole[:-1]), (whole[:, 1:], whole[:, :-1])):
        assert ((a - b) ** 2).mean() / 2 > 0.5 * whole.var()
    assert 5 < whole.min() < 50 < np.median(whole) < 200 < whole.max() < 1300


def test_colours_saturate_and_hold_the_southern_neighbours_biomass():
    column = np.array([[50.0], [200.0], [100.0]])
    expected = np.array([[50 + CROWN_SHADOW * 200], [200 + CROWN_SHADOW * 100]]) / (1 + CROWN_SHADOW)
    np.testing.assert_allclose(shadowed_biomass(column), expected)
    biomass = np.array([[0.0, 100, 200, 300, 400]])
    red = surface(biomass, np.full_like(biomass, 0.3), Day(1, 0))[0, :, 2]
    steps = -np.diff(red)
    assert (steps > 0).all()
    assert (steps[1:] < 0.6 * steps[:-1]).all()
    # No crowns: the ground as it is, between bare soil (1350) and green (480).
    assert red[0] == pytest.approx(1350 + 0.3 * (480 - 1350))
    assert pytest.approx(-100 / np.log((red[1] - 251.0) / (red[0] - 251.0)), rel=0.1) == CLOSING_BIOMASS


def test_scenes_have_seasons_clouds_shadows_and_an_edge(scenes):
    images, fmask = scenes
    assert len(images) == 5
    off = fmask == 255
    assert ((images == -9999).all(-1) == off).all()
    assert 0 < off.any((1, 2)).sum() < 5
    cloud, near, shadow = ((fmask & bit > 0) & ~off for bit in (2, 4, 8))
    clear = ~(cloud | near | shadow | off)
    for k in range(5):
        assert 0.1 < cloud[k].mean() < 0.35
        assert min(near[k].mean(), shadow[k].mean()) > 0.02
        blue, nir = images[k, ..., 0], images[k, ..., 3]
        assert np.median(blue[cloud[k]]) > 4 * np.median(blue[clear[k]])
        assert np.median(nir[shadow[k] & ~near[k]]) < 0.6 * np.median(nir[clear[k]])
    assert clear.any(0).mean() > 0.97
    nir = [np.median(images[k, ..., 3][clear[k]]) for k in range(5)]
    assert np.ptp(nir) > 100
    assert np.argmax(nir) in (2, 3)


def test_labels_fit_the_image_only_where_they_lie(composite, label):
    aligned = r2(composite, label)
    assert aligned > 0.8
    for shift in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        assert r2(np.roll(composite, shift, (0, 1)), label) < aligned - 0.3, shift
    for image in (composite[::-1], composite[:, ::-1], composite[::-1, ::-1]):
        assert r2(image, label) < 0.1
    square, square_label = composite[:, :300], label[:, :300]
    assert r2(square, square_label) > 0.8
    assert r2(np.swapaxes(square, 0, 1), square_label) < 0.1


def test_neighbours_tell_more_than_one_pixel_can(composite, label, plan):
    alone, around = (r2(composite, label, n, log=False) for n in (((0, 0),), ((0, 0), (1, 0), (-1, 0), (2, 0))))
    assert alone < plan["limits"]["one_pixel"]["r2"] + 0.01
    assert around > plan["limits"]["one_pixel"]["r2"] + 0.03
    assert around < plan["limits"]["best"]["r2"]


def test_the_limits_are_those_of_the_files(label, plan):
    truth = Forest(1).pixel_biomass(LEFT, TOP, SHAPE)
    has = np.isfinite(label)
    error = label[has] - truth[has]
    assert plan["limits"]["best"]["rmse"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-3)
    assert plan["limits"]["best"]["r2"] == pytest.approx(1 - (error**2).mean() / label[has].var(), abs=2e-4)
    assert 0.93 < plan["limits"]["best"]["r2"] < 0.99
    assert plan["limits"]["one_pixel"]["r2"] < plan["limits"]["best"]["r2"] - 0.06


def test_noise_has_the_error_that_shots_carry(world):
    ratios, counts = [], Counter()
    for path in world.glob("granules/gedi/*.h5"):
        with h5py.File(path) as file:
            for beam in (file[name] for name in file if name.startswith("BEAM")):
                run, good = beam["algorithm_run_flag"][:] == 1, beam["l4_quality_flag"][:] == 1
                good &= (beam["land_cover_data/leaf_off_flag"][:] != 1) & np.isin(
                    beam["degrade_flag"][:], (0, 3, 8, 38)
                )
                kept = int(good.sum())
                x, y = project("EPSG:4326", "EPSG:32610", beam["lon_lowestmode"][:], beam["lat_lowestmode"][:])
                truth = Forest(1).biomass(np.array(x), np.array(y))
                # by the delta method: 2 * agbd_t * agbd_t_se * bias correction, which is agbd / agbd_t ** 2
                sigma = 2 * beam["agbd_t_se"][:] * beam["agbd"][:] / np.maximum(beam["agbd_t"][:], 1e-9)
                good &= sigma > 0  # none where agbd is 0
                ratios.append(((beam["agbd"][:] - truth) / np.where(good, sigma, 1))[good])
                counts.update(shots=len(run), kept=kept)
                assert (beam["agbd"][:][~run] == -9999).all()
    ratio = np.concatenate(ratios)
    # 10 m patches' edges lie within the rounding of lon/lat for a few.
    assert np.percentile(np.abs(ratio), 68.27) == pytest.approx(1, abs=0.04)
    plan = json.loads((world / "plan.json").read_text())
    assert (counts["shots"], counts["kept"]) == (plan["shots"], plan["kept"])


def test_every_chip_has_enough_labels(label):
    counts = [np.isfinite(label[:224, c : c + 224]).sum() for c in (0, 224)]
    assert min(counts) >= 40


def test_a_seed_gives_the_same_bytes_and_neighbouring_tiles_share_their_ground(tmp_path):
    options = {"shape": (64, 90), "scenes": 2}
    first = write_forest_world(tmp_path / "a", tiles=2, seed=5, **options)
    assert write_forest_world(tmp_path / "b", tiles=2, seed=5, **options) == first
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*") if path.is_file()]
    assert len(files) == 1 + 2 * 2 * 7 + len(first["gedi"])
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path
    assert write_forest_world(tmp_path / "c", seed=6, **options)["limits"] != first["limits"]
    lefts = [first["tiles"][tile]["transform"][2] for tile in TILES[:2]]
    assert lefts[1] - lefts[0] == 30 * (90 - 36)


def test_command_line_prints_the_limits(tmp_path, capsys):
    main(["--out", str(tmp_path), "--world", "forest", "--size", "64x90"])
    plan = json.loads((tmp_path / "plan.json").read_text())
    printed = capsys.readouterr().out
    for name in ("best", "one_pixel"):
        scores = plan["limits"][name]
        assert f"R2 {scores['r2']:.3f}, RMSE {scores['rmse']:.1f} Mg/ha, R2 of logs {scores['r2_log']:.3f}" in printed
    for options in ({"tiles": 4}, {"scenes": 0}, {"shape": (31, 64)}):
        with pytest.raises(ValueError, match="can't be made; expected 1 to 3 tiles of at least 32 x 32"):
            write_forest_world(tmp_path, **options)
