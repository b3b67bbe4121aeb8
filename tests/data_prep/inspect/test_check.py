"""The alignment scan: leave-one-out against refitting, shifts against plain loops, the real chip."""

import json

import numpy as np
import pytest
import rasterio

from biomass_jax.data import records
from biomass_jax.errors import PrepError
from data_prep.chips import cells as chips
from data_prep.chips import index as chip_index
from data_prep.chips import splits
from data_prep.inspect import check
from data_prep.settings import ChipSettings, SplitSettings
from data_prep.shards import write as shards
from data_prep.shards.items import items_of
from tests.data_prep.chip_world import SIZE, write_tile


def refit_r2(design, target):
    errors = []
    for i in range(len(target)):
        rest = np.arange(len(target)) != i
        fitted, *_ = np.linalg.lstsq(design[rest], target[rest], rcond=None)
        errors.append(target[i] - design[i] @ fitted)
    return 1 - np.sum(np.square(errors)) / np.sum((target - target.mean()) ** 2)


@pytest.mark.parametrize("dependent", [False, True])
def test_leave_one_out_is_that_of_refitting(dependent):
    rng = np.random.default_rng(1)
    design = np.column_stack([np.ones(23), rng.normal(5, 1, (23, 4))])
    target = design @ [3, 1, -2, 0.5, 0] + rng.normal(0, 1.5, 23)
    expected = refit_r2(design, target)
    assert 0.2 < expected < 0.95
    if dependent:  # the same fits
        design = np.column_stack([design, design[:, 1] - 2 * design[:, 3]])
    assert check.loo_r2(design, target) == pytest.approx(expected, abs=1e-9)
    noise = rng.normal(size=23)
    assert check.loo_r2(design, noise) == pytest.approx(refit_r2(design[:, :5], noise), abs=1e-9)


def test_no_number_where_there_is_nothing_to_fit():
    ones = np.ones((9, 1))
    assert np.isnan(check.loo_r2(ones, np.full(9, 4.0)))
    alone = np.column_stack([ones, np.arange(9) == 3])  # without point 3 its coefficient has no value
    assert np.isnan(check.loo_r2(alone, np.arange(9.0)))


def record(image, label, *, tile="10SFF", row=0, col=0, name="10SFF_0_2020-06-01"):
    return records.Record(
        image=image,
        label=label.astype(np.float32),
        agbd_sigma=records.unknown_sigma(label),
        chip_id=name,
        tile=tile,
        row=row,
        col=col,
        epsg=32610,
        transform=np.array([30.0, 0, 600000, 0, -30, 4200000]),
        biome="unknown",
        season="2020-06-01/2020-09-16",
        sensors="L30",
        schema_version=records.SCHEMA_VERSION,
    )


def related(shape, shift=(0, 0), *, seed=0, every=2):
    """An image and labels that belong to the pixels `shift` (rows, columns) from theirs."""
    rng = np.random.default_rng(seed)
    image = rng.integers(60, 3000, (*shape, 6)).astype(np.int16)
    wanted = 0.01 * image[..., 1].astype(float) ** 1.5 / image[..., 4] ** 0.3 * rng.lognormal(0, 0.3, shape)
    label = np.roll(wanted, (-shift[0], -shift[1]), (0, 1))
    label[rng.random(shape) > 1 / every] = -1
    return image, label.astype(np.float32)


def test_samples_are_the_pixels_around_each_label():
    image, label = related((9, 12), every=4)
    image[3, 5, 2] = -9999
    label[0, 0], label[8, 11], label[2, 3] = 7, 8, 0
    found, labels = check.shifted_samples(image, label, max_shift=2)
    places = [(r, c) for r in range(9) for c in range(12) if label[r, c] > 0]
    assert (2, 3) not in places
    assert labels.tolist() == [label[place] for place in places]
    for sample, (r, c) in zip(found, places, strict=True):
        for dr in range(-2, 3):
            for dc in range(-2, 3):
                inside = 0 <= r + dr < 9 and 0 <= c + dc < 12 and (r + dr, c + dc) != (3, 5)
                expected = image[r + dr, c + dc] if inside else np.full(6, np.nan)
                np.testing.assert_array_equal(sample[dr + 2, dc + 2], expected)


@pytest.mark.parametrize("shift", [(0, 0), (-2, 1), (3, -3), (0, 2)])
def test_the_peak_is_where_the_labels_belong(shift):
    (found,) = check.check_records([record(*related((40, 52), shift))])
    assert found.peak == shift
    assert found.r2[3 + shift[0], 3 + shift[1]] > 0.6
    assert (found.r2 > 0.1).sum() == 1
    if shift == (0, 0):
        assert found.fault == ""
    else:
        assert f"fit the image best {shift} rows down and columns right" in found.fault


def test_a_fit_uses_logs_of_bands_from_50_on():
    image, label = related((30, 31))
    image[:, :, 0] = np.where(image[:, :, 0] < 600, -300, image[:, :, 0])
    (found,) = check.check_records([record(image, label)])
    used = label > 0
    logs = np.log(np.maximum(image[used].astype(float), 50))
    expected = refit_r2(np.column_stack([np.ones(used.sum()), logs]), np.log(label[used].astype(float)))
    assert found.in_place == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("turn", [np.flipud, np.fliplr, np.transpose])
def test_labels_turned_round_are_said_to_have_no_relation(turn):
    image, label = related((64, 64))
    (found,) = check.check_records([record(image, turn(label))])
    assert found.in_place < 0.03
    assert "next to no relation" in found.fault


def test_too_few_labels_are_said():
    image, label = related((20, 21))
    keep = np.flatnonzero(label > 0)
    label.flat[keep[29:]] = -1
    (found,) = check.check_records([record(image, label)])
    assert found.labels == 29
    assert "29 labels are too few" in found.fault
    label.flat[keep[29]] = 5
    assert check.check_records([record(image, label)])[0].fault != found.fault


def test_numbers_are_pooled_by_tile():
    one, two, other = related((16, 16), seed=1), related((16, 16), seed=2), related((16, 16), seed=3)
    one[1][4, 4:6] = 0
    one[0][8] = 0  # a row without data: its labels don't count
    found = check.check_records(
        [record(*other, tile="11SKB", row=16, col=32), record(*one), record(*two, row=32, col=48)]
    )
    assert [tile.tile for tile in found] == ["10SFF", "11SKB"]
    used = np.delete(one[1], 8, axis=0)
    labels = np.concatenate([used[used >= 0], two[1][two[1] >= 0]])
    tile = found[0]
    assert (tile.chips, tile.labels, tile.zeros) == (2, len(labels), 2)
    assert (tile.label_min, tile.label_max) == (0, labels.max())
    assert tile.label_mean == pytest.approx(labels.mean(dtype=np.float64))
    assert tile.nodata / tile.pixels == 16 / 512
    assert tile.counts == {(0, 0): (used >= 0).sum(), (2, 3): (two[1] >= 0).sum()}
    parts = [check.shifted_samples(image, np.where((image == 0).all(-1), -1, label)) for image, label in (one, two)]
    np.testing.assert_allclose(tile.r2, check.alignment(*map(np.concatenate, zip(*parts, strict=True))))
    with pytest.raises(PrepError, match="nothing to check"):
        check.check_records([])


def real_record(samples):
    with rasterio.open(samples / "chip_input.tif") as src:
        image = np.moveaxis(src.read([2, 3, 4, 5, 6, 7]), 0, -1).astype(np.int16)
    with rasterio.open(samples / "chip_label.tif") as src:
        return record(image, src.read(1))


def test_the_real_chip_peaks_in_place(samples):
    real = real_record(samples)
    (found,) = check.check_records([real])
    assert found.peak == (0, 0)
    assert found.in_place == pytest.approx(0.508, abs=0.0005)
    assert (found.labels, found.nodata, found.fault) == (246, 79, "")
    for turn in (np.flipud, np.fliplr, np.transpose):
        (turned,) = check.check_records([real | {"label": turn(real["label"])}])
        assert turned.in_place < 0.03
        assert "next to no relation" in turned.fault


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two tiles: labels of the second are one row off."""
    root = tmp_path_factory.mktemp("world")
    for number, (tile, shift) in enumerate({"10SFF": (0, 0), "10SGF": (1, 0)}.items()):
        image, label = related((48, 64), shift, seed=number)
        places = np.argwhere(label >= 0)
        shots = [(1000 * number + i, int(r), int(c), float(label[r, c])) for i, (r, c) in enumerate(places)]
        bands = np.concatenate([np.moveaxis(image, -1, 0), np.ones((1, 48, 64), np.int16)])
        write_tile(root, tile, image=bands, shots=shots, origin=(600000.0 + 90000 * number, 4200000.0))
    chips.index_folder(root, ChipSettings(size=SIZE))
    splits.run(chip_index.path_in(root), SplitSettings(block_km=0.5, buffer_m=0, fractions=(0.6, 0.2, 0.2)))
    return root


def test_the_command_on_an_index(world, capsys):
    assert check.main(["--out", str(world)]) == 0
    out, err = capsys.readouterr()
    assert "10SFF: 12 chips" in out and "0.00% no data" in out and "best at (0, 0)" in out
    assert err.count("warning: ") == 1
    assert "tile 10SGF: labels fit the image best (1, 0) rows down" in err
    stored = json.loads((world / "check" / "check.json").read_text())
    assert [tile["peak"] for tile in stored] == [[0, 0], [1, 0]]
    assert stored[0]["r2"][3][3] > 0.6 > stored[1]["r2"][3][3]
    assert stored[1]["fault"]
    for tile in ("10SFF", "10SGF"):
        assert (world / "check" / f"{tile}.png").read_bytes()[:4] == b"\x89PNG"


def test_shards_give_what_the_index_gives(world, tmp_path, capsys):
    shards.write_shards(items_of(chip_index.path_in(world)), tmp_path / "shards", metadata={})
    assert check.main(["--shards", str(tmp_path / "shards"), "--tile", "T10SGF"]) == 0
    assert check.main(["--out", str(world), "--tile", "10SGF", "--figures", str(tmp_path / "two")]) == 0
    capsys.readouterr()
    for name in ("check.json", "10SGF.png"):
        assert (tmp_path / "check" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert not (tmp_path / "check" / "10SFF.png").exists()


def test_the_picture_shows_the_numbers(world, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(check.style, "save_titled", lambda path, figure, title: drawn.append((figure, title)))
    found = check.check_records(check.records_of_index(world, ["10SGF"]))[0]
    check.draw(found, tmp_path / "x.png")
    (figure, title), (left, right, *_) = drawn[0], drawn[0][0].axes
    assert figure is drawn[0][0] and f"{found.labels:,} labels in 12 chips" in title
    np.testing.assert_array_equal(left.images[0].get_array(), found.r2)
    texts = {text.get_position(): text.get_text() for text in left.texts}
    assert texts[0, 1] == f"{found.r2[4, 3]:.2f}"
    box = left.lines[0].get_xydata()
    assert (box.min(axis=0).tolist(), box.max(axis=0).tolist()) == ([-0.5, 0.5], [0.5, 1.5])  # column 0, row 1
    counts = right.images[0].get_array()
    assert counts.shape == (3, 4)
    assert counts.sum() == found.labels


def test_without_an_index_or_shards_the_message_names_what_is_missing(tmp_path, capsys):
    assert check.main(["--out", str(tmp_path)]) == 1
    assert "chips.parquet: no such file" in capsys.readouterr().err
    assert check.main(["--shards", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err
