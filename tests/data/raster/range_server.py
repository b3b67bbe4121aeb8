"""Serves a folder with byte ranges, as object stores do: `python range_server.py FOLDER` prints its port
and lists the paths it is asked for in FOLDER/asked.txt.

A program of its own, because GDAL may hold Python's lock while it waits for an answer.
"""

import functools
import http.server
import sys
from pathlib import Path


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Understands `Range: bytes=a-b`, which the standard library's server does not."""

    def do_GET(self):
        body = self._head()
        self.wfile.write(body)

    def do_HEAD(self):
        self._head()

    def _head(self):
        path = Path(self.directory, self.path.split("?")[0].lstrip("/"))
        body = path.read_bytes() if path.is_file() else b""
        with Path(self.directory, "asked.txt").open("a") as log:
            log.write(self.path + "\n")
        asked = self.headers.get("Range") if body else None
        first, last = (int(n) for n in asked.removeprefix("bytes=").split("-")) if asked else (0, len(body))
        part = body[first : last + 1]
        self.send_response(206 if asked else 200 if body else 404)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(body)}")
        self.end_headers()
        return part

    def log_message(self, *args):
        pass


if __name__ == "__main__":
    handler = functools.partial(Ranges, directory=sys.argv[1])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        print(server.server_port, flush=True)
        server.serve_forever()
