"""The rows of docs/vllm-omni.md that vLLM-Omni's own package can show on a CPU: it and ditattn are asked the same."""

import enum
import inspect
import logging
import sys

import pytest

pytest.importorskip(
    "vllm_omni.diffusion.attention.layer", reason="vLLM-Omni is not installed: requirements-vllm-omni.txt", exc_type=ImportError
)

import torch
from vllm_omni.diffusion.attention import selector
from vllm_omni.diffusion.attention.backends import abstract, cudnn_attn, flash_attn, flashinfer_attn, registry, sage_attn, sdpa
from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata, QueryRange
from vllm_omni.diffusion.attention.backends.utils import fa
from vllm_omni.diffusion.attention.backends.utils.piecewise_attn import piecewise_attn
from vllm_omni.diffusion.attention.parallel.ulysses import UlyssesParallelAttention
from vllm_omni.diffusion.data import AttentionConfig, AttentionSpec, build_attention_config, parse_attention_config
from vllm_omni.platforms import current_omni_platform
from vllm_omni_reference import expected, inputs, stand_in_flash_attn_func, stand_in_flash_attn_varlen_func

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


@pytest.fixture
def flash(monkeypatch):
    """vLLM-Omni's FLASH_ATTN over the stand-in: which way a call goes, and what is done around the kernel, is its own."""
    calls = []

    def recorded(name, function):
        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(fa, "HAS_FLASH_ATTN", True)
    monkeypatch.setattr(fa, "flash_attn_func", recorded("dense", stand_in_flash_attn_func))
    monkeypatch.setattr(fa, "flash_attn_varlen_func", recorded("varlen", stand_in_flash_attn_varlen_func))

    def run(query, key, value, metadata=None, **config):
        calls.clear()
        made = flash_attn.FlashAttentionImpl(query.shape[2], query.shape[3], query.shape[3] ** -0.5, **config)
        return made.forward_cuda(query, key, value, metadata), list(calls)

    return run


def outcome(action, *args):
    """What it returns, or its error's kind and text."""
    try:
        return action(*args)
    except Exception as error:
        return type(error), str(error)


def layer(member="FLASH_ATTN", heads=4, kv_heads=2, head_size=64, **config):
    return Ours[member].get_class().get_impl_cls()(heads, head_size, num_kv_heads=kv_heads, **config)


def close(out, wanted):
    return torch.allclose(out.double(), wanted.double(), atol=2e-5)


PADDING = torch.arange(9) < torch.tensor([[5], [9]])


# --- Registry


def test_the_members_they_share_and_those_of_vllm_omni_alone():
    assert [(m.name, m.value) for m in Theirs][:6] == [(m.name, m.value) for m in Ours][:6]
    assert [m.name for m in Ours][:6] == SHARED and "CUSTOM" not in Theirs.__members__
    assert [m.name for m in Theirs][6:] == ["FASTVIDEO_VSA", "FLASH_ATTN_HUB", "FLASH_ATTN_3_HUB", "TRTLLM_ATTN", "RAINFUSION_ATTN"]


ALIKE = {
    "names are case-sensitive": lambda E, register: outcome(lambda: E["flash_attn"])[0],
    "an unknown attribute": lambda E, register: outcome(lambda: E.NOPE)[0],
    "by value": lambda E, register: E("vllm_omni.diffusion.attention.backends.sdpa.SDPABackend").name,
    "default path": lambda E, register: (E.SAGE_ATTN.get_path(), E.SAGE_ATTN.get_path(include_classname=False)),
    "not overridden": lambda E, register: (E.FLASH_ATTN.is_overridden(), E.FLASH_ATTN.clear_override()),
    "by path": lambda E, register: (register(E.SAGE_ATTN, "a.b.C")(7), E.SAGE_ATTN.get_path(), E.SAGE_ATTN.is_overridden()),
    "by path, the module": lambda E, register: (register(E.SAGE_ATTN, "a.b.C"), E.SAGE_ATTN.get_path(False))[1],
    "the value stays": lambda E, register: (register(E.SAGE_ATTN, "a.b.C"), E.SAGE_ATTN.value)[1],
    "the last wins": lambda E, register: [register(E.SAGE_ATTN, p) and E.SAGE_ATTN.get_path() for p in ("a.B", "a.C")],
    "no path": lambda E, register: (register(E.SAGE_ATTN, ""), outcome(E.SAGE_ATTN.get_path))[1],
    "no path, no class": lambda E, register: (register(E.SAGE_ATTN, ""), outcome(E.SAGE_ATTN.get_class))[1],
    "no such module": lambda E, register: (
        register(E.SAGE_ATTN, "no_such.module.C"),
        issubclass(outcome(E.SAGE_ATTN.get_class)[0], ImportError),
    )[1],
    "a decorator": lambda E, register: (register(E.SAGE_ATTN)(Mine) is Mine, E.SAGE_ATTN.get_path(), E.SAGE_ATTN.get_class() is Mine),
    "clear_override": lambda E, register: (register(E.SAGE_ATTN, "a.b.C"), E.SAGE_ATTN.clear_override(), E.SAGE_ATTN.get_path())[2],
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


@pytest.mark.parametrize("path, theirs", [("nodots", ValueError), ("no such.module!.C", ModuleNotFoundError), (".C", ValueError)])
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
    assert all(hasattr(abstract.AttentionBackend, name) and not hasattr(ditattn.AttentionBackend, name) for name in asked)
    assert not any(hasattr(abstract.AttentionBackend, name) for name in ("resolve_capabilities", "supports_allgather_kv"))


def test_constructors_differ_by_the_scale():
    theirs, ours = (inspect.signature(cls.__init__).parameters for cls in (abstract.AttentionImpl, ditattn.AttentionImpl))
    assert list(theirs)[:-1] == list(ours)[:-1]
    assert theirs["softmax_scale"].default is inspect.Parameter.empty and ours["softmax_scale"].default is None
    differing = [name for name in list(theirs)[1:-1] if theirs[name].default != ours[name].default]
    assert differing == ["softmax_scale"]


def test_there_is_no_branch_for_the_cpu_there():
    made = sdpa.SDPAImpl(4, 64, 0.125)
    with pytest.raises(NotImplementedError, match="^No forward implementation for platform: "):
        made.forward(*inputs())
    assert current_omni_platform.device_type == "cpu"
    assert close(layer("TORCH_SDPA").forward(*inputs()), made.forward_cuda(*inputs()))


def test_paged_kv_is_refused_alike():
    texts = [outcome(made.forward_paged, object()) for made in (sdpa.SDPAImpl(4, 64, 0.125), layer("TORCH_SDPA"))]
    assert texts[0] == texts[1] == (NotImplementedError, "SDPAImpl does not support paged KV attention")


def test_builders_and_metadata_classes_are_not_implemented_there():
    assert outcome(sdpa.SDPABackend.get_builder_cls) == (NotImplementedError, "")
    assert outcome(sdpa.SDPABackend.get_metadata_cls) == (NotImplementedError, "")
    assert Ours.TORCH_SDPA.get_class().get_metadata_cls() is ditattn.AttentionMetadata


@pytest.mark.parametrize("theirs, name, ours", [(sdpa.SDPAImpl, "SDPAImpl", "TORCH_SDPA"), (flash_attn.FlashAttentionImpl, "FlashAttentionImpl", "FLASH_ATTN")])  # fmt: skip
def test_options_nobody_knows_are_one_warning(theirs, name, ours, monkeypatch, caplog):
    said = []
    monkeypatch.setattr(sys.modules[theirs.__module__].logger, "warning", lambda text, *args: said.append(text % args))
    theirs(4, 64, 0.125, backend_kwargs={"b": 1, "a": 2})
    assert said == [f"{name} ignoring backend_kwargs: ['b', 'a']"]
    with caplog.at_level(logging.WARNING, "ditattn"):
        layer(ours, backend_kwargs={"b_page": 1, "a_page": 2})
    shown = "SDPA" if ours == "TORCH_SDPA" else ours
    assert f"{shown} ignoring backend_kwargs: ['a_page', 'b_page']" in caplog.text


# --- Metadata


def test_the_fields_are_those_of_vllm_omni_but_two():
    theirs, ours = ({n: f.default for n, f in cls.__dataclass_fields__.items()} for cls in (AttentionMetadata, ditattn.AttentionMetadata))
    assert {name: theirs[name] for name in ours if name != "extra"} == {name: ours[name] for name in ours if name != "extra"}
    assert [name for name in theirs if name not in ours] == ["video_layout", "packed_padding"]


@pytest.mark.parametrize("given", [{"joint_strategy": "x", "all": True}, {"joint_strategy": "front", "all": False}])
def test_errors_of_joint_tensors_are_those_of_its_strategies(given):
    """Its back ends never look at them."""
    query, key, value = inputs(kv_heads=4)
    fields = {"joint_query": query, "joint_key": key, "joint_value": value if given["all"] else None}
    group = type("Group", (), {"ulysses_group": None, "ulysses_world_size": 1})()
    strategy = UlyssesParallelAttention(group, 2, 1, False)
    theirs = outcome(strategy.pre_attention, query, key, value, AttentionMetadata(joint_strategy=given["joint_strategy"], **fields))
    metadata = ditattn.AttentionMetadata(joint_strategy=given["joint_strategy"], **fields)
    ours = outcome(layer(kv_heads=4).forward, query, key, value, metadata)
    assert theirs[0] is ours[0] is ValueError
    assert theirs[1].rstrip(".") == ours[1].rstrip(".")


def test_back_ends_do_not_look_at_joint_tensors_there(flash):
    query, key, value = inputs(kv_heads=4)
    fields = {"joint_query": query, "joint_key": key, "joint_value": value}
    metadata = AttentionMetadata(**fields)
    alone = expected(query, key, value)
    assert close(sdpa.SDPAImpl(4, 64, 0.125).forward_cuda(query, key, value, metadata), alone)
    assert close(flash(query, key, value, metadata)[0], alone)
    assert layer(kv_heads=4).forward(query, key, value, ditattn.AttentionMetadata(**fields)).shape[1] == 2 * query.shape[1]


@pytest.mark.parametrize("mask", [PADDING.long(), PADDING.float(), PADDING.float() * 0.5])
def test_sdpa_takes_any_mask_of_two_dimensions_for_not_zero_keeps_there(mask):
    query, key, value = inputs()
    theirs = sdpa.SDPAImpl(4, 64, 0.125).forward_cuda(query, key, value, AttentionMetadata(attn_mask=mask))
    assert close(theirs, expected(query, key, value, PADDING[:, None, None]))
    ours = outcome(layer("TORCH_SDPA").forward, query, key, value, ditattn.AttentionMetadata(attn_mask=mask))
    if mask.dtype == torch.long:
        assert ours[0] is ValueError
    else:
        assert close(ours, expected(query, key, value, bias=mask[:, None, None])) and not close(ours, theirs)


def test_sdpa_broadcasts_a_mask_of_queries_and_keys_there():
    """Where it is not (batch, keys); here the error says to give four dimensions."""
    query, key, value = inputs()
    mask = torch.rand(7, 9, generator=torch.Generator().manual_seed(1)) < 0.6
    theirs = sdpa.SDPAImpl(4, 64, 0.125).forward_cuda(query, key, value, AttentionMetadata(attn_mask=mask))
    assert close(theirs, expected(query, key, value, mask))
    kind, text = outcome(layer("TORCH_SDPA").forward, query, key, value, ditattn.AttentionMetadata(attn_mask=mask))
    assert kind is ValueError and "give a (queries, keys) mask as (1, 1, queries, keys)." in text


@pytest.mark.parametrize("rows", [9, 4])
def test_without_query_ranges_the_rows_are_the_last_ones_there(rows):
    """Here the first ones; with as many rows as keys these are the same."""
    query, key, value = inputs(seq_q=rows)
    spans = [[(2, 4), (6, 8)]] * 2
    theirs = piecewise_attn(query, key, value, spans, 0.125, stand_in_flash_attn_func)
    ours = layer().forward(query, key, value, ditattn.AttentionMetadata(full_attn_spans=spans))
    assert close(ours, theirs) is (rows == 9)
    ranges = [QueryRange(0, rows, 9 - rows)]
    assert close(layer().forward(query, key, value, ditattn.AttentionMetadata(full_attn_spans=spans, query_ranges=ranges)), theirs)


def test_spans_must_be_alike_in_a_batch_there():
    query, key, value = inputs(seq_q=9)
    spans = [[(2, 4)], [(6, 8)]]
    kind, text = outcome(piecewise_attn, query, key, value, spans, 0.125, stand_in_flash_attn_func)
    assert kind is ValueError and text.startswith("piecewise_attn requires homogeneous batch: ")
    ours = layer().forward(query, key, value, ditattn.AttentionMetadata(full_attn_spans=spans))
    for i, own in enumerate(spans):
        one = [x[i : i + 1] for x in (query, key, value)]
        assert close(ours[i : i + 1], piecewise_attn(*one, [own], 0.125, stand_in_flash_attn_func))


def test_query_ranges_must_cover_the_query():
    query, key, value = inputs()
    ranges = (QueryRange(0, 3, 0), QueryRange(4, 7, 4))
    theirs = outcome(piecewise_attn, query, key, value, [[], []], 0.125, stand_in_flash_attn_func, ranges)
    ours = outcome(layer().forward, query, key, value, ditattn.AttentionMetadata(full_attn_spans=[[], []], query_ranges=ranges))
    assert theirs == (ValueError, "query_ranges must cover local query contiguously")
    assert ours[0] is ValueError and ours[1].startswith(theirs[1])


def test_valid_kv_length_is_cudnns_alone_there(flash):
    query, key, value = inputs()
    metadata = AttentionMetadata(extra={"valid_kv_length": 10})
    theirs = outcome(cudnn_attn.CuDNNAttentionImpl(4, 64, 0.125).forward_cuda, query, key, value, metadata)
    assert theirs == (ValueError, "valid_kv_length must be within the K/V sequence, got 10 for length 9")
    ours = outcome(layer().forward, query, key, value, ditattn.AttentionMetadata(extra={"valid_kv_length": 10}))
    assert ours[0] is ValueError and ours[1].startswith(theirs[1])
    metadata = AttentionMetadata(extra={"valid_kv_length": 5})
    alone = expected(query, key, value)
    assert close(sdpa.SDPAImpl(4, 64, 0.125).forward_cuda(query, key, value, metadata), alone)
    assert close(flash(query, key, value, metadata)[0], alone)
    ours = layer().forward(query, key, value, ditattn.AttentionMetadata(extra={"valid_kv_length": 5}))
    assert close(ours, expected(query, key[:, :5], value[:, :5]))


def packed(*offsets, **more):
    cu = torch.tensor(offsets, dtype=torch.int32)
    return {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 9, "max_seqlen_k": 9, **more}


def test_packed_sequences_with_a_valid_kv_length(flash):
    """There the padding is a document of its own, and the length is not looked at; here the two contradict each other."""
    query, key, value = inputs(batch=1, seq_q=9)
    extra = packed(0, 6, 9, valid_kv_length=6)
    theirs, _ = flash(query, key, value, AttentionMetadata(extra=extra))
    assert close(theirs[:, :6], expected(query[:, :6], key[:, :6], value[:, :6]))
    kind, text = outcome(layer().forward, query, key, value, ditattn.AttentionMetadata(extra=extra))
    assert (kind, text) == (ValueError, "cu_seqlens_k ends at 9, expected 6 (the tokens of a batch entry).")
    inside = vllm_omni.FlashAttentionImpl(4, 64, 0.125, num_kv_heads=2)
    assert close(inside.forward(query, key, value, AttentionMetadata(extra=extra)), theirs)


def test_float_is_a_kv_cache_dtype_there(flash):
    query, key, value = inputs()
    assert close(flash(query, key, value, AttentionMetadata(extra={"kv_cache_dtype": "float"}))[0], expected(query, key, value))
    metadata = ditattn.AttentionMetadata(extra={"kv_cache_dtype": "float"})
    assert outcome(layer().forward, query, key, value, metadata)[0] is ValueError


# --- Back ends


def test_gqa_is_refused_alike():
    query, key, value = inputs(heads=3, kv_heads=2)
    theirs = outcome(sdpa.SDPAImpl(3, 64, 0.125).forward_cuda, query, key, value)
    ours = outcome(layer, "TORCH_SDPA", 3, 2)
    assert theirs == (ValueError, "GQA requires query heads to be a multiple of KV heads, got q_heads=3 and kv_heads=2.")
    assert ours[0] is ValueError and ours[1].startswith(theirs[1].rstrip("."))


def test_flash_attn_needs_a_package_there():
    kind, text = outcome(flash_attn.FlashAttentionImpl(4, 64, 0.125).forward_cuda, *inputs())
    assert kind is ImportError and text.startswith("FlashAttentionBackend requires Flash Attention. ")


def test_spans_go_before_packed_sequences_and_these_before_masks(flash):
    """A mask beside spans or packed sequences is not looked at there, and holds here."""
    query, key, value = inputs(batch=1, seq_q=9)
    spans, extra, keep = [[(2, 5)]], packed(0, 4, 9), torch.arange(9)[None] != 3
    everything = AttentionMetadata(attn_mask=keep, extra=extra, full_attn_spans=spans)
    assert close(flash(query, key, value, everything)[0], piecewise_attn(query, key, value, spans, 0.125, stand_in_flash_attn_func))
    without = AttentionMetadata(extra=extra)
    both = AttentionMetadata(attn_mask=keep, extra=extra)
    assert torch.equal(flash(query, key, value, both)[0], flash(query, key, value, without)[0])
    ours = [layer().forward(query, key, value, ditattn.AttentionMetadata(attn_mask=m, extra=extra)) for m in (keep, None)]
    assert close(ours[1], flash(query, key, value, without)[0]) and not close(ours[0], ours[1])


def test_a_mask_that_is_all_true_goes_the_dense_way_there(flash):
    query, key, value = inputs()
    assert flash(query, key, value, AttentionMetadata(attn_mask=torch.ones(2, 9, dtype=torch.bool)))[1] == ["dense"]
    assert flash(query, key, value, AttentionMetadata(attn_mask=PADDING))[1] == ["varlen"]


def test_padded_query_rows_are_zero_there(flash):
    """In cross-attention, and where lengths differ, keys alone are left out."""
    query, key, value = inputs(seq_q=9)
    metadata = AttentionMetadata(attn_mask=PADDING)
    wanted = expected(query, key, value, PADDING[:, None, None])
    theirs, _ = flash(query, key, value, metadata)
    assert not theirs[~PADDING].any() and close(theirs[PADDING], wanted[PADDING])
    assert close(flash(query, key, value, metadata, role="cross")[0], wanted)
    assert close(layer().forward(query, key, value, ditattn.AttentionMetadata(attn_mask=PADDING)), wanted)


def test_flash_attn_takes_masks_of_two_dimensions_there(flash):
    query, key, value = inputs(seq_q=9)
    mask = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(1)) < 0.6
    theirs = outcome(flash, query, key, value, AttentionMetadata(attn_mask=mask))
    assert theirs == (AssertionError, "attention_mask must be 2D, (batch_size, seq_len)")
    assert close(layer().forward(query, key, value, ditattn.AttentionMetadata(attn_mask=mask)), expected(query, key, value, mask))


def test_packed_sequences_need_batch_size_one_there(flash):
    query, key, value = inputs(seq_q=9)
    theirs = outcome(flash, query, key, value, AttentionMetadata(extra=packed(0, 4, 9)))
    assert theirs == (ValueError, "Packed variable-length attention currently requires batch size 1")
    ours = layer().forward(query, key, value, ditattn.AttentionMetadata(extra=packed(0, 4, 9)))
    one = [x[1:] for x in (query, key, value)]
    assert close(ours[1:], flash(*one, AttentionMetadata(extra=packed(0, 4, 9)))[0])


def test_incomplete_packed_sequences_are_refused_alike(flash):
    query, key, value = inputs(batch=1, seq_q=9)
    extra = {key: value for key, value in packed(0, 9).items() if key.endswith("_q")}
    theirs = outcome(flash, query, key, value, AttentionMetadata(extra=extra))
    ours = outcome(layer().forward, query, key, value, ditattn.AttentionMetadata(extra=extra))
    assert theirs == (ValueError, "Incomplete packed FlashAttention metadata; missing ['cu_seqlens_k', 'max_seqlen_k']")
    assert ours[0] is ValueError and ours[1].startswith(theirs[1])


def test_causal_with_fewer_queries_than_keys(flash):
    query, key, value = inputs(seq_q=5)
    theirs = [sdpa.SDPAImpl(4, 64, 0.125, causal=True).forward_cuda(query, key, value), flash(query, key, value, causal=True)[0]]
    ours = [layer(member, causal=True).forward(query, key, value) for member in ("TORCH_SDPA", "FLASH_ATTN")]
    assert close(ours[0], theirs[0]) and close(ours[1], theirs[1]) and not close(ours[0], ours[1])


def test_causal_and_a_mask_hold_together(flash):
    query, key, value = inputs(seq_q=9)
    keep = torch.arange(9) != 4
    metadata = AttentionMetadata(attn_mask=keep[None].repeat(2, 1))
    wanted = expected(query, key, value, keep & torch.ones(9, 9).tril().bool())
    assert close(sdpa.SDPAImpl(4, 64, 0.125, causal=True).forward_cuda(query, key, value, metadata), wanted)
    assert close(flash(query, key, value, metadata, causal=True)[0][:, keep], wanted[:, keep])
    for member in ("TORCH_SDPA", "FLASH_ATTN"):
        ours = layer(member, causal=True).forward(query, key, value, ditattn.AttentionMetadata(attn_mask=metadata.attn_mask))
        assert close(ours, wanted)


def test_sage_attn_takes_no_mask_and_needs_a_package_there():
    made = sage_attn.SageAttentionImpl(4, 64, 0.125)
    theirs = outcome(made.forward_cuda, *inputs(), AttentionMetadata(attn_mask=PADDING))
    assert theirs == (ValueError, "SAGE_ATTN does not support attn_mask. Select a mask-capable backend.")
    kind, text = outcome(made.forward_cuda, *inputs())
    assert kind is ImportError and text.startswith("SAGE_ATTN requires sageattention. ")
    assert outcome(Theirs.SAGE_ATTN_3.get_class)[0] is ImportError


def test_one_key_is_refused_by_cudnn_where_it_was_chosen():
    made = cudnn_attn.CuDNNAttentionImpl(4, 64, 0.125, backend_explicit=True)
    kind, text = outcome(made.forward_cuda, *inputs(seq_kv=1))
    assert kind is ValueError and "cuDNN FMHA does not support key/value sequence length 1. " in text


def test_nan_behind_a_mask_shows_there():
    query, key, value = inputs()
    value[0, 7] = torch.nan
    theirs = sdpa.SDPAImpl(4, 64, 0.125).forward_cuda(query, key, value, AttentionMetadata(attn_mask=PADDING))
    ours = layer().forward(query, key, value, ditattn.AttentionMetadata(attn_mask=PADDING))
    assert theirs[0].isnan().any() and not ours.isnan().any()


# --- Selection


def resolved(config, **asked):
    """(spec's back end or None, source) of both selectors."""
    theirs = AttentionConfig(**config).resolve_with_source(**asked)
    ours = ditattn.selection.resolve_role(config=config, **asked)
    return (theirs[0].backend if theirs[0] else None, theirs[1]), (ours.spec.backend if ours.spec else None, ours.source)


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


@pytest.mark.parametrize("config, text", [({"default": {"backend": 7}}, "Expected str for AttentionSpec.backend, got "), ({"per_role": 7}, "Expected dict for AttentionConfig.per_role, got ")])  # fmt: skip
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
