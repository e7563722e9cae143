"""``torch.ops.ditattn``: attention as operators of PyTorch, which torch.compile and CUDA graphs take as they are.

    torch.ops.ditattn.attention(query, key, value, attn_mask=None, backend="auto", softmax_scale=None, causal=False,
                                backend_kwargs="")
    torch.ops.ditattn.attention_with_lse(…)  # (out, lse)

query (B, Sq, H, D), key and value (B, Skv, Hkv, D), of one dtype on one device, any strides with a unit last one; the
result is a new contiguous tensor of query's shape, and the LSE float32 (B, H, Sq). `backend` is a member's name in any
case or "auto", `backend_kwargs` a JSON object. Under autocast they run in its dtype. They work in PyTorch's current
stream, and raise what `ditattn.attention` raises; there are no gradients.

A mask is looked at once, on the host, for as long as the tensor object lives and is not written to. While a graph is
captured it is not looked at at all but read by the kernel, element by element, at each replay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from . import _native
from .metadata import AttentionMetadata
from .tensors import FORWARD_ONLY

_attention = _native.function("attention")
_NO_LIMITS = ("", "", {}, None, None, True)  # role, category, configuration, out, lse, return_lse
_DEFAULTS = ("auto", None, False, "")

_LIBRARY = torch.library.Library("ditattn", "DEF")
_ARGUMENTS = (
    'Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, str backend="auto", '
    'float? softmax_scale=None, bool causal=False, str backend_kwargs=""'
)

_described = WeakTensorKeyDictionary()  # mask → (its version, its metadata)


def _refuse_gradients(query: Any, key: Any, value: Any, attn_mask: Any) -> None:
    for name, tensor in zip(("query", "key", "value", "attn_mask"), (query, key, value, attn_mask)):
        if tensor is not None and tensor.requires_grad:
            raise NotImplementedError(f"{name} cannot be taken over: {FORWARD_ONLY}")


def _metadata(mask: torch.Tensor | None) -> Any:
    if mask is None:
        return None
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return AttentionMetadata(attn_mask=mask, extra={"attention_mask_mode": "arbitrary"}).to_native()
    if mask.is_inference():  # such tensors do not tell when they are written to
        return AttentionMetadata(attn_mask=mask).to_native()
    version, native = _described.get(mask, (None, None))
    if version != mask._version:
        version = mask._version
        native = AttentionMetadata(attn_mask=mask.detach()).to_native()  # must not keep its own key alive
        _described[mask] = version, native
    return native


def _run(query: Any, key: Any, value: Any, attn_mask: Any = None, *options: Any) -> Any:
    if torch.is_grad_enabled():
        _refuse_gradients(query, key, value, attn_mask)
    return _attention(query, key, value, _metadata(attn_mask), *options)


def _run_with_lse(query: Any, key: Any, value: Any, attn_mask: Any = None, *options: Any) -> tuple[Any, Any]:
    if torch.is_grad_enabled():
        _refuse_gradients(query, key, value, attn_mask)
    options += _DEFAULTS[len(options) :]
    out, lse = _attention(query, key, value, _metadata(attn_mask), *options, *_NO_LIMITS)
    return torch.from_dlpack(out), torch.from_dlpack(lse)


def _fake(query: Any, key: Any, value: Any, attn_mask: Any = None, *options: Any) -> Any:
    if torch.is_grad_enabled():
        _refuse_gradients(query, key, value, attn_mask)
    return query.new_empty(query.shape)


def _fake_with_lse(query: Any, *arguments: Any) -> tuple[Any, Any]:
    batch, rows, heads, _ = query.shape
    return _fake(query, *arguments), query.new_empty((batch, heads, rows), dtype=torch.float32)


def _in_autocast_dtype(operator: Any, device: str) -> Any:
    def call(query: Any, key: Any, value: Any, attn_mask: Any = None, *options: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)

        def cast(tensor: Any) -> Any:
            eligible = tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
            return tensor.to(dtype) if eligible else tensor

        with torch.autocast(device, enabled=False):
            return operator(cast(query), cast(key), cast(value), cast(attn_mask), *options)

    return call


def _define(name: str, result: str, run: Any, fake: Any) -> Any:
    _LIBRARY.define(f"{name}({_ARGUMENTS}) -> {result}", tags=(torch.Tag.pt2_compliant_tag,))
    operator = getattr(torch.ops.ditattn, name).default
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, key)
        _LIBRARY.impl(name, _in_autocast_dtype(operator, key.lower()), f"Autocast{key}")
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")  # `run` refuses, without a cost for others
    torch.library.register_fake(f"ditattn::{name}", fake, lib=_LIBRARY)
    return operator


attention = _define("attention", "Tensor", _run, _fake)
attention_with_lse = _define("attention_with_lse", "(Tensor, Tensor)", _run_with_lse, _fake_with_lse)
