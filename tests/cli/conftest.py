"""Runs the command `ditattn`: the built one, and a copy of it that sees only stand-in backends."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

MODULES = Path("vllm_omni/diffusion/attention/backends")
OWN_VARIABLES = ("DITATTN_", "DIFFUSION_ATTENTION_")


class Command:
    """One installed `ditattn`. Calls check what all promise: errors leave stdout empty, --json is one document."""

    def __init__(self, program, plugin_path=None):
        self.program = Path(program)
        self.plugin_path = plugin_path

    def environment(self, **extra):
        env = {k: v for k, v in os.environ.items() if not k.startswith(OWN_VARIABLES)}
        env |= {"NO_COLOR": "1", "DITATTN_TUNE": "off"}  # not the user's tuned choices
        if self.plugin_path:
            env["DITATTN_PLUGIN_PATH"] = str(self.plugin_path)
        env.update(extra)
        return env

    def __call__(self, *args, env=None, **options):
        command = [str(self.program), *map(str, args)]
        return subprocess.run(
            command, env=self.environment(**(env or {})), capture_output=True, text=True, timeout=120, **options
        )

    def ok(self, *args, **options):
        """stdout of a call that must succeed."""
        done = self(*args, **options)
        assert done.returncode == 0, f"{args}: status {done.returncode}: {done.stderr}"
        return done.stdout

    def json(self, *args, **options):
        return json.loads(self.ok(*args, "--json", **options))

    def fails(self, status, *args, **options):
        """stderr of a call that must end with `status` and print nothing else."""
        done = self(*args, **options)
        assert done.returncode == status, f"{args}: status {done.returncode}, not {status}: {done.stderr}"
        assert done.stdout == ""
        assert done.stderr.startswith("ditattn: error: ")
        return done.stderr


@pytest.fixture(scope="session")
def ditattn():
    return Command(os.environ["DITATTN_TEST_COMMAND"])


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory):
    """The command moved to a folder of its own, where the stand-ins of test_plugin.cpp are the only backends.

    FLASH_ATTN is there a file that is no library at all. With another DITATTN_PLUGIN_PATH there is no backend.
    """
    root = tmp_path_factory.mktemp("moved")
    program = Path(os.environ["DITATTN_TEST_COMMAND"])
    (root / "bin").mkdir()
    (root / "lib").mkdir()
    shutil.copy(program, root / "bin")
    for library in ("libditattn.so.0.1", "libditattn_command.so", "libtvm_ffi.so"):
        shutil.copy(program.parent.parent / "lib" / library, root / "lib")
    modules = root / "plugins" / MODULES
    modules.mkdir(parents=True)
    for module in ("sdpa", "sage_attn", "sage_attn3", "cudnn_attn", "flashinfer_attn"):
        shutil.copy(os.environ["DITATTN_TEST_PLUGIN"], modules / f"{module}.so")
    (modules / "flash_attn.so").write_text("not a library")
    return Command(root / "bin" / "ditattn", root / "plugins")
