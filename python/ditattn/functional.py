"""`attention`: one call, no classes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from . import _native
from .backend import call_native
from .enum import DiffusionAttentionBackendEnum
from .metadata import AttentionMetadata, native_metadata
from .python_backend import adapted
from .selection import AttentionConfig, native_config
from .tensors import torch

torch_ops: Any = None
if torch() is not None:  # tvm_ffi imports it where it is installed
    from . import torch_ops

_attention = _native.function("attention")


def _named(backend: Any) -> Any:
    """A name, or C++'s object for a class."""
    if isinstance(backend, DiffusionAttentionBackendEnum):
        return backend.name
    if isinstance(backend, type):
        return adapted(backend)
    raise TypeError(f"backend must be a name, a member or a class, got {backend!r}.")


def _are_of_torch(query: Any, key: Any, value: Any, attn_mask: Any) -> bool:
    if torch_ops is None:
        return False
    tensor = torch_ops.Tensor
    mask_fits = attn_mask is None or isinstance(attn_mask, tensor)
    return isinstance(query, tensor) and isinstance(key, tensor) and isinstance(value, tensor) and mask_fits


def _that_differ(
    backend: str, softmax_scale: Any, causal: bool, backend_kwargs: Any, max_error: Any
) -> dict[str, Any]:
    """Options of PyTorch's operator that are not as by default: each takes it a third of a microsecond."""
    given: dict[str, Any] = {}
    if backend != "auto":
        given["backend"] = backend
    if softmax_scale is not None:
        given["softmax_scale"] = softmax_scale
    if causal:
        given["causal"] = True
    if backend_kwargs:
        given["backend_kwargs"] = json.dumps(dict(backend_kwargs))
    if max_error is not None:
        given["max_error"] = max_error
    return given


def with_mask(metadata: Any, attn_mask: Any) -> Any:
    """Metadata with the mask in it, which may be given either way."""
    if attn_mask is None:
        return metadata
    if metadata is None:
        return AttentionMetadata(attn_mask=attn_mask)
    if metadata.attn_mask is not None:
        raise ValueError("attn_mask is given twice: as itself and in metadata.")
    return dataclasses.replace(metadata, attn_mask=attn_mask)


def attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    backend: str | DiffusionAttentionBackendEnum | type = "auto",
    attn_mask: Any = None,
    metadata: AttentionMetadata | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_lse: bool = False,
    out: Any = None,
    lse: Any = None,
    backend_kwargs: Mapping[str, Any] | None = None,
    max_error: float | None = None,
    role: str | None = None,
    config: AttentionConfig | Mapping[str, Any] | None = None,
    role_category: str | None = None,
) -> Any:
    """Attention over (batch, tokens, heads, head_size); heads and sizes are those of the tensors.

    `backend` is a member, its name in any case, or a class. "auto" is the selector's choice for `role` in `config`;
    with neither, DIFFUSION_ATTENTION_BACKEND, else the fastest that was measured for this problem (`tune`) to be within
    `max_error` (None: exact), else the first of the platform's back ends that takes it.
    Classes written in Python are checked as those in C++ are. Implementations are kept for the next call of the kind.
    Arguments and result are those of `NativeImpl.forward`. For PyTorch tensors without `metadata`, `out`, `lse`, `role`
    and `config` this is ``torch.ops.ditattn.attention``, and torch.compile sees that.
    """
    name = backend if isinstance(backend, str) else _named(backend)
    if (metadata is None and out is None and lse is None and role is None and config is None and role_category is None
            and isinstance(name, str) and _are_of_torch(query, key, value, attn_mask)):  # fmt: skip
        operator = torch_ops.attention_with_lse if return_lse else torch_ops.attention
        given = _that_differ(name, softmax_scale, causal, backend_kwargs, max_error)
        if attn_mask is None:
            return operator.default(query, key, value, **given)
        return operator.masked(query, key, value, attn_mask, **given)
    options = (name, softmax_scale, causal, dict(backend_kwargs or {}), max_error)
    selection = (role or "", role_category or "", native_config(config))
    known = native_metadata(with_mask(metadata, attn_mask))

    def call(query: Any, key: Any, value: Any, out: Any, lse: Any) -> Any:
        return _attention(query, key, value, known, *options, *selection, out, lse, return_lse)

    return call_native(call, query, key, value, out, lse, return_lse)
