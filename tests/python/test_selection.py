"""Which back end for which role."""

import json

import pytest
from numpy_backends import NumpyBackend

from ditattn import (
    HEAD_SIZE_UNKNOWN, AttentionConfig, AttentionSpec, Problem, define_platform, explain,
    get_attn_backend_for_role, platform_candidates, register_diffusion_backend, select_backend,
)  # fmt: skip
from ditattn import DiffusionAttentionBackendEnum as Enum

FIELDS = {
    "default": "Flash_Attn",
    "per_role": {
        "self": {"backend": "torch_sdpa", "backend_kwargs": {"block": 3}}, "cross": "AUTO",
        "ltx2": {"audio_to_video": "torch_sdpa", "video": {"self": "flash_attn"}},
    },
}  # fmt: skip


def test_configurations(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    config = AttentionConfig.from_dict(FIELDS)
    assert config.default == AttentionSpec("FLASH_ATTN")
    assert config.per_role == {
        "self": AttentionSpec("TORCH_SDPA", {"block": 3}), "ltx2.audio_to_video": AttentionSpec("TORCH_SDPA"),
        "ltx2.video.self": AttentionSpec("FLASH_ATTN"),
    }  # fmt: skip
    assert AttentionConfig.from_json(json.dumps(FIELDS)) == config
    assert AttentionConfig.from_file(tmp_path / "config.json") == config
    assert AttentionConfig(**FIELDS) == config
    assert AttentionConfig(default=AttentionSpec("auto")) == AttentionConfig() == AttentionConfig.from_dict({})


@pytest.mark.parametrize(
    "make, kind, text",
    [
        (lambda: AttentionConfig.from_dict({"default": 3}), ValueError, "AttentionConfig.default|AttentionSpec"),
        (lambda: AttentionConfig.from_dict({"per_role": {"self": {}}}), ValueError, "Empty per_role entry for role"),
        (lambda: AttentionConfig.from_dict({"per_role": 3}), ValueError, "Expected dict for AttentionConfig.per_role"),
        (lambda: AttentionConfig.from_json("{"), ValueError, "JSON|json|parse"),
        (lambda: AttentionConfig.from_file("/no/such/file.json"), OSError, "/no/such/file.json"),
        (lambda: AttentionConfig.from_dict({"default": object()}), TypeError, "not JSON serializable"),
    ],
)
def test_bad_configurations(make, kind, text):
    with pytest.raises(kind, match=text):
        make()


def test_precedence(monkeypatch):
    flash, sdpa = Enum.FLASH_ATTN.get_class(), Enum.TORCH_SDPA.get_class()
    config = {"default": "flash_attn", "per_role": {"self": "torch_sdpa", "cat": "torch_sdpa"}}
    assert get_attn_backend_for_role("self", 64, config) == (sdpa, AttentionSpec("TORCH_SDPA"))
    assert get_attn_backend_for_role("other", 64, config, role_category="cat")[0] is sdpa
    assert get_attn_backend_for_role("other", 64, config) == (flash, AttentionSpec("FLASH_ATTN"))
    assert get_attn_backend_for_role("self", 64, AttentionConfig.from_dict(config))[0] is sdpa
    cls, spec = get_attn_backend_for_role("self", HEAD_SIZE_UNKNOWN)
    assert cls.get_name() == "FLASH_ATTN" and spec is None
    assert cls is get_attn_backend_for_role()[0]
    monkeypatch.setenv("DIFFUSION_ATTENTION_BACKEND", "torch_sdpa")
    assert get_attn_backend_for_role("self", 64)[0] is sdpa
    assert get_attn_backend_for_role("self", 64, {"default": "flash_attn"})[0] is flash


def test_the_configuration_under_its_name_in_vllm_omni():
    assert get_attn_backend_for_role("self", 64, attention_config={"default": "torch_sdpa"})[0].get_name() == "SDPA"
    with pytest.raises(ValueError, match="two names of one argument"):
        get_attn_backend_for_role("self", 64, {"default": "torch_sdpa"}, attention_config={"default": "torch_sdpa"})


def test_an_explicit_choice_is_never_replaced(not_built):
    with pytest.raises(ImportError, match="not built: there was no compiler"):
        get_attn_backend_for_role("self", 64, {"default": not_built.name.lower()})
    with pytest.raises(ValueError, match="Unknown diffusion attention backend: 'NO_SUCH'"):
        get_attn_backend_for_role("self", 64, {"default": "no_such"})


def test_a_class_of_ones_own():
    register_diffusion_backend(Enum.CUSTOM)(NumpyBackend)
    assert get_attn_backend_for_role("self", 64, {"default": "custom"})[0] is NumpyBackend
    with pytest.raises(ValueError, match="CUSTOM was explicitly selected but head_size=40 is unsupported"):
        get_attn_backend_for_role("self", 40, {"default": "custom"})


def test_select_backend():
    found = select_backend(head_size=64, causal=True)
    assert (found.member, found.backend) == (Enum.FLASH_ATTN, Enum.FLASH_ATTN.get_class())
    assert (found.spec, found.source, found.is_explicit) == (None, "platform default", False)
    found = select_backend(Problem(head_size=64), role="self", config={"per_role": {"self": "torch_sdpa"}})
    assert found.backend is Enum.TORCH_SDPA.get_class() and found.is_explicit
    assert found.source == "attention_config.per_role['self']" and found.spec == AttentionSpec("TORCH_SDPA")
    with pytest.raises(ValueError, match="float64"):
        select_backend(dtype="float64")


def test_platforms():
    before = platform_candidates("cpu")
    assert before == [Enum.FLASH_ATTN, Enum.TORCH_SDPA]
    try:
        define_platform("cpu", [Enum.TORCH_SDPA])
        assert get_attn_backend_for_role()[0] is Enum.TORCH_SDPA.get_class()
    finally:
        define_platform("cpu", before)


# --- explain ----------------------------------------------------------------------------------------------------


def test_an_explanation_has_every_member_with_its_reasons(not_built):
    found = explain(head_size=64, mask="additive", num_heads=4, num_kv_heads=2)
    assert (found.source, found.is_explicit, found.chosen) == ("platform default", False, Enum.FLASH_ATTN)
    assert [answer.member for answer in found.members] == list(Enum)
    assert [answer.member.name for answer in found.members if answer.is_candidate] == ["FLASH_ATTN", "TORCH_SDPA"]
    answers = {answer.member: answer for answer in found.members}
    assert answers[Enum.TORCH_SDPA].reasons == () and answers[Enum.TORCH_SDPA].engine
    assert "does not support a mask of kind additive" in answers[Enum.SAGE_ATTN].reasons[0]
    assert "not built: there was no compiler" in answers[not_built].reasons[0] and answers[not_built].engine == ""


def test_an_explanation_chooses_as_select_backend_does(monkeypatch):
    config = {"default": "flash_attn", "per_role": {"cross": "torch_sdpa"}}
    for options in ({}, {"config": config}, {"config": config, "role": "cross"}, {"head_size": 300}):
        found, chosen = explain(Problem(), **options), select_backend(Problem(), **options)
        assert (found.chosen, found.source, found.is_explicit) == (chosen.member, chosen.source, chosen.is_explicit)
    monkeypatch.setenv("DIFFUSION_ATTENTION_BACKEND", "sage_attn")
    found = explain(head_size=300)
    assert found.is_explicit and found.chosen is None
    assert "head_size=300" in found.members[0].reasons[0] and found.members[0].member is Enum.SAGE_ATTN
    with pytest.raises(ValueError, match="Unknown diffusion attention backend: 'NOPE'"):
        explain(config={"default": "nope"})
