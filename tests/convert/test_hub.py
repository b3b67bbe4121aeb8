"""hf:// names: their form, a missing library, and downloads from a local stand-in for the hub."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from biomass_jax.convert import hub
from biomass_jax.convert.convert import read
from biomass_jax.convert.declared import Options
from biomass_jax.errors import ConvertError

COMMIT = "a" * 40


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """A huggingface_hub that writes down what it is asked for."""
    asked = []

    def hf_hub_download(**arguments):
        asked.append(arguments)
        if arguments["filename"] == "gone.ckpt":
            raise RuntimeError("404 Client Error\nEntry Not Found")
        return str(tmp_path / arguments["filename"])

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=hf_hub_download))
    return asked


def test_a_name_is_taken_apart(calls, tmp_path):
    assert hub.fetch("hf://ibm-granite/some.repo/model.ckpt") == tmp_path / "model.ckpt"
    assert hub.fetch("hf://owner/repo@v1.0/sub/model.ckpt") == tmp_path / "sub" / "model.ckpt"
    hub.fetch("hf://owner/repo@refs%2Fpr%2F1/model.ckpt")
    assert calls == [
        {"repo_id": "ibm-granite/some.repo", "filename": "model.ckpt", "revision": None},
        {"repo_id": "owner/repo", "filename": "sub/model.ckpt", "revision": "v1.0"},
        {"repo_id": "owner/repo", "filename": "model.ckpt", "revision": "refs/pr/1"},
    ]


@pytest.mark.parametrize(
    "name", ["hf://owner/file", "hf://owner/repo/", "hf:///repo/file", "hf://a/b@/c", "hf://o p/r/f"]
)
def test_another_form_is_an_error(calls, name):
    with pytest.raises(ConvertError, match="expected hf://OWNER/REPO/FILE"):
        hub.fetch(name)
    assert calls == []


def test_a_failed_download_is_one_line(calls):
    with pytest.raises(ConvertError, match=r"hf://o/r/gone\.ckpt: could not be fetched .*404 Client Error\)$"):
        hub.fetch("hf://o/r/gone.ckpt")


def test_without_the_library_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConvertError, match=r"pip install 'biomass-jax\[hub\]'"):
        hub.fetch("hf://owner/repo/model.ckpt")


def test_the_commit_is_read_from_the_cache_path(tmp_path):
    assert hub.commit_of(tmp_path / "models--o--r" / "snapshots" / COMMIT / "sub" / "x.ckpt") == COMMIT
    assert hub.commit_of(tmp_path / "x.ckpt") is None


class _Hub(http.server.BaseHTTPRequestHandler):
    """The hub's resolve endpoint for the files in `files`."""

    files: dict[str, bytes] = {}

    def do_HEAD(self):
        self._answer(False)

    def do_GET(self):
        self._answer(True)

    def _answer(self, with_body):
        body = self.files.get(self.path)
        if body is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


FETCH = """
import json, sys
from biomass_jax.convert import hub
path = hub.fetch(sys.argv[1])
print(json.dumps([str(path), hub.commit_of(path)]))
"""


def test_the_real_library_fetches_from_a_local_stand_in(golden, tmp_path, root):
    pytest.importorskip("huggingface_hub", reason="the hub extra is not installed")
    source = golden / "ckpt_micro_cli" / "state_dict.ckpt"
    _Hub.files = {"/owner/repo/resolve/main/sub/model.ckpt": source.read_bytes()}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # A process of its own, because the library reads its settings when it is imported.
    settings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    try:

        def fetch(name):
            command = [sys.executable, "-c", FETCH, name]
            return subprocess.run(
                command, env=os.environ | settings, cwd=root, capture_output=True, text=True, timeout=120
            )

        found = fetch("hf://owner/repo/sub/model.ckpt")
        assert found.returncode == 0, found.stderr
        path, commit = json.loads(found.stdout.splitlines()[-1])
        assert commit == COMMIT
        assert Path(path).read_bytes() == source.read_bytes()
        gone = fetch("hf://owner/repo/none.ckpt")
        assert "hf://owner/repo/none.ckpt: could not be fetched" in gone.stderr
    finally:
        server.shutdown()
        server.server_close()
    converted = read(path, options=Options(statistics="granite"))
    assert converted.layout.name == "granite"


def test_provenance_names_the_hub_file_and_its_commit(monkeypatch, golden, tmp_path):
    folder = tmp_path / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (folder / "model.ckpt").write_bytes((golden / "ckpt_micro_cli" / "state_dict.ckpt").read_bytes())
    monkeypatch.setattr(hub, "fetch", lambda name: folder / "model.ckpt")
    found = read("hf://owner/repo/model.ckpt", options=Options(statistics="granite"))
    assert found.provenance["source"] == "hf://owner/repo/model.ckpt"
    assert found.provenance["commit"] == COMMIT
