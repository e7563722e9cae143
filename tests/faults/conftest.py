"""Runs the command and Python with the package, away from the user's settings."""

import os
import subprocess
import sys

import numpy as np
import pytest
from tensors import save

CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("DITATTN_", "DIFFUSION_ATTENTION_"))}


@pytest.fixture
def command():
    return os.environ["DITATTN_TEST_COMMAND"]


@pytest.fixture
def environment(tmp_path):
    """Without the user's settings, and with tuned choices in a folder of the test's own."""
    return CLEAN | {"NO_COLOR": "1", "DITATTN_TUNE": "use", "DITATTN_TUNE_CACHE": str(tmp_path / "tuned")}


@pytest.fixture
def run_python(tmp_path, environment):
    """Runs a program of Python with the package."""
    return lambda program: subprocess.run([sys.executable, "-c", program], env=environment, cwd=tmp_path,
                                          capture_output=True, text=True, timeout=120)  # fmt: skip


@pytest.fixture
def qkv(tmp_path):
    """A file of tensors, as `run --input` takes them."""
    file = tmp_path / "qkv.safetensors"
    save(file, {name: np.ones((1, 64, 4, 64), "float32") for name in ("query", "key", "value")})
    return file
