"""Every test begins and ends with the registry as it is after import."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ditattn
from ditattn import DiffusionAttentionBackendEnum as Enum

PACKAGE = Path(ditattn.__file__).parent
BUILT_IN = ["FLASH_ATTN", "TORCH_SDPA", "SAGE_ATTN", "SAGE_ATTN_3", "CUDNN_ATTN", "FLASHINFER_ATTN", "CUSTOM"]
OWN_VARIABLES = ("DITATTN_", "DIFFUSION_ATTENTION_")


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    for name in [name for name in os.environ if name.startswith(OWN_VARIABLES)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DITATTN_TUNE", "off")  # not the user's tuned choices
    yield
    for member in Enum:
        member.clear_override()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes modules that can be imported during the test: module("name", "text")."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(name, text):
        path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        importlib.invalidate_caches()
        return path

    yield write
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def not_built(tmp_path, monkeypatch):
    """CUSTOM, registered with a class whose plug-in a build left out: a file with the reason is in its place."""
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "left_out.not_built").write_text("not built: there was no compiler for it\n")
    monkeypatch.setenv("DITATTN_PLUGIN_PATH", str(tmp_path / "plugins"))
    ditattn.register_diffusion_backend(Enum.CUSTOM, "left_out.LeftOutBackend")
    return Enum.CUSTOM


@pytest.fixture
def run_python(tmp_path):
    """Runs Python with the package on its path, in a folder of its own."""

    def run(*args, timeout=120, **env):
        clean = {k: v for k, v in os.environ.items() if not k.startswith((*OWN_VARIABLES, "PYTHONUNBUFFERED"))}
        return subprocess.run([sys.executable, *map(str, args)], env=clean | {"NO_COLOR": "1", "DITATTN_TUNE": "off"} | env, cwd=tmp_path,
                              capture_output=True, text=True, timeout=timeout)  # fmt: skip

    return run


def inputs(batch=2, seq_q=7, seq_kv=9, heads=4, kv_heads=2, head_size=16, dtype="float32", seed=1):
    """Query, key, value with standard normal numbers."""
    rng = np.random.default_rng(seed)
    shapes = [(batch, seq_q, heads, head_size), *2 * [(batch, seq_kv, kv_heads, head_size)]]
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def layer(name="FLASH_ATTN", heads=4, kv_heads=2, head_size=16, **config):
    """An implementation of a member's class."""
    impl = Enum[name].get_class().get_impl_cls()
    return impl(num_heads=heads, head_size=head_size, num_kv_heads=kv_heads, **config)
