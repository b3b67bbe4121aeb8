"""The index of chips against numbers worked out from the shots, and its windows read back."""

import json

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyproj
import pytest
import rasterio
import shapely

from biomass_jax.data import biomes, records
from biomass_jax.errors import BiomassError, PrepError, RasterError
from data_prep.chips import cells as chips
from data_prep.chips import folders as chip_folders
from data_prep.chips import index as chip_index
from data_prep.chips import splits
from data_prep.chips.windows import ChipReader, read_record
from data_prep.settings import ChipSettings, SplitSettings
from tests.data_prep.chip_world import BANDS, SEASON, SIZE, ramp, scattered, write_tif, write_tile

HEIGHT, WIDTH = 53, 70  # 3 x 4 cells of 16 px; 5 rows and 6 columns are left over
TILE = "10SFF"
SHOTS = scattered(HEIGHT, WIDTH, 500, seed=4)


def in_cell(row, col, shots=SHOTS):
    return [s for s in shots if row <= s[1] < row + SIZE and col <= s[2] < col + SIZE]


@pytest.fixture
def world(tmp_path):
    """A tile with a cell without data, one with too few labels, and one whose data lies under a bit of no-data."""
    image = ramp(HEIGHT, WIDTH)
    image[2, 0:16, 16:32] = -9999  # a single band is enough
    image[:, 16:17, 32:44] = 0  # 12 of 256 pixels: 0.047
    shots = [s for s in SHOTS if not (0 <= s[1] < 16 and 48 <= s[2] < 64)] + [(7, 3, 50, 5.0)]
    write_tile(tmp_path, TILE, image=image, shots=shots)
    return tmp_path


def index(root, *, allow_empty=False, **settings):
    counts = chips.index_folder(root, ChipSettings(size=SIZE, **settings), allow_empty=allow_empty)
    return chip_index.read_index(chip_index.path_in(root)), counts


def test_cells_with_enough_labels_and_data_become_chips(world):
    frame, counts = index(world)
    (found,) = counts.values()
    assert found == {"cells": 12, "kept": 10, "few_labels": 2, "no_data": 0}  # labels without data don't count
    cells = {(r, c) for r in (0, 16, 32) for c in (0, 16, 32, 48)} - {(0, 16), (0, 48)}
    assert list(zip(frame["row"], frame["col"], strict=True)) == sorted(cells)
    assert frame["chip_id"].tolist() == [f"{TILE}_{r // 16 * 4 + c // 16}_2020-06-01" for r, c in sorted(cells)]
    assert set(frame["split"]) == {""}
    assert set(frame["biome"]) == {"unknown"}


def test_numbers_of_a_chip_are_those_of_its_shots(world):
    frame, _ = index(world)
    for row in frame.to_dict("records"):
        inside = in_cell(row["row"], row["col"])
        if (row["row"], row["col"]) == (16, 32):
            used = [s for s in inside if not (s[1] == 16 and s[2] < 44)]
            assert len(used) < len(inside)
            assert row["nodata_share"] == 12 / 256
        else:
            used = inside
            assert row["nodata_share"] == 0
        agbd = np.array([s[3] for s in used])
        assert row["n_labels"] == len(used)
        assert row["label_mean"] == pytest.approx(agbd.mean(), rel=1e-12)
        assert row["label_max"] == agbd.max()
        edges = (0, 25, 50, 75, 100, 150, 200, 250, 300, 400, 500)
        expected = [
            ((agbd >= low) & (agbd < high)).sum() for low, high in zip(edges, (*edges[1:], np.inf), strict=True)
        ]
        assert row["label_counts"].tolist() == expected
        assert row["shot_numbers"].dtype == np.uint64
        assert row["shot_numbers"].tolist() == sorted(s[0] for s in inside)  # exact above 2**53


def test_limits_are_inclusive(world):
    frame, _ = index(world, min_labels=1, max_nodata=12 / 256)
    assert (16, 32) in set(zip(frame["row"], frame["col"], strict=True))
    assert (0, 48) in set(zip(frame["row"], frame["col"], strict=True))
    frame, counts = index(world, min_labels=1, max_nodata=11 / 256)
    assert (16, 32) not in set(zip(frame["row"], frame["col"], strict=True))
    assert next(iter(counts.values()))["no_data"] == 1
    fewest = min(
        len(in_cell(row, col)) for row, col in zip(frame["row"], frame["col"], strict=True) if (row, col) != (0, 48)
    )
    kept, _ = index(world, min_labels=fewest)
    assert kept["n_labels"].min() == fewest
    assert index(world, min_labels=fewest + 1)[0]["n_labels"].min() > fewest


def test_outlines_lie_where_the_pixels_do(world):
    frame, _ = index(world)
    assert frame.crs.to_epsg() == 4326
    geod = pyproj.Geod(ellps="WGS84")
    back = pyproj.Transformer.from_crs(4326, 32610, always_xy=True)
    for row in frame.to_dict("records"):
        a, b, c, d, e, f = row["transform"]
        assert (a, b, d, e) == (30, 0, 0, -30)
        assert (c, f) == (600000 + 30 * row["col"], 4200000 - 30 * row["row"])
        x, y = back.transform(*np.array(row["geometry"].exterior.coords).T)
        assert (np.min(x), np.max(x), np.min(y), np.max(y)) == pytest.approx((c, c + 480, f - 480, f), abs=1e-3)
        assert abs(geod.geometry_area_perimeter(row["geometry"])[0]) == pytest.approx(480**2, rel=1e-3)
        assert row["geometry"].exterior.is_ccw


def test_the_index_is_geoparquet_with_its_settings(world):
    index(world, min_labels=21)
    schema = pq.read_schema(chip_index.path_in(world))
    geo = json.loads(schema.metadata[b"geo"])
    column = geo["columns"][geo["primary_column"]]
    assert column["encoding"] == "WKB"
    assert column["geometry_types"] == ["Polygon"]
    assert column["crs"]["id"] == {"authority": "EPSG", "code": 4326}
    assert schema.field("shot_numbers").type == pa.list_(pa.uint64())
    stored = chip_index.read_metadata(chip_index.path_in(world))["chips"]
    assert stored["min_labels"] == 21
    assert stored["counts"][f"composites/{TILE}/{TILE}_2020-06-01_2020-09-16.tif"]["cells"] == 12


def test_equal_input_gives_equal_bytes_and_paths_that_move(world, tmp_path):
    index(world)
    first = chip_index.path_in(world).read_bytes()
    moved = world.rename(world.parent / f"{world.name}_moved")
    frame, _ = index(moved)
    assert chip_index.path_in(moved).read_bytes() == first
    assert frame["label"][0] == f"labels/{TILE}/{TILE}_2020-06-01_2020-09-16_agbd.tif"


def test_records_hold_the_window(world):
    frame, _ = index(world)
    image = ramp(HEIGHT, WIDTH)
    for _, row in frame.iterrows():
        record = read_record(row, world)
        records.validate(record, image_shape=(SIZE, SIZE, 6), image_dtype=np.int16)
        r, c = row["row"], row["col"]
        expected = np.moveaxis(image[:6, r : r + SIZE, c : c + SIZE], 0, -1).copy()
        if (r, c) == (16, 32):
            expected[0, :12] = 0
        np.testing.assert_array_equal(record["image"], expected)
        label = np.full((SIZE, SIZE), -1, np.float32)
        for _, i, j, agbd in in_cell(r, c):
            label[i - r, j - c] = agbd
        np.testing.assert_array_equal(record["label"], label)
        assert (record["chip_id"], record["tile"], record["season"]) == (row["chip_id"], TILE, SEASON)
        assert (record["row"], record["col"], record["epsg"], record["sensors"]) == (r, c, 32610, "L30")
        assert record["transform"].tolist() == [30, 0, 600000 + 30 * c, 0, -30, 4200000 - 30 * r]


def test_a_reader_keeps_a_bounded_number_of_tiles_open(tmp_path):
    for number, tile in enumerate(("10SFF", "10SFG", "10SFH", "10SGF")):
        origin = (600000.0, 4200000 - 100000.0 * number)
        write_tile(
            tmp_path,
            tile,
            image=ramp(16, 16) + np.int16(number),
            shots=scattered(16, 16, 30, seed=number),
            origin=origin,
        )
    frame, _ = index(tmp_path)
    with ChipReader(tmp_path) as reader:
        reader.MOST_OPEN = 2
        for _ in range(2):
            for number, (_, row) in enumerate(frame.iterrows()):
                assert reader.read(row)["image"][0, 0, 0] == 1500 + number
                assert len(reader._open) <= 2
    assert not reader._open


def test_records_of_changed_rasters_are_refused(world):
    frame, _ = index(world)
    write_tile(world, TILE, image=ramp(HEIGHT, WIDTH), shots=SHOTS[:400])
    with pytest.raises(PrepError, match="run .python -m data_prep chips. again"):
        for _, row in frame.iterrows():
            read_record(row, world)


def test_biomes_come_from_polygons_at_the_centre(world):
    # Centres of the columns of chips lie at x = 600,240, 600,720, 601,200 and 601,680 m.
    spans = {
        "West of it": (599000, 600239),
        "Boreal Forests/Taiga": (600239, 600721),
        "Comes too late": (599000, 600800),
    }
    boxes = [shapely.box(west, 4198000, east, 4200100) for west, east in spans.values()]
    polygons = geopandas.GeoDataFrame({"name": list(spans)}, geometry=boxes, crs=32610)
    polygons.to_file(world / "biomes.gpkg")
    frame, _ = index(world, biomes=world / "biomes.gpkg", biome_field="name")
    assert frame.groupby("col")["biome"].unique().map(list).to_dict() == {
        0: ["boreal-forests-taiga"],
        16: ["boreal-forests-taiga"],
        32: ["unknown"],
        48: ["unknown"],
    }
    with pytest.raises(BiomassError, match="found columns name, geometry .*expected BIOME"):
        index(world, biomes=world / "biomes.gpkg", biome_field="BIOME")


@pytest.mark.parametrize(("polygons", "places"), [(360, 0), (-360, 0), (0, 360)])
def test_biomes_in_either_convention_of_longitude(tmp_path, polygons, places):
    box = shapely.box(-121 + polygons, 37, -119 + polygons, 39)
    geopandas.GeoDataFrame({"name": ["Taiga"]}, geometry=[box], crs=4326).to_file(tmp_path / "b.gpkg")
    found = biomes.Biomes(tmp_path / "b.gpkg", "name").at(np.array([[-120.0 + places, 38.0], [-118.0 + places, 38.0]]))
    assert found == ["taiga", "unknown"]


def test_slugs():
    assert [biomes.slug(v) for v in ("Boreal Forests/Taiga", " É ", None, float("nan"), 6.0)] == [
        "boreal-forests-taiga",
        "unknown",
        "unknown",
        "unknown",
        "6-0",
    ]


def test_shots_that_contradict_the_labels_are_refused(world):
    table = next((world / "labels" / TILE).glob("*.parquet"))
    changed = pq.read_table(table).slice(1)
    pq.write_table(changed, table)
    with pytest.raises(
        PrepError, match=r"1 pixels .*the shots give -1, the label is .*run .python -m data_prep labels. again"
    ):
        index(world)
    as_float = changed.set_column(0, "shot_number", changed["shot_number"].cast(pa.float64(), safe=False))
    pq.write_table(as_float, table)
    with pytest.raises(PrepError, match="shot_number: found double, expected uint64"):
        index(world)
    pq.write_table(changed.drop_columns(["agbd"]), table)
    with pytest.raises(PrepError, match=r"without agbd; run .python -m data_prep labels. again"):
        index(world)


def test_without_shots_there_is_a_warning(world):
    next((world / "labels" / TILE).glob("*.parquet")).unlink()
    with pytest.warns(UserWarning, match="no table of shots"):
        frame, _ = index(world)
    assert all(len(numbers) == 0 for numbers in frame["shot_numbers"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tags": {"TILE": TILE, "SEASON": SEASON}}, "tag SENSORS: found None"),
        ({"tags": {"TILE": TILE, "SEASON": "2020-09-16/2020-06-01", "SENSORS": "L30"}}, "tag SEASON"),
        ({"image": ramp(HEIGHT, WIDTH).astype(np.float32) / 1e4}, "found float32 with .* expected int16"),
        ({"crs": None}, "no CRS"),
    ],
)
def test_other_composites_are_refused(tmp_path, change, message):
    write_tile(tmp_path, TILE, **({"image": ramp(HEIGHT, WIDTH), "shots": SHOTS} | change))
    with pytest.raises(BiomassError, match=message):
        index(tmp_path)


@pytest.mark.parametrize(
    ("shape", "shift", "value", "message"),
    [
        ((HEIGHT, WIDTH), 15, -1, "expected one on the composite's grid"),
        ((HEIGHT - 1, WIDTH), 0, -1, "expected one on the composite's grid"),
        ((HEIGHT, WIDTH), 0, np.inf, "labels up to inf, 1120 of them above 2000 Mg/ha"),
        ((HEIGHT, WIDTH), 0, 3 + 7j, "agbd.tif: its labels are complex64; expected real numbers, Mg/ha"),
    ],
)
def test_other_labels_are_refused(tmp_path, shape, shift, value, message):
    _, label, _ = write_tile(tmp_path, TILE, image=ramp(HEIGHT, WIDTH), shots=SHOTS)
    values = np.full((1, *shape), value, np.complex64 if isinstance(value, complex) else np.float32)
    write_tif(label, values, "EPSG:32610", rasterio.Affine(30, 0, 600000 + shift, 0, -30, 4200000), nodata=-1)
    with pytest.raises(BiomassError, match=message):
        index(tmp_path)


def no_labels_at(label, places, dtype, value):
    """Write a label raster again with a value at some of its pixels; its profile as it was."""
    with rasterio.open(label) as dataset:
        profile, values = dataset.profile, dataset.read(1)
    values = np.where(values == -1, 0, np.rint(values)).astype(dtype) if dtype != "float32" else values
    for row, col in places:
        values[row, col] = value
    return {**profile, "dtype": dtype}, values


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("nan", "3 NaN"),
        ("-9999", "3 -9999"),
        ("tag", "3 its no-data value 12345"),
        ("internal mask", "3 hidden by a mask"),
        ("side-car mask", "3 hidden by a mask"),
        ("alpha", "3 hidden by a mask"),
    ],
)
def test_labels_that_the_raster_takes_away_are_none_and_told(tmp_path, kind, why):
    """Of the pixels of three shots; these leave the index too."""
    _, label, _ = write_tile(tmp_path, TILE, image=ramp(HEIGHT, WIDTH), shots=SHOTS)
    gone = [(row, col) for _, row, col, _ in in_cell(16, 32)[:3]]
    value = {"nan": np.nan, "-9999": -9999, "tag": 12345}.get(kind)
    profile, values = no_labels_at(label, gone if value is not None else [], "float32", value)
    profile |= {"nodata": 12345 if kind == "tag" else -1}
    hidden = np.zeros(values.shape, bool)
    hidden[tuple(zip(*gone, strict=True))] = True
    bands = values[None]
    if kind == "alpha":
        profile |= {"count": 2, "alpha": "yes", "photometric": "minisblack", "nodata": None}
        bands = np.stack([values, np.where(hidden, 0, 255)]).astype(np.float32)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=kind == "internal mask"), rasterio.open(label, "w", **profile) as dst:
        dst.write(bands)
        if "mask" in kind:
            dst.write_mask(~hidden)
    with pytest.warns(UserWarning, match=rf"agbd\.tif: labels taken as none: {why}$"):
        frame, _ = index(tmp_path)
    (row,) = (row for _, row in frame.iterrows() if (row["row"], row["col"]) == (16, 32))
    assert row["n_labels"] == len(in_cell(16, 32)) - 3 == len(row["shot_numbers"])
    record = read_record(row, tmp_path)
    assert all(record["label"][r - 16, c - 32] == -1 for r, c in gone)


def test_cast_fill_and_true_zeros_of_whole_labels(tmp_path):
    """uint16 labels whose tag says no-data 0, with 55,537 for -9999: neither is biomass."""
    _, label, table = write_tile(tmp_path, TILE, image=ramp(HEIGHT, WIDTH), shots=SHOTS)
    table.unlink()
    places = [(row, col) for _, row, col, _ in SHOTS[:5]]
    profile, values = no_labels_at(label, places, "uint16", 55537)
    with rasterio.open(label, "w", **{**profile, "nodata": 0}) as dst:
        dst.write(values, 1)
    told = r"5 55537, which is -9999 cast to uint16, 2,906 its no-data value 0$"
    with pytest.warns(UserWarning, match="no table of shots"), pytest.warns(UserWarning, match=told):
        frame, _ = index(tmp_path)
    assert frame["label_max"].max() < 401
    assert frame["n_labels"].sum() == sum(np.rint(agbd) > 0 for _, row, col, agbd in SHOTS[5:] if row < 48 and col < 64)


def test_high_labels_are_refused_unless_allowed(tmp_path):
    shots = [(number, row, col, 1000 * agbd) for number, row, col, agbd in SHOTS]
    write_tile(tmp_path, TILE, image=ramp(HEIGHT, WIDTH), shots=shots)
    with pytest.raises(RasterError, match=r"agbd\.tif: labels up to 39.* of them above 2000 Mg/ha; probably kg"):
        index(tmp_path)
    assert len(index(tmp_path, label_max=1e6)[0]) == 12


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (ramp(HEIGHT, WIDTH) // 100, "very low for digital numbers"),
        (ramp(HEIGHT, WIDTH) * np.int16(3), "beyond 0 to 16,000"),
    ],
)
def test_composites_of_other_numbers_are_refused_unless_asked_for(tmp_path, image, says):
    composite, *_ = write_tile(tmp_path, TILE, image=image, shots=SHOTS)
    with pytest.raises(RasterError, match=rf"{composite.name}: percentiles .*{says}"):
        index(tmp_path)
    frame, _ = index(tmp_path, encoding="digital_numbers")
    np.testing.assert_array_equal(
        read_record(frame.iloc[0], tmp_path)["image"], np.moveaxis(image[:6, :SIZE, :SIZE], 0, -1)
    )
    tags = {"TILE": TILE, "SEASON": SEASON, "SENSORS": "L30", "COMPOSITE": '{"encoding": "digital_numbers"}'}
    write_tile(tmp_path, TILE, image=image, shots=SHOTS, tags=tags)  # its making was told already
    assert len(index(tmp_path)[0]) == 12


def test_a_composite_with_another_scale_is_refused(tmp_path):
    composite, *_ = write_tile(tmp_path, TILE, image=ramp(HEIGHT, WIDTH), shots=SHOTS)
    with rasterio.open(composite, "r+") as dataset:
        dataset.scales, dataset.offsets = (1e-4,) * 7, (-0.1,) * 7
    with pytest.raises(RasterError, match="band BLUE has scale 0.0001 and offset -0.1"):
        index(tmp_path)


def test_a_mask_of_a_composite_is_no_data(tmp_path):
    composite, *_ = write_tile(tmp_path, TILE, image=ramp(HEIGHT, WIDTH), shots=SHOTS)
    hidden = np.zeros((HEIGHT, WIDTH), bool)
    hidden[:16, 16:32] = True
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(composite, "r+") as dataset:
        dataset.write_mask(~hidden)
    frame, counts = index(tmp_path)
    assert next(iter(counts.values()))["few_labels"] == 1
    assert (0, 16) not in zip(frame["row"], frame["col"], strict=True)


def test_endings_in_capitals_are_found(world):
    (composite,) = world.glob("composites/*/*.tif")
    composite.rename(composite.with_suffix(".TIF"))
    (composite.parent / f"{composite.stem}.TIF.aux.xml").write_text("<PAMDataset/>")
    frame, _ = index(world)
    assert len(frame) == 10
    assert read_record(frame.iloc[0], world)["image"].shape == (SIZE, SIZE, 6)


def test_an_index_without_chips_is_refused_unless_asked_for(world, capsys):
    command = ["--out", str(world), "--size", str(SIZE), "--min-labels", "256"]
    assert chips.main(command) == 1
    assert "cells with 256 labels and enough data, which are chips: 0 of 12; allow_empty" in capsys.readouterr().err
    assert not chip_index.path_in(world).exists()
    assert chips.main([*command, "--allow-empty"]) == 0


def test_a_truncated_composite_is_named(world, capsys):
    path = next(world.glob("composites/*/*.tif"))
    path.write_bytes(path.read_bytes()[:-5000])
    assert chips.main(["--out", str(world), "--size", "16"]) == 1
    assert f"error: {path}" in capsys.readouterr().err
    assert not chip_index.path_in(world).exists()


def test_two_seasons_of_a_tile_are_two_chips_and_one_twice_is_refused(world):
    write_tile(world, TILE, image=ramp(HEIGHT, WIDTH), shots=SHOTS, season="2021-06-01/2021-09-16")
    frame, _ = index(world)
    assert len(set(frame["chip_id"])) == len(frame) == 22
    for folder in ("composites", "labels"):
        for path in (world / folder / TILE).glob("*2021-06*"):
            path.with_name("copy_" + path.name).write_bytes(path.read_bytes())
    with pytest.raises(PrepError, match=r"12 chip_ids twice, first 10SFF_0_2021-06-01"):
        index(world)


def test_the_command(world, capsys):
    write_tif(
        world / "composites" / "10SGF" / "10SGF_x.tif", ramp(16, 16), None, rasterio.Affine.scale(30), nodata=None
    )
    assert chips.main(["--out", str(world), "--size", "16"]) == 0
    out, err = capsys.readouterr()
    assert "12 cells, 10 kept, 2 few labels, 0 no data" in out
    assert "warning: " in err and "10SGF_x.tif: left out, it has no label raster" in err
    assert chips.main(["--out", str(world), "--tile", "T10SFF", "--min-labels", "25", "--size", "16"]) == 0
    assert chip_index.read_metadata(chip_index.path_in(world))["chips"]["min_labels"] == 25
    assert chips.main(["--out", str(world), "--tile", "11SAA"]) == 1
    assert "found no composite with labels for 11SAA" in capsys.readouterr().err


def test_the_reference_layout(world, capsys):
    index(world)
    with pytest.raises(PrepError, match="no split drawn"):
        chip_folders.write_folders(world, world / "published")
    splits.run(chip_index.path_in(world), SplitSettings(block_km=0.5, buffer_m=0, seed=1, fractions=(0.6, 0.2, 0.2)))
    assert chip_folders.main(["--out", str(world), "--folders", str(world / "published")]) == 0
    frame = chip_index.read_index(chip_index.path_in(world))
    assert set(frame["split"]) == {"train", "val", "test"}
    paths = sorted(path.relative_to(world / "published").as_posix() for path in (world / "published").rglob("*.tif"))
    cells = zip(frame["split"], frame["row"] // 16 * 4 + frame["col"] // 16, strict=True)
    expected = [
        f"{split}_{kind}s/T10SFF_{cell}_tile_{short}.tif"
        for split, cell in cells
        for kind, short in (("image", "img"), ("label", "label"))
    ]
    assert paths == sorted(expected)
    row = frame.iloc[3]
    record = read_record(row, world)
    stem = f"T10SFF_{row['row'] // 16 * 4 + row['col'] // 16}_tile"
    with rasterio.open(world / "published" / f"{row['split']}_images" / f"{stem}_img.tif") as src:
        assert (src.dtypes[0], src.nodata, src.crs.to_epsg()) == ("float32", -9999, 32610)
        assert src.descriptions == BANDS[:6]
        assert list(src.transform)[:6] == record["transform"].tolist()
        np.testing.assert_array_equal(src.read(), np.moveaxis(record["image"], -1, 0))
    with rasterio.open(world / "published" / f"{row['split']}_labels" / f"{stem}_label.tif") as src:
        np.testing.assert_array_equal(src.read(1), record["label"])


def test_the_real_chip_comes_back(samples, tmp_path):
    with rasterio.open(samples / "chip_input.tif") as src:
        image, crs, transform = src.read([2, 3, 4, 5, 6, 7]).astype(np.int16), src.crs, src.transform
        np.testing.assert_array_equal(image, src.read([2, 3, 4, 5, 6, 7]))
    with rasterio.open(samples / "chip_label.tif") as src:
        label = src.read(1)
    stem = "14RMR_2020-05-01_2020-10-01"
    tags = {"TILE": "14RMR", "SEASON": "2020-05-01/2020-10-01", "SENSORS": "L30"}
    scene = tmp_path / f"composites/14RMR/{stem}.tif"
    write_tif(scene, image, crs, transform, nodata=-9999, names=BANDS[:6], tags=tags)
    write_tif(tmp_path / f"labels/14RMR/{stem}_agbd.tif", label[None], crs, transform, nodata=-1)
    with pytest.warns(UserWarning, match="no table of shots"):
        chips.index_folder(tmp_path, ChipSettings())
    (row,) = chip_index.read_index(chip_index.path_in(tmp_path)).to_dict("records")
    assert (row["n_labels"], row["nodata_share"]) == (246, 79 / 224**2)
    record = read_record(row, tmp_path)
    np.testing.assert_array_equal(record["image"], np.moveaxis(image, 0, -1))
    np.testing.assert_array_equal(record["label"], label)


@pytest.mark.parametrize("settings", [{"min_labels": 0}, {"max_nodata": 1.5}, {"max_nodata": -0.1}])
def test_settings_out_of_range_are_refused(world, settings):
    with pytest.raises(PrepError, match="settings: found size 16, min_labels"):
        index(world, **settings)


def test_no_chip_at_all_is_an_index_without_rows(world):
    with pytest.warns(UserWarning, match="no cell has 256 labels"):
        frame, _ = index(world, allow_empty=True, min_labels=256)
    assert len(frame) == 0
    with pytest.warns(UserWarning, match="no chip is left for train, val, test: 0 chips"):
        splits.run(chip_index.path_in(world), SplitSettings(kind="block"))
    assert set(chip_index.read_metadata(chip_index.path_in(world))["split"]["counts"].values()) == {0}
