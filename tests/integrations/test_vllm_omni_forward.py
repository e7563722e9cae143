"""What ditattn's classes compute in vLLM-Omni, against float64 and its own SDPA, and what they make of its metadata."""

import copy
import dataclasses
import gc
import pickle
import types
import weakref

import pytest

pytest.importorskip(
    "vllm_omni.diffusion.attention.layer",
    reason="vLLM-Omni is not installed: requirements-vllm-omni.txt",
    exc_type=ImportError,
)

import torch
from vllm_omni.diffusion.attention.backends import abstract, sdpa
from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata, QueryRange
from vllm_omni.diffusion.attention.backends.utils.piecewise_attn import piecewise_attn
from vllm_omni_reference import (
    EXACT,
    HERE,
    assert_close,
    causal,
    expected,
    impl,
    inputs,
    same_document,
    stand_in_flash_attn_func,
)

from ditattn.integrations import vllm_omni

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="written for vLLM-Omni's platform without a device")


@pytest.fixture(autouse=True)
def without_gradients():
    """As vLLM-Omni runs."""
    with torch.no_grad():
        yield


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
    "not contiguous": lambda: (torch.rand(2, 1, 9, 7, generator=torch.Generator().manual_seed(6)) < 0.6).transpose(
        2, 3
    ),
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
    return {
        "cu_seqlens_q": offsets[0],
        "cu_seqlens_k": offsets[1],
        "max_seqlen_q": longest[0],
        "max_seqlen_k": longest[1],
        **more,
    }


@pytest.mark.parametrize("member", HERE)
@pytest.mark.parametrize("offsets", [([0, 3, 4, 9],), ([0, 9],), ([0, 4, 4, 9, 9],), ([0, 2, 9], [0, 5, 9])])
def test_packed_documents_do_not_see_each_other(member, offsets):
    query, key, value = inputs(batch=1, seq_q=9)
    extra = packed(*offsets)
    keep = same_document(extra["cu_seqlens_q"], extra["cu_seqlens_k"], 9, 9)
    for longest in (extra["max_seqlen_q"], 64):  # models may give a bound
        extra |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
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
            ulysses_group=torch.distributed.group.WORLD,
            ulysses_world_size=1,
            ulysses_rank=0,
            ring_world_size=1,
            ring_group=None,
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
    with pytest.raises(
        ValueError, match=r"query must have 4 dimensions \(batch, tokens, heads, head_size\), got shape \(7, 4, 64\)"
    ):
        made.forward(query[0], key[0], value[0])
    with pytest.raises(
        ValueError, match="GQA requires query heads to be a multiple of KV heads, got q_heads=3 and kv_heads=2."
    ):
        made.forward(query[:, :, :3], key, value)


def test_layers_can_be_copied_and_pickled():
    made = impl()
    wanted = made.forward(*inputs())
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other.forward(*inputs()), wanted)


@pytest.mark.parametrize("options", [{}, {"smooth_k": False}])
def test_torch_compile_sees_one_operator(options):
    made = impl("SAGE_ATTN" if options else "FLASH_ATTN", backend_kwargs=options)
    query, key, value = inputs()
    keep = torch.arange(9) < torch.tensor([[4], [9]])
    for metadata, mask in ((None, None), (AttentionMetadata(attn_mask=keep.int()), keep[:, None, None])):
        torch._dynamo.reset()
        called = lambda query, metadata=metadata: made.forward(query * 2, key, value, metadata) + 1  # noqa: E731
        compiled = torch.compile(called, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(query), called(query))
        if not options:
            assert_close(compiled(query), expected(query * 2, key, value, mask) + 1)


def test_under_inference_mode_and_torch_compile_with_more_metadata():
    made, (query, key, value) = impl(), inputs()
    metadata = AttentionMetadata(extra={"valid_kv_length": 5})
    called = lambda query: made.forward(query * 2, key, value, metadata) + 1  # noqa: E731
    assert torch._dynamo.explain(called)(query).graph_count == 2  # one before the layer, one after it
    assert_close(torch.compile(called)(query), expected(query * 2, key[:, :5], value[:, :5]) + 1)
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
