import json
import os

import numpy as np
import pytest

from biomass_jax.errors import PrepError
from data_prep.archive.fetch import AccessError, Wanted, fetch, fetch_all
from tests.data_prep.archive_server import CHUNK, names_in


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The pauses, which no test waits for."""
    pauses = []
    monkeypatch.setattr("data_prep.archive.fetch.sleep", pauses.append)
    return pauses


def get(server, open_url, path, size=None, attempts=5, pause=2):
    waits = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.archive.fetch.sleep", waits.append)
        patch.setattr("data_prep.archive.fetch.ATTEMPTS", attempts)
        patch.setattr("data_prep.archive.fetch.PAUSE", pause)
        return fetch(Wanted(f"{server.url}/{path.name}", path, size), open_url), waits


def test_a_file_comes_whole(server, open_url, tmp_path):
    server.files["/a.bin"] = bytes(range(256)) * 40
    assert get(server, open_url, tmp_path / "a.bin", size=10240) == (10240, [])
    assert (tmp_path / "a.bin").read_bytes() == server.files["/a.bin"]
    assert names_in(tmp_path) == ["a.bin"]


def test_a_dropped_connection_goes_on_where_it_ended(server, open_url, tmp_path):
    body = np.random.default_rng(0).bytes(12 * CHUNK)
    server.files["/a.bin"], server.faults["/a.bin"] = body, ["drop", 503, "drop"]
    assert get(server, open_url, tmp_path / "a.bin", pause=2) == (12 * CHUNK, [2, 4, 8])
    assert (tmp_path / "a.bin").read_bytes() == body
    assert [asked for _, asked in server.asked] == [
        None,
        f"bytes={6 * CHUNK}-",
        f"bytes={6 * CHUNK}-",
        f"bytes={9 * CHUNK}-",
    ]
    assert names_in(tmp_path) == ["a.bin"]


def test_a_later_run_goes_on_too(server, open_url, tmp_path):
    body = np.random.default_rng(0).bytes(4 * CHUNK)
    server.files["/a.bin"], server.faults["/a.bin"] = body, ["drop"]
    with pytest.raises(PrepError, match=r"a\.bin: .*\(1 attempts\); start again to resume"):
        get(server, open_url, tmp_path / "a.bin", attempts=1)
    assert names_in(tmp_path) == [".a.bin.part", ".a.bin.part.json"]
    assert get(server, open_url, tmp_path / "a.bin") == (2 * CHUNK, [])
    assert (tmp_path / "a.bin").read_bytes() == body


def test_stopped_between_the_last_byte_and_the_name(server, open_url, tmp_path):
    body = b"x" * 1000
    server.files["/a.bin"] = body
    (tmp_path / ".a.bin.part").write_bytes(body)
    (tmp_path / ".a.bin.part.json").write_text(json.dumps({"etag": '"1"', "modified": None, "size": 1000}))
    assert get(server, open_url, tmp_path / "a.bin") == (0, [])
    assert server.asked == []
    assert names_in(tmp_path) == ["a.bin"]


class Answer:
    """An answer of a library that doesn't notice when a body ends early."""

    def __init__(self, status_code, pieces, **headers):
        self.status_code, self.pieces, self.headers = status_code, pieces, headers

    def iter_content(self, chunk_size):
        return self.pieces

    def close(self):
        pass


def test_a_body_that_ends_early_without_an_error(tmp_path, waits):
    answers = [
        Answer(200, [b"abc", b"de"], **{"Content-Length": "8"}),
        Answer(206, [b"fgh"], **{"Content-Length": "3", "Content-Range": "bytes 5-7/8"}),
    ]
    asked = []

    def open_url(url, headers):
        asked.append(headers.get("Range"))
        return answers[len(asked) - 1]

    assert fetch(Wanted("https://x/a.bin", tmp_path / "a.bin"), open_url) == 8
    assert (tmp_path / "a.bin").read_bytes() == b"abcdefgh"
    assert asked == [None, "bytes=5-"] and waits == [2.0]


def test_a_part_of_another_version_is_thrown_away(server, open_url, tmp_path):
    server.files["/a.bin"], server.faults["/a.bin"] = b"a" * 4 * CHUNK, ["drop"]
    with pytest.raises(PrepError):
        get(server, open_url, tmp_path / "a.bin", attempts=1)
    server.files["/a.bin"], server.etag = b"b" * 4 * CHUNK, '"2"'
    assert get(server, open_url, tmp_path / "a.bin") == (4 * CHUNK, [2.0])
    assert (tmp_path / "a.bin").read_bytes() == server.files["/a.bin"]


@pytest.mark.parametrize("fault", ["whole", "shifted", 416])
def test_servers_that_answer_a_range_in_their_own_way(server, open_url, tmp_path, fault):
    body = np.random.default_rng(0).bytes(4 * CHUNK)
    server.files["/a.bin"], server.faults["/a.bin"] = body, ["drop", fault]
    get(server, open_url, tmp_path / "a.bin")
    assert server.asked[1] == ("/a.bin", f"bytes={2 * CHUNK}-")
    assert (tmp_path / "a.bin").read_bytes() == body
    assert names_in(tmp_path) == ["a.bin"]


def test_a_part_without_a_note_starts_anew(server, open_url, tmp_path):
    server.files["/a.bin"] = b"good" * 100
    (tmp_path / ".a.bin.part").write_bytes(b"bad" * 10)
    get(server, open_url, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == b"good" * 100


def test_a_wrong_size_is_tried_again_and_never_kept(server, open_url, tmp_path):
    server.files["/a.bin"], server.faults["/a.bin"] = b"x" * 1000, ["longer"]
    assert get(server, open_url, tmp_path / "a.bin", size=1000)[1] == [2.0]
    server.files["/b.bin"] = b"x" * 999
    with pytest.raises(PrepError, match=r"b\.bin: wrong size: 999 bytes on the server, expected 1,000 \(3 attempts\)"):
        get(server, open_url, tmp_path / "b.bin", size=1000, attempts=3)
    assert names_in(tmp_path) == ["a.bin"]


def test_pauses_grow_and_the_server_may_name_one(server, open_url, tmp_path):
    server.files["/a.bin"], server.faults["/a.bin"] = b"x", [500, 429, 502, 504]
    assert get(server, open_url, tmp_path / "a.bin", pause=40) == (1, [40, 0, 120, 120])
    server.faults["/a.bin"] = [503, 503]
    with pytest.raises(PrepError, match=r"the server answers 503 \(2 attempts\)"):
        get(server, open_url, tmp_path / "a.bin", attempts=2)


def test_no_server(open_url, tmp_path, waits, monkeypatch):
    monkeypatch.setattr("data_prep.archive.fetch.ATTEMPTS", 2)
    with pytest.raises(PrepError, match=r"a\.bin: no answer"):
        fetch(Wanted("http://127.0.0.1:9/a.bin", tmp_path / "a.bin"), open_url)
    assert waits == [2.0]


def test_a_file_that_is_not_there_is_not_asked_for_again(server, open_url, tmp_path):
    with pytest.raises(PrepError, match=r"the server answers 404 for http"):
        get(server, open_url, tmp_path / "a.bin")
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("fault", "says"), [(401, r"refused \(401\)"), (403, r"refused \(403\)"), ("page", "a web page")]
)
def test_refused_credentials_end_everything_and_name_the_steps(server, open_url, tmp_path, fault, says):
    for name in ("a", "b", "c", "d", "e", "f"):
        server.files[f"/{name}.bin"], server.faults[f"/{name}.bin"] = b"x", [fault] * 9
    wanted = [Wanted(f"{server.url}/{name}.bin", tmp_path / f"{name}.bin") for name in "abcdef"]
    with pytest.raises(AccessError, match=rf"(?s){says}.*EARTHDATA_TOKEN.*netrc"):
        fetch_all(wanted, lambda: open_url, workers=1)
    assert len(server.asked) < 6
    assert [name for name in names_in(tmp_path) if not name.startswith(".")] == []


@pytest.mark.parametrize("size", [None, 5000])
@pytest.mark.parametrize("name", ["a.tif", "a.h5", "a.bin"])
def test_a_login_page_is_known_whatever_the_server_calls_it(server, open_url, tmp_path, name, size):
    server.files[f"/{name}"] = b"<!DOCTYPE html><html><title>Earthdata Login</title></html>"
    with pytest.raises(AccessError, match=r"(?s)an HTML page titled 'Earthdata Login', a login page.*EARTHDATA_TOKEN"):
        get(server, open_url, tmp_path / name, size=size)
    assert len(server.asked) == 1
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(("name", "size"), [("a.tif", None), ("a.h5", None), ("a.h5", 5000)])
def test_what_a_server_says_in_place_of_a_file_is_told(server, open_url, tmp_path, name, size):
    server.files[f"/{name}"] = b"<Error><Code>SlowDown</Code><Message>Reduce your rate</Message></Error>"
    with pytest.raises(PrepError, match=r"it is XML text that says 'SlowDown: Reduce your rate'.*\(2 attempts\)"):
        get(server, open_url, tmp_path / name, attempts=2, size=size)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("name", ["a.tif", "a.h5"])
def test_content_is_checked_even_where_the_size_is_right(server, open_url, tmp_path, granule, orbit, name):
    whole = next(iter(granule.values())) if name == "a.tif" else orbit
    server.files[f"/{name}"] = whole[: len(whole) // 2]
    with pytest.raises(PrepError, match="truncated|not a whole HDF5 file"):
        get(server, open_url, tmp_path / name, attempts=2, size=len(whole) // 2)
    assert names_in(tmp_path) == []
    server.files[f"/{name}"] = whole
    get(server, open_url, tmp_path / name)
    assert names_in(tmp_path) == [name]


def test_what_is_there_and_whole_is_not_taken_again(server, open_url, tmp_path, granule):
    name, body = next(iter(granule.items()))
    server.files["/a.tif"], server.files["/b.tif"], server.files["/c.tif"] = body, body, body
    (tmp_path / "a.tif").write_bytes(body)
    (tmp_path / "b.tif").write_bytes(body[:-100])
    (tmp_path / "c.tif").write_bytes(body + b"x")
    sizes = {"a": None, "b": None, "c": len(body)}
    wanted = [Wanted(f"{server.url}/{key}.tif", tmp_path / f"{key}.tif", size) for key, size in sizes.items()]
    lines = []
    result = fetch_all(wanted, lambda: open_url, log=lines.append)
    assert result.present == [tmp_path / "a.tif"]
    assert result.received == [tmp_path / "b.tif", tmp_path / "c.tif"]
    assert result.bytes == 2 * len(body)
    assert all(path.read_bytes() == body for path in tmp_path.iterdir())
    assert len(lines) == 2


def test_one_file_that_fails_does_not_stop_the_others(server, open_url, tmp_path):
    server.files |= {"/a.bin": b"1", "/c.bin": b"2"}
    wanted = [Wanted(f"{server.url}/{name}.bin", tmp_path / "new" / f"{name}.bin") for name in "abc"]
    result = fetch_all(wanted, lambda: open_url, workers=2)
    assert [path.name for path in result.received] == ["a.bin", "c.bin"]
    assert list(result.failed) == [tmp_path / "new" / "b.bin"]
    assert "404" in result.failed[tmp_path / "new" / "b.bin"]


def test_no_room(server, open_url, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(PrepError, match="make room"):
        fetch_all([Wanted(f"{server.url}/a.bin", tmp_path / "a.bin", 5000)], lambda: open_url)
    assert server.asked == []


def test_a_disk_that_fills_up_is_not_tried_again(server, open_url, tmp_path, monkeypatch):
    server.files["/a.bin"] = b"x"

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PrepError, match=r"can't be written: No space left on device"):
        get(server, open_url, tmp_path / "a.bin")
    assert len(server.asked) == 1
