"""Which backend `ditattn run` uses where --backend names none: configuration, roles, environment; and --register."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from tensors import save


@pytest.fixture()
def source(tmp_path):
    rng = np.random.default_rng(7)
    tensors = {name: rng.standard_normal((1, 8, 2, 16)).astype(np.float32) for name in ("query", "key", "value")}
    return save(tmp_path / "in.safetensors", tensors)


@pytest.fixture()
def run(ditattn, source, tmp_path):
    """Runs with flags and returns (backend, source)."""

    def call(*flags, **options):
        document = ditattn.json("run", "--input", source, "--output", tmp_path / "out.safetensors", *flags, **options)
        return document["backend"], document["source"]

    return call


@pytest.fixture()
def fails(ditattn, source, tmp_path):
    def call(status, *flags, **options):
        return ditattn.fails(status, "run", "--input", source, "--output", tmp_path / "out.safetensors", *flags, **options)

    return call


BY_ROLE = json.dumps({"default": "flash_attn", "per_role": {"self": "torch_sdpa", "ltx2": {"a2v": "torch_sdpa"}}})


def test_platform_default(run):
    assert run() == ("FLASH_ATTN", "platform default")


@pytest.mark.parametrize("name", ["torch_sdpa", "TORCH_SDPA", "Torch_Sdpa"])
def test_backend_flag_in_any_case(run, name):
    assert run("--diffusion-attention-backend", name) == ("TORCH_SDPA", "attention_config.default")


def test_flag_wins_over_the_environment(run):
    env = {"DIFFUSION_ATTENTION_BACKEND": "flash_attn"}
    assert run("--diffusion-attention-backend", "torch_sdpa", env=env)[0] == "TORCH_SDPA"
    assert run("--diffusion-attention-config", '{"default": "torch_sdpa"}', env=env)[0] == "TORCH_SDPA"
    assert run("--diffusion-attention-backend", "auto", env=env) == (
        "FLASH_ATTN",
        "attention_config.default (DIFFUSION_ATTENTION_BACKEND)",
    )


def test_roles_and_categories(run):
    config = ("--diffusion-attention-config", BY_ROLE)
    assert run(*config) == ("FLASH_ATTN", "attention_config.default")
    assert run(*config, "--role", "self") == ("TORCH_SDPA", "attention_config.per_role['self']")
    assert run(*config, "--role", "ltx2.a2v") == ("TORCH_SDPA", "attention_config.per_role['ltx2.a2v']")
    assert run(*config, "--role", "x", "--role-category", "self") == (
        "TORCH_SDPA",
        "attention_config.per_role['self'] (role_category fallback)",
    )


def test_config_from_a_file(run, fails, tmp_path):
    file = tmp_path / "attention.json"
    file.write_text(BY_ROLE)
    assert run("--diffusion-attention-config", file, "--role", "self")[0] == "TORCH_SDPA"
    assert "Cannot read the AttentionConfig file" in fails(4, "--diffusion-attention-config", tmp_path / "none.json")
    file.write_text("default: flash_attn")
    assert "is not JSON" in fails(2, "--diffusion-attention-config", file)


def test_dotted_flags(run, fails):
    assert run("--diffusion-attention-config.default.backend", "torch_sdpa")[0] == "TORCH_SDPA"
    assert run("--diffusion-attention-config.per_role.self.backend=torch_sdpa", "--role", "self")[0] == "TORCH_SDPA"
    assert "needs a value" in fails(2, "--diffusion-attention-config.default.backend")


def test_flags_that_exclude_each_other(fails):
    assert (
        "--diffusion-attention-backend is mutually exclusive with --diffusion-attention-config.default.backend."
        in fails(2, "--diffusion-attention-backend", "flash_attn", "--diffusion-attention-config", BY_ROLE)
    )
    assert "excludes" in fails(2, "--backend", "flash_attn", "--diffusion-attention-backend", "flash_attn")


def test_bad_configurations(fails):
    flag = "--diffusion-attention-config"
    assert "Empty per_role entry for role 'self'" in fails(2, flag, '{"per_role": {"self": {}}}')
    assert "'NOPE'. Valid options are: FLASH_ATTN, " in fails(2, flag, '{"per_role": {"unused": "nope"}}')
    assert "'NOPE'. Valid" in fails(2, flag, '{"default": {"backend": "auto", "allowed": ["nope"]}}')
    assert "Unknown key 'defualt'" in fails(2, flag, '{"defualt": "flash_attn"}')


def test_unavailable_explicit_choice_is_not_replaced(fails):
    register = ("--register", "CUSTOM=left_out.LeftOutBackend")
    assert "Cannot import" in fails(3, *register, "--diffusion-attention-backend", "custom")


def test_verbose_tells_the_source_once(ditattn, source, tmp_path):
    done = ditattn("-v", "run", "--input", source, "--output", tmp_path / "o.safetensors", "--role", "self")
    assert done.stderr == (
        "ditattn: info: Resolved diffusion attention backend 'FLASH_ATTN' for role='self' via platform default\n"
    )


# --- --register


@pytest.fixture()
def plugin_path(tmp_path):
    module = tmp_path / "plugins" / "acme" / "attention.so"
    module.parent.mkdir(parents=True)
    shutil.copy(os.environ["DITATTN_TEST_PLUGIN"], module)
    return Path(module).parent.parent


def test_register_a_member_and_a_new_one(ditattn, plugin_path):
    env = {"DITATTN_PLUGIN_PATH": str(plugin_path)}
    document = ditattn.json(
        "--register", "custom=acme.attention.SageAttentionBackend",
        "--register", "MY_ATTN=acme.attention.Missing",
        "list", env=env,
    )  # fmt: skip
    backends = {entry["name"]: entry for entry in document["backends"]}
    assert list(backends)[-2:] == ["CUSTOM", "MY_ATTN"]
    assert backends["CUSTOM"]["available"] and backends["CUSTOM"]["overridden"]
    assert backends["CUSTOM"]["class_path"] == "acme.attention.SageAttentionBackend"
    assert "no such class 'Missing'" in backends["MY_ATTN"]["reason"]


@pytest.mark.parametrize("entry", ["CUSTOM", "=a.b.C", "CUSTOM=", ""])
def test_register_needs_name_and_path(ditattn, entry):
    assert "is not NAME=package.module.Class" in ditattn.fails(2, "--register", entry, "list")


def test_registered_path_that_is_malformed(ditattn):
    assert "Class path 'nodot' has no dot." in ditattn.fails(2, "--register", "CUSTOM=nodot", "compare", "--backends", "custom")
