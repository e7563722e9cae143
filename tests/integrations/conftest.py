"""Tests with other people's packages; those that are not there are skipped."""

import copy
import os
import subprocess
import sys

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before diffusers is imported: no test may ask a server
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
        return subprocess.run([sys.executable, *map(str, args)], env=clean | env, cwd=tmp_path, capture_output=True,
                              text=True, timeout=timeout)  # fmt: skip

    return run


# STAND-IN
import json

import torch

import ditattn

if not hasattr(torch.ops.ditattn, "attention"):
    L = torch.library.Library("ditattn", "DEF")
    A = 'Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, str backend="auto", float? softmax_scale=None, bool causal=False, str backend_kwargs=""'

    def _call(query, key, value, attn_mask=None, backend="auto", softmax_scale=None, causal=False, backend_kwargs="", return_lse=False):
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (query, key, value, attn_mask)):
            raise NotImplementedError("forward only")
        if query.is_meta or isinstance(query, torch._subclasses.FakeTensor):
            b, s, h, _ = query.shape
            out = query.new_empty(query.shape)
            return (out, query.new_empty((b, h, s), dtype=torch.float32)) if return_lse else out
        return ditattn.attention(
            query, key, value, backend=backend, attn_mask=attn_mask, softmax_scale=softmax_scale, causal=causal,
            return_lse=return_lse, backend_kwargs=json.loads(backend_kwargs or "{}"))

    def _with(*args, **kwargs):
        return _call(*args, **kwargs, return_lse=True)
    for n, r, f in (("attention", "Tensor", _call), ("attention_with_lse", "(Tensor, Tensor)", _with)):
        L.define(f"{n}({A}) -> {r}", tags=(torch.Tag.pt2_compliant_tag,))
        L.impl(n, f, "CPU")
        L.impl(n, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"ditattn::{n}", f, lib=L)
