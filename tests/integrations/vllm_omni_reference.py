"""For the tests with vLLM-Omni: float64 attention, and a stand-in for the flash-attn package, which needs a GPU."""

import torch

from ditattn import DiffusionAttentionBackendEnum
from ditattn.integrations import vllm_omni

CLASSES = {
    "FLASH_ATTN": "FlashAttention",
    "TORCH_SDPA": "SDPA",
    "SAGE_ATTN": "SageAttention",
    "SAGE_ATTN_3": "SageAttention3",
    "CUDNN_ATTN": "CuDNNAttention",
    "FLASHINFER_ATTN": "FlashInferAttention",
}
HERE = ["FLASH_ATTN", "TORCH_SDPA", "SAGE_ATTN", "SAGE_ATTN_3"]  # of a build without CUDA
NOT_HERE = [name for name in CLASSES if name not in HERE]
EXACT = HERE[:2]
TOLERANCE = {"FLASH_ATTN": 1e-5, "TORCH_SDPA": 1e-5, "SAGE_ATTN": 0.05, "SAGE_ATTN_3": 0.5}


def inputs(batch=2, seq_q=7, seq_kv=9, heads=4, kv_heads=2, head_size=64, dtype=torch.float32, seed=1):
    """Query, key, value with standard normal numbers."""
    made = torch.Generator().manual_seed(seed)
    shapes = [(batch, seq_q, heads, head_size), *2 * [(batch, seq_kv, kv_heads, head_size)]]
    return [torch.randn(shape, generator=made).to(dtype) for shape in shapes]


def expected(query, key, value, keep=None, bias=None, scale=None):
    """softmax(scale · query · keyᵀ + bias, where `keep`) · value in float64; both broadcast to (B, H, Sq, Skv)."""
    groups = query.shape[2] // key.shape[2]
    query, key, value = (
        x.double() for x in (query, key.repeat_interleave(groups, 2), value.repeat_interleave(groups, 2))
    )
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + bias.double()
    if keep is not None:
        logits = logits.masked_fill(~keep, -torch.inf)
    weights = torch.softmax(logits, -1).nan_to_num(0.0)  # a row without keys is zero
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)


def causal(rows, keys, first=None):
    """Row i sees keys up to `first` + i; by default the last row sees the last key."""
    first = keys - rows if first is None else first
    return torch.arange(keys) <= torch.arange(rows)[:, None] + first


def same_document(cu_seqlens_q, cu_seqlens_k, rows, keys):
    """Whether a row and a key of a packed batch belong together."""
    row = torch.bucketize(torch.arange(rows), cu_seqlens_q, right=True)
    key = torch.bucketize(torch.arange(keys), cu_seqlens_k, right=True)
    return row[:, None] == key


def stand_in_flash_attn_func(query, key, value, *, causal, softmax_scale, **_):
    """Stands in for flash_attn_func, in float64: causal to the bottom right."""
    rows, keys = query.shape[1], key.shape[1]
    keep = torch.arange(keys) <= torch.arange(rows)[:, None] + keys - rows if causal else None
    return expected(query, key, value, keep, scale=softmax_scale).to(query.dtype)


def stand_in_flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale, **_):
    """Stands in for flash_attn_varlen_func: one document after the other."""
    spans = zip(*(torch.stack((cu[:-1], cu[1:]), 1).tolist() for cu in (cu_seqlens_q, cu_seqlens_k)))
    outputs = [
        stand_in_flash_attn_func(q[None, a:b], k[None, c:d], v[None, c:d], causal=causal, softmax_scale=softmax_scale)[
            0
        ]
        for (a, b), (c, d) in spans
    ]
    return torch.cat(outputs)


def backend(member):
    return getattr(vllm_omni, f"{CLASSES[member]}Backend")


def impl(member="FLASH_ATTN", heads=4, kv_heads=2, head_size=64, **config):
    scale = config.pop("softmax_scale", head_size**-0.5)
    return backend(member).get_impl_cls()(heads, head_size, scale, num_kv_heads=kv_heads, **config)


def assert_close(out, wanted, member="FLASH_ATTN"):
    """By the norms of the two, and no row may be far off."""
    assert out.shape == wanted.shape and out.dtype == torch.float32
    assert torch.linalg.norm(out - wanted) <= TOLERANCE[member] * torch.linalg.norm(wanted)


def outcome(action, *args):
    """What it returns, or its error's kind and text."""
    try:
        return action(*args)
    except Exception as error:
        return type(error), str(error)


def own_layer(member="FLASH_ATTN", heads=4, kv_heads=2, head_size=64, **config):
    """ditattn's own layer, without vLLM-Omni."""
    cls = DiffusionAttentionBackendEnum[member].get_class()
    return cls.get_impl_cls()(heads, head_size, num_kv_heads=kv_heads, **config)


def close(out, wanted):
    return torch.allclose(out.double(), wanted.double(), atol=2e-5)
