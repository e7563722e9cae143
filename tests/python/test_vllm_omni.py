"""What Python code written for vLLM-Omni meets here: docs/vllm-omni.md lists it and names these tests."""

import dataclasses
import inspect

import numpy as np
import pytest
import tvm_ffi
from conftest import inputs, layer

import ditattn
from ditattn import AttentionBackend, AttentionImpl, AttentionMetadata, AttentionSpec, register_diffusion_backend
from ditattn import DiffusionAttentionBackendEnum as Enum

HERE = ["FLASH_ATTN", "TORCH_SDPA"]
STATICS = ["get_name", "get_impl_cls", "get_metadata_cls", "get_builder_cls", "get_supported_head_sizes",
           "supports_head_size", "supports_attention_mask", "supports_piecewise_spans", "validate_available"]  # fmt: skip


# --- Registry


def test_overrides_are_kept_in_cpp():
    """One store for every language; vLLM-Omni's is a dictionary of its module."""
    register_diffusion_backend(Enum.CUSTOM, "a.b.C")
    assert tvm_ffi.get_global_func("ditattn.get_path")("CUSTOM", True) == "a.b.C"
    assert not hasattr(ditattn.registry, "_DIFFUSION_ATTN_OVERRIDES")


def test_the_outcome_of_get_class_is_remembered(module):
    """vLLM-Omni imports at each call."""
    module("reloaded", "class Mine:\n    get_name = staticmethod(lambda: 'MINE')\n"
                       "    get_impl_cls = staticmethod(lambda: Impl)\nfrom numpy_backends import NumpyImpl as Impl\n")  # fmt: skip
    register_diffusion_backend(Enum.CUSTOM, "reloaded.Mine")
    first = Enum.CUSTOM.get_class()
    import reloaded

    reloaded.Mine = type("Mine", (reloaded.Mine,), {})
    assert Enum.CUSTOM.get_class() is first
    register_diffusion_backend(Enum.CUSTOM)(reloaded.Mine)
    assert Enum.CUSTOM.get_class() is reloaded.Mine


# --- Classes


@pytest.mark.parametrize("cls", [AttentionBackend, *HERE])
def test_statics_are_called_on_the_class(cls):
    if isinstance(cls, str):
        cls = Enum[cls].get_class()
    for name in STATICS:
        assert not inspect.ismethod(getattr(cls, name)) or getattr(cls, name).__self__ is cls, name
    assert isinstance(cls.accept_output_buffer, bool)
    assert cls.supports_attention_mask() == cls.supports_attention_mask(attention_spec=None)
    with pytest.raises(NotImplementedError, match="There is no metadata builder: construct AttentionMetadata itself."):
        cls.get_builder_cls()


def test_defaults_of_a_class_of_ones_own():
    class Mine(AttentionBackend):
        get_name = staticmethod(lambda: "MINE")
        get_impl_cls = staticmethod(lambda: AttentionImpl)

    assert Mine.get_supported_head_sizes() == [] and Mine.supports_head_size(7)
    assert Mine.get_metadata_cls() is AttentionMetadata and Mine.validate_available() is None
    assert (Mine.supports_attention_mask(), Mine.supports_piecewise_spans(), Mine.accept_output_buffer) == (False,) * 3


@pytest.mark.parametrize("name", HERE)
def test_newer_questions_are_answered_by_capabilities(name):
    """Where vLLM-Omni has a static for each."""
    cls = Enum[name].get_class()
    for question in ("supports_paged_kv", "supports_prefix_kv_slicing", "supports_packed_mask_free",
                     "supports_multi_doc_packed_varlen", "supports_allgather_kv", "supported_platforms",
                     "resolve_capabilities"):  # fmt: skip
        assert not hasattr(cls, question)
    can = cls.capabilities()
    assert can["packed"] and "cpu" in can["devices"]
    assert cls.explain(packed=True, mask="bool") == []


@pytest.mark.parametrize("cls", [AttentionImpl, "FLASH_ATTN"])
def test_constructor_of_implementations(cls):
    if isinstance(cls, str):
        cls = Enum[cls].get_class().get_impl_cls()
    parameters = inspect.signature(cls).parameters
    assert list(parameters) == ["num_heads", "head_size", "softmax_scale", "causal", "num_kv_heads", "prefix",
                                "qkv_layout", "backend_kwargs", "extra"]  # fmt: skip
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    assert defaults == {"softmax_scale": None, "causal": False, "num_kv_heads": None, "prefix": "", "qkv_layout": None,
                        "backend_kwargs": None}  # fmt: skip
    assert parameters["extra"].kind is inspect.Parameter.VAR_KEYWORD
    assert cls(2, 16, 0.5, role="self", backend_explicit=True).softmax_scale == 0.5


def impl_with(*methods):
    """An implementation that has these forward methods; each returns its own name."""
    body = {name: lambda self, q, k, v, m, name=name: name for name in methods}
    return type("Impl", (AttentionImpl,), body)(1, 16)


@pytest.mark.parametrize(
    "platform, methods, expected",
    [
        ("cuda", ["forward_cuda", "forward_cpu"], "forward_cuda"),
        ("rocm", ["forward_hip", "forward_cuda"], "forward_hip"),
        ("rocm", ["forward_cuda"], "forward_cuda"),
        ("npu", ["forward_npu", "forward_cuda"], "forward_npu"),
        ("xpu", ["forward_xpu", "forward_cuda"], "forward_xpu"),
        ("musa", ["forward_musa", "forward_cuda"], "forward_musa"),
        ("musa", ["forward_cuda"], "forward_cuda"),
        ("cpu", ["forward_cuda", "forward_cpu"], "forward_cpu"),
    ],
)
def test_forward_goes_to_the_platforms_method(monkeypatch, platform, methods, expected):
    monkeypatch.setattr(ditattn.backend, "_platform_of", lambda query: platform)
    assert impl_with(*methods).forward(*inputs()) == expected


@pytest.mark.parametrize("platform", ["npu", "xpu", "tpu"])
def test_a_platform_without_a_method(monkeypatch, platform):
    monkeypatch.setattr(ditattn.backend, "_platform_of", lambda query: platform)
    with pytest.raises(NotImplementedError, match=f"^No forward implementation for platform: {platform}$"):
        impl_with("forward_cuda").forward(*inputs())


def test_the_platform_is_the_tensors():
    """vLLM-Omni asks for the process's, and has no branch for the CPU."""
    assert impl_with("forward_cuda", "forward_cpu").forward(*inputs()) == "forward_cpu"


def test_no_paged_kv():
    with pytest.raises(NotImplementedError, match="^FlashAttentionImpl does not support paged KV attention$"):
        layer().forward_paged(object())


# --- Metadata


def test_fields_of_the_metadata():
    defaults = {field.name: getattr(AttentionMetadata(), field.name) for field in dataclasses.fields(AttentionMetadata)}
    assert defaults == {
        "attn_mask": None, "joint_attn_mask": None, "joint_query": None, "joint_key": None, "joint_value": None,
        "joint_strategy": "front", "extra": {}, "full_attn_spans": None, "query_ranges": None,
    }  # fmt: skip


@pytest.mark.parametrize("field", ["video_layout", "packed_padding"])
def test_fields_that_are_not_here(field):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{field}'"):
        AttentionMetadata(**{field: object()})


@pytest.mark.parametrize("name", HERE)
def test_masks_that_are_not_bool(name):
    """vLLM-Omni's SDPA takes any two-dimensional mask for non-zero = keep."""
    query, key, value = inputs()
    keep = np.arange(9) < np.array([[4], [9]])
    expected = layer(name)(query, key, value, AttentionMetadata(attn_mask=keep))
    with pytest.raises(ValueError, match="attn_mask has dtype int64. Valid dtypes are: bool .true = attend., and"):
        layer(name)(query, key, value, AttentionMetadata(attn_mask=keep.astype("int64")))
    added = layer(name)(query, key, value, AttentionMetadata(attn_mask=keep.astype("float32")))
    assert np.abs(added - expected).max() > 0.01
    hidden = np.where(keep, np.float32(0), np.float32(-np.inf))
    assert np.array_equal(layer(name)(query, key, value, AttentionMetadata(attn_mask=hidden)), expected)


# --- Configuration


def test_unknown_head_size():
    assert ditattn.HEAD_SIZE_UNKNOWN == -1


@pytest.mark.parametrize("field", ["skip_softmax", "quant", "fastvideo_vsa_topk", "block_sparse", "skip_calibration"])
def test_a_spec_has_a_name_and_options(field):
    own = ["on_unusable", "allowed", "max_error"]  # vLLM-Omni has none of these
    assert [field.name for field in dataclasses.fields(AttentionSpec)] == ["backend", "backend_kwargs", *own]
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{field}'"):
        AttentionSpec("FLASH_ATTN", **{field: {}})


def test_a_resolution_is_a_class_and_what_named_it():
    cls, spec = ditattn.get_attn_backend_for_role("self", 64, {"default": {"backend": "torch_sdpa"}})
    assert (cls, spec) == (Enum.TORCH_SDPA.get_class(), AttentionSpec("TORCH_SDPA"))
    assert ditattn.get_attn_backend_for_role("self", 64)[1] is None
    assert ditattn.get_attn_backend_for_role("a", 64)[0] is ditattn.get_attn_backend_for_role("b", 64)[0]


def test_names_of_the_selectors_arguments():
    """vLLM-Omni has no device, and attention_config for config, which is taken by that name too."""
    parameters = list(inspect.signature(ditattn.get_attn_backend_for_role).parameters)
    assert parameters == ["role", "head_size", "config", "role_category", "device", "attention_config"]
