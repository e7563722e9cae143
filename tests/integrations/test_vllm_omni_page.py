"""The rows of docs/vllm-omni.md that vLLM-Omni's own package can show on a CPU: it and ditattn are asked the same."""

import enum
import inspect
import logging
import sys

import pytest

pytest.importorskip(
    "vllm_omni.diffusion.attention.layer",
    reason="vLLM-Omni is not installed: requirements-vllm-omni.txt",
    exc_type=ImportError,
)

import torch
from vllm_omni.diffusion.attention import selector
from vllm_omni.diffusion.attention.backends import (
    abstract,
    cudnn_attn,
    flash_attn,
    flashinfer_attn,
    registry,
    sage_attn,
    sdpa,
)
from vllm_omni.diffusion.data import AttentionConfig, AttentionSpec, build_attention_config, parse_attention_config
from vllm_omni.platforms import current_omni_platform
from vllm_omni_reference import close, inputs, outcome, own_layer

import ditattn
from ditattn.integrations import vllm_omni

Theirs, Ours = registry.DiffusionAttentionBackendEnum, ditattn.DiffusionAttentionBackendEnum
BOTH = [(Theirs, registry.register_diffusion_backend), (Ours, ditattn.register_diffusion_backend)]
SHARED = ["FLASH_ATTN", "TORCH_SDPA", "SAGE_ATTN", "SAGE_ATTN_3", "CUDNN_ATTN", "FLASHINFER_ATTN"]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="written for vLLM-Omni's platform without a device")


@pytest.fixture(autouse=True)
def as_imported(monkeypatch):
    monkeypatch.delenv("DIFFUSION_ATTENTION_BACKEND", raising=False)
    with torch.no_grad():
        yield
    vllm_omni.uninstall()
    for member in [*Theirs, *Ours]:
        member.clear_override()


# --- Registry


def test_the_members_they_share_and_those_of_vllm_omni_alone():
    assert [(m.name, m.value) for m in Theirs][:6] == [(m.name, m.value) for m in Ours][:6]
    assert [m.name for m in Ours][:6] == SHARED and "CUSTOM" not in Theirs.__members__
    assert [m.name for m in Theirs][6:] == [
        "FASTVIDEO_VSA",
        "FLASH_ATTN_HUB",
        "FLASH_ATTN_3_HUB",
        "TRTLLM_ATTN",
        "RAINFUSION_ATTN",
    ]


ALIKE = {
    "names are case-sensitive": lambda E, register: outcome(lambda: E["flash_attn"])[0],
    "an unknown attribute": lambda E, register: outcome(lambda: E.NOPE)[0],
    "by value": lambda E, register: E("vllm_omni.diffusion.attention.backends.sdpa.SDPABackend").name,
    "default path": lambda E, register: (E.SAGE_ATTN.get_path(), E.SAGE_ATTN.get_path(include_classname=False)),
    "not overridden": lambda E, register: (E.FLASH_ATTN.is_overridden(), E.FLASH_ATTN.clear_override()),
    "by path": lambda E, register: (
        register(E.SAGE_ATTN, "a.b.C")(7),
        E.SAGE_ATTN.get_path(),
        E.SAGE_ATTN.is_overridden(),
    ),
    "by path, the module": lambda E, register: (register(E.SAGE_ATTN, "a.b.C"), E.SAGE_ATTN.get_path(False))[1],
    "the value stays": lambda E, register: (register(E.SAGE_ATTN, "a.b.C"), E.SAGE_ATTN.value)[1],
    "the last wins": lambda E, register: [register(E.SAGE_ATTN, p) and E.SAGE_ATTN.get_path() for p in ("a.B", "a.C")],
    "no path": lambda E, register: (register(E.SAGE_ATTN, ""), outcome(E.SAGE_ATTN.get_path))[1],
    "no path, no class": lambda E, register: (register(E.SAGE_ATTN, ""), outcome(E.SAGE_ATTN.get_class))[1],
    "no such module": lambda E, register: (
        register(E.SAGE_ATTN, "no_such.module.C"),
        issubclass(outcome(E.SAGE_ATTN.get_class)[0], ImportError),
    )[1],
    "a decorator": lambda E, register: (
        register(E.SAGE_ATTN)(Mine) is Mine,
        E.SAGE_ATTN.get_path(),
        E.SAGE_ATTN.get_class() is Mine,
    ),
    "clear_override": lambda E, register: (
        register(E.SAGE_ATTN, "a.b.C"),
        E.SAGE_ATTN.clear_override(),
        E.SAGE_ATTN.get_path(),
    )[2],
}


class Mine(sdpa.SDPABackend):
    pass


@pytest.mark.parametrize("question", ALIKE)
def test_both_registries_answer_alike(question):
    theirs, ours = (ALIKE[question](*each) for each in BOTH)
    assert theirs == ours


@pytest.mark.parametrize("E", [Theirs, Ours])
def test_an_unknown_name_lists_all_members(E):
    with pytest.raises(ValueError) as error:
        E["NOPE"]
    names = ", ".join(E.__members__)
    assert str(error.value) == f"Unknown diffusion attention backend: 'NOPE'. Valid options are: {names}"
    assert error.value.__cause__ is None and error.value.__suppress_context__ is (E is Theirs)


def test_the_enumeration_is_closed_there():
    assert issubclass(Theirs, enum.Enum) and not issubclass(Ours, enum.Enum)
    assert not hasattr(Theirs, "define") and callable(Ours.define)


def test_get_class_imports_at_each_call_there(monkeypatch):
    module = type(sys)("changing")
    monkeypatch.setitem(sys.modules, "changing", module)
    found = []
    for E, register in BOTH:
        register(E.SAGE_ATTN, "changing.Mine")
        module.Mine = Mine
        first = E.SAGE_ATTN.get_class()
        module.Mine = type("Mine", (Mine,), {})
        found.append(E.SAGE_ATTN.get_class() is first)
    assert found == [False, True]


def test_a_class_that_its_module_lacks_is_an_attribute_error_there():
    kinds = [(register(E.SAGE_ATTN, "json.NoSuch"), outcome(E.SAGE_ATTN.get_class)[0])[1] for E, register in BOTH]
    assert kinds == [AttributeError, ImportError]


@pytest.mark.parametrize(
    "path, theirs", [("nodots", ValueError), ("no such.module!.C", ModuleNotFoundError), (".C", ValueError)]
)
def test_any_text_is_tried_as_a_path_there(path, theirs):
    kinds = [(register(E.SAGE_ATTN, path), outcome(E.SAGE_ATTN.get_class)[0])[1] for E, register in BOTH]
    assert kinds == [theirs, ValueError]


def test_registering_checks_nothing_there():
    assert callable(registry.register_diffusion_backend("FLASH_ATTN", "a.b.C"))
    assert registry._DIFFUSION_ATTN_OVERRIDES.pop("FLASH_ATTN") == "a.b.C"
    with pytest.raises(TypeError):
        ditattn.register_diffusion_backend("FLASH_ATTN", "a.b.C")


# --- Classes

HEAD_SIZES = {
    "TORCH_SDPA": (sdpa.SDPABackend, list(range(1024))),
    "FLASH_ATTN": (flash_attn.FlashAttentionBackend, [64, 96, 128, 192, 256]),
    "SAGE_ATTN": (sage_attn.SageAttentionBackend, [32, 64, 96, 128, 160, 192, 224, 256]),
    "CUDNN_ATTN": (cudnn_attn.CuDNNAttentionBackend, list(range(8, 257, 8))),
    "FLASHINFER_ATTN": (flashinfer_attn.FlashInferAttentionBackend, [64, 128, 256]),
}


@pytest.mark.parametrize("member", HEAD_SIZES)
def test_head_sizes_and_what_vllm_omnis_classes_take(member):
    cls, sizes = HEAD_SIZES[member]
    assert cls.get_supported_head_sizes() == sizes
    assert cls.get_name() == ("SDPA" if member == "TORCH_SDPA" else member)
    assert cls.supports_piecewise_spans is (member == "FLASH_ATTN")
    assert cls.supports_attention_mask() is (member != "SAGE_ATTN")
    assert cls.supports_prefix_kv_slicing is (member == "CUDNN_ATTN")
    assert cls.supports_paged_kv is (member == "FLASH_ATTN")


def test_supports_piecewise_spans_is_an_attribute_there():
    assert abstract.AttentionBackend.supports_piecewise_spans is False
    assert ditattn.AttentionBackend.supports_piecewise_spans() is False


def test_questions_that_are_only_there():
    asked = ["supports_paged_kv", "supports_prefix_kv_slicing", "supported_platforms", "supports_packed_mask_free",
             "supports_multi_doc_packed_varlen", "indexes_kv_by_block_stride"]  # fmt: skip
    assert all(
        hasattr(abstract.AttentionBackend, name) and not hasattr(ditattn.AttentionBackend, name) for name in asked
    )
    assert not any(
        hasattr(abstract.AttentionBackend, name) for name in ("resolve_capabilities", "supports_allgather_kv")
    )


def test_constructors_differ_by_the_scale():
    theirs, ours = (
        inspect.signature(cls.__init__).parameters for cls in (abstract.AttentionImpl, ditattn.AttentionImpl)
    )
    assert list(theirs)[:-1] == list(ours)[:-1]
    assert theirs["softmax_scale"].default is inspect.Parameter.empty and ours["softmax_scale"].default is None
    differing = [name for name in list(theirs)[1:-1] if theirs[name].default != ours[name].default]
    assert differing == ["softmax_scale"]


def test_there_is_no_branch_for_the_cpu_there():
    made = sdpa.SDPAImpl(4, 64, 0.125)
    with pytest.raises(NotImplementedError, match="^No forward implementation for platform: "):
        made.forward(*inputs())
    assert current_omni_platform.device_type == "cpu"
    assert close(own_layer("TORCH_SDPA").forward(*inputs()), made.forward_cuda(*inputs()))


def test_paged_kv_is_refused_alike():
    texts = [outcome(made.forward_paged, object()) for made in (sdpa.SDPAImpl(4, 64, 0.125), own_layer("TORCH_SDPA"))]
    assert texts[0] == texts[1] == (NotImplementedError, "SDPAImpl does not support paged KV attention")


def test_builders_and_metadata_classes_are_not_implemented_there():
    assert outcome(sdpa.SDPABackend.get_builder_cls) == (NotImplementedError, "")
    assert outcome(sdpa.SDPABackend.get_metadata_cls) == (NotImplementedError, "")
    assert Ours.TORCH_SDPA.get_class().get_metadata_cls() is ditattn.AttentionMetadata


@pytest.mark.parametrize("theirs, ours", [(sdpa.SDPAImpl, "TORCH_SDPA"), (flash_attn.FlashAttentionImpl, "FLASH_ATTN")])
def test_options_nobody_knows_are_one_warning(theirs, ours, monkeypatch, caplog):
    said = []
    monkeypatch.setattr(sys.modules[theirs.__module__].logger, "warning", lambda text, *args: said.append(text % args))
    theirs(4, 64, 0.125, backend_kwargs={"b": 1, "a": 2})
    assert said == [f"{theirs.__name__} ignoring backend_kwargs: ['b', 'a']"]
    with caplog.at_level(logging.WARNING, "ditattn"):
        own_layer(ours, backend_kwargs={"b_page": 1, "a_page": 2})
    shown = "SDPA" if ours == "TORCH_SDPA" else ours
    assert f"{shown} ignoring backend_kwargs: ['a_page', 'b_page']" in caplog.text


# --- Selection


def resolved(config, **asked):
    """(spec's back end or None, source) of both selectors."""
    theirs = AttentionConfig(**config).resolve_with_source(**asked)
    ours = ditattn.selection.resolve_role(config=config, **asked)
    return (theirs[0].backend if theirs[0] else None, theirs[1]), (
        ours.spec.backend if ours.spec else None,
        ours.source,
    )


@pytest.mark.parametrize(
    "config, asked",
    [
        ({"default": "FLASH_ATTN", "per_role": {"self": "SAGE_ATTN"}}, {"role": "self"}),
        ({"default": "FLASH_ATTN", "per_role": {"cat": "SAGE_ATTN"}}, {"role": "x", "role_category": "cat"}),
        ({"default": "FLASH_ATTN", "per_role": {"cat": "SAGE_ATTN"}}, {"role": "x"}),
        ({"per_role": {"ltx2": {"audio": {"backend": "SAGE_ATTN"}}}}, {"role": "ltx2.audio"}),
        ({"default": {"backend": "FLASH_ATTN"}, "per_role": {"self": "auto"}}, {"role": "self"}),
    ],
)
def test_both_selectors_resolve_alike(config, asked):
    theirs, ours = resolved(config, **asked)
    assert theirs == ours


def test_what_is_auto_or_not_named_is_the_platforms_choice():
    for config in ({}, {"default": "Auto"}, {"per_role": {"self": "FLASH_ATTN"}}):
        assert resolved(config, role="cross") == ((None, None), (None, "platform default"))


@pytest.mark.parametrize(
    "config",
    [
        {"per_role": {"self": {"backend": "FLASH_ATTN", "nested": "SAGE_ATTN"}}},
        {"per_role": {"self": {}}},
        {"default": {"backend": "FLASH_ATTN", "quant": {"dtype_qk": "fp8_e4m3"}}},
        {"default": {"backend": "FLASH_ATTN", "skip_softmax": {"threshold": 1.0}}},
    ],
)
def test_configurations_are_refused_alike(config):
    """The first sentences are the same, but that vLLM-Omni has quotes around the back end's name."""
    theirs = outcome(lambda: AttentionConfig(**config))
    ours = outcome(lambda: ditattn.AttentionConfig.from_dict(config))
    assert theirs[0] is ours[0] is ValueError
    first = theirs[1].partition(". ")[0].rstrip(".").replace("backend='FLASH_ATTN'", "backend=FLASH_ATTN")
    assert ours[1].startswith(first)


@pytest.mark.parametrize(
    "config, text",
    [
        ({"default": {"backend": 7}}, "Expected str for AttentionSpec.backend, got "),
        ({"per_role": 7}, "Expected dict for AttentionConfig.per_role, got "),
    ],
)
def test_what_was_expected_is_a_type_error_there(config, text):
    theirs = outcome(lambda: AttentionConfig(**config))
    ours = outcome(lambda: ditattn.AttentionConfig.from_dict(config))
    assert (theirs[0], ours[0]) == (TypeError, ValueError)
    assert theirs[1].startswith(text) and ours[1].startswith(text)


def test_flags_that_exclude_each_other():
    theirs = outcome(lambda: parse_attention_config({"default": "FLASH_ATTN"}, attention_backend="SAGE_ATTN"))
    text = "--diffusion-attention-backend is mutually exclusive with --diffusion-attention-config.default.backend."
    assert theirs == (ValueError, text)


def test_the_environment_is_read_once_there(monkeypatch):
    monkeypatch.setenv("DIFFUSION_ATTENTION_BACKEND", "sage_attn")
    config = build_attention_config(None)
    assert config.resolve_with_source("self")[1] == "attention_config.default"
    ours = ditattn.selection.resolve_role("self")
    assert (ours.member.name, ours.source) == ("SAGE_ATTN", "attention_config.default (DIFFUSION_ATTENTION_BACKEND)")
    monkeypatch.delenv("DIFFUSION_ATTENTION_BACKEND")
    assert config.resolve_with_source("self")[0].backend == "sage_attn"
    assert ditattn.selection.resolve_role("self").spec is None


def test_specs_and_the_selectors_arguments():
    fields = ["backend", "skip_softmax", "quant", "fastvideo_vsa_topk", "block_sparse", "skip_calibration"]
    assert list(AttentionSpec.__dataclass_fields__) == fields
    theirs = list(inspect.signature(selector.get_attn_backend_for_role).parameters)
    ours = list(inspect.signature(ditattn.get_attn_backend_for_role).parameters)
    assert theirs == ["role", "head_size", "attention_config", "role_category", "allow_trtllm_default"]
    assert ours[:4] == ["role", "head_size", "config", "role_category"] and "attention_config" in ours
    assert selector.HEAD_SIZE_UNKNOWN == ditattn.HEAD_SIZE_UNKNOWN == -1


def test_what_a_resolution_logs(monkeypatch, caplog):
    """With a category vLLM-Omni names it beside the role."""
    vllm_omni.install("FLASH_ATTN")
    said = []
    monkeypatch.setattr(selector.logger, "info", lambda text, *args: said.append(text % args))
    config = {"default": "FLASH_ATTN"}
    for category in (None, "page_category"):
        selector.get_attn_backend_for_role("page_role", 64, AttentionConfig(**config), category)
    assert said == [
        "Resolved diffusion attention backend 'FLASH_ATTN' for role='page_role' via attention_config.default",
        "Resolved diffusion attention backend 'FLASH_ATTN' for role='page_role' (role_category='page_category') "
        "via attention_config.default",
    ]
    with caplog.at_level(logging.INFO, "ditattn"):
        ditattn.get_attn_backend_for_role("page_role", 64, config, "page_category")
    assert [record.message for record in caplog.records if "page_role" in record.message] == said[:1]
