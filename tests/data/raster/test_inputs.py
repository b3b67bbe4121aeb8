"""Which images a path stands for."""

from pathlib import Path, PurePath

import pytest

from biomass_jax.data.raster.inputs import InputItem, find_inputs
from biomass_jax.errors import RasterError

GRANULE = "HLS.L30.T10SFF.2020183T184512.v2.0"
S30_GRANULE = "HLS.S30.T10SFF.2020185T184921.v2.0"


def test_a_file_is_one_item(tmp_path, numbers, write):
    path = write(tmp_path / "scene.one.tif", numbers((6, 5, 7)))
    assert find_inputs(path) == [InputItem(str(path), (str(path),), PurePath("scene.one"))]


def test_a_folder_is_walked_and_mirrored(tmp_path):
    for name in ("b.tif", "sub/a.TIF", "sub/deep/c.vrt", "d.tiff"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for passed in (
        ".b.partial.tif",
        "b_agbd.tif",
        "b_agbd_quicklook.png",
        "notes.txt",
        ".cache/x.tif",
        "b.tif.aux.xml",
    ):
        (tmp_path / passed).parent.mkdir(exist_ok=True)
        (tmp_path / passed).touch()
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    items = find_inputs(tmp_path)
    assert [str(item.relative) for item in items] == ["b", "d", "sub/a", "sub/deep/c"]
    assert items[2].paths == (str(tmp_path / "sub/a.TIF"),)


def test_a_granule_is_one_item(tmp_path, write_granule):
    write_granule(tmp_path / GRANULE)
    (item,) = find_inputs(tmp_path / GRANULE)
    assert item.relative == PurePath(GRANULE)
    assert [Path(p).name.split(".")[-2] for p in item.paths] == ["B02", "B03", "B04", "B05", "B06", "B07"]
    (item,) = find_inputs(tmp_path)
    assert item.relative == PurePath(GRANULE, GRANULE)


def test_granules_in_one_folder_are_one_item_each(tmp_path, numbers, write, write_granule):
    write_granule(tmp_path)
    write_granule(tmp_path, S30_GRANULE, ("B02", "B8A"))
    write(tmp_path / f"{GRANULE}.stack.tif", numbers((6, 5, 7)))
    items = find_inputs(tmp_path)
    assert [str(i.relative) for i in items] == [GRANULE, f"{GRANULE}.stack", S30_GRANULE]
    assert [len(item.paths) for item in items] == [6, 1, 2]


def test_patterns(tmp_path, write_granule):
    for name in ("y1/a.tif", "y1/b.tif", "y2/a.tif", "y2/a_agbd.tif", "y2/z/c.tif", "y2/a.txt", "y2/p.jp2"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def found(pattern):
        return [str(item.relative) for item in find_inputs(str(tmp_path / pattern))]

    assert found("*/a*.tif") == ["y1/a", "y2/a"]
    assert found("y2/**") == ["a", "z/c"]
    assert found("**/*.tif") == ["y1/a", "y1/b", "y2/a", "y2/z/c"]
    assert found("y?") == ["y1/a", "y1/b", "y2/a", "y2/z/c"]
    assert found("y2/*.jp2") == ["p"]
    write_granule(tmp_path / "g")
    assert found("g/*.B0*.tif") == [GRANULE]


def test_a_name_that_looks_like_a_pattern_is_a_file(tmp_path):
    path = tmp_path / "a[1].tif"
    path.touch()
    assert find_inputs(path)[0].paths == (str(path),)


@pytest.mark.parametrize(
    ("url", "path", "name", "relative"),
    [
        ("https://h.org/d/a.tif?sig=SECRET", "/vsicurl/https://h.org/d/a.tif?sig=SECRET", "https://h.org/d/a.tif", "a"),
        ("http://me:PW@h.org/a.b.tif", "/vsicurl/http://me:PW@h.org/a.b.tif", "http://h.org/a.b.tif", "a.b"),
        ("s3://bucket/k/a.tif", "/vsis3/bucket/k/a.tif", "s3://bucket/k/a.tif", "a"),
        ("gs://bucket/a.tif", "/vsigs/bucket/a.tif", "gs://bucket/a.tif", "a"),
        ("/vsizip/x.zip/a.tif", "/vsizip/x.zip/a.tif", "/vsizip/x.zip/a.tif", "a"),
    ],
)
def test_urls(url, path, name, relative):
    assert find_inputs(url) == [InputItem(name, (path,), PurePath(relative))]


def test_nothing_found_says_what_was_looked_for(tmp_path):
    (tmp_path / f"{GRANULE}.Fmask.tif").touch()
    with pytest.raises(RasterError, match=r"no images in this folder.*\*\.tif.*Fmask"):
        find_inputs(tmp_path)
    with pytest.raises(RasterError, match="no image matches this pattern"):
        find_inputs(str(tmp_path / "*.vrt"))
    with pytest.raises(RasterError, match="absent.tif: no such file or folder"):
        find_inputs(tmp_path / "absent.tif")
    with pytest.raises(RasterError, match="unknown kind of URL"):
        find_inputs("ftp://h.org/a.tif")


def test_two_inputs_of_one_output_name(tmp_path):
    for name in ("s/a.tif", "s/a.vrt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(RasterError, match=r"s/a\.tif and .*s/a\.vrt would both become s/a_agbd\.tif"):
        find_inputs(tmp_path)


def test_the_real_quality_layer_is_passed_over(samples):
    assert [str(item.relative) for item in find_inputs(samples)] == ["chip_input", "chip_label"]
