"""`attention`: one call, no classes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from .backend import NativeImpl, class_for
from .enum import DiffusionAttentionBackendEnum
from .metadata import AttentionMetadata
from .python_backend import adapted
from .selection import AttentionConfig, resolve_role

_KEPT = 256  # implementations: more than a model has kinds of layers
_DEVICES = {1: "cpu", 3: "cpu", 2: "cuda", 13: "cuda", 10: "rocm"}  # DLDeviceType


@functools.lru_cache(maxsize=_KEPT)
def _impl_cls(cls: type) -> type[NativeImpl]:
    """A class's implementation as C++ runs it: checked, whatever it is written in."""
    native = class_for(adapted(cls), lambda: cls.__qualname__)
    native.validate_available()
    return native.get_impl_cls()


@functools.lru_cache(maxsize=_KEPT)
def _impl(cls: type, num_heads: int, head_size: int, scale: float | None, causal: bool, num_kv_heads: int,
          options: tuple[tuple[str, type, Any], ...]) -> NativeImpl:  # fmt: skip
    kwargs = {key: value for key, _, value in options}  # types are there because 1, 1.0 and True are equal
    return _impl_cls(cls)(num_heads, head_size, scale, causal, num_kv_heads, backend_kwargs=kwargs)


def _impl_for(cls: type, *config: Any, kwargs: Mapping[str, Any]) -> NativeImpl:
    options = tuple((key, type(value), value) for key, value in sorted(kwargs.items()))
    try:
        return _impl(cls, *config, options)
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
    return _impl.__wrapped__(cls, *config, options)


def _shape_of(tensor: Any, what: str) -> tuple[int, ...]:
    shape = getattr(tensor, "shape", None)
    if shape is None:
        raise TypeError(
            f"{what} must be a tensor with __dlpack__ (NumPy, PyTorch, tvm_ffi, …), got {type(tensor).__name__}."
        )
    if len(shape) != 4:
        raise ValueError(f"{what} must have 4 dimensions (batch, tokens, heads, head_size), got shape {tuple(shape)}.")
    return tuple(shape)


def _with_mask(metadata: Any, attn_mask: Any) -> Any:
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
    role: str | None = None,
    config: AttentionConfig | Mapping[str, Any] | None = None,
    role_category: str | None = None,
) -> Any:
    """Attention over (batch, tokens, heads, head_size); heads and sizes are those of the tensors.

    `backend` is a member, its name in any case, or a class. "auto" is the selector's choice for `role` in `config`;
    with neither, DIFFUSION_ATTENTION_BACKEND, else the first of the platform's back ends that takes this problem.
    Classes written in Python are checked as those in C++ are. Implementations are kept for the next call of the kind.
    Arguments and result are those of `NativeImpl.forward`.
    """
    _, _, num_heads, head_size = _shape_of(query, "query")
    num_kv_heads = _shape_of(key, "key")[2]
    kwargs = dict(backend_kwargs or {})
    if isinstance(backend, str) and backend.upper() == "AUTO":
        device = _DEVICES.get(query.__dlpack_device__()[0], "unknown") if hasattr(query, "__dlpack_device__") else "cpu"
        selection = resolve_role(role, head_size, config, role_category, device)
        cls = selection.backend
        kwargs = {**(selection.spec.backend_kwargs if selection.spec else {}), **kwargs}
    elif isinstance(backend, str):
        cls = DiffusionAttentionBackendEnum[backend.upper()].get_class()
    elif isinstance(backend, DiffusionAttentionBackendEnum):
        cls = backend.get_class()
    elif isinstance(backend, type):
        cls = backend
    else:
        raise TypeError(f"backend must be a name, a member or a class, got {backend!r}.")
    impl = _impl_for(cls, num_heads, head_size, softmax_scale, causal, num_kv_heads, kwargs=kwargs)
    return impl.forward(query, key, value, _with_mask(metadata, attn_mask), out, lse, return_lse)
