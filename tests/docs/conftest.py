"""An installed tree as $HOME/ditattn, which pages that are followed literally begin with."""

import os
import sys
from pathlib import Path

import page
import pytest


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    build, cmake = os.environ["DITATTN_TEST_BUILD"], os.environ["DITATTN_TEST_CMAKE"]
    page.run([cmake, "--install", build, "--prefix", folder / "ditattn"])
    return folder


@pytest.fixture
def follow(home, tmp_path):
    """Follows a page of docs/ in an empty folder, with the built command first on the path."""

    def run(text, skip=()):
        python = Path(os.environ["DITATTN_TEST_LIBDIR"]) / "python"
        path = f"{home / 'ditattn/bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        return page.follow(text, tmp_path, skip, HOME=str(home), PATH=path, PYTHONPATH=str(home / "ditattn" / python),
                           CXX=os.environ["DITATTN_TEST_COMPILER"], CMAKE_GENERATOR=os.environ["DITATTN_TEST_GENERATOR"])  # fmt: skip

    return run
