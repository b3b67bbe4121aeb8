"""One page of all: what it shows is what the files tell, and it needs no other file."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from affine import Affine
from rasterio.crs import CRS

from biomass_jax.data.raster.cog import MapWriter
from biomass_jax.data.raster.grid import Grid
from biomass_jax.errors import RegionalError
from biomass_jax.figures import page as pages
from biomass_jax.regional import report as module

pytestmark = pytest.mark.slow  # many, of a second and more each

GRANULES = ("HLS.L30.T10SFF.2020137T184512.v2.0", "HLS.S30.T10SFF.2020167T184512.v2.0")
MODEL = "1ab928c51bdd639f4028bfc60f4a40e6434fd70d496350260dd8ed6cdd03277b"
TAGS = {"SEASON": "2020-05-01/2020-10-01", "SENSORS": "L30, S30", "MODEL_SHA256": MODEL}
CALIBRATED = {"INTERVAL_LEVEL": "0.9", "CALIBRATION": json.dumps({"groups": [{"blocks": 21, "pixels": 4087}]})}
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def write_raster(path, layers=("agbd", "agbd_sd"), value=120.0, **tags):
    """100 x 50 pixels of 30 m, of which a fifth has no data; the layers' values are value, value / 10 ..."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.stack([np.full((100, 50), value / 10**number) for number, _ in enumerate(layers)], axis=-1)
    values[:20] = -1
    grid = Grid(100, 50, CRS.from_epsg(32610), Affine(30, 0, 600000, 0, -30, 4200000))
    with MapWriter(path, grid, nodata=-1, layers=dict.fromkeys(layers, "Mg ha-1"), tags=tags) as writer:
        writer.write_rows(0, values.astype(np.float32))
    return path


def write_scores(folder, **fields):
    folder.mkdir(parents=True, exist_ok=True)
    scores = {"n": 3631, "rmse": 29.36, "rmse_low": 26.8, "rmse_high": 32.2, "bias": -1.03, "bias_low": -3.0}
    scores |= {"bias_high": 1.0, "r2": 0.684, "interval": {"blocks": 18}, "bundle": {"weights_sha256": MODEL}}
    scores |= {"data": {"sha256": "084ce37c"}, "uncertainty": {"level": 0.9, "coverage": 0.9273}}
    (folder / "metrics.json").write_text(json.dumps(scores | fields))
    (folder / "density_scatter.png").write_bytes(PNG)


class Reader(HTMLParser):
    """Texts, where pictures and links lead, and tags that were not closed."""

    def __init__(self, text):
        super().__init__()
        self.text, self.sources, self.open, self.tags = "", [], [], set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def whole(folder):
    """A folder with one of each; its page."""
    write_raster(folder / "maps" / "a_agbd.tif", **TAGS, **CALIBRATED, DATA_SOURCES="; ".join(GRANULES))
    write_raster(folder / "mosaic.tif", value=90, **TAGS, MOSAIC_SHA256="m", OVERLAP="inverse_variance")
    seasons = {"SEASON_BEFORE": "2018-05-01/2018-10-01", "SEASON_AFTER": "2020-05-01/2020-10-01"}
    numbers = {
        "BEFORE": "a.tif",
        "AFTER": "b.tif",
        "Z_THRESHOLD": "2.5",
        "ERROR_CORRELATION": "0.62",
        "FDR": "0.05",
        "MIN_AREA_HA": "0.5",
    }
    layers = ("agbd_change", "agbd_change_sd", "significant")
    write_raster(folder / "change.tif", layers, value=-7, **seasons, **numbers)
    write_raster(folder / "composite.tif", ("red", "green"))  # nothing that a report is about
    write_raster(folder / ".half" / "b_agbd.tif", **TAGS)
    write_scores(folder / "scores")
    (folder / "plots.png").write_bytes(PNG)
    body = ["<p>Ten plots &amp; more.</p>", "<p><img src='plots.png' alt='plots'></p>", "<h2>All plots</h2>"]
    (folder / "validation.html").write_text(pages.page("Map and <field> plots", body))
    (folder / "other.html").write_text("<!DOCTYPE html><html><h1>Not ours</h1>\n</html>")
    found = module.report([folder], folder / "report.html", title="A <b>district")
    return found, (folder / "report.html").read_text()


def test_one_page_shows_all_and_needs_no_other_file(tmp_path):
    found, text = whole(tmp_path)
    read = Reader(text)
    assert read.open == []
    assert [kind for kind, _ in found.rasters] == ["change", "map", "mosaic"]
    assert read.sources and all(source.startswith("data:image/png;base64,") for source in read.sources)
    assert read.tags.isdisjoint({"script", "link", "iframe", "b", "field"}) and "A <b>district" in read.text
    assert "Map and <field> plots" in read.text and "Ten plots & more." in read.text and "Not ours" not in read.text
    assert "<h3>All plots</h3>" in text and base64.b64encode(PNG).decode() in text
    for one in (*GRANULES, MODEL, "084ce37c", *(file.identity for _, file in found.rasters)):
        assert one in read.text
    assert "b_agbd" not in read.text and "composite.tif" not in read.text


def test_tables_tell_areas_and_means(tmp_path):
    _, text = whole(tmp_path)
    rows = {
        cells[0]: cells[1:]
        for row in re.findall("<tr>(.*?)</tr>", text)
        if (cells := re.findall("<td>(.*?)</td>", row))
    }
    season = "2020-05-01 to 2020-09-30"
    # 80 of 100 rows of 50 pixels of 0.09 ha have data.
    assert rows["a_agbd.tif"] == ["map", season, "L30, S30", "360", "120.0", "12.0"]
    assert rows["mosaic.tif"] == ["mosaic", season, "L30, S30", "360", "90.0", "9.0"]
    assert rows["change.tif"] == ["change", f"2018-05-01 to 2018-09-30 and {season}", "", "360", "-7.0", "-0.7"]
    assert rows["scores"][:3] == ["3,631", "18", "29.4 (26.8 to 32.2)"] and rows["scores"][3] == "-1.0 (-3.0 to +1.0)"
    assert rows["scores"][-1] == "92.7% of 90%"


def test_methods_and_references_say_what_the_files_tell(tmp_path):
    found, _ = whole(tmp_path)
    words = " ".join(module.methods(found))
    for said in ("pixels of 30 m from HLS", "2020-05-01 to 2020-09-30", f"model {MODEL[:12]}", "a 90% interval"):
        assert said in words
    for said in (
        "4,087 labelled pixels in 21 blocks",
        "92.7% of the labels",
        "correlation 0.62",
        "at most 5%",
        "0.5 ha",
    ):
        assert said in words
    assert "inverse_variance" in words
    cited = " ".join(module.references(found))
    for one in ("2406.19888", "HLSL30.002", "HLSS30.002", "ORNLDAAC/2056", "01621459.2017.1307116"):
        assert one in cited
    plain = tmp_path / "plain"
    write_raster(plain / "a.tif", **TAGS)
    alone = module.report([plain], plain / "report.html")
    words, cited = " ".join(module.methods(alone)), " ".join(module.references(alone))
    for untold in ("HLS", "interval", "root mean square", "correlation", "overlap"):
        assert untold not in words
    assert "HLS" not in cited and "Lei" not in cited and "GEDI" not in cited


def test_references_are_those_of_the_citation_file():
    text = (Path(__file__).resolve().parents[2] / "CITATION.cff").read_text(encoding="utf-8")
    for name in ("model", "L30", "S30", "labels"):
        assert f"doi: {module.REFERENCES[name].rpartition('doi.org/')[2]}" in text, name


def test_the_same_files_give_the_same_page_and_it_does_not_hold_itself(tmp_path):
    _, first = whole(tmp_path)
    assert module.main([str(tmp_path), "--title", "A <b>district"]) == 0
    assert (tmp_path / "report.html").read_text() == first


def test_many_rasters_are_in_the_table_and_some_have_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_SHOWN", 2)
    for number in range(3):
        write_raster(tmp_path / f"{number}.tif", **TAGS)
    (tmp_path / "1_quicklook.png").write_bytes(PNG)
    module.report([tmp_path], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert text.count("<figure>") == 2 and "Pictures of the first 2 of 3" in text and "2.tif" in text
    assert base64.b64encode(PNG).decode() in text  # its quicklook


def test_what_cannot_be_reported_is_told(tmp_path, capsys):
    with pytest.raises(RegionalError, match="gone: no such folder"):
        module.report([tmp_path / "gone"], tmp_path / "r.html")
    with pytest.raises(RegionalError, match=r"no map, mosaic or change of biomass-jax, no scores \(metrics.json\)"):
        module.report([tmp_path], tmp_path / "r.html")
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(RegionalError, match=r"metrics\.json: can't be read as scores"):
        module.report([tmp_path], tmp_path / "r.html")
    (tmp_path / "metrics.json").write_text('{"loss": 1}')
    with pytest.raises(RegionalError, match=r"metrics\.json: not the scores that biomass-jax evaluate writes"):
        module.report([tmp_path], tmp_path / "r.html")
    (tmp_path / "metrics.json").unlink()
    (tmp_path / "zones.html").write_text(pages.page("Zones", ["<img src='gone.png' alt=''>"]))
    assert module.main([str(tmp_path)]) == 1
    assert "zones.html: it, or a picture of it, can't be read" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
