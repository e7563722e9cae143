"""ditattn's classes in vLLM-Omni, by its own package: registry, selector, layers, metadata."""

import copy
import dataclasses
import gc
import pickle
import re
import subprocess
import sys
import types
import weakref
from pathlib import Path

import pytest

layer_module = pytest.importorskip(
    "vllm_omni.diffusion.attention.layer", reason="vLLM-Omni is not installed: requirements-vllm-omni.txt", exc_type=ImportError
)

import torch
from vllm_omni.diffusion.attention.backends import abstract, sdpa
from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata, QueryRange
from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum as Theirs
from vllm_omni.diffusion.attention.backends.registry import register_diffusion_backend
from vllm_omni.diffusion.attention.backends.utils.piecewise_attn import piecewise_attn
from vllm_omni.diffusion.config import set_current_diffusion_config
from vllm_omni.diffusion.data import build_attention_config
from vllm_omni.platforms.interface import UnspecifiedOmniPlatform
from vllm_omni_reference import causal, expected, inputs, same_document, stand_in_flash_attn_func

import ditattn
from ditattn.integrations import vllm_omni

CLASSES = {
    "FLASH_ATTN": "FlashAttention",
    "TORCH_SDPA": "SDPA",
    "SAGE_ATTN": "SageAttention",
    "SAGE_ATTN_3": "SageAttention3",
    "CUDNN_ATTN": "CuDNNAttention",
    "FLASHINFER_ATTN": "FlashInferAttention",
}
PATH = "ditattn.integrations.vllm_omni."
HERE = ["FLASH_ATTN", "TORCH_SDPA", "SAGE_ATTN", "SAGE_ATTN_3"]  # of a build without CUDA
NOT_HERE = [name for name in CLASSES if name not in HERE]
EXACT = HERE[:2]
TOLERANCE = {"FLASH_ATTN": 1e-5, "TORCH_SDPA": 1e-5, "SAGE_ATTN": 0.05, "SAGE_ATTN_3": 0.5}
DOCS = Path(__file__).resolve().parents[2] / "docs" / "vllm-omni.md"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="written for vLLM-Omni's platform without a device")


@pytest.fixture(autouse=True)
def as_installed(monkeypatch):
    """Every test ends with both registries as they are after import, and runs without gradients, as vLLM-Omni does."""
    monkeypatch.delenv("DIFFUSION_ATTENTION_BACKEND", raising=False)
    with torch.no_grad():
        yield
    vllm_omni.uninstall()
    for member in [*Theirs, *ditattn.DiffusionAttentionBackendEnum]:
        member.clear_override()


def backend(member):
    return getattr(vllm_omni, f"{CLASSES[member]}Backend")


def impl(member="FLASH_ATTN", heads=4, kv_heads=2, head_size=64, **config):
    scale = config.pop("softmax_scale", head_size**-0.5)
    return backend(member).get_impl_cls()(heads, head_size, scale, num_kv_heads=kv_heads, **config)


def layer(config=None, *, heads=4, kv_heads=2, head_size=64, diffusion=None, **kwargs):
    """vLLM-Omni's own layer, made under a configuration as its engine makes models."""
    parallel = types.SimpleNamespace(ring_degree=1, ulysses_degree=1, allgather_degree=1)
    made = types.SimpleNamespace(
        diffusion_attention_config=build_attention_config(config), parallel_config=parallel, **(diffusion or {})
    )
    with set_current_diffusion_config(made):
        return layer_module.Attention(
            heads, head_size, kwargs.pop("causal", False), head_size**-0.5, num_kv_heads=kv_heads, **kwargs
        )


def assert_close(out, wanted, member="FLASH_ATTN"):
    """By the norms of the two, and no row may be far off."""
    assert out.shape == wanted.shape and out.dtype == torch.float32
    assert torch.linalg.norm(out - wanted) <= TOLERANCE[member] * torch.linalg.norm(wanted)


def run_python(text, **kwargs):
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120, **kwargs)


# --- Classes


@pytest.mark.parametrize("member", CLASSES)
def test_every_class_loads_through_vllm_omnis_registry(member):
    """Under the names that vLLM-Omni's own have."""
    register_diffusion_backend(Theirs[member], PATH + Theirs[member].value.rpartition(".")[2])
    cls = Theirs[member].get_class()
    assert cls is backend(member) and issubclass(cls, abstract.AttentionBackend)
    assert issubclass(cls.get_impl_cls(), abstract.AttentionImpl)
    assert cls.get_impl_cls().__name__ == f"{CLASSES[member]}Impl"
    assert cls.get_metadata_cls() is AttentionMetadata
    assert (cls.supported_platforms, cls.supports_paged_kv, cls.accept_output_buffer) == (None, False, True)
    assert cls.indexes_kv_by_block_stride() is False
    with pytest.raises(NotImplementedError, match="There is no metadata builder"):
        cls.get_builder_cls()
    for each in (cls, cls.get_impl_cls()):
        assert pickle.loads(pickle.dumps(each)) is each


@pytest.mark.parametrize("member", HERE)
def test_a_class_answers_as_ditattns_does(member):
    cls, own = backend(member), ditattn.DiffusionAttentionBackendEnum[member].get_class()
    assert cls.get_name() == own.get_name()
    assert cls.get_supported_head_sizes() == own.get_supported_head_sizes()
    assert [cls.supports_head_size(size) for size in (0, 1, 64, 300)] == [own.supports_head_size(s) for s in (0, 1, 64, 300)]
    assert cls.supports_attention_mask() is cls.supports_attention_mask(object()) is own.supports_attention_mask()
    assert cls.supports_piecewise_spans is own.supports_piecewise_spans()
    assert cls.supports_packed_mask_free() is cls.supports_multi_doc_packed_varlen() is own.capabilities()["packed"] is True
    assert cls.supports_prefix_kv_slicing is True
    assert cls.validate_available() is None


def test_answers_are_methods_where_the_base_class_has_methods(monkeypatch):
    """supports_piecewise_spans is an attribute in vLLM-Omni 0.30, and a method in others."""
    monkeypatch.setattr(abstract.AttentionBackend, "supports_piecewise_spans", classmethod(lambda cls: False))

    class Mine(abstract.AttentionBackend):
        member = "FLASH_ATTN"
        supports_piecewise_spans = vllm_omni._ClassAnswer(lambda own: own.supports_piecewise_spans())

    assert Mine.supports_piecewise_spans() is True


@pytest.mark.parametrize("member", NOT_HERE)
def test_what_was_not_built_says_so_and_vllm_omnis_own_is_not_taken_for_it(member):
    """ditattn's class paths are vLLM-Omni's, whose package would be found there."""
    for ask in (backend(member).validate_available, backend(member).get_name, lambda: impl(member)):
        with pytest.raises(ImportError, match="not built: ditattn was configured without DITATTN_CUDA"):
            ask()


def test_importing_the_module_loads_no_back_end():
    """Nor does using one load vLLM-Omni's of the same path."""
    done = run_python(
        "import sys\n"
        "from pathlib import Path\n"
        "from ditattn.integrations import vllm_omni\n"
        "def loaded():\n"
        "    files = [l.rpartition('/')[2] for l in Path('/proc/self/maps').read_text().splitlines() if l.endswith('_attn.so')]\n"
        "    ours = 'vllm_omni.diffusion.attention.backends.'\n"
        "    return sorted(set(files)), sorted(m for m in sys.modules if m.startswith(ours) and m.endswith('attn'))\n"
        "print(loaded())\n"
        "vllm_omni.FlashAttentionBackend.get_name()\n"
        "print(loaded())\n"
    )
    assert done.stdout.splitlines()[-2:] == ["([], [])", "(['flash_attn.so'], [])"], done.stderr


def test_without_vllm_omni_the_import_says_what_is_missing():
    done = run_python("import sys; sys.modules['vllm_omni'] = None; import ditattn.integrations.vllm_omni")
    assert "ImportError: ditattn.integrations.vllm_omni needs vLLM-Omni: " in done.stderr


def test_a_class_of_ones_own_in_ditattns_registry_is_used():
    """Also one that derives from vLLM-Omni's, whose supports_piecewise_spans is no method."""

    class MyImpl(abstract.AttentionImpl):
        def __init__(self, num_heads, head_size, softmax_scale, **_):
            self.scale = softmax_scale

        def forward(self, query, key, value, attn_metadata=None):
            return expected(query, key, value, scale=self.scale).float()

    @ditattn.register_diffusion_backend(ditattn.DiffusionAttentionBackendEnum.FLASH_ATTN)
    class MyBackend(sdpa.SDPABackend):
        get_impl_cls = staticmethod(lambda: MyImpl)

    query, key, value = inputs(kv_heads=4)
    assert vllm_omni.FlashAttentionBackend.get_name() == "SDPA"
    assert vllm_omni.FlashAttentionBackend.supports_piecewise_spans is False
    assert_close(impl(kv_heads=4).forward(query, key, value), expected(query, key, value))


# --- install


def test_install_registers_what_can_be_had_here():
    assert vllm_omni.install() == HERE
    for member in CLASSES:
        assert Theirs[member].is_overridden() is (member in HERE)
    assert [Theirs[member].get_class() for member in HERE] == [backend(member) for member in HERE]
    vllm_omni.uninstall()
    assert not any(member.is_overridden() for member in Theirs)
    assert Theirs.FLASH_ATTN.get_class().__module__.startswith("vllm_omni.")


def test_install_of_named_members_is_all_or_nothing():
    assert vllm_omni.install("SAGE_ATTN") == ["SAGE_ATTN"]
    with pytest.raises(ImportError, match="not built: ditattn was configured without DITATTN_CUDA"):
        vllm_omni.install("FLASH_ATTN", "CUDNN_ATTN")
    assert [member.name for member in Theirs if member.is_overridden()] == ["SAGE_ATTN"]
    with pytest.raises(ValueError, match="^ditattn has no class for 'TRTLLM_ATTN' of vLLM-Omni. It has: FLASH_ATTN, TORCH_"):
        vllm_omni.install("TRTLLM_ATTN")


def test_uninstall_leaves_the_registrations_of_others():
    vllm_omni.install("FLASH_ATTN", "SAGE_ATTN")
    register_diffusion_backend(Theirs.TORCH_SDPA, "a.b.C")
    register_diffusion_backend(Theirs.SAGE_ATTN, "a.b.D")
    vllm_omni.uninstall("FLASH_ATTN", "SAGE_ATTN", "TORCH_SDPA")
    assert [member.name for member in Theirs if member.is_overridden()] == ["TORCH_SDPA", "SAGE_ATTN"]


def test_a_platform_that_the_build_is_not_for(monkeypatch):
    monkeypatch.setattr(UnspecifiedOmniPlatform, "device_type", "cuda")
    with pytest.raises(ImportError, match="^ditattn's FLASH_ATTN computes on cpu only as it was built, .* platform is cuda."):
        vllm_omni.install("FLASH_ATTN")
    assert vllm_omni.install() == []


def test_install_holds_for_names_that_were_resolved_before():
    """vLLM-Omni's selector remembers a class by the name that was asked for."""
    vllm_omni.install("SAGE_ATTN")
    assert layer({"default": "SAGE_ATTN"}).attn_backend is vllm_omni.SageAttentionBackend
    register_diffusion_backend(Theirs.SAGE_ATTN, PATH + "FlashAttentionBackend")
    vllm_omni.install("FLASH_ATTN")
    assert layer({"default": "SAGE_ATTN"}).attn_backend is vllm_omni.FlashAttentionBackend


# --- Selector and layer


def test_the_cpu_has_no_back_end_before():
    with pytest.raises(NotImplementedError):
        layer()


def test_the_default_on_the_cpu_is_the_choice_of_ditattns_selector():
    vllm_omni.install()
    made = layer()
    assert made.attn_backend is vllm_omni.AutoAttentionBackend
    assert isinstance(made.attention, vllm_omni.AutoAttentionImpl) and not made.backend_explicit
    query, key, value = inputs()
    assert_close(made(query, key, value), expected(query, key, value))


@pytest.mark.parametrize("member", HERE)
def test_vllm_omnis_layer_computes_with_an_explicit_choice(member):
    vllm_omni.install()
    made = layer({"default": "SDPA" if member == "none" else member.lower()})
    assert made.attn_backend is backend(member) and made.backend_explicit
    query, key, value = inputs(seq_q=33, seq_kv=65)
    keep = torch.arange(65) < torch.tensor([[40], [65]])
    out = made(query, key, value, AttentionMetadata(attn_mask=keep))
    assert_close(out, expected(query, key, value, keep[:, None, None]), member)


def test_roles_and_the_environment_choose_as_ever(monkeypatch):
    vllm_omni.install()
    config = {"default": "FLASH_ATTN", "per_role": {"cross": "SAGE_ATTN"}}
    assert layer(config, role="self").attn_backend is vllm_omni.FlashAttentionBackend
    assert layer(config, role="x", role_category="cross").attn_backend is vllm_omni.SageAttentionBackend
    monkeypatch.setenv("DIFFUSION_ATTENTION_BACKEND", "TORCH_SDPA")
    assert layer().attn_backend is vllm_omni.SDPABackend


def test_an_explicit_choice_that_cannot_be_had_is_an_error():
    vllm_omni.install()
    with pytest.raises(ValueError, match="^Unknown diffusion attention backend: 'NOPE'. Valid options are: FLASH_ATTN, TORCH_"):
        layer({"default": "nope"})
    with pytest.raises(ValueError, match="^SAGE_ATTN was explicitly selected but head_size=300 is unsupported. Supported head"):
        layer({"default": "SAGE_ATTN"}, head_size=300)
    register_diffusion_backend(Theirs.CUDNN_ATTN, PATH + "CuDNNAttentionBackend")
    with pytest.raises(ImportError, match="not built: ditattn was configured without DITATTN_CUDA"):
        layer({"default": "CUDNN_ATTN"})


def test_a_models_own_implementation_may_derive_from_ours():
    vllm_omni.install()
    mine = type("Mine", (vllm_omni.FlashAttentionImpl,), {})
    made = layer({"default": "FLASH_ATTN"}, impl_overrides={"FLASH_ATTN": mine})
    assert type(made.attention) is mine
    assert_close(made(*inputs()), expected(*inputs()))
    with pytest.raises(TypeError, match="must subclass the selected implementation"):
        layer({"default": "FLASH_ATTN"}, impl_overrides={"FLASH_ATTN": sdpa.SDPAImpl})


@pytest.mark.parametrize("member", HERE)
def test_quantized_kv_is_refused_where_the_layer_is_made(member):
    vllm_omni.install()
    cls = backend(member).get_impl_cls()
    assert [cls.supports_kv_cache_dtype(dtype, "cpu") for dtype in (None, "auto", "float")] == [True] * 3
    assert [cls.supports_kv_cache_dtype(dtype, "cpu") for dtype in ("fp8", "mxfp4")] == [False] * 2
    with pytest.raises(ValueError, match=f"{backend(member).get_name()} does not support kv_cache_dtype='fp8'"):
        layer({"default": member}, diffusion={"diffusion_kv_cache_dtype": "fp8"})
    made = layer({"default": member}, diffusion={"diffusion_kv_cache_dtype": "float"})
    assert_close(made(*inputs()), expected(*inputs()), member)


def test_the_layer_refuses_a_mask_for_a_back_end_without_masks(monkeypatch):
    vllm_omni.install()
    made = layer({"default": "SAGE_ATTN"})
    query, key, value = inputs()
    dense = torch.rand(2, 1, 7, 9) < 0.5
    with pytest.raises(ValueError, match="^SAGE_ATTN does not support a mask of kind bool. Supported kinds: padding, spans."):
        made(query, key, value, AttentionMetadata(attn_mask=dense))


# --- forward


def shapes():
    """(name, query, key, value): odd lengths, single tokens, views that are not contiguous, half precision."""
    yield "odd", *inputs()
    yield "one row", *inputs(seq_q=1)
    yield "one key", *inputs(seq_kv=1)
    yield "many", *inputs(seq_q=130, seq_kv=257)
    yield "no groups", *inputs(heads=3, kv_heads=3, head_size=40)
    yield "views", *(x[:, ::2].transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(seq_q=14, seq_kv=18))


@pytest.mark.parametrize("member", HERE)
@pytest.mark.parametrize("name, query, key, value", shapes(), ids=lambda x: x if isinstance(x, str) else "")
def test_dense(member, name, query, key, value):
    made = impl(member, query.shape[2], key.shape[2], query.shape[3])
    assert_close(made.forward(query, key, value), expected(query, key, value), member)
    assert torch.equal(made.forward_cuda(query, key, value), made.forward(query, key, value))


MASKS = {
    "padding": lambda: torch.arange(9) < torch.tensor([[5], [9]]),
    "holes": lambda: torch.tensor([[1, 0, 1, 0, 0, 1, 1, 0, 1], [0, 1, 1, 1, 0, 0, 0, 1, 0]]).bool(),
    "integers": lambda: torch.tensor([[1, 0, 2, 0, 0, 1, 1, 0, 1], [0, 1, 1, 1, 0, 0, 0, 7, 0]]),
    "numbers in two dimensions": lambda: torch.tensor([[1, 0, 1, 0, 0, 1, 1, 0, 1], [0, 1, 1, 1, 0, 0, 0, 1, 0.5]]),
    "four dimensions": lambda: torch.rand(2, 1, 7, 9, generator=torch.Generator().manual_seed(2)) < 0.6,
    "by head": lambda: torch.rand(2, 4, 7, 9, generator=torch.Generator().manual_seed(3)) < 0.6,
    "broadcast": lambda: torch.arange(9).expand(1, 1, 1, 9) != 4,
    "added": lambda: torch.randn(2, 4, 7, 9, generator=torch.Generator().manual_seed(4)),
    "added for all": lambda: torch.randn(1, 1, 7, 9, generator=torch.Generator().manual_seed(5)),
    "not contiguous": lambda: (torch.rand(2, 1, 9, 7, generator=torch.Generator().manual_seed(6)) < 0.6).transpose(2, 3),
    "all true": lambda: torch.ones(2, 9, dtype=torch.bool),
}


@pytest.mark.parametrize("member", EXACT)
@pytest.mark.parametrize("mask", MASKS)
def test_masks_mean_what_they_mean_to_vllm_omnis_sdpa(member, mask):
    query, key, value = inputs()
    metadata = AttentionMetadata(attn_mask=MASKS[mask]())
    out = impl(member).forward(query, key, value, metadata)
    assert_close(out, sdpa.SDPAImpl(4, 64, 0.125).forward_cuda(query, key, value, metadata), member)
    full = metadata.attn_mask if metadata.attn_mask.ndim == 4 else metadata.attn_mask.bool()[:, None, None]
    given = {"keep": full} if full.dtype == torch.bool else {"bias": full}
    assert_close(out, expected(query, key, value, **given), member)


@pytest.mark.parametrize("rows, keys", [(9, 9), (1, 1), (5, 9)])
@pytest.mark.parametrize("member", HERE)
def test_causal(member, rows, keys):
    """With fewer queries than keys: TORCH_SDPA as vLLM-Omni's SDPA, the others to the bottom right."""
    query, key, value = inputs(seq_q=rows, seq_kv=keys)
    out = impl(member, causal=True).forward(query, key, value)
    top_left = member == "TORCH_SDPA"
    assert_close(out, expected(query, key, value, causal(rows, keys, 0 if top_left else None)), member)
    if top_left:
        assert_close(out, sdpa.SDPAImpl(4, 64, 0.125, causal=True).forward_cuda(query, key, value), member)


SPANS = {
    "one": ([[(2, 5)]] * 2, None),
    "two": ([[(0, 3), (5, 9)]] * 2, None),
    "none": ([[], []], None),
    "ranges": ([[(2, 5), (7, 8)]] * 2, (QueryRange(0, 3, 1), QueryRange(3, 7, 5))),
}


@pytest.mark.parametrize("member", EXACT)
@pytest.mark.parametrize("name", SPANS)
def test_spans_are_vllm_omnis_piecewise_attention(member, name):
    spans, ranges = SPANS[name]
    query, key, value = inputs()
    metadata = AttentionMetadata(full_attn_spans=spans, query_ranges=ranges)
    wanted = piecewise_attn(query, key, value, spans, 0.125, stand_in_flash_attn_func, ranges)
    assert_close(impl(member).forward(query, key, value, metadata), wanted, member)


def packed(cu_seqlens_q, cu_seqlens_k=None, **more):
    offsets = [torch.tensor(cu, dtype=torch.int32) for cu in (cu_seqlens_q, cu_seqlens_k or cu_seqlens_q)]
    longest = [int(cu.diff().max()) for cu in offsets]
    return {"cu_seqlens_q": offsets[0], "cu_seqlens_k": offsets[1], "max_seqlen_q": longest[0], "max_seqlen_k": longest[1], **more}


@pytest.mark.parametrize("member", HERE)
@pytest.mark.parametrize("offsets", [([0, 3, 4, 9],), ([0, 9],), ([0, 2, 9], [0, 5, 9])])
def test_packed_documents_do_not_see_each_other(member, offsets):
    query, key, value = inputs(batch=1, seq_q=9)
    extra = packed(*offsets)
    keep = same_document(extra["cu_seqlens_q"], extra["cu_seqlens_k"], 9, 9)
    out = impl(member).forward(query, key, value, AttentionMetadata(extra=extra))
    assert_close(out, expected(query, key, value, keep), member)


def test_a_model_may_leave_out_the_mask_of_packed_padding():
    """What supports_packed_mask_free, supports_prefix_kv_slicing say: [real, padding] with all the keys models give."""
    query, key, value = inputs(batch=1, seq_q=9)
    key[:, 6:] = torch.nan
    extra = packed([0, 6, 9], valid_kv_length=6, npu_attn_varlen=True, laser_input_scale=4.0)
    padding = abstract.PackedPaddingMetadata(6, 6, extra["cu_seqlens_q"][:2], extra["cu_seqlens_k"][:2])
    layout = abstract.VideoTokenLayout(prefix_len=2, latent_grid=(1, 2, 2))
    metadata = AttentionMetadata(extra=extra, packed_padding=padding, video_layout=layout)
    out = impl().forward(query, key, value, metadata)
    assert_close(out[:, :6], expected(query[:, :6], key[:, :6], value[:, :6]))


@pytest.mark.parametrize("member", HERE)
def test_valid_kv_length_is_a_prefix(member):
    query, key, value = inputs()
    out = impl(member).forward(query, key, value, AttentionMetadata(extra={"valid_kv_length": 5}))
    assert_close(out, expected(query, key[:, :5], value[:, :5]), member)
    with pytest.raises(ValueError, match="^valid_kv_length must be within the K/V sequence, got 10 for length 9"):
        impl(member).forward(query, key, value, AttentionMetadata(extra={"valid_kv_length": 10}))


@pytest.mark.parametrize("dtype", ["float", "auto", None])
def test_kv_cache_dtypes_that_are_none(dtype):
    query, key, value = inputs()
    out = impl().forward(query, key, value, AttentionMetadata(extra={"kv_cache_dtype": dtype}))
    assert torch.equal(out, impl().forward(query, key, value))
    with pytest.raises(ValueError, match="FLASH_ATTN does not support kv_cache_dtype='fp8'"):
        impl().forward(query, key, value, AttentionMetadata(extra={"kv_cache_dtype": "fp8"}))


@pytest.mark.parametrize("strategy", ["front", "rear"])
def test_joint_tensors_are_joined_by_vllm_omnis_strategy_and_not_again(strategy):
    """Its strategies join them to query, key and value, and leave the fields of the metadata as they were."""
    from vllm_omni.diffusion.attention.parallel.ulysses import UlyssesParallelAttention

    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        group = types.SimpleNamespace(
            ulysses_group=torch.distributed.group.WORLD, ulysses_world_size=1, ulysses_rank=0, ring_world_size=1, ring_group=None
        )
        made = UlyssesParallelAttention(group, 2, 1, False)
        query, key, value = inputs(seq_q=9, kv_heads=4)
        text = inputs(seq_q=3, seq_kv=3, kv_heads=4, seed=2)
        keep = torch.tensor([[True, False, True], [True, True, True]])
        metadata = AttentionMetadata(
            joint_query=text[0], joint_key=text[1], joint_value=text[2], joint_strategy=strategy, joint_attn_mask=keep
        )
        joined = made.pre_attention(query, key, value, metadata)
    finally:
        torch.distributed.destroy_process_group()
    assert joined[3].joint_query is not None and joined[0].shape[1] == 12
    order = slice(None) if strategy == "front" else slice(None, None, -1)
    whole = [torch.cat([a, b][order], 1) for a, b in zip(text, (query, key, value))]
    mask = torch.cat([keep, torch.ones(2, 9, dtype=torch.bool)][order], 1)
    for each in (impl(kv_heads=4).forward, sdpa.SDPAImpl(4, 64, 0.125).forward_cuda):
        assert_close(each(*joined[:4]), expected(*whole, mask[:, None, None]))


def test_heads_are_those_of_the_tensors():
    """Ulysses gives each process a part of the layer's heads."""
    made = impl(heads=8, kv_heads=4)
    query, key, value = inputs(heads=4, kv_heads=2)
    assert_close(made.forward(query, key, value), expected(query, key, value))
    with pytest.raises(ValueError, match=r"query must have 4 dimensions \(batch, tokens, heads, head_size\), got shape \(7, 4, 64\)"):
        made.forward(query[0], key[0], value[0])
    with pytest.raises(ValueError, match="GQA requires query heads to be a multiple of KV heads, got q_heads=3 and kv_heads=2."):
        made.forward(query[:, :, :3], key, value)


def test_layers_can_be_copied_and_pickled():
    made = impl()
    wanted = made.forward(*inputs())
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other.forward(*inputs()), wanted)


def test_under_inference_mode_and_torch_compile():
    made, (query, key, value) = impl(), inputs()
    compiled = torch.compile(lambda query: made.forward(query * 2, key, value) + 1)
    assert_close(compiled(query), expected(query * 2, key, value) + 1)
    with torch.inference_mode():
        query, key, value = inputs()
        assert_close(made.forward(query, key, value), expected(query, key, value))
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="ditattn is forward only"):
        made.forward(query.clone().requires_grad_(), key, value)


def test_layout_hints_and_platform_methods():
    """`qkv_layout` is a hint for a kernel: the tensors' layout never changes."""
    assert torch.equal(impl(qkv_layout="BNSD").forward(*inputs()), impl().forward(*inputs()))
    assert torch.equal(impl().forward_hip(*inputs()), impl().forward(*inputs()))
    with pytest.raises(NotImplementedError):
        impl().forward_npu(*inputs())
    with pytest.raises(NotImplementedError, match="^FlashAttentionImpl does not support paged KV attention$"):
        impl().forward_paged(object())


def test_options_of_the_configuration_reach_the_back_end():
    with pytest.raises(ValueError, match="pv"):
        impl("SAGE_ATTN", backend_kwargs={"pv": "int3"})


# --- Metadata that many layers share


def test_metadata_is_converted_once_for_all_layers():
    metadata = AttentionMetadata(attn_mask=MASKS["integers"]())
    made = vllm_omni._converted(metadata)
    impl().forward(*inputs(), metadata)
    impl("TORCH_SDPA").forward(*inputs(), metadata)
    assert vllm_omni._converted(metadata) is made and made.to_native() is made.to_native()
    assert vllm_omni._converted(dataclasses.replace(metadata)) is not made


def test_metadata_that_was_changed_is_converted_anew():
    query, key, value = inputs()
    metadata = AttentionMetadata(attn_mask=MASKS["padding"]())
    for mask in (MASKS["padding"](), MASKS["holes"](), MASKS["padding"]()):
        metadata.attn_mask = mask
        assert_close(impl().forward(query, key, value, metadata), expected(query, key, value, mask[:, None, None]))
    metadata.extra["valid_kv_length"] = 3
    wanted = expected(query, key[:, :3], value[:, :3])
    assert_close(impl().forward(query, key, value, metadata), wanted)
    metadata.attn_mask, metadata.extra = None, {}
    assert_close(impl().forward(query, key, value, metadata), expected(query, key, value))


def test_metadata_is_not_kept_alive():
    gc.collect()
    kept = len(vllm_omni._converted._kept)
    metadata = AttentionMetadata(attn_mask=MASKS["padding"]())
    mask = weakref.ref(metadata.attn_mask)
    impl().forward(*inputs(), metadata)
    assert len(vllm_omni._converted._kept) == kept + 1
    del metadata
    gc.collect()
    assert mask() is None and len(vllm_omni._converted._kept) == kept


def test_what_is_no_metadata_is_a_type_error():
    with pytest.raises(TypeError, match="^attn_metadata must be an AttentionMetadata or None, got int.$"):
        impl().forward(*inputs(), 7)


# --- Documentation


def test_the_snippets_of_the_page(tmp_path):
    section = DOCS.read_text().split("\n## ")[1]
    assert section.startswith("Use it inside vLLM-Omni")
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        (tmp_path / "example.py").write_text(block)
        done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr


def test_the_entry_point_of_the_page_installs_in_every_process(tmp_path):
    """vLLM-Omni's worker processes load such plug-ins, too."""
    (line,) = re.findall(r"^ditattn = .*$", DOCS.read_text(), re.MULTILINE)
    (group,) = re.findall(r'^\[project.entry-points."(.*)"\]$', DOCS.read_text(), re.MULTILINE)
    info = tmp_path / "mine-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{line.replace(chr(34), '')}\n")
    done = run_python(
        f"import sys; sys.path.append({str(tmp_path)!r})\n"
        "from vllm_omni.plugins import load_omni_general_plugins\n"
        "from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum\n"
        "load_omni_general_plugins()\n"
        "print(DiffusionAttentionBackendEnum.FLASH_ATTN.get_path())\n"
    )
    assert done.stdout.splitlines()[-1:] == [PATH + "FlashAttentionBackend"], done.stderr
