"""A file server on this machine that fails at random, seeded, places, in the ways far servers do."""

import random
import socket
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# What comes instead of the bytes asked for.
FAULTS = ("503", "no answer", "half, then closed", "half, then silence", "half, as if whole", "a page")


class FaultyServer(ThreadingHTTPServer):
    """Serves a folder with byte ranges; a `share` of the answers after the first `well` ones is one of `faults`.

    `asked` lists the paths it was asked for, `failed` counts the faults.
    """

    daemon_threads = True

    def __init__(self, folder, *, faults=FAULTS, share=0.3, seed=0, well=2, silence=4.0):
        self.folder, self.faults, self.share, self.well, self.silence = Path(folder), faults, share, well, silence
        self.random, self.lock, self.ranges, self.failed, self.asked = random.Random(seed), threading.Lock(), 0, 0, []
        super().__init__(("127.0.0.1", 0), _Handler)
        # GDAL keeps what it read by its URL, and a later server may get the same port.
        self.url = f"http://127.0.0.1:{self.server_port}/{uuid.uuid4().hex}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *args):
        self.shutdown()
        self.server_close()

    def handle_error(self, *args):
        pass  # a client that went away

    def next_fault(self):
        with self.lock:
            self.ranges += 1
            fails = self.ranges > self.well and self.random.random() < self.share
            self.failed += fails
            return self.random.choice(self.faults) if fails else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer(self._file(), None)

    def do_GET(self):
        data = self._file()
        asked = self.headers.get("Range")
        self._answer(data, self.server.next_fault() if data and asked else None, asked)

    def _file(self):
        self.server.asked.append(self.path)
        path = self.server.folder / self.path.split("?")[0].split("/", 2)[2]
        return path.read_bytes() if path.is_file() else b""

    def _answer(self, data, fault, asked=None):
        first, last = 0, len(data) - 1
        if asked:
            first, end = (int(n) if n else last for n in asked.removeprefix("bytes=").split("-"))
            last = min(end, last)
        part = data[first : last + 1]
        if fault == "half, as if whole":
            last -= len(part) // 2
            part = data[first : last + 1]
        code = 404 if not data else 206 if asked else 200
        if fault in ("503", "a page"):
            code, part = (503, b"") if fault == "503" else (200, b"<html>Please log in</html>")
        if fault == "no answer":
            return self._hang_up()
        self.send_response(code)
        if code == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if fault in ("half, then closed", "half, then silence"):
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            time.sleep(self.server.silence if fault.endswith("silence") else 0)
            return self._hang_up()
        return self.wfile.write(part)

    def _hang_up(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
