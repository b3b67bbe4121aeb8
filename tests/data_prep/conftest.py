"""A local archive to download from, for the tests that share it."""

import pytest

from tests.data_prep.archive_server import asking, granule_files, orbit_file, serving


@pytest.fixture
def server():
    with serving() as server:
        yield server


@pytest.fixture
def open_url():
    with asking() as open_url:
        yield open_url


@pytest.fixture(scope="module")
def granule(tmp_path_factory):
    return granule_files(tmp_path_factory.mktemp("granule"))


@pytest.fixture(scope="module")
def orbit(tmp_path_factory):
    return orbit_file(tmp_path_factory.mktemp("orbit"))
