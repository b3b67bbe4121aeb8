"""The lists of fingerprints: what counts as equal, as near enough, as different and as missing."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio

from biomass_jax import bundle
from tests.end_to_end import fingerprints

LABEL, MAP, CURVE = "labels/10SFF/a.tif", "maps/a.tif", "finetune/metrics.jsonl"
WEIGHTS = "729f9c3852d971635845aac5e41dfafb55ee7b97a1fc9efbad4e7d5787a6516c"  # hashlib and struct, by hand


def write_map(path, *, pixel=2.0, mtime=1, season="2020"):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.full((1, 16, 16), 3, np.float32)
    values[0, 5, 6], values[0, 0, 0] = pixel, -1
    grid = {"crs": "EPSG:32610", "transform": rasterio.Affine(30, 0, 6e5, 0, -30, 4e6)}
    with rasterio.open(path, "w", "GTiff", 16, 16, 1, dtype="float32", nodata=-1, **grid) as file:
        file.write(values)
        file.update_tags(SOURCE_MTIME_NS=mtime, SEASON=season)


def write_curve(path, rmse, *, speed=1.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"step": 1, "train/loss": 9.0, "perf/step_s": speed}, {"step": 1, "val/loss": 30.0, "val/rmse": rmse}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_index(path, *, crs, rows=(1, 2)):
    path.parent.mkdir(parents=True, exist_ok=True)
    geo = {"columns": {"geometry": {"crs": crs, "encoding": "WKB"}}, "version": "1.1.0"}
    table = pa.table({"row": pa.array(rows, pa.int32()), "label_mean": [0.1, float("nan")]})
    pq.write_table(table.replace_schema_metadata({"geo": json.dumps(geo)}), path)


def write_record(path, *, time, settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    files = {"inputs": {"a.tif": f"12-{time}"}, "outputs": {"b.tif": f"34-{time}"}}
    path.write_text(json.dumps({"digest": f"{time}", "settings": settings, **files}))


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """A small folder of a few kinds, in which `fingerprints` looks for those only."""
    kinds = ("label", "chip index", "prepare record", "map pixels", "map header", "training curve")
    monkeypatch.setattr(fingerprints, "KINDS", {kind: fingerprints.KINDS[kind] for kind in kinds})
    out = tmp_path / "demo_out"
    write_map(out / LABEL)
    write_index(out / "chips" / "chips.parquet", crs={"name": "WGS 84"})
    write_record(out / "state" / "labels" / "10SFF.json", time=1, settings={"size": 224})
    write_map(out / MAP)
    write_curve(out / CURVE, 20.0)
    return out


def statuses(old, new):
    return {(kind, file): status for kind, file, status, _ in fingerprints.compare(old, new) if status != "equal"}


def test_a_copy_is_equal(demo, tmp_path, capsys):
    shutil.copytree(demo, tmp_path / "copy")
    for name, folder in (("old", demo), ("new", tmp_path / "copy")):
        assert fingerprints.main(["make", str(folder), "--json", str(tmp_path / name)]) == 0
    capsys.readouterr()
    assert fingerprints.main(["compare", str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["label", LABEL, "equal"]
    assert lines[-1] == "6 equal, 0 within 1e-3, 0 differ"


def test_what_depends_on_time_or_libraries_does_not_count(demo):
    old = fingerprints.make(demo)
    write_map(demo / MAP, mtime=2)
    write_index(demo / "chips" / "chips.parquet", crs={"name": "WGS 84", "area": "World."})
    write_record(demo / "state" / "labels" / "10SFF.json", time=2, settings={"size": 224})
    write_curve(demo / CURVE, 20.0, speed=2.0)
    assert statuses(old, fingerprints.make(demo)) == {}


def test_what_changed_is_found(demo):
    old = fingerprints.make(demo)
    write_map(demo / LABEL, pixel=2.5)
    write_map(demo / MAP, pixel=2.5)
    write_index(demo / "chips" / "chips.parquet", crs={"name": "WGS 84"}, rows=(1, 3))
    write_record(demo / "state" / "labels" / "10SFF.json", time=1, settings={"size": 448})
    assert statuses(old, fingerprints.make(demo)) == {
        ("label", LABEL): "differs",
        ("chip index", "chips/chips.parquet"): "differs",
        ("prepare record", "state/labels/10SFF.json"): "differs",
        ("map pixels", MAP): "differs",
    }
    write_map(demo / MAP, season="2021")
    assert statuses(old, fingerprints.make(demo))["map header", MAP] == "differs"


def test_missing_and_new_files_are_found(demo, capsys):
    old = fingerprints.make(demo)
    (demo / LABEL).rename(demo / "labels" / "10SFF" / "b.tif")
    rows = fingerprints.compare(old, fingerprints.make(demo))
    assert ("label", LABEL, "missing", "") in rows and ("label", "labels/10SFF/b.tif", "new", "") in rows
    assert not fingerprints.report(rows)
    assert capsys.readouterr().out.splitlines()[-1] == "5 equal, 0 within 1e-3, 0 differ, 1 missing, 1 new"


def test_a_folder_without_a_kind_is_refused(demo):
    (demo / MAP).unlink()
    with pytest.raises(SystemExit, match=r"no map pixels \(maps/\*\.tif\)"):
        fingerprints.make(demo)


@pytest.mark.parametrize(("off", "status"), [(0.5e-3, "within 1e-3"), (2e-3, "differs"), (np.nan, "differs")])
def test_a_score_may_be_off_by_a_thousandth(demo, capsys, off, status):
    old = fingerprints.make(demo)
    write_curve(demo / CURVE, 20.0 * (1 + off))
    rows = fingerprints.compare(old, fingerprints.make(demo))
    assert [row[2:] for row in rows if row[2] != "equal"] == [(status, f"(val/rmse 20, {20 * (1 + off):.8g})")]
    assert fingerprints.report(rows) == (status != "differs")


def test_a_score_that_is_gone_differs(demo):
    old = fingerprints.make(demo)
    (demo / CURVE).write_text('{"step": 1, "val/loss": 30.0}\n')
    (row,) = (row for row in fingerprints.compare(old, fingerprints.make(demo)) if row[2] != "equal")
    assert row[2:] == ("differs", "(no number val/rmse)")


def test_a_trained_map_is_compared_by_its_parts(tmp_path):
    def entry(pixel):
        write_map(tmp_path / "a.tif", pixel=pixel)
        return fingerprints.map_pixels(tmp_path / "a.tif", trained=True)

    old = entry(2.0)
    assert old["numbers"]["count"] == 255 and old["numbers"]["mean of part 1 1"] == (15 * 3 + 2) / 16
    assert fingerprints._status(old, entry(2.001))[0] == "within 1e-3"
    assert fingerprints._status(old, entry(2.5))[0] == "differs"


def test_weights_that_bundle_json_does_not_name_are_refused(tmp_path, monkeypatch):
    variables = {"params": {"b": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, "a": np.float32([4])}}
    monkeypatch.setattr(bundle, "load", lambda path: SimpleNamespace(variables=variables))
    meta = {"weights_sha256": WEIGHTS, "training": {"scores": {"val/loss": 1.5}}}
    path = tmp_path / "bundle.json"
    path.write_text(json.dumps(meta))
    entry = fingerprints.bundle_weights(path, trained=True)
    assert entry == {"sha256": WEIGHTS, "numbers": {"norm of all tensors": 71**0.5, "val/loss": 1.5}}
    variables["params"]["b"]["kernel"][0, 0] = 1
    with pytest.raises(SystemExit, match="weights_sha256 is"):
        fingerprints.bundle_weights(path, trained=False)
