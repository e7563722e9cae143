"""The rows of docs/vllm-omni.md about metadata and back ends, as vLLM-Omni's own package shows them on a CPU."""

import pytest

pytest.importorskip(
    "vllm_omni.diffusion.attention.layer",
    reason="vLLM-Omni is not installed: requirements-vllm-omni.txt",
    exc_type=ImportError,
)

import torch
from vllm_omni.diffusion.attention.backends import (
    cudnn_attn,
    flash_attn,
    registry,
    sage_attn,
    sdpa,
)
from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata, QueryRange
from vllm_omni.diffusion.attention.backends.utils import fa
from vllm_omni.diffusion.attention.backends.utils.piecewise_attn import piecewise_attn
from vllm_omni.diffusion.attention.parallel.ulysses import UlyssesParallelAttention
from vllm_omni_reference import (
    close,
    expected,
    inputs,
    outcome,
    own_layer,
    stand_in_flash_attn_func,
    stand_in_flash_attn_varlen_func,
)

import ditattn
from ditattn.integrations import vllm_omni

Theirs = registry.DiffusionAttentionBackendEnum

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="written for vLLM-Omni's platform without a device")


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def flash(monkeypatch):
    """vLLM-Omni's FLASH_ATTN over the stand-in: which way a call goes, and what surrounds the kernel, is its own."""
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


PADDING = torch.arange(9) < torch.tensor([[5], [9]])


# --- Metadata


def test_the_fields_are_those_of_vllm_omni_but_two():
    theirs, ours = (
        {n: f.default for n, f in cls.__dataclass_fields__.items()}
        for cls in (AttentionMetadata, ditattn.AttentionMetadata)
    )
    assert {name: theirs[name] for name in ours if name != "extra"} == {
        name: ours[name] for name in ours if name != "extra"
    }
    assert [name for name in theirs if name not in ours] == ["video_layout", "packed_padding"]


@pytest.mark.parametrize("given", [{"joint_strategy": "x", "all": True}, {"joint_strategy": "front", "all": False}])
def test_errors_of_joint_tensors_are_those_of_its_strategies(given):
    """Its back ends never look at them."""
    query, key, value = inputs(kv_heads=4)
    fields = {"joint_query": query, "joint_key": key, "joint_value": value if given["all"] else None}
    group = type("Group", (), {"ulysses_group": None, "ulysses_world_size": 1})()
    strategy = UlyssesParallelAttention(group, 2, 1, False)
    theirs = outcome(
        strategy.pre_attention, query, key, value, AttentionMetadata(joint_strategy=given["joint_strategy"], **fields)
    )
    metadata = ditattn.AttentionMetadata(joint_strategy=given["joint_strategy"], **fields)
    ours = outcome(own_layer(kv_heads=4).forward, query, key, value, metadata)
    assert theirs[0] is ours[0] is ValueError
    assert theirs[1].rstrip(".") == ours[1].rstrip(".")


def test_back_ends_do_not_look_at_joint_tensors_there(flash):
    query, key, value = inputs(kv_heads=4)
    fields = {"joint_query": query, "joint_key": key, "joint_value": value}
    metadata = AttentionMetadata(**fields)
    alone = expected(query, key, value)
    assert close(sdpa.SDPAImpl(4, 64, 0.125).forward_cuda(query, key, value, metadata), alone)
    assert close(flash(query, key, value, metadata)[0], alone)
    assert (
        own_layer(kv_heads=4).forward(query, key, value, ditattn.AttentionMetadata(**fields)).shape[1]
        == 2 * query.shape[1]
    )


@pytest.mark.parametrize("mask", [PADDING.long(), PADDING.float(), PADDING.float() * 0.5])
def test_sdpa_takes_any_mask_of_two_dimensions_for_not_zero_keeps_there(mask):
    query, key, value = inputs()
    theirs = sdpa.SDPAImpl(4, 64, 0.125).forward_cuda(query, key, value, AttentionMetadata(attn_mask=mask))
    assert close(theirs, expected(query, key, value, PADDING[:, None, None]))
    ours = outcome(own_layer("TORCH_SDPA").forward, query, key, value, ditattn.AttentionMetadata(attn_mask=mask))
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
    kind, text = outcome(own_layer("TORCH_SDPA").forward, query, key, value, ditattn.AttentionMetadata(attn_mask=mask))
    assert kind is ValueError and "give a (queries, keys) mask as (1, 1, queries, keys)." in text


@pytest.mark.parametrize("rows", [9, 4])
def test_without_query_ranges_the_rows_are_the_last_ones_there(rows):
    """Here the first ones; with as many rows as keys these are the same."""
    query, key, value = inputs(seq_q=rows)
    spans = [[(2, 4), (6, 8)]] * 2
    theirs = piecewise_attn(query, key, value, spans, 0.125, stand_in_flash_attn_func)
    ours = own_layer().forward(query, key, value, ditattn.AttentionMetadata(full_attn_spans=spans))
    assert close(ours, theirs) is (rows == 9)
    ranges = [QueryRange(0, rows, 9 - rows)]
    assert close(
        own_layer().forward(query, key, value, ditattn.AttentionMetadata(full_attn_spans=spans, query_ranges=ranges)),
        theirs,
    )


def test_spans_must_be_alike_in_a_batch_there():
    query, key, value = inputs(seq_q=9)
    spans = [[(2, 4)], [(6, 8)]]
    kind, text = outcome(piecewise_attn, query, key, value, spans, 0.125, stand_in_flash_attn_func)
    assert kind is ValueError and text.startswith("piecewise_attn requires homogeneous batch: ")
    ours = own_layer().forward(query, key, value, ditattn.AttentionMetadata(full_attn_spans=spans))
    for i, own in enumerate(spans):
        one = [x[i : i + 1] for x in (query, key, value)]
        assert close(ours[i : i + 1], piecewise_attn(*one, [own], 0.125, stand_in_flash_attn_func))


def test_query_ranges_must_cover_the_query():
    query, key, value = inputs()
    ranges = (QueryRange(0, 3, 0), QueryRange(4, 7, 4))
    theirs = outcome(piecewise_attn, query, key, value, [[], []], 0.125, stand_in_flash_attn_func, ranges)
    ours = outcome(
        own_layer().forward, query, key, value, ditattn.AttentionMetadata(full_attn_spans=[[], []], query_ranges=ranges)
    )
    assert theirs == (ValueError, "query_ranges must cover local query contiguously")
    assert ours[0] is ValueError and ours[1].startswith(theirs[1])


def test_valid_kv_length_is_cudnns_alone_there(flash):
    query, key, value = inputs()
    metadata = AttentionMetadata(extra={"valid_kv_length": 10})
    theirs = outcome(cudnn_attn.CuDNNAttentionImpl(4, 64, 0.125).forward_cuda, query, key, value, metadata)
    assert theirs == (ValueError, "valid_kv_length must be within the K/V sequence, got 10 for length 9")
    ours = outcome(own_layer().forward, query, key, value, ditattn.AttentionMetadata(extra={"valid_kv_length": 10}))
    assert ours[0] is ValueError and ours[1].startswith(theirs[1])
    metadata = AttentionMetadata(extra={"valid_kv_length": 5})
    alone = expected(query, key, value)
    assert close(sdpa.SDPAImpl(4, 64, 0.125).forward_cuda(query, key, value, metadata), alone)
    assert close(flash(query, key, value, metadata)[0], alone)
    ours = own_layer().forward(query, key, value, ditattn.AttentionMetadata(extra={"valid_kv_length": 5}))
    assert close(ours, expected(query, key[:, :5], value[:, :5]))


def packed(*offsets, **more):
    cu = torch.tensor(offsets, dtype=torch.int32)
    return {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 9, "max_seqlen_k": 9, **more}


def test_packed_sequences_with_a_valid_kv_length(flash):
    """There the padding is a document, and the length is not looked at; here the two contradict each other."""
    query, key, value = inputs(batch=1, seq_q=9)
    extra = packed(0, 6, 9, valid_kv_length=6)
    theirs, _ = flash(query, key, value, AttentionMetadata(extra=extra))
    assert close(theirs[:, :6], expected(query[:, :6], key[:, :6], value[:, :6]))
    kind, text = outcome(own_layer().forward, query, key, value, ditattn.AttentionMetadata(extra=extra))
    assert (kind, text) == (ValueError, "cu_seqlens_k ends at 9, expected 6 (the tokens of a batch entry).")
    inside = vllm_omni.FlashAttentionImpl(4, 64, 0.125, num_kv_heads=2)
    assert close(inside.forward(query, key, value, AttentionMetadata(extra=extra)), theirs)


def test_float_is_a_kv_cache_dtype_there(flash):
    query, key, value = inputs()
    assert close(
        flash(query, key, value, AttentionMetadata(extra={"kv_cache_dtype": "float"}))[0], expected(query, key, value)
    )
    metadata = ditattn.AttentionMetadata(extra={"kv_cache_dtype": "float"})
    assert outcome(own_layer().forward, query, key, value, metadata)[0] is ValueError


# --- Back ends


def test_gqa_is_refused_alike():
    query, key, value = inputs(heads=3, kv_heads=2)
    theirs = outcome(sdpa.SDPAImpl(3, 64, 0.125).forward_cuda, query, key, value)
    ours = outcome(own_layer, "TORCH_SDPA", 3, 2)
    assert theirs == (
        ValueError,
        "GQA requires query heads to be a multiple of KV heads, got q_heads=3 and kv_heads=2.",
    )
    assert ours[0] is ValueError and ours[1].startswith(theirs[1].rstrip("."))


def test_flash_attn_needs_a_package_there():
    kind, text = outcome(flash_attn.FlashAttentionImpl(4, 64, 0.125).forward_cuda, *inputs())
    assert kind is ImportError and text.startswith("FlashAttentionBackend requires Flash Attention. ")


def test_spans_go_before_packed_sequences_and_these_before_masks(flash):
    """A mask beside spans or packed sequences is not looked at there, and holds here."""
    query, key, value = inputs(batch=1, seq_q=9)
    spans, extra, keep = [[(2, 5)]], packed(0, 4, 9), torch.arange(9)[None] != 3
    everything = AttentionMetadata(attn_mask=keep, extra=extra, full_attn_spans=spans)
    assert close(
        flash(query, key, value, everything)[0],
        piecewise_attn(query, key, value, spans, 0.125, stand_in_flash_attn_func),
    )
    without = AttentionMetadata(extra=extra)
    both = AttentionMetadata(attn_mask=keep, extra=extra)
    assert torch.equal(flash(query, key, value, both)[0], flash(query, key, value, without)[0])
    ours = [
        own_layer().forward(query, key, value, ditattn.AttentionMetadata(attn_mask=m, extra=extra))
        for m in (keep, None)
    ]
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
    assert close(own_layer().forward(query, key, value, ditattn.AttentionMetadata(attn_mask=PADDING)), wanted)


def test_flash_attn_takes_masks_of_two_dimensions_there(flash):
    query, key, value = inputs(seq_q=9)
    mask = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(1)) < 0.6
    theirs = outcome(flash, query, key, value, AttentionMetadata(attn_mask=mask))
    assert theirs == (AssertionError, "attention_mask must be 2D, (batch_size, seq_len)")
    assert close(
        own_layer().forward(query, key, value, ditattn.AttentionMetadata(attn_mask=mask)),
        expected(query, key, value, mask),
    )


def test_packed_sequences_need_batch_size_one_there(flash):
    query, key, value = inputs(seq_q=9)
    theirs = outcome(flash, query, key, value, AttentionMetadata(extra=packed(0, 4, 9)))
    assert theirs == (ValueError, "Packed variable-length attention currently requires batch size 1")
    ours = own_layer().forward(query, key, value, ditattn.AttentionMetadata(extra=packed(0, 4, 9)))
    one = [x[1:] for x in (query, key, value)]
    assert close(ours[1:], flash(*one, AttentionMetadata(extra=packed(0, 4, 9)))[0])


def test_incomplete_packed_sequences_are_refused_alike(flash):
    query, key, value = inputs(batch=1, seq_q=9)
    extra = {key: value for key, value in packed(0, 9).items() if key.endswith("_q")}
    theirs = outcome(flash, query, key, value, AttentionMetadata(extra=extra))
    ours = outcome(own_layer().forward, query, key, value, ditattn.AttentionMetadata(extra=extra))
    assert theirs == (ValueError, "Incomplete packed FlashAttention metadata; missing ['cu_seqlens_k', 'max_seqlen_k']")
    assert ours[0] is ValueError and ours[1].startswith(theirs[1])


def test_causal_with_fewer_queries_than_keys(flash):
    query, key, value = inputs(seq_q=5)
    theirs = [
        sdpa.SDPAImpl(4, 64, 0.125, causal=True).forward_cuda(query, key, value),
        flash(query, key, value, causal=True)[0],
    ]
    ours = [own_layer(member, causal=True).forward(query, key, value) for member in ("TORCH_SDPA", "FLASH_ATTN")]
    assert close(ours[0], theirs[0]) and close(ours[1], theirs[1]) and not close(ours[0], ours[1])


def test_causal_and_a_mask_hold_together(flash):
    query, key, value = inputs(seq_q=9)
    keep = torch.arange(9) != 4
    metadata = AttentionMetadata(attn_mask=keep[None].repeat(2, 1))
    wanted = expected(query, key, value, keep & torch.ones(9, 9).tril().bool())
    assert close(sdpa.SDPAImpl(4, 64, 0.125, causal=True).forward_cuda(query, key, value, metadata), wanted)
    assert close(flash(query, key, value, metadata, causal=True)[0][:, keep], wanted[:, keep])
    for member in ("TORCH_SDPA", "FLASH_ATTN"):
        ours = own_layer(member, causal=True).forward(
            query, key, value, ditattn.AttentionMetadata(attn_mask=metadata.attn_mask)
        )
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
    ours = own_layer().forward(query, key, value, ditattn.AttentionMetadata(attn_mask=PADDING))
    assert theirs[0].isnan().any() and not ours.isnan().any()
