"""Choice by measurement from Python: tune, what is known, and who then computes."""

import json
import logging

import numpy as np
import pytest
from tensors import attention as float64_attention

import ditattn
from ditattn import AttentionConfig, AttentionSpec, Problem
from ditattn import DiffusionAttentionBackendEnum as Enum

SHAPE = {"batch": 1, "num_heads": 2, "num_kv_heads": 2, "seq_q": 96, "seq_kv": 96, "head_size": 64}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Each test has a cache folder of its own."""
    monkeypatch.setenv("DITATTN_TUNE", "use")
    monkeypatch.setenv("DITATTN_TUNE_CACHE", str(tmp_path))
    ditattn.reload_tuned()
    yield tmp_path
    monkeypatch.undo()
    ditattn.reload_tuned()


def inputs(tokens=96):
    return np.random.default_rng().standard_normal((3, 1, tokens, 2, 64), dtype="float32")


def reference(query, key, value, mask=None):
    return float64_attention(query, key, value, mask)[0]


def ran():
    counts = {count.backend: count.calls for count in ditattn.launch_counts()}
    ditattn.reset_launch_counts()
    return counts


def test_what_is_measured_is_kept_and_chosen_by(cache):
    assert ditattn.tuned(**SHAPE) is None and ditattn.tuned_member(**SHAPE) is None
    measured = ditattn.tune(**SHAPE, budget_ms=50)
    assert measured.problem == Problem(**SHAPE)
    usable = [result for result in measured.results if not result.reason]
    assert [result.median_ms for result in usable] == sorted(result.median_ms for result in usable)
    errors = {result.backend: result.error for result in usable}
    print(errors)
    assert errors["FLASH_ATTN"] < 2e-6 and errors["TORCH_SDPA"] < 2e-6
    assert 1e-3 < errors["SAGE_ATTN"] < 0.05 < errors["SAGE_ATTN_3"] < 0.5
    assert ditattn.tuned(**SHAPE) == measured and ditattn.tuned_problems() == [measured]
    (file,) = cache.glob("tuned-*.json")
    assert str(file) == ditattn.tune_cache_file()
    assert len(json.loads(file.read_text())["problems"]) == 1
    ditattn.reload_tuned()
    assert ditattn.tuned(**SHAPE) == measured  # read back


@pytest.mark.parametrize("max_error", [None, 0.05, 1.0])
def test_auto_is_the_chosen_one_to_the_last_bit(max_error):
    query, key, value = inputs()
    ditattn.tune_call(query, key, value, budget_ms=50)
    chosen = ditattn.tuned_member(**SHAPE, max_error=max_error)
    ran()
    out = ditattn.attention(query, key, value, max_error=max_error)
    assert ran() == {chosen.get_class().get_name(): 1}
    assert np.array_equal(out, ditattn.attention(query, key, value, backend=chosen))
    expected = reference(query, key, value)
    error = np.linalg.norm(out - expected) / np.linalg.norm(expected)
    print(f"{chosen.name}: {error:.2e}")
    assert error < (max_error or ditattn.exact_error("float32"))
    explained = ditattn.explain(**SHAPE, config={"default": {"backend": "auto", "max_error": max_error or 1e-5}})
    assert explained.chosen == chosen and explained.why.startswith("measured: ")
    assert {entry.member.name for entry in explained.members if entry.tuned} >= {"FLASH_ATTN", "SAGE_ATTN"}


def test_not_published_means_this_process_alone(cache):
    ditattn.tune(**SHAPE, budget_ms=50, publish=False, backends=["flash_attn", Enum.TORCH_SDPA])
    assert {result.backend for result in ditattn.tuned(**SHAPE).results} == {"FLASH_ATTN", "TORCH_SDPA"}
    assert list(cache.iterdir()) == []


def test_bad_arguments():
    query, key, value = inputs()
    with pytest.raises(ValueError, match="max_error bounds the choice of backend \"auto\", but the backend is FLASH_ATTN"):
        ditattn.attention(query, key, value, backend="FLASH_ATTN", max_error=1.0)
    with pytest.raises(ValueError, match="max_error is -1, expected a number from 0 on"):
        ditattn.attention(query, key, value, max_error=-1.0)
    with pytest.raises(ValueError, match=r"key must be 4-D, \(batch, tokens, heads, head_size\), got \(96, 2, 64\)"):
        ditattn.tune_call(query, key[0], value)
    with pytest.raises(NotImplementedError, match="packed sequences"):
        ditattn.tune(**SHAPE, packed=True)
    with pytest.raises(ValueError, match="Unknown diffusion attention backend: 'NOPE'"):
        ditattn.tune(**SHAPE, backends=["nope"])
    with pytest.raises(ImportError, match="CUDNN_ATTN|cudnn_attn"):
        ditattn.tune(**SHAPE, backends=["CUDNN_ATTN"])


@pytest.mark.parametrize("policy, level", [("warn", logging.WARNING), ("allow", logging.INFO)])
def test_a_named_back_end_is_replaced_where_its_policy_says_so(policy, level, caplog):
    query, key, value = inputs()
    mask = np.random.default_rng().random((1, 1, 96, 96)) < 0.7
    spec = {"backend": "sage_attn", "on_unusable": policy, "allowed": ["torch_sdpa", "flash_attn"]}
    config = AttentionConfig.from_dict({"per_role": {"self": spec}})
    assert config.per_role["self"] == AttentionSpec("SAGE_ATTN", {}, policy, ("TORCH_SDPA", "FLASH_ATTN"))
    ran()
    ditattn.attention(query, key, value, role="self", config=config)
    assert ran() == {"SAGE_ATTN": 1}
    with caplog.at_level(logging.INFO, "ditattn"):
        for _ in range(2):
            out = ditattn.attention(query, key, value, attn_mask=mask, role="self", config=config)
    assert ran() == {"SDPA": 2}
    assert np.allclose(out, reference(query, key, value, mask), atol=1e-5)
    moves = [record for record in caplog.records if "moves on to TORCH_SDPA" in record.message]
    assert [record.levelno for record in moves] == [level]
    assert "The choice of SAGE_ATTN moves on to TORCH_SDPA: SAGE_ATTN does not support" in moves[0].message


def test_without_a_policy_nothing_is_replaced():
    query, key, value = inputs()
    mask = np.ones((1, 1, 96, 96), dtype=bool)
    mask[..., 5, :] = False
    with pytest.raises(ValueError, match="SAGE_ATTN does not support a mask"):
        ditattn.attention(query, key, value, attn_mask=mask, role="self", config={"per_role": {"self": "SAGE_ATTN"}})


def test_auto_within_an_allowed_list():
    query, key, value = inputs()
    ditattn.tune_call(query, key, value, budget_ms=50)
    config = {"default": {"backend": "auto", "allowed": ["torch_sdpa", "sage_attn_3"], "max_error": 1.0}}
    ran()
    ditattn.attention(query, key, value, config=config)
    (name,) = ran()
    assert name in ("SDPA", "SAGE_ATTN_3")
