"""The ruler world, read back by plain rasterio and h5py: it is as planned, and it tells wrong rules from right ones."""

import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

import h5py
import numpy as np
import pytest
import rasterio
from rasterio.warp import transform as project

from data_prep.synthetic.__main__ import main
from data_prep.synthetic.ruler.world import write_ruler_world

pytestmark = pytest.mark.slow  # many, of a second and more each

SHAPE = (70, 100)
ROWS, COLS = np.mgrid[: SHAPE[0], : SHAPE[1]]
L30 = ("B02", "B03", "B04", "B05", "B06", "B07")
S30 = ("B02", "B03", "B04", "B8A", "B11", "B12")
TILES = ["10SFF", "10SGF", "10UGB", "11UKS", "22JGR", "01KAB"]
# As the issue gives them, written out once more.
TRUTH = np.stack(
    [1 + ROWS, 4001 + COLS, 8001 + (ROWS + 2 * COLS) % 1000, 9501 + (2 * ROWS + COLS) % 1000]
    + [np.full(SHAPE, 11001), np.full(SHAPE, 12001)],
    axis=-1,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_ruler_world(tmp_path_factory.mktemp("ruler"), shape=SHAPE, seed=3).parent


@pytest.fixture(scope="module")
def plan(world) -> dict:
    return json.loads((world / "plan.json").read_text())


def read(folder: Path, layer: str) -> np.ndarray:
    with rasterio.open(folder / f"{folder.name}.{layer}.tif") as src:
        return src.read(1)


def acquired(folder: Path) -> datetime:
    return datetime.strptime(folder.name.split(".")[3], "%Y%jT%H%M%S").replace(tzinfo=UTC)


def season(text: str) -> tuple[datetime, datetime]:
    start, stop = (datetime.fromisoformat(day).replace(tzinfo=UTC) for day in text.split("/"))
    return start, stop


def scenes_that_count(world: Path, tile: str, text: str) -> list[Path]:
    """By sensor, date in the name, and newest processing among those less than ten minutes apart."""
    start, stop = season(text)
    found = sorted(world.glob(f"granules/hls/HLS.L30.T{tile}.*"))
    kept: list[Path] = []
    for folder in (f for f in found if start <= acquired(f) < stop):
        if kept and acquired(folder) - acquired(kept[-1]) < timedelta(minutes=10):
            kept[-1] = max(kept[-1], folder, key=lambda f: tags(f)["HLS_PROCESSING_TIME"])
        else:
            kept.append(folder)
    return kept


def tags(folder: Path, layer: str = "B02") -> dict:
    with rasterio.open(folder / f"{folder.name}.{layer}.tif") as src:
        return src.tags()


@pytest.fixture(scope="module")
def stacks(world, plan) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By tile: (scenes, H, W, 6) digital numbers and (scenes, H, W) Fmask of the scenes that count."""
    stacks = {}
    for tile in TILES:
        folders = scenes_that_count(world, tile, plan["tiles"][tile]["season"])
        images = [np.stack([read(folder, band) for band in L30], -1) for folder in folders]
        stacks[tile] = np.stack(images), np.stack([read(folder, "Fmask") for folder in folders])
    return stacks


def composite(images: np.ndarray, clear: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of clear pixels, -9999 where there is none, and how many there are; `clear` may differ by band."""
    clear = np.broadcast_to(clear, images.shape)
    count = clear.sum(0)
    mean = np.where(clear, images.astype(float), 0).sum(0) / np.maximum(count, 1)
    return np.where(count > 0, mean, -9999), count


def rule(images: np.ndarray, fmask: np.ndarray) -> np.ndarray:
    return ((fmask != 255) & (fmask & 0b11110 == 0) & (images != -9999).all(-1))[..., None]


@pytest.mark.parametrize("tile", TILES)
def test_the_mean_of_clear_pixels_tells_row_and_column(tile, stacks, plan):
    mean, count = composite(stacks[tile][0], rule(*stacks[tile]))
    assert (count == count[..., :1]).all()
    seen = count[..., 0] > 0
    np.testing.assert_array_equal(mean[seen], TRUTH[seen])
    assert 0.005 < 1 - seen.mean() < 0.02
    planned = plan["tiles"][tile]["clear_counts"]
    assert Counter(count[..., 0].ravel().tolist()) == {int(number): pixels for number, pixels in planned.items()}


WRONG_RULES = {
    "cloud": lambda i, f: rule(i, f & ~np.uint8(2)),
    "adjacent": lambda i, f: rule(i, f & ~np.uint8(4)),
    "shadow": lambda i, f: rule(i, f & ~np.uint8(8)),
    "snow": lambda i, f: rule(i, f & ~np.uint8(16)),
    "255 taken for clear": lambda i, f: ((f == 255) | (f & 0b11110 == 0))[..., None] & (i != -9999).all(-1)[..., None],
    "-9999 averaged": lambda i, f: rule(np.zeros_like(i), f),
    "mask by band": lambda i, f: rule(np.zeros_like(i), f) & (i != -9999),
    "bits shifted": lambda i, f: rule(i, np.where(f == 255, f, f << 1)),
    "fmask == 0": lambda i, f: rule(i, f) & (f == 0)[..., None],
    "no water": lambda i, f: rule(i, f) & (f & 32 == 0)[..., None],
    "no bit 0": lambda i, f: rule(i, f) & (f & 1 == 0)[..., None],
    "no high aerosol": lambda i, f: rule(i, f) & (f >> 6 != 3)[..., None],
    "no average aerosol": lambda i, f: rule(i, f) & (f >> 6 != 2)[..., None],
    "no climatology": lambda i, f: rule(i, f) & (f >> 6 != 0)[..., None],
}


@pytest.mark.parametrize("name", WRONG_RULES)
def test_each_wrong_mask_leaves_poison_or_loses_pixels_in_every_tile(name, stacks):
    for tile in TILES:
        images, fmask = stacks[tile]
        seen = composite(images, rule(images, fmask))[1] > 0
        mean, count = composite(images, WRONG_RULES[name](images, fmask))
        wrong = (mean != TRUTH) & (count > 0)
        lost = seen & (count == 0)
        assert (wrong | lost).any(-1).mean() > 0.01, tile


def test_scenes_to_be_left_out_carry_their_poison_and_are_told_by_name_and_tags(world, plan):
    poisons = {"out_of_season": 3000, "other_year": 2000, "other_sensor": 1500, "older_duplicate": 900}
    for tile in TILES:
        fields = plan["tiles"][tile]
        by_role = {scene["role"]: world / "granules/hls" / scene["granule"] for scene in fields["scenes"]}
        counted = [scene["granule"] for scene in fields["scenes"] if scene["role"] == "season"]
        assert [folder.name for folder in scenes_that_count(world, tile, fields["season"])] == sorted(counted)
        assert len(counted) == 4
        for role, poison in poisons.items():
            folder = by_role[role]
            bands = S30 if role == "other_sensor" else L30
            image = np.stack([read(folder, band) for band in bands], -1)
            shown = image == TRUTH + poison
            # the older duplicate has clouds and no-data where the newer one has them
            assert shown.mean() > 0.2 if role == "older_duplicate" else shown.all()
            assert role == "older_duplicate" or (read(folder, "Fmask") == 64).all()
        start, stop = season(fields["season"])
        days = [acquired(world / "granules/hls" / name).date() for name in sorted(counted)]
        assert (days[0], days[-1]) == (start.date(), (stop - timedelta(days=1)).date())
        outside = acquired(by_role["out_of_season"]).date()
        assert outside in (stop.date(), (start - timedelta(days=1)).date())
        # Duplicates: 24 s and 9 min 59 s apart; the one that counts is first by name in some tiles, second in others.
        twin = world / "granules/hls" / counted[0]
        apart = abs((acquired(by_role["older_duplicate"]) - acquired(twin)).total_seconds())
        assert apart in (24, 599)
        assert tags(by_role["older_duplicate"])["HLS_PROCESSING_TIME"] < tags(twin)["HLS_PROCESSING_TIME"]
    # Two good scenes exactly ten minutes apart are no duplicates.
    first, second = sorted(s["granule"] for s in plan["tiles"]["10SFF"]["scenes"] if s["role"] == "season")[1:3]
    assert acquired(Path(second)) - acquired(Path(first)) == timedelta(minutes=10)


def test_unused_bands_hold_20000_and_their_number(world):
    for sensor, used, number in (("L30", L30, 11), ("S30", S30, 14)):
        folder = max(world.glob(f"granules/hls/HLS.{sensor}.T10SFF.*"), key=lambda f: len(list(f.iterdir())))
        layers = {path.name.split(".")[-2] for path in folder.iterdir()}
        assert len(layers) == number
        for layer in layers - set(used) - {"Fmask"}:
            assert (read(folder, layer) == 20000 + int(layer[1:3])).all()
    # S30's B05 is there to be taken for NIR by mistake.
    assert (read(folder, "B05") == 20005).all()


def test_the_forms_of_scale_crs_and_tags_that_real_granules_have(world, plan):
    scales, forms = set(), {}
    for folder in sorted(world.glob("granules/hls/*")):
        with rasterio.open(folder / f"{folder.name}.B04.tif") as src:
            scales.add((src.scales[0], "scale_factor" in src.tags()))
            forms.setdefault(folder.name[9:14], set()).add((src.crs.to_epsg(), src.transform.f))
            assert (src.dtypes, src.nodata, src.shape) == (("int16",), -9999, SHAPE)
    assert scales == {(1.0, True), (0.0001, False), (0.0001, True)}
    assert {epsg for epsg, _ in forms["10SFF"]} == {32610}
    assert {epsg for epsg, _ in forms["11UKS"]} == {32611}
    assert forms["22JGR"] == {(32622, 7100020 - 1e7), (32722, 7100020)}
    assert {epsg for epsg, _ in forms["01KAB"]} == {None, 32701}
    joined = [folder for folder in world.glob("granules/hls/*") if ";" in tags(folder).get("SENSING_TIME", "")]
    assert len(joined) == len(TILES)
    assert all(len(tags(folder)["LANDSAT_SCENE_ID"].split("; ")) == 2 for folder in joined)
    (s30,) = world.glob("granules/hls/HLS.S30.T10SFF.*")
    assert tags(s30)["SENSING_TIME"][:16] != f"{acquired(s30):%Y-%m-%dT%H:%M}"
    assert "Sentinel" in tags(s30)["SPACECRAFT_NAME"]


# What shots are called here, and in the files.
FIELDS = {"number": "shot_number", "lon": "lon_lowestmode", "lat": "lat_lowestmode", "time": "delta_time"}
FIELDS |= {"agbd": "agbd", "run": "algorithm_run_flag", "quality": "l4_quality_flag", "degrade": "degrade_flag"}
FIELDS |= {"algorithm": "selected_algorithm", "limit": "predictor_limit_flag"}
FIELDS |= {"leaf_off": "land_cover_data/leaf_off_flag", "pft": "land_cover_data/pft_class"}
FIELDS |= {"water": "land_cover_data/landsat_water_persistence", "urban": "land_cover_data/urban_proportion"}
FIELDS |= {"sensitivity": "sensitivity"}


@cache
def shots_of(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path) as file:
        beams = [name for name in file if name.startswith("BEAM")]
        table = {key: np.concatenate([file[beam][name][:] for beam in beams]) for key, name in FIELDS.items()}
    return table | {"wrong_release": np.full(len(table["lon"]), "_002_01_" in path.name)}


def filters(span: tuple[float, float]) -> dict:
    return {
        "algorithm_run_flag": lambda t: t["run"] == 1,
        "l4_quality_flag": lambda t: t["quality"] == 1,
        "agbd_valid": lambda t: np.isfinite(t["agbd"]) & (t["agbd"] >= 0),
        "degrade_flag": lambda t: np.isin(t["degrade"], [10 * a + b for a in (0, 1, 2, 3, 4, 6) for b in (0, 3, 8)]),
        "selected_algorithm": lambda t: (t["algorithm"] != 10) | ~t["wrong_release"],
        "leaf_off_flag": lambda t: t["leaf_off"] != 1,
        "water_persistence_below": lambda t: t["water"] < 10,
        "urban_proportion_below": lambda t: t["urban"] < 50,
        "season": lambda t: (t["time"] >= span[0]) & (t["time"] < span[1]),
        "sensitivity_min": lambda t: t["sensitivity"] > 0.95,
        "sensitivity_min_tropical_evergreen": lambda t: (t["sensitivity"] > 0.98) | (t["pft"] != 2) | ~tropical(t),
    }


def tropical(table: dict[str, np.ndarray]) -> np.ndarray:
    return np.abs(table["lat"]) <= 23.5


def span_of(path: Path, plan: dict) -> tuple[float, float]:
    """Seconds since 2018 of the season of the tiles under an orbit: orbits 65xx, 66xx ... belong to groups of tiles."""
    group = int(path.name.split("_")[3][1:]) // 100 - 65
    text = plan["tiles"][["10SFF", "10UGB", "22JGR", "01KAB"][group]]["season"]
    start, stop = ((day - datetime(2018, 1, 1, tzinfo=UTC)).total_seconds() for day in season(text))
    return start, stop


def kept_shots(world: Path, plan: dict, changed: dict | None = None) -> dict[str, np.ndarray]:
    """All files' shots that pass the filters, of which some may be changed."""
    tables = []
    for path in sorted(world.glob("granules/gedi/*.h5")):
        table = shots_of(path)
        for keep in (filters(span_of(path, plan)) | (changed or {})).values():
            passed = keep(table)
            table = {key: values[passed] for key, values in table.items()}
        tables.append(table)
    return {key: np.concatenate([table[key] for table in tables]) for key in tables[0]}


def pixels(world: Path, plan: dict, tile: str, table: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of shots, by the CRS of the tile's first file."""
    scene = world / "granules/hls" / plan["tiles"][tile]["scenes"][0]["granule"]
    with rasterio.open(next(scene.glob("*.B04.tif"))) as src:
        x, y = project("EPSG:4326", src.crs, table["lon"], table["lat"])
        to_pixel = ~src.transform
    x, y = np.array(x), np.array(y)
    rows, cols = to_pixel.e * y + to_pixel.f, to_pixel.a * x + to_pixel.c
    return np.floor(rows).astype(int), np.floor(cols).astype(int)


def labels(world, plan, stacks, tile: str, table: dict[str, np.ndarray]) -> dict[tuple[int, int], list[float]]:
    """agbd by pixel, of the shots that the plan gives to this tile, on pixels that were seen."""
    owner = {number: name for number, name, *_ in plan["shots"]}
    row, col = pixels(world, plan, tile, table)
    seen = (rule(*stacks[tile]).any(0))[..., 0]
    found: dict[tuple[int, int], list[float]] = {}
    for r, c, number, agbd in zip(row, col, table["number"].tolist(), table["agbd"].tolist(), strict=True):
        if 0 <= r < SHAPE[0] and 0 <= c < SHAPE[1] and owner[number] == tile and seen[r, c]:
            found.setdefault((int(r), int(c)), []).append(agbd)
    return found


def test_filters_drop_what_is_planned_in_every_file(world, plan):
    files = sorted(world.glob("granules/gedi/*.h5"))
    assert [path.name for path in files] == sorted(plan["gedi"])
    assert len(files) == 16
    totals: Counter = Counter()
    for path in files:
        table, planned = shots_of(path), plan["gedi"][path.name]
        assert len(table["lon"]) == planned["shots"]
        dropped = {}
        for name, keep in filters(span_of(path, plan)).items():
            passed = keep(table)
            dropped[name] = int((~passed).sum())
            table = {key: values[passed] for key, values in table.items()}
        assert dropped == planned["dropped"], path.name
        totals.update(dropped)
        with h5py.File(path) as file:
            beams = [name for name in file if name.startswith("BEAM")]
            assert len(beams) == 8 - len(planned["absent_beams"])
            assert not set(beams) & set(planned["absent_beams"])
            assert all(len(file[beam]["agbd"]) for beam in beams)
        if "_002_01_" in path.name:
            assert planned["absent_beams"] == ["BEAM0010"]
    assert totals.pop("sensitivity_min_tropical_evergreen") >= 1  # in the one tropical tile
    assert min(totals.values()) >= 5
    assert totals == Counter(fate for *_, fate in plan["shots"] if fate in totals)


@pytest.mark.parametrize("tile", TILES)
def test_labels_tell_row_and_column(tile, world, plan, stacks):
    found = labels(world, plan, stacks, tile, kept_shots(world, plan))
    assert {pixel: np.mean(values) for pixel, values in found.items()} == {(r, c): 4096 * r + c for r, c in found}
    assert [[r, c, len(values)] for (r, c), values in sorted(found.items())] == plan["tiles"][tile]["labels"]
    assert sum(map(len, found.values())) == plan["tiles"][tile]["kept"]
    assert sum(0.0 in values for values in found.values()) > 0
    assert sum(len(values) == 4 for values in found.values()) > 0


def everything(table: dict[str, np.ndarray]) -> np.ndarray:
    return np.ones(len(table["lon"]), bool)


WRONG_FILTERS = {
    **dict.fromkeys(("l4_quality_flag", "degrade_flag", "selected_algorithm", "leaf_off_flag", "season"), everything),
    **dict.fromkeys(("water_persistence_below", "urban_proportion_below", "sensitivity_min"), everything),
    "water 9 is too much": lambda t: t["water"] < 9,
    "urban 49 is too much": lambda t: t["urban"] < 49,
    "degrade is 0": lambda t: t["degrade"] == 0,
    "leaf_off is 0": lambda t: t["leaf_off"] == 0,
    "agbd above 0": lambda t: t["agbd"] > 0,
    "no algorithm 10 at all": lambda t: t["algorithm"] != 10,
    "limits are 0": lambda t: t["limit"] == 0,
}


@pytest.mark.parametrize("name", WRONG_FILTERS)
def test_each_wrong_filter_changes_labels_in_every_tile(name, world, plan, stacks):
    right, wrong = kept_shots(world, plan), kept_shots(world, plan, {name: WRONG_FILTERS[name]})
    for tile in TILES:
        assert labels(world, plan, stacks, tile, right) != labels(world, plan, stacks, tile, wrong), tile


def test_places_are_as_planned_in_all_corners_and_nothing_outside_is_inside(world, plan):
    table = kept_shots(world, plan)
    fates = {number: (tile, r, c, dx, dy, fate) for number, tile, r, c, dx, dy, fate in plan["shots"]}
    assert len(fates) == len(plan["shots"]) == sum(file["shots"] for file in plan["gedi"].values())
    corners = {(dx, dy) for *_, dx, dy, fate in plan["shots"] if fate == "kept"}
    assert corners == {(-14.9, -14.9), (-14.9, 14.9), (14.9, -14.9), (14.9, 14.9)}
    outside = np.array([fates[number][-1] == "outside" for number in table["number"].tolist()])
    assert outside.sum() >= 12
    held = np.zeros(len(outside), int)
    centres = {tile: plan["tiles"][tile]["centre"] for tile in TILES}
    for tile in TILES:
        row, col = pixels(world, plan, tile, table)
        inside = (row >= 0) & (row < SHAPE[0]) & (col >= 0) & (col < SHAPE[1])
        held += inside
        for k in np.flatnonzero(inside):
            owner = fates[int(table["number"][k])]
            if owner[0] == tile:
                assert (row[k], col[k]) == owner[1:3]
            else:  # an overlap: the owner's centre is nearer
                lon, lat = table["lon"][k], table["lat"][k]
                east, north = np.array([(lon, lat)] * 2).T - np.array([centres[tile], centres[owner[0]]]).T
                far, near = np.hypot(east * np.cos(np.radians(lat)), north)
                assert near < far
    assert (held[outside] == 0).all()
    assert (held[~outside] >= 1).all()
    assert (held == 2).sum() > 10
    assert {fates[n][0] for n in table["number"][held == 2].tolist()} == {"10SFF", "10SGF", "10UGB", "11UKS"}
    # 14.9 m from the centre: within 0.2 m of another pixel's ground.
    row, col = pixels(world, plan, "22JGR", table | {"lon": table["lon"] + 0.2 / 99_900})
    mine = np.array([fates[n][0] == "22JGR" and fates[n][-1] == "kept" for n in table["number"].tolist()])
    moved = col[mine] != np.array([fates[n][2] for n in table["number"][mine].tolist()])
    assert 0.3 < moved.mean() < 0.7


def test_tiles_lie_on_both_sides_of_their_boundaries(plan):
    lon = np.array([plan["tiles"][tile]["centre"][0] for tile in TILES])
    assert lon[2] < -120 < lon[3]
    assert abs(abs(lon[5]) - 180) < 0.01
    assert [plan["tiles"][tile]["season"] for tile in TILES] == [
        *["2020-05-01/2020-10-01"] * 2,
        *["2020-06-01/2020-09-16"] * 2,
        "2019-11-01/2020-04-01",
        "2020-06-01/2020-10-01",
    ]


def test_shots_reach_from_the_seasons_first_moment_until_its_last_on_both_sides_of_180_degrees(world, plan):
    for group in range(4):
        files = sorted(world.glob(f"granules/gedi/*_O0{65 + group}*.h5"))
        start, stop = span_of(files[0], plan)
        table = [shots_of(path) for path in files]
        times = np.concatenate([t["time"] for t in table])
        assert {start, stop - 1 / 128, stop} <= set(times)
    assert (np.abs(table[0]["lon"]) > 179.9).all()
    assert {-1.0, 1.0} == set(np.sign(table[0]["lon"]))
    numbers = np.array([number for number, *_ in plan["shots"]], np.uint64)
    assert len(set(numbers.astype(np.float64))) < len(numbers)


def test_a_seed_gives_the_same_bytes_and_some_tiles_are_as_in_the_whole_world(world, tmp_path):
    write_ruler_world(tmp_path / "a", shape=SHAPE, seed=3, tiles=("22JGR",))
    write_ruler_world(tmp_path / "b", shape=SHAPE, seed=4, tiles=("22JGR",))
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*") if path.is_file()]
    assert len(files) > 50
    for path in files:
        if path.name != "plan.json":
            assert (tmp_path / "a" / path).read_bytes() == (world / path).read_bytes(), path
    orbit = next(path for path in files if "_O06700_" in path.name)
    assert (tmp_path / "b" / orbit).read_bytes() != (world / orbit).read_bytes()


def test_command_line_and_errors(tmp_path, capsys):
    with pytest.raises(ValueError, match="no tile 99ZZZ; it has 10SFF"):
        write_ruler_world(tmp_path, shape=SHAPE, tiles=["99ZZZ"])
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--world", "ruler", "--size", "20x64"])
    assert "20 x 64 pixels is too small" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
