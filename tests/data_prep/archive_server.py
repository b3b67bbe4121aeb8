"""A stand-in for NASA's archive: recorded search answers and a local server that can go wrong on request."""

import http.server
import threading
from contextlib import contextmanager

import h5py
import numpy as np
import requests

from data_prep.season import Season
from data_prep.synthetic.granule import Overpass, write_granule

SEASON = Season.parse("2020-06-01/2020-09-16")
HLS = "HLS.L30.T10SFF.2020183T184512.v2.0"
GEDI = "GEDI04_A_2020183151358_O08815_02_T00198_02_002_01_V002"
CHUNK = 2**16  # pieces that are written as they come
TEMPORAL = ("2020-06-01T00:00:00Z", "2020-09-15T23:59:59Z")


class Server(http.server.ThreadingHTTPServer):
    """Files by path, with ranges; `faults[path]` is a list of what to do wrong in the next answers."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.asked = {}, {}, []
        self.etag = '"1"'

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.asked.append((self.path, asked))
        fault = next(iter(self.server.faults.get(self.path, [])), None)
        if fault is not None:
            self.server.faults[self.path].pop(0)
        body = self.server.files.get(self.path)
        if isinstance(fault, int) or body is None:
            return self.answer(fault or 404, b"no", {"Retry-After": "0"} if fault == 429 else {})
        if fault == "page":
            return self.answer(200, b"<!DOCTYPE html>", {"Content-Type": "text/html; charset=utf-8"})
        headers = {"ETag": self.server.etag}
        if fault == "longer":
            body = body + b"more"
        first = int(asked.removeprefix("bytes=").rstrip("-")) if asked and fault != "whole" else 0
        status = 200
        if asked and fault != "whole":
            if first >= len(body):
                return self.answer(416, b"")
            status = 206
            first += fault == "shifted"
            headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
        self.answer(status, body[first:], headers, cut=fault == "drop")

    def answer(self, status, body, headers=None, cut=False):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")  # or a client would ask again on what is being closed
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = True

    def log_message(self, *args):
        pass


@contextmanager
def serving():
    """A server that runs as long as the block."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def asking():
    """`open_url` for files that need no login."""
    with requests.Session() as session:
        yield lambda url, headers: session.get(url, headers=dict(headers), stream=True, timeout=5)


def granule_files(folder):
    """{file name: bytes} of a synthetic granule with bands that nobody uses."""
    rng = np.random.default_rng(1)
    image = rng.integers(0, 5000, (40, 50, 6)).astype(np.int16)
    others = {"B01": image[..., 0], "B09": image[..., 0]}
    granule = write_granule(folder, image, np.zeros((40, 50), np.uint8), Overpass(), others)
    return {path.name: path.read_bytes() for path in sorted(granule.iterdir())}


def orbit_file(folder):
    """Bytes of an HDF5 file."""
    path = folder / "orbit.h5"
    with h5py.File(path, "w") as file:
        file["BEAM0101/agbd"] = np.arange(5000.0)
    return path.read_bytes()


def answer(name, files=(), *, url="https://archive.example", cloud=None, sizes=None, total=None):
    """A granule's record as the archive's search gives it (UMM-G), cut to what a reader touches."""
    related = [{"URL": f"{url}/{name}/{file}", "Type": "GET DATA"} for file in files]
    related += [{"URL": f"s3://bucket/{name}/{file}", "Type": "GET DATA VIA DIRECT ACCESS"} for file in files]
    related += [{"URL": f"{url}/public/{name}.jpg", "Type": "GET RELATED VISUALIZATION"}]
    umm = {"GranuleUR": name, "RelatedUrls": related, "DataGranule": {}}
    if cloud is not None:
        umm["AdditionalAttributes"] = [
            {"Name": "MGRS_TILE_ID", "Values": [name[9:14]]},
            {"Name": "CLOUD_COVERAGE", "Values": [str(cloud)]},
        ]
    information = [{"Name": "Not provided", "Size": total, "SizeUnit": "NA"}] if total else []
    information += [{"Name": file, "SizeInBytes": size} for file, size in (sizes or {}).items()]
    umm["DataGranule"]["ArchiveAndDistributionInformation"] = information
    return {"meta": {"concept-id": "G1-X"}, "umm": umm}


def hls_files(name, layers=("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B09", "Fmask", "SZA")):
    return [f"{name}.{layer}.tif" for layer in layers]


class Recorded:
    """A search that gives recorded answers and notes what it was asked."""

    def __init__(self, *answers):
        self.answers, self.queries = answers, []

    def __call__(self, **query):
        self.queries.append(query)
        return list(self.answers)


def names_in(folder):
    return sorted(entry.name for entry in folder.iterdir())
