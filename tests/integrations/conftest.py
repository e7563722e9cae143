"""Tests with other people's packages; those that are not there are skipped."""

import copy
import os
import subprocess
import sys

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before diffusers is imported: no test may ask a server
os.environ["DITATTN_TUNE"] = "off"  # not the user's tuned choices
OWN_VARIABLES = ("DITATTN_", "DIFFUSION_ATTENTION_", "DIFFUSERS_ATTN_")


@pytest.fixture
def names():
    """ditattn's names in diffusers; afterwards diffusers is as it was before."""
    diffusers = pytest.importorskip("diffusers")
    from ditattn.integrations.diffusers import install, uninstall

    diffusers.logging.set_verbosity_error()  # it calls its back ends experimental
    before = state_of_diffusers()
    install()
    yield
    uninstall()
    assert state_of_diffusers() == before


def state_of_diffusers():
    """All that an attention back end's name is in, copied."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    containers = (dict, list, set)
    return [
        {name: copy.copy(value) if isinstance(value, containers) else value for name, value in vars(cls).items()}
        for cls in (AttentionBackendName, _AttentionBackendRegistry)
    ]


@pytest.fixture
def run_python(tmp_path):
    """Runs Python in a folder of its own."""

    def run(*args, timeout=300, **env):
        clean = {name: value for name, value in os.environ.items() if not name.startswith(OWN_VARIABLES)}
        return subprocess.run([sys.executable, *map(str, args)], env=clean | {"DITATTN_TUNE": "off"} | env, cwd=tmp_path, capture_output=True,
                              text=True, timeout=timeout)  # fmt: skip

    return run
