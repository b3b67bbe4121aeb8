"""NASA's archive as GDAL meets it: a gate that wants a token and points to a store, which refuses to see the token."""

import json
import os
import threading
import uuid
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.data_prep.archive_server import answer

TOKEN = "a.token"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, handler, **fields):
        super().__init__(("127.0.0.1", 0), handler)
        vars(self).update(fields)

    def handle_error(self, *args):
        pass  # a client that went away


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def say(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


class Gate(_Handler):
    def do_GET(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            if self.server.polite:
                return self.say(401, b"no")
            return self.say(200, b"<!DOCTYPE html><title>Earthdata Login</title>", Content_Type="text/html")
        return self.say(302, Location=f"http://localhost:{self.server.store.server_port}{self.path}?signature=s")


class Store(_Handler):
    def do_GET(self):
        if "Authorization" in self.headers:
            return self.say(400, b"only one way to log in")
        if self.server.broken:
            return self.say(500, b"")
        path = self.server.folder / self.path.partition("?")[0].split("/", 2)[2]  # behind the archive's own name
        if not path.is_file():
            return self.say(404)
        body, asked = path.read_bytes(), self.headers.get("Range")
        if asked is None:
            return self.say(200, body, Accept_Ranges="bytes")
        first, last = (int(number or len(body)) for number in asked.removeprefix("bytes=").split("-"))
        part = body[first : last + 1]
        if self.command == "GET":
            self.server.asked.append((path.name, first, first + len(part)))
        whole = f"bytes {first}-{first + len(part) - 1}/{len(body)}"
        return self.say(206, part, Accept_Ranges="bytes", Content_Range=whole)


class Archive:
    """A folder of granules as the archive has them.

    Attributes:
        asked: (file, first byte, the one behind the last) of each range that was given.
    """

    def __init__(self, folder):
        self.store = _Server(Store, folder=Path(folder), broken=False, asked=[])
        self.gate = _Server(Gate, store=self.store, polite=True)
        self.asked = self.store.asked
        self.searches = []
        self.name = uuid.uuid4().hex  # GDAL keeps what it read by its URL, and a later server may get the same port

    def url(self, server):
        """Where one of the two servers has the granules."""
        return f"http://127.0.0.1:{server.server_port}/{self.name}"

    def search(self, **query):
        """In place of `earthaccess.search_data`."""
        self.searches.append(query)
        url = self.url(self.gate)
        wanted = "HLS." + query["short_name"][-3:] if query["short_name"].startswith("HLS") else "GEDI04_A"
        granules = sorted(path for path in self.store.folder.iterdir() if path.name.startswith(wanted))
        return [answer(path.name, sorted(file.name for file in path.iterdir()), url=url) for path in granules]


@contextmanager
def open_archive(folder):
    """An archive whose servers run as long as the block."""
    archive = Archive(folder)
    servers = (archive.store, archive.gate)
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield archive
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


# What asks NASA's archive, in its place: the answers and the token are those of the stand-in.
EARTHACCESS = """
import json, os, requests
from types import SimpleNamespace
from . import exceptions
def login(strategy):
    if os.environ.get("EARTHDATA_TOKEN") is None:
        raise exceptions.LoginStrategyUnavailable(strategy)
    return SimpleNamespace(authenticated=True, token={"access_token": os.environ["EARTHDATA_TOKEN"]})
def search_data(short_name, **query):
    return json.load(open(os.environ["ARCHIVE_ANSWERS"])).get(short_name, [])
def get_requests_https_session():
    session = requests.Session()
    session.headers["Authorization"] = "Bearer " + os.environ["EARTHDATA_TOKEN"]
    return session
"""
EXCEPTIONS = """
class LoginStrategyUnavailable(Exception): ...
class LoginAttemptFailure(Exception): ...
"""


def stand_in(archive, folder, root):
    """Environment variables with which another process finds the stand-in as `earthaccess`, and the checkout `root`."""
    package = folder / "earthaccess"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(EARTHACCESS)
    (package / "exceptions.py").write_text(EXCEPTIONS)
    products = ("HLSL30", "GEDI_L4A_AGB_Density_V2_1_2056")
    answers = folder / "answers.json"
    answers.write_text(json.dumps({name: archive.search(short_name=name) for name in products}))
    path = os.pathsep.join((str(folder), str(root)))
    return {"PYTHONPATH": path, "ARCHIVE_ANSWERS": str(answers), "EARTHDATA_TOKEN": TOKEN}
