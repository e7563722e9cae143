"""``torch.ops.ditattn``: attention as operators of PyTorch, which torch.compile and CUDA graphs take as they are.

    torch.ops.ditattn.attention(query, key, value, attn_mask=None, backend="auto", softmax_scale=None, causal=False,
                                backend_kwargs="", max_error=None)
    torch.ops.ditattn.attention_with_lse(…)  # (out, lse)

query (B, Sq, H, D), key and value (B, Skv, Hkv, D), of one dtype on one device, any strides with a unit last one; the
result is a new contiguous tensor of query's shape, and the LSE float32 (B, H, Sq). `backend` is a member's name in any
case or "auto" (within `max_error`, where problems were measured), `backend_kwargs` a JSON object. Under autocast they run in its dtype. They work in PyTorch's current
stream, and raise what `ditattn.attention` raises; there are no gradients.

Each has two overloads. Without a mask, `default`, options by keyword, is a kernel in C++ (PyTorch 2.10 and later).
With one, `masked`: a mask is looked at once, on the host, for as long as the tensor object lives and is not written to.
While a graph is captured it is not looked at at all but read by the kernel, element by element, at each replay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import Library, fallthrough_kernel, register_fake
from torch.utils.weak import WeakTensorKeyDictionary

from . import _native
from .metadata import AttentionMetadata
from .tensors import FORWARD_ONLY

_attention = _native.function("attention")
_DEFAULTS = ("auto", None, False, "", None)
_WITH_LSE: tuple[Any, ...] = ("", "", {}, None, None, True)  # role, category, configuration, out, lse, return_lse

_OPERATORS = Library("ditattn", "DEF")
_TENSORS = "Tensor query, Tensor key, Tensor value"
_OPTIONS = 'str backend="auto", float? softmax_scale=None, bool causal=False, str backend_kwargs="", float? max_error=None'
_OVERLOADS = {"": f"{_TENSORS}, *, {_OPTIONS}", ".masked": f"{_TENSORS}, Tensor? attn_mask, {_OPTIONS}"}

_described = WeakTensorKeyDictionary()  # mask → (its version, its metadata)


def _requires_gradient(*tensors: Any) -> int:
    """The first that does; −1 for none."""
    return next((index for index, tensor in enumerate(tensors) if tensor is not None and tensor.requires_grad), -1)


def _refuse_gradients(*tensors: Any) -> None:
    which = _requires_gradient(*tensors) if torch.is_grad_enabled() else -1
    if which >= 0:
        raise NotImplementedError(f"{('query', 'key', 'value', 'attn_mask')[which]} cannot be taken over: {FORWARD_ONLY}")


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


def _run(query: Any, key: Any, value: Any, attn_mask: Any = None, *options: Any, **more: Any) -> Any:
    _refuse_gradients(query, key, value, attn_mask)
    return _attention(query, key, value, _metadata(attn_mask), *(options or _in_order(**more)))


def _run_with_lse(query: Any, key: Any, value: Any, attn_mask: Any = None, *options: Any, **more: Any) -> Any:
    options = options or _in_order(**more)
    out, lse = _run(query, key, value, attn_mask, *options, *_DEFAULTS[len(options) :], *_WITH_LSE)
    return torch.from_dlpack(out), torch.from_dlpack(lse)


def _in_order(
    backend: str = "auto",
    softmax_scale: float | None = None,
    causal: bool = False,
    backend_kwargs: str = "",
    max_error: float | None = None,
) -> tuple[Any, ...]:
    return backend, softmax_scale, causal, backend_kwargs, max_error


def _fake(query: Any, key: Any, value: Any, attn_mask: Any = None, *options: Any, **more: Any) -> Any:
    _refuse_gradients(query, key, value, attn_mask)
    return query.new_empty(query.shape)


def _fake_with_lse(query: Any, *arguments: Any, **more: Any) -> Any:
    batch, rows, heads, _ = query.shape
    return _fake(query, *arguments), query.new_empty((batch, heads, rows), dtype=torch.float32)


def _in_autocast_dtype(operator: Any, device: str) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)

        def cast(argument: Any) -> Any:
            eligible = isinstance(argument, torch.Tensor) and argument.is_floating_point()
            return argument.to(dtype) if eligible and argument.dtype != torch.float64 else argument

        with torch.autocast(device, enabled=False):
            return operator(*map(cast, arguments), **options)

    return call


def _define(name: str, result: str, run: Any, fake: Any) -> Any:
    for overload, arguments in _OVERLOADS.items():
        full = name + overload
        _OPERATORS.define(f"{full}({arguments}) -> {result}", tags=(torch.Tag.pt2_compliant_tag,))
        operator = getattr(getattr(torch.ops.ditattn, name), overload[1:] or "default")
        for key in ("CPU", "CUDA"):
            if overload or not _HAS_KERNELS_IN_CPP:
                _OPERATORS.impl(full, run, key)
            _OPERATORS.impl(full, _in_autocast_dtype(operator, key.lower()), f"Autocast{key}")
        _OPERATORS.impl(full, fallthrough_kernel, "Autograd")  # kernels refuse, at no cost for others
        register_fake(f"ditattn::{full}", fake, lib=_OPERATORS)
    return getattr(torch.ops.ditattn, name)


_HAS_KERNELS_IN_CPP = _native.function("register_torch_kernels")()
if _HAS_KERNELS_IN_CPP:  # which ask
    _OPERATORS.define(f"requires_gradient({_TENSORS}) -> int")
    _OPERATORS.impl("requires_gradient", _requires_gradient, "CompositeExplicitAutograd")
    _OPERATORS.impl("requires_gradient", fallthrough_kernel, "Autograd")

attention = _define("attention", "Tensor", _run, _fake)
attention_with_lse = _define("attention_with_lse", "(Tensor, Tensor)", _run_with_lse, _fake_with_lse)
