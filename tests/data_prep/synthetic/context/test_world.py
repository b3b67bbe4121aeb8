"""The context world's files, read back by plain rasterio and h5py, and the limits that it prints."""

import itertools
import json

import h5py
import numpy as np
import pytest
import rasterio
from rasterio.warp import transform as project

from data_prep.synthetic.__main__ import main
from data_prep.synthetic.context import world
from data_prep.synthetic.context.land import Context, factors
from data_prep.synthetic.context.view import surface
from data_prep.synthetic.context.world import around, known, share_that_stays, write_context_world

LEFT, TOP = 600000.0, 4100040.0
SHAPE = (448, 560)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder, and what its plan.json holds."""
    out = tmp_path_factory.mktemp("context")
    write_context_world(out, shape=SHAPE, seed=2, scenes=2)
    return out, json.loads((out / "plan.json").read_text())


@pytest.fixture(scope="module")
def label(made) -> np.ndarray:
    """(H, W) mean agbd of good shots where the file says that they lie, NaN where there is none."""
    total, count = np.zeros(SHAPE), np.zeros(SHAPE)
    for path in made[0].glob("granules/gedi/*.h5"):
        with h5py.File(path) as file:
            for beam in (file[name] for name in file if name.startswith("BEAM")):
                good = (beam["l4_quality_flag"][:] == 1) & (beam["land_cover_data/leaf_off_flag"][:] != 1)
                good &= np.isin(beam["degrade_flag"][:], (0, 3, 8, 38))
                lon, lat = beam["lon_lowestmode"][:][good], beam["lat_lowestmode"][:][good]
                x, y = project("EPSG:4326", "EPSG:32610", lon, lat)
                at = np.floor((TOP - np.array(y)) / 30).astype(int), np.floor((np.array(x) - LEFT) / 30).astype(int)
                np.add.at(total, at, beam["agbd"][:][good])
                np.add.at(count, at, 1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def rmse(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2)))


def fitted(features: list[np.ndarray], label: np.ndarray) -> float:
    """RMSE of least squares of labels on a constant and features (H, W), in the sample."""
    use = np.isfinite(label)
    x = np.stack([np.ones(use.sum()), *(feature[use] for feature in features)], -1)
    return rmse(x @ np.linalg.lstsq(x, label[use], rcond=None)[0], label[use])


def test_each_range_tells_more(made):
    limits = made[1]["limits"]
    found = [limits[name]["rmse"] for name in ("one_pixel", "window", "neighbours", "stages", "oracle")]
    for less, more in zip(found[:-2], found[1:-1], strict=True):
        assert more < 0.9 * less
    assert found[-1] < 1.01 * found[-2]
    # So that a model has to use two of the three to be 30 % better than one of single pixels.
    assert found[1] > 0.7 * found[0] > found[3]


def test_the_one_pixel_limit_is_not_passed_by_what_sees_a_pixel_alone(made, label):
    limits = made[1]["limits"]
    context = Context(2)
    at = context.pixels(LEFT, TOP, SHAPE)
    forest = ~(at.bare | at.water)
    cover = np.where(forest, np.minimum(at.cover, 150), 0)
    colour = [cover, cover**2, cover**3, forest, at.moist, at.moist * cover, at.moist * cover**2]
    assert limits["one_pixel"]["rmse"] < fitted(colour, label) < 1.06 * limits["one_pixel"]["rmse"]
    # And what surrounds it is worth what the limits say, by a fit that knows nothing of their means.
    parts = [cover * np.prod(factors(at)[:k], axis=0) for k in (1, 2, 3)]
    window, neighbours, stages = (fitted([*colour, part, part * at.moist], label) for part in parts)
    for found, name in ((window, "window"), (neighbours, "neighbours"), (stages, "stages")):
        assert found == pytest.approx(limits[name]["rmse"], rel=0.12), name


def test_the_oracle_s_limit_is_that_of_the_files(made, label):
    truth = Context(2).pixel_biomass(LEFT, TOP, SHAPE)
    has = np.isfinite(label)
    # The mean over the nine pixels that a shot may have hit, by places drawn in each.
    rng = np.random.default_rng(0)
    rows, cols = np.nonzero(has)
    drawn = np.zeros(len(rows))
    for _ in range(200):
        y = np.floor(rows + rng.uniform(size=len(rows)) + 10 / np.sqrt(2) / 30 * rng.standard_normal(len(rows)))
        x = np.floor(cols + rng.uniform(size=len(rows)) + 10 / np.sqrt(2) / 30 * rng.standard_normal(len(rows)))
        drawn += truth[np.clip(y, 0, SHAPE[0] - 1).astype(int), np.clip(x, 0, SHAPE[1] - 1).astype(int)] / 200
    found = made[1]["limits"]["oracle"]["rmse"]
    assert found == pytest.approx(rmse(label[has], drawn), rel=0.01)
    assert found < rmse(label[has], truth[has]) - 0.3


def test_shots_lie_astray():
    rng = np.random.default_rng(0)
    place = rng.uniform(0, 1, 400_000)
    for sigma in (0.1, world.ASTRAY_M / 30, 0.5):
        there = np.floor(place + sigma * rng.standard_normal(len(place)))
        assert share_that_stays(sigma) == pytest.approx((there == 0).mean(), abs=0.005)
    point = np.zeros((5, 7))
    point[2, 3] = 1
    stays = share_that_stays(world.ASTRAY_M / 30)
    assert around(point)[2, 3] == pytest.approx(stays**2)
    assert around(point)[2, 4] == around(point)[2, 2] == pytest.approx(stays * (1 - stays) / 2)
    assert around(point)[1, 2] == pytest.approx(((1 - stays) / 2) ** 2)
    assert around(point)[1:4, 2:5].sum() == pytest.approx(around(point).sum()) == pytest.approx(1)


def test_what_a_range_can_not_tell_is_its_mean():
    at = Context(2).pixels(LEFT, TOP, (150, 170))
    found = known(at)
    forest = ~(at.bare | at.water)
    means = {m: [part[forest & (at.moist == m)].mean() for part in factors(at)] for m in (False, True)}
    bright = {m: at.cover[forest & (at.moist == m) & (at.cover > 150)].mean() for m in (False, True)}
    stays = share_that_stays(world.ASTRAY_M / 30)
    share = {-1: (1 - stays) / 2, 0: stays, 1: (1 - stays) / 2}
    for row, col in np.random.default_rng(0).integers((1, 1), (149, 169), (200, 2)):
        expected = dict.fromkeys(found, 0.0)
        for down, right in itertools.product(share, share):
            y, x = row + down, col + right
            moist = bool(at.moist[y, x])
            parts = [part[y, x] for part in factors(at)]
            cover = at.cover[y, x] if at.cover[y, x] <= 150 else bright[moist]
            weight = share[down] * share[right] * forest[y, x]
            for known_parts, name in enumerate(("window", "neighbours", "stages"), start=1):
                told = parts[:known_parts] + means[moist][known_parts:]
                expected[name] += weight * cover * np.prod(told)
            expected["oracle"] += weight * at.cover[y, x] * np.prod(parts)
        for name, values in found.items():
            assert values[row, col] == pytest.approx(expected[name]), name


def test_stripes_and_clouds_lie_over_the_scenes(made):
    (first, *_) = sorted(made[0].glob("granules/hls/*"))
    with (
        rasterio.open(first / f"{first.name}.B05.tif") as band,
        rasterio.open(first / f"{first.name}.Fmask.tif") as mask,
    ):
        image, cloud = band.read(1).astype(float), mask.read(1) & 0b1110 != 0
    assert 0.1 < cloud.mean() < 0.5
    at = Context(2).pixels(LEFT, TOP, SHAPE)
    land = surface(at, Context(2).crowns(LEFT, TOP, (SHAPE[0] + 1, SHAPE[1])), 0.85)[..., 3]
    use = ~cloud & ~at.bare & ~at.water
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    along, ratio = (x + 0.2 * y)[use] / 46, image[use] / land[use]
    ratio = ratio / ratio.mean() - 1
    amplitudes = [2 * np.abs((ratio * np.exp(2j * np.pi * times * along)).mean()) for times in (1, 1.6, 2.2)]
    assert amplitudes[0] > 0.015 > 2 * max(amplitudes[1:])


def test_command_line_prints_the_limits(tmp_path, capsys):
    main(["--out", str(tmp_path), "--world", "context", "--size", "200x224"])
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["world"] == "context"
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + 5
    for line, scores in zip(printed[1:], plan["limits"].values(), strict=True):
        assert f"R2 {scores['r2']:.3f}, RMSE {scores['rmse']:.1f} Mg/ha" in line
    with pytest.raises(ValueError, match="can't be made; expected 1 to 3 tiles of at least 32 x 32"):
        write_context_world(tmp_path, shape=(31, 64))
