"""Maps as files: where they go, what they carry, when they are kept, masks, folders with bad files."""

import json
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from PIL import Image

import biomass_jax
from biomass_jax.data.raster import stac
from biomass_jax.data.raster.image import read_tags
from biomass_jax.errors import BundleError, PredictionError, RasterError
from biomass_jax.runtime.progress import Progress, duration
from tests.prediction.stubs import NIR, coded_image, nir, read_map, stub_bundle, write_raster


@pytest.fixture
def scene(tmp_path):
    return write_raster(tmp_path / "in" / "scene.tif", coded_image(240, 260))


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_map_has_the_grid_and_the_tags_of_the_design(stub, scene, tmp_path):
    with rasterio.open(scene, "r+") as file:
        file.update_tags(SENSOR="L30", SEASON="2020-06-01/2020-08-31")
    result = stub(stride=160).predict_file(scene, tmp_path / "out", bands=None)
    assert result.path == tmp_path / "out" / "scene_agbd.tif"
    assert result.status == "written"
    assert result.chips == 4
    assert set(result.timings) == {"read", "compute", "blend", "write", "verify", "copy"}
    with rasterio.open(scene) as source, rasterio.open(result) as file:
        assert (file.crs, file.transform, file.shape) == (source.crs, source.transform, source.shape)
        assert file.dtypes == ("float32",)
        assert file.nodata == -1
        assert file.descriptions == ("agbd",)
        assert file.units == ("Mg ha-1",)
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        tags = file.tags()
    status = os.stat(scene)
    assert tags["AREA_OR_POINT"] == "Area"
    assert tags["DATA_SOURCES"] == "scene.tif"
    assert tags["SENSORS"] == "L30"
    assert tags["SEASON"] == "2020-06-01/2020-08-31"
    assert tags["MODEL_SHA256"] == "f" * 64
    assert tags["SOFTWARE"] == f"biomass_jax {biomass_jax.__version__}"
    assert tags["SOURCE_SIZE"] == str(status.st_size)
    assert tags["SOURCE_MTIME_NS"] == str(status.st_mtime_ns)
    assert json.loads(tags["SETTINGS"]) == {
        "tile": 224, "stride": 160, "margin": 8, "blend": "cosine", "tiling": "default", "dtype": "float32",
        "matmul_precision": "highest", "bands": None, "encoding": "auto", "resample": None,
            "mask": None, "mask_keep": None,
    }  # fmt: skip


def test_no_data_value_layer_and_unit_come_from_the_bundle(stub, scene, tmp_path):
    bundle = stub_bundle(nodata=-9999.0)
    bundle.meta["output"] = {"bands": ["height"], "units": "m", "nodata": -9999.0}
    result = stub(bundle=bundle).predict_file(scene, tmp_path)
    assert result.path.name == "scene_height.tif"
    with rasterio.open(result) as file:
        assert (file.nodata, file.descriptions, file.units) == (-9999, ("height",), ("m",))


def test_destination_is_a_file_where_it_ends_in_tif(stub, scene, tmp_path):
    target = tmp_path / "deep" / "er" / "mine.tif"
    assert stub().predict_file(scene, target).path == target
    assert target.is_file()


@pytest.mark.parametrize("change", ["nothing", "weights", "stride", "bands", "source", "map", "overwrite", "quicklook"])
def test_a_finished_map_is_kept_only_where_a_new_one_would_be_the_same(stub, scene, tmp_path, change):
    first = stub().predict_file(scene, tmp_path / "out")
    before = os.stat(first).st_ino
    bundle, settings, options = stub_bundle(), {}, {}
    if change == "weights":
        bundle = stub_bundle(sha="0" * 64)
    elif change == "stride":
        settings = {"stride": 100}
    elif change == "bands":
        options = {"bands": "BLUE,GREEN,RED,NIR_NARROW,SWIR_1,SWIR_2"}
    elif change == "source":
        os.utime(scene, ns=(1, 1))
    elif change == "map":
        whole = first.path.read_bytes()
        first.path.write_bytes(whole[: len(whole) // 2])
    elif change == "overwrite":
        options = {"overwrite": True}
    elif change == "quicklook":
        options = {"quicklook": True}
    again = stub(bundle=bundle, batch_size=2, **settings).predict_file(scene, tmp_path / "out", **options)
    kept = change in ("nothing", "quicklook")
    assert again.status == ("skipped" if kept else "written")
    assert (os.stat(again).st_ino == before) == kept
    assert stac.quicklook_path(again.path).is_file() == (change == "quicklook")
    np.testing.assert_allclose(read_map(again), coded_image(240, 260)[..., NIR], rtol=1e-6)


PAM = "<PAMDataset>{}</PAMDataset>"
NO_DATA = PAM.format(
    "".join(f'<PAMRasterBand band="{band}"><NoDataValue>500</NoDataValue></PAMRasterBand>' for band in (1, 2))
)
PLACE = "30, 0, 4100000, 0, -30"
SEEN = PAM.format('<PAMRasterBand band="1"><Metadata><MDI key="STATISTICS_MEAN">3</MDI></Metadata></PAMRasterBand>')


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("statistics", "MODEL.input.means: was None, now [1, 2]"),
        ("output", "MODEL.output.units: was 'Mg ha-1', now 'kg'"),
        ("architecture", "MODEL.architecture: was None, now {'final_relu': False}"),
        ("no-data set in QGIS", "SOURCE_READING.nodata: was ["),
        ("place set in QGIS", "SOURCE_READING.transform: was ["),
        ("mask", "SOURCE_READING.masked: was [False"),
        ("one file of the same size, older", "SOURCE_FILES: was "),
        ("an older version's map", "it has no tag MODEL"),
        ("looked at", None),
    ],
)
def test_what_bears_on_a_map_makes_it_again_and_is_named(stub, tmp_path, caplog, change, words):
    scene = write_raster(tmp_path / "in" / "scene.tif", coded_image(40, 60), nodata=None)
    other = write_raster(tmp_path / "in" / "zother.tif", coded_image(40, 60), nodata=None)
    os.utime(other, ns=(10**18, 10**18))
    source = scene
    if change.startswith("one file"):
        source = tmp_path / "in" / "both.vrt"
        rasterio.shutil.copy(scene, source, driver="VRT")
        source.write_text(source.read_text().replace("scene.tif", "zother.tif", 1))
    result = stub().predict_file(source, tmp_path / "out")
    bundle = stub_bundle()
    if change == "statistics":
        bundle.meta["input"]["means"] = [1, 2]
    elif change == "output":
        bundle.meta["output"] = bundle.meta["output"] | {"units": "kg"}
    elif change == "architecture":
        bundle.meta["architecture"] = {"final_relu": False}
    elif change == "no-data set in QGIS":
        scene.with_name("scene.tif.aux.xml").write_text(NO_DATA)
    elif change == "place set in QGIS":
        scene.with_name("scene.tif.aux.xml").write_text(PAM.format(f"<GeoTransform>600015, {PLACE}</GeoTransform>"))
    elif change == "mask":
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(scene, "r+") as file:
            file.write_mask(np.zeros((40, 60), bool))
    elif change.startswith("one file"):
        os.utime(other, ns=(10**17, 10**17))
    elif change.startswith("an older"):
        with rasterio.open(result.path, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as file:
            file.update_tags(MODEL="")
    else:
        scene.with_name("scene.tif.aux.xml").write_text(SEEN)
    with caplog.at_level(logging.INFO):
        # some of these leave nothing of so small an image
        again = stub(bundle=bundle).predict_file(source, tmp_path / "out", allow_empty=True)
    assert again.status == ("skipped" if words is None else "written")
    assert words is None or f"{result.path}: is made again: {words}" in caplog.text, caplog.text
    assert stub(bundle=bundle).predict_file(source, tmp_path / "out").status == "skipped"


def test_a_new_map_begins_without_the_side_cars_of_the_old_one(stub, scene, tmp_path):
    result = stub().predict_file(scene, tmp_path)
    for ending in (".aux.xml", ".msk"):
        result.path.with_name(result.path.name + ending).write_text("of the old one")
    assert stub().predict_file(scene, tmp_path, overwrite=True).status == "written"
    assert files(tmp_path) == ["in/scene.tif", "scene_agbd.tif"]


def test_a_mask_counts_with_what_lies_beside_it_and_behind_it(stub, scene, tmp_path):
    classes = np.full((240, 260, 1), 10, np.uint8)
    write_raster(tmp_path / "cover.tif", classes, nodata=None, named=False)
    rasterio.shutil.copy(tmp_path / "cover.tif", tmp_path / "cover.vrt", driver="VRT")
    chosen = {"mask": tmp_path / "cover.vrt", "mask_keep": (10,)}

    def status():
        return stub().predict_file(scene, tmp_path / "out", **chosen).status

    assert [status(), status()] == ["written", "skipped"]
    os.utime(tmp_path / "cover.tif", ns=(1, 1))
    assert [status(), status()] == ["written", "skipped"]
    (tmp_path / "cover.vrt.aux.xml").write_text(NO_DATA)
    assert [status(), status()] == ["written", "skipped"]


def test_a_mask_that_is_not_there_fails_before_the_first_image(stub, tmp_path):
    write_raster(tmp_path / "in" / "a.tif", coded_image(10, 10))
    with pytest.raises(RasterError, match="absent.tif"):
        stub().predict_dir(tmp_path / "in", tmp_path / "out", mask=tmp_path / "absent.tif", mask_keep=(10,))


def test_a_kept_map_needs_no_weights(stub, scene, tmp_path):
    stub().predict_file(scene, tmp_path)
    bundle = stub_bundle()
    del bundle.variables
    assert stub(bundle=bundle).predict_file(scene, tmp_path).status == "skipped"


def test_a_mask_keeps_its_classes_and_the_share_is_told(stub, scene, tmp_path, caplog):
    classes = np.full((240, 260, 1), 30, np.uint8)
    classes[:60] = 10
    classes[60:90, :130] = 95
    mask = write_raster(tmp_path / "cover.tif", classes, nodata=0, named=False)
    image = coded_image(240, 260)
    image[:30] = 0
    write_raster(scene, image)
    with caplog.at_level(logging.INFO):
        result = stub().predict_file(scene, tmp_path / "out", mask=mask, mask_keep=(10, 95))
    expected = np.where((classes[..., 0] != 30) & (image[..., NIR] > 0), image[..., NIR], -1)
    np.testing.assert_allclose(read_map(result), expected, rtol=1e-6)
    share = (30 * 260 + 30 * 130) / (210 * 260)  # of the pixels with data
    assert result.mask_share == pytest.approx(share)
    assert f"the mask keeps {share:.1%} of its data pixels" in caplog.text
    settings = json.loads(read_tags(result.path)["SETTINGS"])
    assert (settings["mask"], settings["mask_keep"]) == (str(mask), [10, 95])
    assert stub().predict_file(scene, tmp_path / "out", mask=mask, mask_keep=[10, 95]).status == "skipped"
    os.utime(mask, ns=(1, 1))
    assert stub().predict_file(scene, tmp_path / "out", mask=mask, mask_keep=(10, 95)).status == "written"


@pytest.mark.parametrize("options", [{"mask": "a.tif"}, {"mask_keep": (10,)}, {"mask": "a.tif", "mask_keep": ()}])
def test_half_a_mask_is_refused(stub, scene, tmp_path, options):
    with pytest.raises(PredictionError, match="give both or neither"):
        stub().predict_file(scene, tmp_path, **options)


def test_folders_are_mirrored_and_bad_files_do_not_stop_the_others(stub, tmp_path, caplog):
    source, out = tmp_path / "in", tmp_path / "out"
    good = write_raster(source / "a" / "one.tif", coded_image(230, 240))
    write_raster(source / "b" / "two.tif", coded_image(50, 40))
    (source / "a" / "cut.tif").write_bytes(good.read_bytes()[:5000])
    write_raster(source / "few.tif", np.ones((20, 20, 5), np.int16), named=False)
    write_raster(source / "c" / "reflectance.tif", (coded_image(60, 60) / 10000).astype(np.float32), nodata=None)
    with pytest.raises(PredictionError) as caught:
        stub().predict_dir(source, out)
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 of 5 inputs failed:"
    assert len(lines) == 4
    for name, reason in (("cut.tif", "directory"), ("few.tif", "5 bands"), ("reflectance.tif", "reflectance")):
        assert any(name in line.split()[0] and reason in line for line in lines), (name, lines)
    assert sorted(Path(name).name for name, _ in caught.value.failures) == ["cut.tif", "few.tif", "reflectance.tif"]
    assert files(out) == ["a/one_agbd.tif", "b/two_agbd.tif"]
    assert caplog.text.count("failed: ") == 3
    assert all(line.count(".tif") == 1 for line in lines[1:] if "cut.tif" not in line), "names are said once"
    assert "Traceback" not in caplog.text


def test_a_fault_of_the_program_in_one_file_is_told_with_its_traceback(stub, scene, tmp_path, caplog):
    def broken(variables, x):
        raise KeyError("nonsense")

    with pytest.raises(PredictionError, match="KeyError: 'nonsense'"):
        stub(broken).predict_dir(scene.parent, tmp_path / "out")
    assert "Traceback" in caplog.text
    assert files(tmp_path / "out") == []


def test_damaged_weights_end_the_run_at_once(stub, scene, tmp_path):
    class Damaged:
        def __getattr__(self, name):
            return getattr(stub_bundle(), name)

        @property
        def variables(self):
            raise BundleError("weights are damaged")

    write_raster(scene.with_name("second.tif"), coded_image(10, 10))
    with pytest.raises(BundleError, match="damaged"):
        stub(bundle=Damaged()).predict_dir(scene.parent, tmp_path / "out")
    assert files(tmp_path / "out") == []


def test_one_output_file_for_several_images_is_refused(stub, scene, tmp_path):
    write_raster(scene.with_name("second.tif"), coded_image(10, 10))
    with pytest.raises(PredictionError, match="one file for 2 maps"):
        stub().predict_dir(scene.parent, tmp_path / "out.tif")
    with pytest.raises(PredictionError, match="2 images; predict_file maps one, predict_dir many"):
        stub().predict_file(scene.parent, tmp_path)
    assert [result.status for result in stub().predict_dir(scene, tmp_path / "out.tif")] == ["written"]


@pytest.mark.parametrize("side", [60, 300])
def test_a_model_without_a_number_leaves_no_map(stub, tmp_path, side):
    source = write_raster(tmp_path / "in" / "scene.tif", coded_image(side, side))
    with pytest.raises(PredictionError, match="the model returned nan"):
        stub(lambda variables, x: x[..., 0] / 0 * 0).predict_file(source, tmp_path / "out")
    assert files(tmp_path / "out") == []


def test_a_failed_map_leaves_the_old_one(stub, scene, tmp_path):
    first = stub().predict_file(scene, tmp_path / "out")
    before = first.path.read_bytes()
    with pytest.raises(PredictionError):
        stub(lambda v, x: nir(v, x) * np.nan, stride=100).predict_file(scene, tmp_path / "out")
    assert files(tmp_path / "out") == ["scene_agbd.tif"]
    assert first.path.read_bytes() == before


def test_unknown_options_are_refused(stub, scene, tmp_path):
    with pytest.raises(TypeError, match="quick_look"):
        stub().predict_file(scene, tmp_path, quick_look=True)


def test_quicklook_shows_image_and_map_with_no_data_transparent(stub, tmp_path):
    image = coded_image(300, 250)
    image[..., :3] += np.random.default_rng(0).integers(0, 500, (300, 250, 3)).astype(np.int16)
    image[100:200, 50:200] = 0
    source = write_raster(tmp_path / "in" / "scene.tif", image)
    result = stub().predict_file(source, tmp_path, quicklook=True)
    picture = tmp_path / "scene_agbd_quicklook.png"
    assert stac.quicklook_path(result.path) == picture
    pixels = np.asarray(Image.open(picture).convert("RGBA"))
    height, width = pixels.shape[:2]
    assert pixels[height // 2, width // 4 - 20, 3] == 0  # middle of the left panel: no data
    assert pixels[height // 5, width // 6, 3] == 255
    assert (pixels[..., 3] == 255).mean() > 0.4


def test_colours_and_item_lie_beside_the_map_and_come_back_where_they_are_missing(stub, scene, tmp_path):
    with rasterio.open(scene, "r+") as file:
        file.update_tags(SEASON="2020-06-01/2020-09-01")
    beside = ["scene_agbd.json", "scene_agbd.qml", "scene_agbd_colours.txt"]
    wanted = {"style": True, "stac": True}
    assert stub().predict_file(scene, tmp_path / "out", **wanted).status == "written"
    assert files(tmp_path / "out") == sorted([*beside, "scene_agbd.tif"])
    before = {name: (tmp_path / "out" / name).read_bytes() for name in beside}
    for name in beside:
        (tmp_path / "out" / name).unlink()
        assert stub().predict_file(scene, tmp_path / "out", **wanted).status == "skipped"
        assert {name: (tmp_path / "out" / name).read_bytes() for name in beside} == before
    (tmp_path / "out" / "scene_agbd.qml").write_text("of somebody who likes other colours")
    assert stub().predict_file(scene, tmp_path / "out", **wanted).status == "skipped"
    assert (tmp_path / "out" / "scene_agbd.qml").read_text() == "of somebody who likes other colours"
    item = json.loads(before["scene_agbd.json"])
    assert item["links"] == [{"rel": "derived_from", "href": "../in/scene.tif"}]
    assert item["properties"]["start_datetime"] == "2020-06-01T00:00:00Z"
    assert b'label="20000 Mg/ha"' in before["scene_agbd.qml"]


def test_a_map_that_is_made_again_has_no_item_of_the_old_one(stub, scene, tmp_path):
    with rasterio.open(scene, "r+") as file:
        file.update_tags(SEASON="2020-06-01/2020-09-01")
    path = stub().predict_file(scene, tmp_path / "out", stac=True).path
    old = (tmp_path / "out" / "scene_agbd.json").read_text()
    assert stub(stride=100).predict_file(scene, tmp_path / "out").status == "written"
    assert files(tmp_path / "out") == ["scene_agbd.tif"]
    assert stub(stride=100).predict_file(scene, tmp_path / "out", stac=True).status == "skipped"
    new = json.loads((tmp_path / "out" / "scene_agbd.json").read_text())
    assert new["assets"]["agbd"]["file:size"] == path.stat().st_size
    assert new["assets"]["agbd"]["file:checksum"] != json.loads(old)["assets"]["agbd"]["file:checksum"]


def test_a_map_of_our_composite_names_its_granules(stub, scene, tmp_path):
    names = [f"HLS.L30.T10SFF.2020{day}T184512.v2.0" for day in (183, 199)]
    with rasterio.open(scene, "r+") as file:
        file.update_tags(SEASON="2020-06-01/2020-09-01", SCENES=",".join(names))
    result = stub().predict_file(scene, tmp_path / "out", stac=True)
    assert read_tags(result.path)["DATA_SOURCES"] == "; ".join(names)
    item = json.loads((tmp_path / "out" / "scene_agbd.json").read_text())
    *granules, image = item["links"]
    assert [link["title"] for link in granules] == names
    assert image == {"rel": "derived_from", "href": "../in/scene.tif"}
    assert "scene.tif of 2 HLS granules" in item["properties"]["processing:lineage"]


def test_lines_in_a_log_tell_rate_and_time_left(caplog):
    now = [0.0]
    with caplog.at_level(logging.INFO), Progress("map.tif", 100, terminal=False, clock=lambda: now[0]) as progress:
        for _ in range(10):
            now[0] += 4.0
            progress.advance(10)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "map.tif: 30 of 100 chips, 2.5 chips/s, 28 s left",
        "map.tif: 60 of 100 chips, 2.5 chips/s, 16 s left",
        "map.tif: 90 of 100 chips, 2.5 chips/s, 4 s left",
    ]


def test_the_time_before_the_first_chips_is_no_speed(caplog, capsys, monkeypatch):
    now = [0.0]
    steps = [(300.0, 10), (6.0, 10), (6.0, 10)]  # five minutes of compiling
    with caplog.at_level(logging.INFO), Progress("a.tif", 100, terminal=False, clock=lambda: now[0]) as progress:
        for seconds, chips in steps:
            now[0] += seconds
            progress.advance(chips)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["a.tif: 20 of 100 chips, 1.7 chips/s, 48 s left"]  # 80 chips of 0.6 s

    for clock in ("time.time", "tqdm.std.time"):  # the bar's own
        monkeypatch.setattr(clock, lambda: now[0])
    with Progress("a.tif", 100, terminal=True, clock=lambda: now[0]) as progress:
        for seconds, chips in steps:
            now[0] += seconds
            progress.advance(chips)
        assert "30/100" in str(progress._bar) and "1.67chip/s" in str(progress._bar)


def test_a_bar_in_a_notebook_needs_no_widgets(capsys, monkeypatch):
    kernel = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: kernel))
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with Progress("map.tif", 8) as progress:
        progress.advance(8)
    assert "8/8" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    with Progress("map.tif", 8) as progress:
        progress.advance(8)
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(capsys):
    with Progress("map.tif", 8, terminal=True) as progress:
        progress.advance(3)
        progress.advance(5)
    shown = capsys.readouterr().err
    assert "map.tif" in shown
    assert "8/8" in shown
    assert "chip/s" in shown


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations_are_readable(seconds, text):
    assert duration(seconds) == text
