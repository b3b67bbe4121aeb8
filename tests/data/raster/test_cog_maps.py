"""Maps on disk: what is in them, and that nothing half-written ever carries a map's name."""

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.crs import CRS
from rasterio.enums import Resampling

from biomass_jax.data.raster import cog
from biomass_jax.data.raster.cog import MapWriter, check_space, space_needed
from biomass_jax.data.raster.grid import Grid
from biomass_jax.data.raster.image import open_image, read_tags
from biomass_jax.data.raster.inputs import find_inputs
from biomass_jax.data.raster.tiff import verify_blocks
from biomass_jax.errors import RasterError

GRID = Grid(301, 427, CRS.from_epsg(32610), Affine(30, 0, 400020, 0, -30, 4200000))
META = {"nodata": -1, "layers": {"agbd": "Mg ha-1"}}
TAGS = {"SEASON": "2020-06-01/2020-09-30", "SETTINGS": '{"tile": 224}', "COUNT": "7"}


def field(grid=GRID, seed=0):
    """(rows, columns) biomass with a tenth of it missing."""
    rng = np.random.default_rng(seed)
    values = rng.gamma(2, 60, (grid.height, grid.width)).astype(np.float32)
    values[rng.random(values.shape) < 0.1] = -1
    return values


def write(path, values, grid=GRID, step=50, block=128, tags=TAGS):
    with MapWriter(path, grid, **META, tags=tags, block=block) as writer:
        for start in range(0, grid.height, step):
            writer.write_rows(start, values[start : start + step])
    return writer


@pytest.mark.parametrize("step", [1, 50, 128, 301])
def test_a_map_holds_what_was_written(tmp_path, step):
    values = field()
    writer = write(tmp_path / "new" / "s_agbd.tif", values, step=step)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["s_agbd.tif"]
    assert all(seconds > 0 for seconds in writer.seconds.values())
    with rasterio.open(tmp_path / "new" / "s_agbd.tif") as dataset:
        np.testing.assert_array_equal(dataset.read(1), values)
        assert (dataset.crs, dataset.transform, dataset.nodata) == (GRID.crs, GRID.transform, -1)
        assert (dataset.dtypes, dataset.descriptions, dataset.units) == (("float32",), ("agbd",), ("Mg ha-1",))
        assert dataset.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert dataset.block_shapes == [(128, 128)] and dataset.overviews(1) == [2, 4]
    assert read_tags(tmp_path / "new" / "s_agbd.tif") == {**TAGS, "AREA_OR_POINT": "Area"}


def statistics(path):
    with rasterio.open(path) as dataset:
        return {name.removeprefix("STATISTICS_"): float(text) for name, text in dataset.tags(1).items()}


def test_a_map_carries_the_statistics_of_its_values_however_its_rows_came(tmp_path):
    values = field()
    values[40:60] = -1  # rows without a value
    valid = values[values != -1].astype(np.float64)
    files = set()
    for step in (1, 50, 128, 301):
        write(tmp_path / "a.tif", values, step=step)
        files.add((tmp_path / "a.tif").read_bytes())
    assert len(files) == 1  # the same bytes
    found = statistics(tmp_path / "a.tif")
    assert (found["MINIMUM"], found["MAXIMUM"]) == (valid.min(), valid.max())
    assert found["VALID_PERCENT"] == 100 * valid.size / values.size
    assert found["MEAN"] == pytest.approx(valid.mean(), rel=1e-13)
    assert found["STDDEV"] == pytest.approx(valid.std(), rel=1e-12)


def test_statistics_of_a_nearly_constant_map_keep_their_digits(tmp_path):
    values = np.full((GRID.height, GRID.width), 3000, np.float32)
    write(tmp_path / "a.tif", values)
    assert statistics(tmp_path / "a.tif")["STDDEV"] == 0
    values[::2] = np.nextafter(np.float32(3000), np.float32(4000))  # 0.000244 more
    write(tmp_path / "b.tif", values)
    assert statistics(tmp_path / "b.tif")["STDDEV"] == pytest.approx(values.astype(np.float64).std(), rel=1e-9)


def test_statistics_of_a_map_without_a_value(tmp_path):
    write(tmp_path / "a.tif", np.full((GRID.height, GRID.width), -1, np.float32))
    assert statistics(tmp_path / "a.tif") == {"VALID_PERCENT": 0}


def test_overviews_are_means_of_the_valid_pixels(tmp_path):
    grid = Grid(256, 512, GRID.crs, GRID.transform)
    values = np.random.default_rng(1).uniform(50, 60, (256, 512)).astype(np.float32)
    rows, columns = np.indices(values.shape)
    values[(rows + columns) % 2 == 1] = -1  # a checker: with -1 averaged in, means would fall to about 27
    values[:64] = -1
    write(tmp_path / "a.tif", values, grid)
    blocks = np.where(values == -1, np.nan, values).reshape(128, 2, 256, 2).swapaxes(1, 2).reshape(128, 256, 4)
    expected = np.full((128, 256), -1.0)
    expected[32:] = np.nanmean(blocks[32:], axis=-1)
    with rasterio.open(tmp_path / "a.tif", overview_level=0) as dataset:
        np.testing.assert_allclose(dataset.read(1), expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [(30, 30), (1, 7), (223, 40), (512, 512), (513, 30)])
def test_small_maps_and_whole_blocks(tmp_path, shape):
    grid = Grid(*shape, GRID.crs, GRID.transform)
    write(tmp_path / "a.tif", field(grid), grid, block=512)
    with rasterio.open(tmp_path / "a.tif") as dataset:
        np.testing.assert_array_equal(dataset.read(1), field(grid))


@pytest.mark.parametrize(
    ("crs", "transform"),
    [(None, Affine.identity()), (None, GRID.transform), (CRS.from_epsg(4326), Affine(0.1, 0.02, -3, 0.01, -0.2, 50))],
)
def test_a_map_lies_where_its_image_lies(tmp_path, crs, transform):
    grid = Grid(33, 45, crs, transform)
    write(tmp_path / "a.tif", field(grid), grid)
    with open_image(tmp_path / "a.tif", band_list="RED", wanted=("RED",)) as image:
        assert (image.grid.crs, image.grid.transform) == (crs, transform)


def test_another_no_data_value(tmp_path):
    with MapWriter(tmp_path / "a.tif", GRID, nodata=-9999, layers={"x": "m"}, tags={}) as writer:
        writer.write_rows(0, field())
    with rasterio.open(tmp_path / "a.tif") as dataset:
        assert (dataset.nodata, dataset.descriptions, dataset.units) == (-9999, ("x",), ("m",))


@pytest.mark.parametrize(
    ("start", "shape", "value", "message"),
    [
        (10, (5, 427), 1, r"got values \(5, 427\) for row 10, expected row 0"),
        (0, (5, 426), 1, "expected row 0 and 427 values a row"),
        (0, (302, 427), 1, "rows 0 to 302 of a raster with 301"),
        (0, (5, 427), np.nan, "not finite in rows 0 to 5"),
        (0, (5, 427), 1, "5 of 301 rows were written"),
    ],
)
def test_wrong_rows_leave_no_map(tmp_path, start, shape, value, message):
    with (
        pytest.raises(RasterError, match=rf"a\.tif: .*{message}"),
        MapWriter(tmp_path / "a.tif", GRID, **META, tags={}) as writer,
    ):
        writer.write_rows(start, np.full(shape, value, np.float32))
    assert list(tmp_path.iterdir()) == []


def test_an_exception_leaves_the_old_map_and_nothing_else(tmp_path):
    write(tmp_path / "a.tif", field())
    before = (tmp_path / "a.tif").read_bytes()
    for error in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(error), MapWriter(tmp_path / "a.tif", GRID, **META, tags={}) as writer:
            writer.write_rows(0, field(seed=1)[:200])
            raise error
    assert [p.name for p in tmp_path.iterdir()] == ["a.tif"] and (tmp_path / "a.tif").read_bytes() == before
    write(tmp_path / "a.tif", field(seed=1))
    with rasterio.open(tmp_path / "a.tif") as dataset:
        np.testing.assert_array_equal(dataset.read(1), field(seed=1))


def child(code, *arguments):
    """Run code in another process, beginning with a map writer's imports."""
    begin = """
        import os, resource, signal, sys
        import numpy as np
        from affine import Affine
        from rasterio.crs import CRS
        from biomass_jax.data.raster.cog import MapWriter
        from biomass_jax.data.raster.grid import Grid
        from biomass_jax.errors import RasterError
        values = np.random.default_rng(0).normal(100, 30, (700, 427)).astype(np.float32)
        grid = Grid(700, 427, CRS.from_epsg(32610), Affine(30, 0, 400020, 0, -30, 4200000))
        def write():
            meta = {"nodata": -1, "layers": {"agbd": "u"}, "tags": {}, "block": 128}
            with MapWriter(sys.argv[1], grid, **meta) as writer:
                for start in range(0, 700, 70):
                    writer.write_rows(start, values[start:start + 70])
                    print("row", start + 70)
    """
    script = textwrap.dedent(begin) + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)


KILLED = {
    "while rows are written": "print = lambda _, row: row == 350 and os.kill(os.getpid(), signal.SIGKILL)",
    "before the copy has its name": "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.parametrize("moment", KILLED)
def test_a_killed_run_leaves_no_map_and_the_next_one_finishes(tmp_path, moment):
    target = tmp_path / "a_agbd.tif"
    assert child(KILLED[moment] + "\nwrite()", target).returncode == -signal.SIGKILL
    left = {p.name for p in tmp_path.iterdir()}
    assert ".a_agbd.partial.tif" in left and target.name not in left
    with pytest.raises(RasterError, match="no images"):
        find_inputs(tmp_path)  # what is left is no input either
    grid = Grid(700, 427, GRID.crs, GRID.transform)
    (tmp_path / ".a_agbd.cog.tif.ovr.tmp").touch()  # GDAL's own, where the kill came later
    write(target, field(grid), grid)
    assert [p.name for p in tmp_path.iterdir()] == [target.name]


@pytest.mark.slow
def test_a_limit_on_file_sizes_fails_loudly_at_every_stage(tmp_path):
    """As a full disk does. The working copy, then the larger COG, then its last bytes meet the limit."""
    assert child("write()", tmp_path / "whole.tif").returncode == 0
    whole = (tmp_path / "whole.tif").stat().st_size
    (tmp_path / "whole.tif").unlink()
    limited = """
        limit = int(sys.argv[2])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN  # as Python sets it
        try:
            write()
        except RasterError as error:
            print("refused:", error)
    """
    for share, stage in ((0.0001, "writing rows 0"), (0.3, "writing rows"), (0.85, ""), (0.99, "")):
        done = child(limited, tmp_path / "a.tif", int(whole * share))
        assert f"refused: {tmp_path}/a.tif: {stage}" in done.stdout and "is the disk full" in done.stdout, done
        assert list(tmp_path.iterdir()) == []
        if stage:
            assert "row 700" not in done.stdout  # noticed at once, not after hours of work
    assert "refused" not in child(limited, tmp_path / "a.tif", whole * 2).stdout


def test_values_that_change_on_disk_are_noticed(tmp_path, monkeypatch):
    """The blocks are all there, but one holds other values: the checksums tell which."""
    values = field()
    real = cog.verify_blocks

    def spoil(path):
        real(path)
        with rasterio.open(path, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as dataset:
            dataset.write(np.zeros((128, 128), np.float32), 1, window=((128, 256), (256, 384)))

    for name in ("partial", "cog"):
        monkeypatch.setattr(cog, "verify_blocks", lambda path, n=name: spoil(path) if n in path.name else real(path))
        with pytest.raises(RasterError, match=rf"a\.tif: .*{name}\.tif holds other values.*row 128, column 256"):
            write(tmp_path / "a.tif", values)
        assert list(tmp_path.iterdir()) == []


def test_a_map_cut_short_is_noticed_though_gdal_opens_it(tmp_path):
    write(tmp_path / "a.tif", field())
    verify_blocks(tmp_path / "a.tif")
    os.truncate(tmp_path / "a.tif", (tmp_path / "a.tif").stat().st_size - 100)
    with rasterio.open(tmp_path / "a.tif") as dataset:
        assert dataset.width == 427
    with pytest.raises(RasterError, match=r"a\.tif: image 1: truncated TIFF: 1 of 12 blocks"):
        verify_blocks(tmp_path / "a.tif")


def test_overviews_cut_short_are_noticed(tmp_path):
    path = tmp_path / "a.tif"
    write(path, field())
    with rasterio.open(path, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as dataset:
        dataset.build_overviews([8], Resampling.average)  # lies behind everything else
        place = int(dataset.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", bidx=1, ovr=2))
    os.truncate(path, place + 10)
    with pytest.raises(RasterError, match=r"a\.tif: image 4: truncated TIFF: 1 of 1 blocks"):
        verify_blocks(path)


def test_what_a_killed_run_left_takes_no_room(tmp_path, monkeypatch):
    seen = []
    (tmp_path / ".a.partial.tif").write_bytes(b"left by a killed run")
    monkeypatch.setattr(cog, "check_space", lambda folder, needed: seen.append(list(folder.iterdir())))
    write(tmp_path / "a.tif", field())
    assert seen == [[]]


def test_a_folder_without_room_or_right(tmp_path, monkeypatch):
    with pytest.raises(RasterError, match=r"MB free, 1,000,000,000,000.0 MB needed"):
        check_space(tmp_path, 10**18)
    check_space(tmp_path, 1000)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RasterError, match="absent: can't write to this folder"):
        check_space(tmp_path / "absent", 1)
    (tmp_path / "file").touch()
    with pytest.raises(RasterError, match="file: can't make this folder"):
        MapWriter(tmp_path / "file" / "a.tif", GRID, **META, tags={})
    (tmp_path / "a.tif").mkdir()
    with pytest.raises(RasterError, match=r"a\.tif: there is a folder of this name"):
        MapWriter(tmp_path / "a.tif", GRID, **META, tags={})
    huge = Grid(10**7, 10**7, None, Affine.identity())
    monkeypatch.setattr(cog.MapWriter, "_create", None)  # must not be reached
    with pytest.raises(RasterError, match="MB needed for the map and its working copies"):
        MapWriter(tmp_path / "b.tif", huge, **META, tags={})


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="wants a folder that root can't write to either")
def test_a_folder_that_cannot_be_written_to():
    with pytest.raises(RasterError, match="/proc: can't write to this folder"):
        MapWriter("/proc/a.tif", GRID, **META, tags={})


def test_space_needed_covers_what_writing_takes(tmp_path, monkeypatch):
    """Noise hardly packs; even so working copy, COG and its overviews stay below the estimate."""
    grid = Grid(1100, 1300, GRID.crs, GRID.transform)
    largest = 0

    def measure(self, path, verify=cog.MapWriter._verify):
        nonlocal largest
        largest = max(largest, sum(p.stat().st_size for p in tmp_path.iterdir()))
        verify(self, path)

    monkeypatch.setattr(cog.MapWriter, "_verify", measure)
    write(tmp_path / "a.tif", field(grid), grid, block=512)
    overviews = 1100 * 1300 * 4 / 3
    assert 1100 * 1300 * 4 < largest + overviews < space_needed(grid)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_height(tmp_path):
    code = """
        grid = Grid(int(sys.argv[2]), 4000, grid.crs, grid.transform)
        rows = np.tile(np.arange(4000, dtype=np.float32), (400, 1))
        with MapWriter(sys.argv[1], grid, nodata=-1, layers={"agbd": "u"}, tags={}) as writer:
            for start in range(0, grid.height, 400):
                writer.write_rows(start, rows)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    """
    low, high = (int(child(code, tmp_path / "a.tif", height).stdout) for height in (16000, 48000))
    assert high < low + 100, (low, high)  # MiB; the higher map has 512 MiB more of values


def in_blocks(values, block=128):
    tops, lefts = range(0, GRID.height, block), range(0, GRID.width, block)
    return [values[None, top : top + block, left : left + block] for top in tops for left in lefts]


def write_blocks(path, blocks, spoil=None):
    with MapWriter(path, GRID, **META, tags=TAGS, block=128) as writer:
        for block in blocks:
            writer.write_block(block)
        if spoil is not None:
            writer._checksums[spoil] += 1


def test_a_map_in_blocks_is_the_map_in_rows(tmp_path, monkeypatch):
    values = field()
    monkeypatch.setattr(cog, "_READ_BACK", 2 * 128 * 128 * 4)  # two blocks of a row are read at once to be compared
    write_blocks(tmp_path / "a.tif", in_blocks(values))
    write(tmp_path / "b.tif", values)
    with rasterio.open(tmp_path / "a.tif") as one, rasterio.open(tmp_path / "b.tif") as other:
        np.testing.assert_array_equal(one.read(1), values)
        np.testing.assert_array_equal(one.read(1, out_shape=(75, 106)), other.read(1, out_shape=(75, 106)))
    for name, number in statistics(tmp_path / "b.tif").items():
        assert statistics(tmp_path / "a.tif")[name] == pytest.approx(number, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda blocks: blocks[3:], r"got float32 \(1, 128, 43\) for the block at row 0, column 0, expected float32"),
        (lambda blocks: [*blocks, blocks[0]], r"for the block at row 301, column 0, expected float32 \(1, 0, 128\)"),
        (lambda blocks: [np.full_like(blocks[0], np.nan)], "not finite in the block at row 0"),
        (lambda blocks: blocks[:4], "128 of 301 rows were written"),
    ],
)
def test_blocks_are_taken_whole_and_in_order(tmp_path, change, said):
    with pytest.raises(RasterError, match=said):
        write_blocks(tmp_path / "a.tif", change(in_blocks(field())))
    assert list(tmp_path.iterdir()) == []


def test_another_value_than_was_written_is_named_by_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(cog, "_READ_BACK", 2 * 128 * 128 * 4)
    with pytest.raises(RasterError, match="holds other values than were written, in the block at row 128, column 384"):
        write_blocks(tmp_path / "a.tif", in_blocks(field()), spoil=7)


def test_a_map_of_empty_blocks_asks_for_little_room():
    full = space_needed(GRID, 16)
    assert 2**20 < space_needed(GRID, 16, share=0.25) < 0.5 * full and space_needed(GRID, 16, share=1.0) == full
