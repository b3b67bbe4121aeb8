"""Pictures of chips and tiles: what is drawn where."""

import matplotlib.image
import numpy as np
import pytest
import rasterio

from biomass_jax.errors import PrepError, RasterError
from biomass_jax.figures import style
from data_prep.chips import cells as chips
from data_prep.chips import index as chip_index
from data_prep.chips import splits
from data_prep.chips.windows import read_record
from data_prep.inspect import preview
from data_prep.settings import ChipSettings, SplitSettings
from data_prep.shards import write as shards
from data_prep.shards.items import items_of
from tests.data_prep.chip_world import SIZE, ramp, scattered, write_tile

TILE = "10SFF"
SHOTS = scattered(48, 70, 600, seed=4)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    image = ramp(48, 70)
    image[:, 20:24, 20:30] = -9999
    write_tile(root, TILE, image=image, shots=[s for s in SHOTS if not (20 <= s[1] < 24 and 20 <= s[2] < 30)])
    chips.index_folder(root, ChipSettings(size=SIZE, max_nodata=0.2))
    splits.run(chip_index.path_in(root), SplitSettings(block_km=0.5, buffer_m=0, fractions=(0.6, 0.2, 0.2)))
    return root


@pytest.fixture
def drawn(monkeypatch):
    figures = []
    monkeypatch.setattr(style, "save_titled", lambda path, figure, title: figures.append((figure, path, title)) or path)
    return figures


def test_colours_are_red_green_blue_stretched_and_no_data_is_transparent():
    image = np.zeros((2, 51, 6), np.int16)
    image[0, :, 0], image[0, :, 1], image[0, :, 2] = 100 + np.arange(51), 1000 - np.arange(51), 7  # blue, green, red
    image[0, 50, 4] = -9999
    found = preview.colours(image)
    assert found[1].max() == 0 and found[0, 50].max() == 0
    assert (found[0, :50, 3] == 1).all()
    np.testing.assert_array_equal(found[0, :50, 0], 0)  # red is the same everywhere
    low, high = np.percentile(np.arange(50), [2, 98])
    share = np.clip((np.arange(50) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(found[0, :50, 2], share**style.GAMMA)
    np.testing.assert_allclose(found[0, :50, 1], (1 - share) ** style.GAMMA, atol=1e-9)


def test_a_chip_with_its_labels(world, drawn):
    frame = chip_index.read_index(chip_index.path_in(world))
    row = frame[(frame["row"] == 16) & (frame["col"] == 16)].iloc[0]
    record = read_record(row, world)
    preview.draw_chip(record, "x.png")
    ((figure, _, title),) = drawn
    axes, bar = figure.axes
    assert title == f"{TILE}_5_2020-06-01, unknown, 2020-06-01/2020-09-16, L30"
    np.testing.assert_array_equal(axes.images[0].get_array(), preview.colours(record["image"]))
    (points,) = axes.collections
    found = dict(zip(map(tuple, points.get_offsets().tolist()), points.get_array().tolist(), strict=True))
    assert found == {
        (c - 16, r - 16): pytest.approx(agbd)
        for _, r, c, agbd in SHOTS
        if 16 <= r < 32 and 16 <= c < 32 and not (20 <= r < 24 and 20 <= c < 30)
    }
    assert bar.get_ylabel() == "agbd (Mg/ha)"
    assert points.get_clim() == pytest.approx((0, np.percentile(list(found.values()), 99)))
    assert "15.6% without data" in axes.get_title()  # 40 of 256


def test_a_tile_with_its_chips_by_split(world, drawn):
    path = preview.preview_tile(world, "T10SFF")
    assert path == world / "preview" / "10SFF_2020-06-01_2020-09-16.png"
    ((figure, _, title),) = drawn
    axes = figure.axes[0]
    assert title == "10SFF, 2020-06-01/2020-09-16"
    assert axes.images[0].get_extent() == [-0.5, 69.5, 47.5, -0.5]
    assert axes.images[0].get_array()[21, 25, 3] == 0 and axes.images[0].get_array()[21, 31, 3] == 1
    (points,) = axes.collections
    assert len(points.get_offsets()) == sum(not (20 <= s[1] < 24 and 20 <= s[2] < 30) for s in SHOTS)
    frame = chip_index.read_index(chip_index.path_in(world))
    from matplotlib.colors import to_rgba

    expected = {(r["col"], r["row"], to_rgba(preview.SPLIT_COLOURS[r["split"]])) for _, r in frame.iterrows()}
    inset = 0.02 * SIZE
    found = {(round(p.get_x() + 0.5 - inset), round(p.get_y() + 0.5 - inset), p.get_edgecolor()) for p in axes.patches}
    assert found == expected
    assert {text.get_text() for text in axes.get_legend().get_texts()} == set(frame["split"])


def test_a_tile_s_picture_shows_labels_as_chips_have_them(tmp_path, drawn):
    """In an alpha band, a tag, NaN, a cast: there is no label, and no point."""
    _, label, _ = write_tile(tmp_path, TILE, image=ramp(20, 31), shots=[(1, 3, 4, 70.0), (2, 5, 6, 90.0)])
    with rasterio.open(label) as file:
        profile, values = file.profile, file.read(1)
    odd = values.copy()
    odd[9, :3] = 12345, np.nan, -3
    cast = np.where(values < 0, 0, values).astype(np.uint16)
    cast[9, :3] = 55537
    opaque = np.full_like(values, 255)
    opaque[5, 6] = 0
    alpha = {"count": 2, "alpha": "yes", "photometric": "minisblack", "nodata": None}
    for stored, changes, expected in (
        (odd[None], {"nodata": 12345}, {(4, 3): 70, (6, 5): 90}),
        (cast[None], {"nodata": 0, "dtype": "uint16"}, {(4, 3): 70, (6, 5): 90}),
        (np.stack([values, opaque]), alpha, {(4, 3): 70}),
    ):
        with rasterio.open(label, "w", **{**profile, **changes}) as file:
            file.write(stored)
        preview.preview_tile(tmp_path, TILE)
        (points,) = drawn.pop()[0].axes[0].collections
        assert (
            dict(zip(map(tuple, points.get_offsets().tolist()), points.get_array().tolist(), strict=True)) == expected
        )
    with rasterio.open(label, "w", **{**profile, "dtype": "complex64"}) as file:
        file.write(values.astype(np.complex64) + 7j, 1)
    with pytest.raises(RasterError, match=r"agbd\.tif: its labels are complex64; expected real numbers"):
        preview.preview_tile(tmp_path, TILE)


def test_the_command_writes_equal_bytes_from_index_and_shards(world, tmp_path, capsys):
    name = f"{TILE}_5_2020-06-01"
    assert preview.main(["--out", str(world), "--chip", name]) == 0
    path = world / "preview" / f"{name}.png"
    assert capsys.readouterr().out.strip() == str(path)
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[2] == 4 and pixels[..., 3].min() == 0  # a transparent background
    shards.write_shards(items_of(chip_index.path_in(world)), tmp_path / "shards", metadata={})
    assert preview.main(["--shards", str(tmp_path / "shards"), "--chip", name, "--png", str(tmp_path / "b.png")]) == 0
    assert (tmp_path / "b.png").read_bytes() == path.read_bytes()
    assert preview.main(["--out", str(world), "--tile", TILE, "--png", str(tmp_path / "tile.png")]) == 0
    assert (tmp_path / "tile.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_not_there_is_named(world, tmp_path, capsys):
    assert preview.main(["--out", str(world), "--chip", "10SFF_999_2020-06-01"]) == 1
    assert "found no chip '10SFF_999_2020-06-01' among 12" in capsys.readouterr().err
    with pytest.raises(PrepError, match="no composite with labels for 11SKB"):
        preview.preview_tile(world, "11SKB")
    for season in ("2020-06-01/2020-09-16", "2021-06-01/2021-09-16"):
        write_tile(tmp_path, TILE, image=ramp(20, 31), shots=scattered(20, 31, 9, seed=1), season=season)
    with pytest.raises(PrepError, match=r"found 2 seasons \(2020-06-01/2020-09-16, 2021.*name it with --season"):
        preview.preview_tile(tmp_path, TILE)
    assert (
        preview.preview_tile(tmp_path, TILE, season="2021-06-01/2021-09-16").name == "10SFF_2021-06-01_2021-09-16.png"
    )
    with pytest.raises(SystemExit):
        preview.main(["--shards", str(tmp_path), "--tile", TILE])


def test_a_chip_without_labels_is_drawn(world, drawn):
    record = read_record(chip_index.read_index(chip_index.path_in(world)).iloc[0], world)
    preview.draw_chip(record | {"label": np.full((SIZE, SIZE), -1, np.float32)}, "x.png")
    assert drawn[0][0].axes[0].get_title() == "No labels, 0.0% without data"
