"""What files are by their first bytes."""

import gzip
import io
import re
import zipfile

import pytest

from biomass_jax.runtime.content import HDF5, TIFF, is_page, is_text, mistaken, unfinished


def zipped():
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("a.tif", b"II*")
    return made.getvalue()


AGAIN = r"download the file itself \(a login may be needed\)"
CASES = [
    (b"", r"an empty file \(0 bytes\)"),
    (bytes(100), "zeros at its beginning"),
    (
        b"\n<!DOCTYPE html>\n<html><head>\n<title>\n Earthdata  Login </title>",
        "an HTML page titled 'Earthdata Login', a login page .*log in .*Earthdata.* download it again",
    ),
    (b"\xef\xbb\xbf<HTML><TITLE>Sign in</TITLE>", "an HTML page titled 'Sign in', a login page"),
    (b"<html><body><form><input type='password'></form>", "an HTML page, a login page"),
    (
        b"<?xml version='1.0'?><!DOCTYPE html PUBLIC 'x'><html><title>404</title>",
        "an HTML page titled '404', a server's",
    ),
    (
        b"<html><head><title>503 Service Unavailable</title>",
        f"an HTML page titled '503 Service Unavailable', .*{AGAIN}",
    ),
    (
        b"<?xml version='1.0'?>\n<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>",
        f"XML text that says 'AccessDenied: Request has expired', a server's answer .*{AGAIN}",
    ),
    (b"<Granule><GranuleUR>HLS.L30</GranuleUR>", f"XML text that begins '<Granule><GranuleUR>.*{AGAIN}"),
    (b'{"error": "invalid_token", "error_description": "expired"}', "JSON text that says 'invalid_token: expired'"),
    (b' [{"message": "Unauthorized"}]', "JSON text that says 'Unauthorized'"),
    (b'{"type": "Feature"}', "JSON text that begins"),
    (b"HTTP Basic: Access denied.\n", f"text that begins 'HTTP Basic: Access denied.'; {AGAIN}"),
    (b"version https://git-lfs.github.com/spec/v1", "a git-lfs pointer"),
    (zipped(), "a zip archive; unpack it first"),
    (gzip.compress(b"II*", mtime=0), "a gzip archive; unpack it first"),
    (b"a/" + bytes(255) + b"ustar" + bytes(300), "a tar archive"),
    (b"\x89PNG\r\n\x1a\n", "a PNG picture"),
    (b"\x07\x99\x01", r"no known kind of file, it begins with b'\\x07\\x99\\x01'"),
]


@pytest.mark.parametrize(("content", "says"), CASES)
@pytest.mark.parametrize("right", [HDF5, TIFF])
def test_what_a_file_is_instead(tmp_path, content, says, right):
    path = tmp_path / "a.h5"
    path.write_bytes(content)
    found = mistaken(path, *right)
    assert re.match(f"(?s){says}", found), found


def test_a_file_that_begins_as_it_should_is_no_mistake(tmp_path):
    for head, right, other in ((HDF5[0], HDF5, TIFF), *((head, TIFF, HDF5) for head in TIFF)):
        path = tmp_path / "a"
        path.write_bytes(head + b"more")
        assert mistaken(path, *right) is None
        assert mistaken(path, *other) in ("an HDF5 file", "a TIFF file")
    assert mistaken(tmp_path / "none", *HDF5) is None
    assert mistaken(tmp_path, *HDF5) is None


def test_pages_and_texts():
    assert [is_page(head) for head in (b" <!doctype html>", b"<?xml?><html>", b"<Error>", b"II*<html>")] == [1, 1, 0, 0]
    assert [is_text(head) for head in (b"<Error>", b'{"a": 1}', b"[]", b"{\x00", b"II*\0")] == [1, 1, 1, 0, 0]


def test_names_of_downloads_that_have_not_ended():
    names = ("a.h5.part", ".a.tif.PARTIAL", "a.tif.crdownload", "a.tif", "part.h5", "a.h5")
    assert [unfinished(name) for name in names] == [True, True, True, False, False, False]
