"""What diffusers gives a back end - masks, causal, heads, scale, LSE - against its own `native` in float64."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("names")

from diffusers.models.attention_dispatch import _AttentionBackendRegistry, dispatch_attention_fn
from small_models import QUANTIZED, padding, quantization_error, tensors

EXACT = ("ditattn", "ditattn_flash", "ditattn_sdpa")
B, H, SQ, SKV = 2, 4, 11, 17
BOOL = torch.rand((B, H, SQ, SKV), generator=torch.Generator().manual_seed(2)) < 0.7
BOOL[..., 0] = True  # no row without keys
NUMBERS = torch.randn((B, H, SQ, SKV), generator=torch.Generator().manual_seed(3))
KEYS = padding(SKV, 6, size=SKV)


def relative(a, b):
    return float((a.double() - b).norm() / b.norm())


def doubled(tensor):
    return tensor.double() if torch.is_tensor(tensor) and tensor.is_floating_point() else tensor


def check(name, query, key, value, mask=None, **arguments):
    """Exact names are as near to native's result in float64 as native's in the inputs' dtype is; quantized ones have
    their documented error."""

    def native(*inputs):
        return dispatch_attention_fn(*inputs, mask, backend="native", **arguments)

    out = dispatch_attention_fn(query, key, value, mask, backend=name, **arguments)
    own = native(query, key, value)
    query, key, value, mask = map(doubled, (query, key, value, mask))
    wide = native(query, key, value)
    assert out.shape == own.shape and out.dtype == own.dtype
    if name in QUANTIZED:
        error, bound = quantization_error(out, wide, value, lambda v: native(query, key, v), QUANTIZED[name])
    else:
        error, bound = relative(out, wide), 4 * relative(own, wide) + torch.finfo(out.dtype).eps
    print(f"{name}: {error:.1e}, bound {bound:.1e}")
    assert error <= bound


MASKS = {
    "none": None,
    "(B, Skv) bool": KEYS,
    "(B, Skv) float": NUMBERS[:, 0, 0],
    "(1, Skv) bool": KEYS[1:],
    "(Sq, Skv) bool": BOOL[0, 0],
    "(Sq, Skv) float": NUMBERS[0, 0],
    "(1, Sq, Skv) bool": BOOL[0, :1],
    "(H, Sq, Skv) bool": BOOL[0],
    "(B, 1, 1, Skv) bool": KEYS[:, None, None],
    "(B, 1, 1, Skv) float": NUMBERS[:, :1, :1],
    "(B, 1, 1, Skv) -10000": torch.where(KEYS, 0.0, -10000.0)[:, None, None],
    "(B, 1, Sq, Skv) bool": BOOL[:, :1],
    "(B, 1, Sq, 1) bool, all true": BOOL[:, :1, :, :1],
    "(B, H, 1, Skv) -10000": torch.where(KEYS, 0.0, -10000.0)[:, None, None].expand(B, H, 1, SKV),
    "(B, H, Sq, Skv) bool": BOOL,
    "(B, H, Sq, Skv) float": NUMBERS,
    "(B, H, Sq, Skv) -inf": NUMBERS.masked_fill(~BOOL, -torch.inf),
    "(1, H, Sq, Skv) every second": torch.cat([NUMBERS, NUMBERS], -2)[:1, :, ::2],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_means_what_it_means_to_native(name, mask, dtype):
    mask = MASKS[mask]
    if mask is not None and mask.is_floating_point():
        mask = mask.to(dtype)
    check(name, *tensors(B, SQ, SKV, H, H, dtype=dtype), mask)


@pytest.mark.parametrize("name", EXACT)
def test_two_dimensions_are_samples_and_keys_where_both_would_fit(name):
    query, key, value = tensors(2, 2, SKV)
    check(name, query, key, value, KEYS)
    differs = dispatch_attention_fn(query, key, value, KEYS[None, None], backend=name)
    assert not torch.allclose(differs, dispatch_attention_fn(query, key, value, KEYS, backend=name))


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("mask", [None, KEYS, KEYS[:, None, None], KEYS[:, None, None].expand(B, H, SQ, SKV)])
def test_quantized_names_take_padding_in_every_form(name, mask):
    check(name, *tensors(B, SQ, SKV), mask)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("mask, kind", [("(Sq, Skv) bool", "bool"), ("(B, 1, 1, Skv) -10000", "additive")])
def test_masks_that_a_back_end_does_not_have_are_its_error(name, mask, kind):
    with pytest.raises(ValueError, match=f"SAGE_ATTN.* does not support a mask of kind {kind}.*FLASH_ATTN would do"):
        dispatch_attention_fn(*tensors(B, SQ, SKV), MASKS[mask], backend=name)


def test_a_row_without_keys_gives_zeros():
    mask = BOOL.clone()
    mask[1, 2, 3] = False
    for name in EXACT:
        out = dispatch_attention_fn(*tensors(B, SQ, SKV), mask, backend=name)
        assert (out[1, 3, 2] == 0).all() and out[1, 4, 2].any() and out.isfinite().all()


@pytest.mark.parametrize("name", [*EXACT, *QUANTIZED])
@pytest.mark.parametrize("seq_q, seq_kv", [(11, 11), (5, 17), (1, 17), (1, 1)])
def test_causal_is_aligned_as_native_has_it(name, seq_q, seq_kv):
    check(name, *tensors(2, seq_q, seq_kv), is_causal=True)


@pytest.mark.parametrize("name", EXACT)
def test_causal_and_a_mask_hold_together(name):
    query, key, value = tensors(B, 5, SKV)
    for mask in (KEYS, NUMBERS[:, :, :5], NUMBERS[:, :, :5, :1], BOOL[0, 0, :5]):
        causal = torch.ones(5, SKV, dtype=torch.bool).tril()
        dense = mask[:, None, None] if mask is KEYS else mask
        both = causal & dense if dense.dtype == torch.bool else dense.masked_fill(~causal, -torch.inf)
        both = both if both.ndim == 4 else both[None, None]
        out = dispatch_attention_fn(query, key, value, mask, is_causal=True, backend=name)
        wide = dispatch_attention_fn(*map(doubled, (query, key, value, both)), backend="native")
        assert relative(out, wide) < 1e-6


@pytest.mark.parametrize("name", [*EXACT, *QUANTIZED])
def test_causal_with_more_queries_than_keys_is_refused_by_all_alike(name):
    with pytest.raises(NotImplementedError, match=r"more queries \(9\) than keys \(7\)"):
        dispatch_attention_fn(*tensors(2, 9, 7), is_causal=True, backend=name)


@pytest.mark.parametrize("name", [*EXACT, *QUANTIZED])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_heads_may_be_grouped(name, kv_heads):
    check(name, *tensors(kv_heads=kv_heads), enable_gqa=True)


@pytest.mark.parametrize("kv_heads", [1, 2, 3])
def test_heads_that_differ_are_refused_unless_grouped(kv_heads):
    with pytest.raises(ValueError, match=f"query has 4 heads and key {kv_heads}.*enable_gqa=True"):
        dispatch_attention_fn(*tensors(kv_heads=kv_heads), backend="ditattn")
    if kv_heads == 3:
        with pytest.raises(ValueError, match="4.*3|3.*4"):
            dispatch_attention_fn(*tensors(kv_heads=kv_heads), enable_gqa=True, backend="ditattn")


@pytest.mark.parametrize("name", [*EXACT, *QUANTIZED])
@pytest.mark.parametrize("scale", [0.05, 1.0])
def test_the_scale_is_taken(name, scale):
    check(name, *tensors(), scale=scale)


@pytest.mark.parametrize("name", [*EXACT, *QUANTIZED])
def test_lse_is_that_of_the_scaled_and_masked_logits(name):
    query, key, value = tensors(B, SQ, SKV)
    out, lse = dispatch_attention_fn(query, key, value, KEYS, backend=name, attention_kwargs={"return_lse": True})
    logits = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()) / query.shape[-1] ** 0.5
    expected = logits.masked_fill(~KEYS[:, None, None], -torch.inf).logsumexp(-1)
    assert lse.shape == (B, H, SQ) and lse.dtype == torch.float32
    assert (lse - expected).abs().max() < (0.3 if name in QUANTIZED else 1e-5)
    torch.testing.assert_close(out, dispatch_attention_fn(query, key, value, KEYS, backend=name))


@pytest.mark.parametrize("name", EXACT)
def test_views_are_taken(name):
    packed = torch.randn((B, SKV, 3, H, 32), generator=torch.Generator().manual_seed(4))
    check(name, *packed.unbind(2))
    check(name, *(tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in packed.unbind(2)))
    check(name, packed[:, ::2, 0], packed[:, 1::3, 1], packed[:, 1::3, 2])


def test_no_keys_at_all_give_zeros():
    query, key, value = tensors(2, 5, 0)
    for name in EXACT:
        assert torch.equal(dispatch_attention_fn(query, key, value, backend=name), torch.zeros_like(query))


@pytest.mark.parametrize("name", EXACT)
def test_under_autocast_the_dtype_is_that_of_native(name):
    query, key, value = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        out = dispatch_attention_fn(query, key, value, backend=name)
        native = dispatch_attention_fn(query, key, value, backend="native")
    assert out.dtype == native.dtype == torch.bfloat16
    torch.testing.assert_close(out, native)


def test_the_checks_of_diffusers_remove_no_argument(monkeypatch, caplog):
    monkeypatch.setattr(_AttentionBackendRegistry, "_checks_enabled", True)
    dispatch_attention_fn(*tensors(), backend="ditattn", attention_kwargs={"return_lse": True})
    assert "unsupported arguments" not in caplog.text


def test_dropout_is_refused():
    with pytest.raises(NotImplementedError, match="dropout_p is 0.1"):
        dispatch_attention_fn(*tensors(), dropout_p=0.1, backend="ditattn")


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("which", range(4))
def test_gradients_are_refused_where_they_are_recorded(name, which):
    inputs = [*tensors(B, SQ, SKV), NUMBERS]
    inputs[which] = inputs[which].clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="forward only"):
        dispatch_attention_fn(*inputs, backend=name)
    with torch.no_grad():
        assert not dispatch_attention_fn(*inputs, backend=name).requires_grad
    with torch.inference_mode():
        assert dispatch_attention_fn(*inputs, backend=name).shape == inputs[0].shape


@pytest.mark.parametrize("name, member", [("ditattn_cudnn", "CUDNN_ATTN"), ("ditattn_flashinfer", "FLASHINFER_ATTN")])
def test_a_back_end_that_is_not_there_is_an_error(name, member):
    from ditattn import DiffusionAttentionBackendEnum as Enum

    try:
        Enum[member].get_class().validate_available()
    except ImportError:
        with pytest.raises(ImportError, match="cudnn|flashinfer"):
            dispatch_attention_fn(*tensors(), backend=name)
    else:  # it is there, and has no kernels for the CPU
        with pytest.raises(ValueError, match=member):
            dispatch_attention_fn(*tensors(), backend=name)


@pytest.mark.parametrize("mask", [torch.ones(2, 8, dtype=torch.bool), torch.ones(2, 9, dtype=torch.int64)])
def test_masks_that_do_not_fit_are_errors(mask):
    with pytest.raises(ValueError, match="attn_mask"):
        dispatch_attention_fn(*tensors(), mask, backend="ditattn")
