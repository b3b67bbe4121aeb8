import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
from earthaccess.exceptions import LoginAttemptFailure, LoginStrategyUnavailable

from biomass_jax.errors import PrepError
from data_prep.archive import download as module
from data_prep.archive.download import log_in, main, plan_gedi, plan_hls
from data_prep.archive.fetch import AccessError
from data_prep.archive.search import Area, read_area, search_gedi, search_hls
from data_prep.hls.granules import open_scene
from tests.data_prep.archive_server import GEDI, HLS, SEASON, TEMPORAL, Recorded, answer, hls_files, names_in

# searching


def test_a_tile_is_searched_by_name_and_not_by_its_box():
    search = Recorded(answer(HLS))
    found = search_hls(Area(tile="10SFF"), SEASON, sensors=("S30", "L30"), search=search)
    assert search.queries == [
        {"short_name": f"HLS{sensor}", "version": "2.0", "granule_name": f"HLS.{sensor}.T10SFF.*", "temporal": TEMPORAL}
        for sensor in ("L30", "S30")
    ]
    assert len(found) == 2


def test_orbits_are_searched_by_box_in_each_season():
    search = Recorded()
    search_gedi(Area(box=(-122.0, 36.0, -121.0, 37.0)), SEASON.widened(1), search=search)
    assert [query["temporal"][0][:4] for query in search.queries] == ["2019", "2020", "2021"]
    assert search.queries[1] == {
        "short_name": "GEDI_L4A_AGB_Density_V2_1_2056",
        "bounding_box": (-122.0, 36.0, -121.0, 37.0),
        "temporal": TEMPORAL,
    }
    search = Recorded()
    search_gedi(Area(box=(-122.0, 36.0, -121.0, 37.0)), [SEASON], search=search, label="rh98")
    product = {"short_name": "GEDI02_A", "version": "002"}
    assert search.queries == [product | {"bounding_box": (-122.0, 36.0, -121.0, 37.0), "temporal": TEMPORAL}]
    search = Recorded()
    search_gedi(Area(tile="10SFF"), [SEASON], search=search)
    west, south, east, north = search.queries[0]["bounding_box"]
    assert -122 < west < -121.8 and 35.9 < south < 36.1 and -120.7 < east < -120.5 and 36.9 < north < 37.1


SQUARE = [[10, 50], [11, 50], [11, 51], [10, 51], [10, 50]]
CLOSED = [tuple(map(float, point)) for point in SQUARE]


@pytest.mark.parametrize(
    "content",
    [
        {"type": "Polygon", "coordinates": [SQUARE, [[10.2, 50.2], [10.3, 50.2], [10.3, 50.3], [10.2, 50.2]]]},
        {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [SQUARE[::-1]]}},
        {
            "type": "FeatureCollection",
            "features": [{"type": "Feature", "geometry": {"type": "MultiPolygon", "coordinates": [[SQUARE]]}}],
        },
    ],
)
def test_polygons_of_geojson(tmp_path, content):
    path = tmp_path / "area.geojson"
    path.write_text(json.dumps(content))
    area = read_area(path)
    assert area.queries(by_name="never {tile}") == [{"polygon": CLOSED}]
    assert area.latitude == 50.5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "can't be read as GeoJSON"),
        ('{"type": "Polygon"}', "can't be read as GeoJSON"),
        ('{"type": "Point", "coordinates": [1, 2]}', "no polygon in it"),
        ('{"type": "Feature", "geometry": null}', "no polygon in it"),
        ('{"type": "Polygon", "coordinates": [[[1, 2], [3, 4], [5, 7], [8, 9]]]}', "isn't closed"),
        ('{"type": "Polygon", "coordinates": [[[500000, 2], [3, 4], [5, 7], [500000, 2]]]}', "in degrees"),
    ],
)
def test_geojson_that_is_no_area(tmp_path, text, says):
    (tmp_path / "area.geojson").write_text(text)
    with pytest.raises(PrepError, match=says):
        read_area(tmp_path / "area.geojson")


def test_a_search_that_fails():
    def search(**query):
        raise RuntimeError("the archive is closed")

    with pytest.raises(PrepError, match="search failed for .*HLSL30.*the archive is closed"):
        search_hls(Area(tile="10SFF"), SEASON, search=search)
    with pytest.raises(PrepError, match="expected L30, S30 or both"):
        search_hls(Area(tile="10SFF"), SEASON, sensors=("L8",), search=search)


# choosing


def test_granules_of_other_tiles_dates_and_clouds_are_left_out(tmp_path):
    names = {
        "good": HLS,
        "first day": "HLS.L30.T10SFF.2020153T000000.v2.0",
        "last day": "HLS.L30.T10SFF.2020259T235959.v2.0",
        "day before": "HLS.L30.T10SFF.2020152T235959.v2.0",
        "day after": "HLS.L30.T10SFF.2020260T000000.v2.0",
        "neighbour": "HLS.L30.T10SGF.2020183T184512.v2.0",
        "cloudy": "HLS.L30.T10SFF.2020191T184512.v2.0",
        "limit": "HLS.L30.T10SFF.2020199T184512.v2.0",
        "old version": "HLS.L30.T10SFF.2020207T184512.v1.5",
    }
    cloud = {"cloudy": 71, "limit": 70, "good": None}
    answers = [answer(name, hls_files(name), cloud=cloud.get(key, 5)) for key, name in names.items()]
    plan = plan_hls([*answers, answers[0]], tmp_path, season=SEASON, tile="10SFF", max_cloud=70)
    assert set(plan.granules) == {names[key] for key in ("good", "first day", "last day", "limit")}
    assert {name: why[:12] for name, why in plan.left_out.items()} == {
        names["day before"]: "not in seaso",
        names["day after"]: "not in seaso",
        names["neighbour"]: "tile 10SGF",
        names["cloudy"]: "71 % cloud",
        names["old version"]: "HLS.L30.T10S",
    }
    assert len(plan.files) == 4 * 7


def test_only_the_needed_files_are_taken(tmp_path):
    s30 = HLS.replace("L30", "S30")
    layers = ["B05", "B08", "B02", "B03", "B04", "B8A", "B11", "B12", "Fmask", "VAA"]
    plan = plan_hls([answer(s30, hls_files(s30, layers)), answer(HLS, hls_files(HLS))], tmp_path, season=SEASON)
    got = [one.path.relative_to(tmp_path).as_posix() for one in plan.files]
    assert got == [
        f"hls/{HLS}/{file}" for file in hls_files(HLS, ("B02", "B03", "B04", "B05", "B06", "B07", "Fmask"))
    ] + [f"hls/{s30}/{file}" for file in hls_files(s30, ("B02", "B03", "B04", "B8A", "B11", "B12", "Fmask"))]
    assert plan.files[0].url == f"https://archive.example/{HLS}/{HLS}.B02.tif"


def test_a_granule_without_a_needed_file_is_named(tmp_path):
    plan = plan_hls(
        [answer(HLS, hls_files(HLS, ("B02", "B03", "B04", "B05", "B07", "Fmask")))], tmp_path, season=SEASON
    )
    assert plan.incomplete == {HLS: f"the archive's answer has no link to {HLS}.B06.tif"}
    assert plan.files == []
    assert plan_gedi([answer(GEDI, [f"{GEDI}.sha256"])], tmp_path).incomplete == {
        GEDI: "the archive's answer has no link to *.h5"
    }


def test_a_plan_lists_and_sums(tmp_path):
    one, other = f"{GEDI}.h5", f"{GEDI.replace('183', '190')}.h5"
    known = answer(GEDI, [one, f"{GEDI}.sha256"], sizes={one: 245_000_000})
    plan = plan_gedi([known, answer(other[:-3], [other], sizes={other: 1_000_000})], tmp_path)
    assert [(file.path.name, file.size) for file in plan.files] == [(one, 245_000_000), (other, 1_000_000)]
    assert plan.lines()[0] == f"{GEDI}: 1 files, 245.0 MB"
    assert plan.lines()[-1] == "2 granules, 2 files, 246.0 MB; 0 left out"
    plan = plan_hls([answer(HLS, hls_files(HLS), total=191_349_343)], tmp_path, season=SEASON)
    assert plan.lines() == [f"{HLS}: 7 files, part of 191.3 MB", "1 granules, 7 files, at most 191.3 MB; 0 left out"]


# the command


@pytest.fixture
def archive(server, granule, orbit, open_url, monkeypatch):
    """The archive's search and login replaced by recorded answers and the local server."""
    server.files |= {f"/{HLS}/{name}": body for name, body in granule.items()}
    server.files[f"/{GEDI}/{GEDI}.h5"] = orbit
    answers = {
        "HLSL30": [answer(HLS, list(granule), url=server.url, cloud=12, total=200_000)],
        "GEDI_L4A_AGB_Density_V2_1_2056": [
            answer(GEDI, [f"{GEDI}.h5"], url=server.url, sizes={f"{GEDI}.h5": len(orbit)})
        ],
    }
    monkeypatch.setattr(
        module, "search_archive", lambda **query: answers[query["short_name"]] if query["temporal"][0] >= "2019" else []
    )
    monkeypatch.setattr(module, "log_in", lambda: open_url)
    return server


def test_hls_by_the_command(archive, tmp_path, capsys, granule):
    arguments = ["hls", "--tile", "T10SFF", "--season", "2020", "--out", str(tmp_path), "--max-cloud", "20"]
    assert main([*arguments, "--dry-run"]) == 0
    assert f"{HLS}: 7 files, part of 0.2 MB" in capsys.readouterr().out
    assert archive.asked == [] and names_in(tmp_path) == []
    archive.faults[f"/{HLS}/{HLS}.B04.tif"] = [404]
    assert main(arguments) == 1
    captured = capsys.readouterr().out
    assert "failed: " in captured and "6 files downloaded" in captured and "0 were there, 1 failed" in captured
    archive.asked.clear()
    assert main(arguments) == 0
    assert "1 files downloaded" in capsys.readouterr().out
    assert [path for path, _ in archive.asked] == [f"/{HLS}/{HLS}.B04.tif"]
    scene = open_scene(tmp_path / "hls" / HLS)
    assert len(scene.paths) == 7 == len(names_in(scene.folder))
    assert {path.name: path.read_bytes() for path in map(Path, scene.paths)}.items() <= granule.items()


def test_gedi_by_the_command(archive, tmp_path, capsys, orbit):
    arguments = ["--season", "2020-06-01/2020-09-16", "--out", str(tmp_path), "--label-years", "1"]
    assert main(["gedi", "--bbox", "-122", "36", "-121", "37", *arguments]) == 0
    assert (tmp_path / "gedi" / f"{GEDI}.h5").read_bytes() == orbit
    assert "1 granules, 1 files" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["hls", "--tile", "10SFF", "--season", "2021"], "no hls granules found for 2021-05-01/2021-10-01"),
        (
            ["hls", "--tile", "10SFF", "--season", "2020", "--max-cloud", "11"],
            f"; 1 were left out, first {HLS}: 12 % cloud",
        ),
        (
            ["gedi", "--tile", "10SFF", "--season", "2018"],
            "2018-10-01; GEDI measures from 51.6 S to 51.6 N, from 2019-04-18",
        ),
        (["hls", "--tile", "99ABC", "--season", "2020"], "expected an MGRS tile"),
        (["hls", "--bbox", "0", "10", "1", "9", "--season", "2020"], "south < north"),
        (["gedi", "--area", "nowhere.geojson", "--season", "2020"], "nowhere.geojson"),
    ],
)
def test_errors_of_the_command(archive, tmp_path, capsys, arguments, says):
    assert main([*arguments, "--out", str(tmp_path)]) == 1
    assert says in capsys.readouterr().err
    assert names_in(tmp_path) == []


def test_missing_credentials_give_the_steps(tmp_path, monkeypatch, capsys):
    for name in ("EARTHDATA_TOKEN", "EARTHDATA_USERNAME", "EARTHDATA_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(module, "search_archive", Recorded(answer(HLS, hls_files(HLS))))
    assert main(["hls", "--tile", "10SFF", "--season", "2020", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    for needed in ("https://urs.earthdata.nasa.gov/users/new", "export EARTHDATA_TOKEN=", "machine urs.earthdata"):
        assert needed in error
    (tmp_path / "netrc").write_text("machine elsewhere.example login me password it\n")
    with pytest.raises(AccessError, match="not found in .netrc"):
        log_in()


def test_a_missing_library_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "earthaccess", None)  # importing it fails
    assert main(["hls", "--tile", "10SFF", "--season", "2020", "--out", str(tmp_path)]) == 1
    assert "pip install 'biomass-jax[prep]'" in capsys.readouterr().err


def logging_in(monkeypatch, *outcomes):
    """earthaccess' login replaced by outcomes in turn; returns the strategies it was asked for."""
    import earthaccess

    strategies = []

    def login(strategy):
        strategies.append(strategy)
        outcome = outcomes[len(strategies) - 1]
        if isinstance(outcome, Exception):
            raise outcome
        return SimpleNamespace(authenticated=outcome)

    def session():
        made = requests.Session()
        made.headers["Authorization"] = "Bearer synthetic"
        return made

    monkeypatch.setattr(earthaccess, "login", login)
    monkeypatch.setattr(earthaccess, "get_requests_https_session", session)
    return strategies


def test_environment_then_netrc_and_each_request_is_authorised(server, monkeypatch):
    strategies = logging_in(monkeypatch, LoginStrategyUnavailable("no variables"), True)
    server.files["/a.bin"] = b"abc"
    open_url = log_in()
    response = open_url(f"{server.url}/a.bin", {"Range": "bytes=1-"})
    assert strategies == ["environment", "netrc"]
    assert (response.status_code, response.content) == (206, b"bc")
    assert response.request.headers["Authorization"] == "Bearer synthetic"


def test_a_login_that_is_refused_or_out_of_reach(monkeypatch):
    logging_in(monkeypatch, LoginAttemptFailure("wrong password"))
    with pytest.raises(AccessError, match="refused what the environment holds: wrong password"):
        log_in()
    logging_in(monkeypatch, requests.ConnectionError("no route"))
    with pytest.raises(PrepError, match="can't be reached: no route"):
        log_in()


def test_the_search_of_the_archive_asks_for_everything(monkeypatch):
    import earthaccess

    search = Recorded(answer(HLS))
    monkeypatch.setattr(earthaccess, "search_data", search)
    found = search_hls(Area(tile="10SFF"), SEASON, search=module.search_archive)
    assert found == [answer(HLS)]
    assert search.queries[0]["count"] == -1
    assert search.queries[0]["granule_name"] == "HLS.L30.T10SFF.*"


@pytest.mark.parametrize(
    "ring",
    [
        [(170, -1), (190, -1), (190, 1), (170, 1), (170, -1)],
        [(170, 1), (190, 1), (190, -1), (170, -1), (170, 1)],
        [(170, -1), (-170, -1), (-170, 1), (170, 1), (170, -1)],
        [(170, 1), (-170, 1), (-170, -1), (170, -1), (170, 1)],
    ],
)
def test_polygons_across_the_antimeridian_in_either_convention(tmp_path, ring):
    (tmp_path / "a.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    (found,) = read_area(tmp_path / "a.geojson").rings
    corners = [(170, -1), (-170, -1), (-170, 1), (170, 1)]  # counter-clockwise
    start = corners.index(found[0])
    assert found == [*corners[start:], *corners[:start], corners[start]]
