"""Each field of AttentionMetadata against float64 NumPy, and how it is converted."""

import copy
import dataclasses
import pickle
import types

import numpy as np
import pytest
import tensors
from conftest import inputs, layer

from ditattn import AttentionMetadata, QueryRange, _native

BACKENDS = ["FLASH_ATTN", "TORCH_SDPA"]
described_as = _native.function("mask_kind")


def assert_seen(name, metadata, visible, arrays=None, **config):
    """The result is attention where each row sees the keys of `visible`, (B or 1, H or 1, Sq, Skv), or added."""
    query, key, value = arrays or inputs()
    out, lse = layer(name, **config)(query, key, value, metadata, return_lse=True)
    expected, magnitude, expected_lse = tensors.attention(query, key, value, mask=np.asarray(visible))
    assert tensors.relative_error(out, expected, magnitude) <= 2e-6
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


def random_mask(*shape):
    mask = np.random.default_rng(3).random(shape) < 0.6
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 9), (1, 9), (2, 1, 1, 9), (1, 1, 7, 9), (2, 4, 7, 9), (4, 7, 9), (7, 1)])
def test_attn_mask_of_bool(name, shape):
    mask = random_mask(*shape)
    if shape == (7, 1):
        mask = mask[None]
    assert_seen(name, AttentionMetadata(attn_mask=mask), mask[:, None, None] if len(shape) == 2 and shape[1] == 9
                else np.broadcast_to(mask, (1, 1, 7, 9)) if shape == (7, 1) else mask)  # fmt: skip


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 9), (2, 4, 7, 9), (1, 1, 7, 9)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_attn_mask_that_is_added(name, shape, dtype):
    mask = np.random.default_rng(3).standard_normal(shape).astype(dtype)
    mask[..., 2] = -np.inf
    assert_seen(name, AttentionMetadata(attn_mask=mask), mask[:, None, None] if mask.ndim == 2 else mask)


def joined(image, text, front):
    return np.concatenate([text, image] if front else [image, text], axis=1)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("strategy", ["front", "rear"])
@pytest.mark.parametrize("masks", ["none", "image", "text", "both"])
def test_joint_tensors_and_their_mask(name, strategy, masks):
    image, text = inputs(), inputs(seq_q=3, seq_kv=5, seed=2)
    metadata = AttentionMetadata(
        joint_query=text[0], joint_key=text[1], joint_value=text[2], joint_strategy=strategy,
        attn_mask=random_mask(2, 9) if masks in ("image", "both") else None,
        joint_attn_mask=random_mask(2, 5) if masks in ("text", "both") else None,
    )  # fmt: skip
    front = strategy == "front"
    image_mask = np.ones((2, 9), bool) if metadata.attn_mask is None else metadata.attn_mask
    text_mask = np.ones((2, 5), bool) if metadata.joint_attn_mask is None else metadata.joint_attn_mask
    both = [joined(i, t, front) for i, t in zip(image, text)]
    out = layer(name)(*image, metadata)
    expected, magnitude, _ = tensors.attention(*both, mask=joined(image_mask, text_mask, front))
    assert out.shape == (2, 10, 4, 16) and tensors.relative_error(out, expected, magnitude) <= 2e-6


def test_front_is_the_default():
    assert AttentionMetadata().joint_strategy == "front"


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("spans", [[[]], [[(2, 5)]], [[[0, 9]]], [[(1, 3), (5, 8)], [(0, 2)]]])
def test_full_attn_spans(name, spans):
    visible = np.zeros((len(spans), 1, 9, 9), bool)
    for sample, entries in enumerate(spans):
        for row in range(9):
            end = next((end for begin, end in entries if begin <= row < end), row + 1)
            visible[sample, 0, row, :end] = True
    assert_seen(name, AttentionMetadata(full_attn_spans=spans), visible, inputs(seq_q=9))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("make", [QueryRange, lambda *numbers: numbers, lambda a, b, c: types.SimpleNamespace(
    local_start=a, local_end=b, global_start=c)])  # fmt: skip
def test_query_ranges(name, make):
    ranges = (make(0, 3, 1), make(3, 7, 5))
    positions = [1, 2, 3, 5, 6, 7, 8]
    visible = np.tri(9, 9, dtype=bool)
    visible[5:8, :8] = True
    metadata = AttentionMetadata(full_attn_spans=[[(5, 8)]], query_ranges=ranges)
    assert_seen(name, metadata, visible[None, None, positions])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("integer", [int, np.int32])
def test_extra_packed_sequences(name, integer):
    extra = {
        "cu_seqlens_q": np.array([0, 3, 7], "int32"), "cu_seqlens_k": np.array([0, 4, 9], "int32"),
        "max_seqlen_q": integer(4), "max_seqlen_k": integer(5),
    }  # fmt: skip
    visible = np.zeros((1, 1, 7, 9), bool)
    visible[:, :, :3, :4] = visible[:, :, 3:, 4:] = True
    assert_seen(name, AttentionMetadata(extra=extra), visible)
    with pytest.raises(ValueError, match=r"Incomplete packed FlashAttention metadata; missing \['max_seqlen_k'\]"):
        layer(name)(*inputs(), AttentionMetadata(extra={k: v for k, v in extra.items() if k != "max_seqlen_k"}))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("integer", [int, np.int64])
def test_extra_valid_kv_length(name, integer):
    visible = np.arange(9) < 4
    assert_seen(name, AttentionMetadata(extra={"valid_kv_length": integer(4)}), visible[None, None, None])
    with pytest.raises(ValueError, match="valid_kv_length must be within the K/V sequence, got 10 for length 9"):
        layer(name)(*inputs(), AttentionMetadata(extra={"valid_kv_length": 10}))


def test_extra_kv_cache_dtype():
    plain = layer()(*inputs())
    assert np.array_equal(layer()(*inputs(), AttentionMetadata(extra={"kv_cache_dtype": "auto"})), plain)
    for wrong in ("fp8", "int3", 7):
        with pytest.raises(ValueError, match="fp8|FP8"):
            layer()(*inputs(), AttentionMetadata(extra={"kv_cache_dtype": wrong}))


def test_unknown_extra_is_ignored_whatever_it_is():
    extra = {"mine": object(), "function": print, "class": int, "self": None, "nan": float("nan"), 3: 4}
    extra["self"] = extra
    assert np.array_equal(layer()(*inputs(), AttentionMetadata(extra=extra)), layer()(*inputs()))


@pytest.mark.parametrize(
    "fields, kind, text",
    [
        ({"attn_mask": np.ones((7, 9), bool)}, ValueError, "attn_mask of shape .7, 9. does not broadcast"),
        ({"attn_mask": np.ones((2, 9), "int64")}, ValueError, "attn_mask has dtype int64"),
        ({"attn_mask": [True]}, TypeError, "attn_mask must be a tensor"),
        ({"joint_key": np.ones((2, 1, 2, 16), "float32")}, ValueError, "should be None or not None simultaneously"),
        ({"joint_strategy": "middle"}, ValueError, "joint_strategy: middle not supported"),
        ({"full_attn_spans": [[(3, 2)]]}, ValueError, r"full_attn_spans has \[3, 2\)"),
        ({"full_attn_spans": [[(1, 2, 3)]]}, ValueError, "full_attn_spans has an entry of 3 numbers, expected 2"),
        ({"query_ranges": [(0, 7)]}, ValueError, "query_ranges has an entry of 2 numbers, expected 3"),
        ({"query_ranges": [(0, 7, 0)]}, ValueError, "query_ranges place rows for full_attn_spans"),
        ({"extra": {"cu_seqlens_q": 3}}, TypeError, r"extra\['cu_seqlens_q'\] must be a tensor"),
    ],
)
def test_bad_fields(fields, kind, text):
    with pytest.raises(kind, match=text):
        layer()(*inputs(), AttentionMetadata(**fields))


@pytest.mark.parametrize("wrong", [3, "mask", np.ones((2, 9), bool), {}])
def test_what_is_no_metadata(wrong):
    with pytest.raises(TypeError, match="attn_metadata must be an AttentionMetadata or None, got"):
        layer()(*inputs(), wrong)


def test_metadata_of_another_class_with_such_fields():
    mask = random_mask(2, 9)
    theirs = types.SimpleNamespace(attn_mask=mask, joint_query=None, video_layout=object(), extra=None)
    assert_seen("FLASH_ATTN", theirs, mask[:, None, None])


# --- Conversion -------------------------------------------------------------------------------------------------


def test_it_holds_the_callers_own_objects():
    mask, extra, spans = random_mask(2, 9), {"mine": object()}, [[]]
    metadata = AttentionMetadata(attn_mask=mask, extra=extra, full_attn_spans=spans)
    metadata.to_native()
    assert metadata.attn_mask is mask and metadata.extra is extra and metadata.full_attn_spans is spans
    assert [field.name for field in dataclasses.fields(metadata)][:1] == ["attn_mask"]
    assert AttentionMetadata().extra == {} and AttentionMetadata().extra is not AttentionMetadata().extra


def test_a_mask_is_described_once():
    mask = np.ones((2, 9), bool)
    metadata = AttentionMetadata(attn_mask=mask)
    native = metadata.to_native()
    assert described_as(native) == "none"
    mask[:, 5:] = False  # too late on purpose: it shows that nobody looks again
    assert metadata.to_native() is native and described_as(native) == "none"


def test_assigning_a_field_converts_again():
    metadata = AttentionMetadata(attn_mask=np.ones((2, 9), bool))
    first = metadata.to_native()
    mask = np.arange(9) < np.array([[4], [9]])
    metadata.attn_mask = mask
    assert metadata.to_native() is not first
    assert_seen("FLASH_ATTN", metadata, mask[:, None, None])


def test_changing_a_known_option_converts_again():
    metadata = AttentionMetadata()
    first = metadata.to_native()
    metadata.extra["mine"] = 1
    assert metadata.to_native() is first
    metadata.extra["valid_kv_length"] = 4
    assert metadata.to_native() is not first
    assert_seen("FLASH_ATTN", metadata, (np.arange(9) < 4)[None, None, None])
    metadata.extra["valid_kv_length"] = 6
    assert_seen("FLASH_ATTN", metadata, (np.arange(9) < 6)[None, None, None])
    del metadata.extra["valid_kv_length"]
    assert_seen("FLASH_ATTN", metadata, np.ones((1, 1, 7, 9), bool))


def test_copies_and_pickles_do_not_share_what_was_made():
    metadata = AttentionMetadata(attn_mask=random_mask(2, 9), extra={"valid_kv_length": 5})
    native = metadata.to_native()
    for other in (copy.copy(metadata), copy.deepcopy(metadata), pickle.loads(pickle.dumps(metadata)),
                  dataclasses.replace(metadata)):  # fmt: skip
        assert np.array_equal(other.attn_mask, metadata.attn_mask) and other.extra == {"valid_kv_length": 5}
        other.attn_mask = None
        assert metadata.to_native() is native
        assert_seen("FLASH_ATTN", other, (np.arange(9) < 5)[None, None, None])
