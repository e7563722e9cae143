"""The two abstract classes of vLLM-Omni, and the classes over C++ back ends that derive from them."""

from __future__ import annotations

import dataclasses
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Callable, ClassVar

import tvm_ffi

from . import _native
from .metadata import AttentionMetadata, native_metadata
from .problem import Problem
from .tensors import as_argument, is_torch, like, torch, torch_stream

_address = _native.function("address")
_get_name = _native.function("get_name")
_get_supported_head_sizes = _native.function("get_supported_head_sizes")
_supports_head_size = _native.function("supports_head_size")
_supports_attention_mask = _native.function("supports_attention_mask")
_supports_piecewise_spans = _native.function("supports_piecewise_spans")
_validate_available = _native.function("validate_available")
_capabilities = _native.function("capabilities")
_explain = _native.function("explain")
_kernel_name = _native.function("kernel_name")
_make = _native.function("make")
_forward = _native.function("forward")


class AttentionBackend(ABC):
    """A back end class. All methods are static or class methods; no object of it is ever made.

    A class of one's own needs `get_name` and `get_impl_cls`; deriving from this class is not required.
    """

    accept_output_buffer: ClassVar[bool] = False

    @staticmethod
    @abstractmethod
    def get_name() -> str:
        """The name, as messages show it."""

    @staticmethod
    @abstractmethod
    def get_impl_cls() -> type:
        """The class that implements one attention layer."""

    @staticmethod
    def get_metadata_cls() -> type:
        """The class of `forward`'s `attn_metadata`."""
        return AttentionMetadata

    @staticmethod
    def get_builder_cls() -> type:
        """vLLM's metadata builders: none here, metadata is made by hand."""
        raise NotImplementedError("There is no metadata builder: construct AttentionMetadata itself.")

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        """Head sizes; empty means any."""
        return []

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Whether a head size is supported."""
        sizes = cls.get_supported_head_sizes()
        return not sizes or head_size in sizes

    @classmethod
    def supports_attention_mask(cls, attention_spec: Any = None) -> bool:
        """Whether masks are taken."""
        return False

    @classmethod
    def supports_piecewise_spans(cls) -> bool:
        """Whether `full_attn_spans` are taken."""
        return False

    @classmethod
    def validate_available(cls) -> None:
        """Raises ImportError with the reason where the back end cannot run here."""

    @classmethod
    def capabilities(cls) -> dict[str, Any]:
        """What else the class can do, for callers in C++; docs/python.md has the keys and what a missing one means."""
        return {}


class AttentionImpl:
    """The implementation of one attention layer; tensors are (batch, tokens, heads, head_size).

    `forward` goes to the method of the query's platform, which a class overrides, or it overrides `forward`.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float | None = None,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        qkv_layout: str | None = None,
        backend_kwargs: Mapping[str, Any] | None = None,
        **extra: Any,
    ) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.softmax_scale = 1 / math.sqrt(head_size) if softmax_scale is None else softmax_scale
        self.causal = causal
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.prefix = prefix
        self.qkv_layout = qkv_layout
        self.backend_kwargs = dict(backend_kwargs or {})

    def forward(self, query: Any, key: Any, value: Any, attn_metadata: Any = None) -> Any:
        """Attention, by the platform of `query`."""
        platform = _platform_of(query)
        methods = {"musa": ("forward_musa", "forward_cuda"), "rocm": ("forward_hip", "forward_cuda")}
        for name in methods.get(platform, (f"forward_{platform}",)):
            method = getattr(self, name, None)
            if method is not None:
                return method(query, key, value, attn_metadata)
        raise NotImplementedError(f"No forward implementation for platform: {platform}")

    def forward_paged(self, *args: Any, **kwargs: Any) -> Any:
        """Paged K/V caches belong to language models."""
        raise NotImplementedError(f"{type(self).__name__} does not support paged KV attention")


def _platform_of(tensor: Any) -> str:
    kind = getattr(getattr(tensor, "device", None), "type", "cpu") if is_torch(tensor) else "cpu"
    return "rocm" if kind == "cuda" and torch().version.hip else kind


def _never() -> None:
    raise TypeError("Back end classes are used as they are; get_impl_cls() gives what objects are made of.")


class NativeImpl(AttentionImpl):
    """An implementation in C++. The subclass of each back end class knows which."""

    _backend: ClassVar[Any]

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float | None = None,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        qkv_layout: str | None = None,
        backend_kwargs: Mapping[str, Any] | None = None,
        **extra: Any,
    ) -> None:
        """Of `extra`, what vLLM-Omni gives, only `role` is used: captures tell it. ValueError for what is out of range."""
        if qkv_layout not in (None, "BSND", "BSHD"):
            raise ValueError(f"qkv_layout is {qkv_layout!r}; tensors are (batch, tokens, heads, head_size): 'BSND'.")
        kwargs = dict(backend_kwargs or {})
        role = str(extra.get("role") or "")
        self._impl = _make(
            self._backend, num_heads, head_size, softmax_scale, causal, num_kv_heads, prefix, kwargs, role
        )
        super().__init__(num_heads, head_size, softmax_scale, causal, num_kv_heads, prefix, qkv_layout, kwargs)

    def forward(
        self,
        query: Any,
        key: Any,
        value: Any,
        attn_metadata: Any = None,
        out: Any = None,
        lse: Any = None,
        return_lse: bool = False,
    ) -> Any:
        """Attention: softmax(scale · query · keyᵀ + mask) · value, per head.

        Takes anything with ``__dlpack__`` without copying it, and returns an array of query's library: a new one, or
        `out` itself, written. With `return_lse` the pair of it and the log-sum-exp, float32 (B, H, Sq): a new array
        or `lse` itself. Everything is checked first; nothing is written then. Runs without Python's lock. PyTorch's
        CUDA tensors: in PyTorch's current stream, without waiting, with new tensors from PyTorch's allocator.
        """
        metadata = native_metadata(attn_metadata)

        def call(query: Any, key: Any, value: Any, out: Any, lse: Any) -> Any:
            return _forward(self._impl, query, key, value, metadata, out, lse, return_lse)

        return call_native(call, query, key, value, out, lse, return_lse)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(f"{type(self).__name__} holds C++ objects and cannot be pickled or copied; make it anew.")


def call_with_native(call: Callable[..., Any], query: Any, key: Any, value: Any, *outputs: Any) -> Any:
    """`call(query, key, value, *outputs)` with tensors as C++ takes them, in query's stream."""
    arguments = (as_argument(query, "query"), as_argument(key, "key"), as_argument(value, "value"), *outputs)
    if arguments[0] is not query and is_torch(query) and query.is_cuda:
        with torch_stream(query):  # for what C++ reads itself, the stream comes with it
            return call(*arguments)
    return call(*arguments)


def call_native(
    call: Callable[..., Any], query: Any, key: Any, value: Any, out: Any, lse: Any, return_lse: bool
) -> Any:
    """`call(query, key, value, out, lse)` with tensors as C++ takes them; results as `NativeImpl.forward` gives them."""
    result = call_with_native(call, query, key, value, _output(out, "out"), _output(lse, "lse"))
    if not return_lse:
        return like(result, query) if out is None else out
    return (like(result[0], query) if out is None else out), (like(result[1], query) if lse is None else lse)


def _output(array: Any, what: str) -> Any:
    if getattr(getattr(array, "flags", None), "writeable", True) is False:
        raise ValueError(f"{what} is read-only.")
    return None if array is None else as_argument(array, what)


_classes: dict[int, type] = {}  # by address; a class keeps its C++ object alive, so addresses are never used again
_classes_lock = threading.Lock()


def class_for(found: Any, path: Callable[[], str] | None = None) -> type[AttentionBackend]:
    """The Python class of what C++ found: its own, or the one class over a C++ back end. `path()` names a new one."""
    if isinstance(found, ClassHolder):
        return found.cls
    address = _address(found)
    known = _classes.get(address)
    if known is not None:
        return known
    made = _class_over(found, path().rpartition(".")[2] if path else f"{_get_name(found)}_Backend")
    with _classes_lock:
        return _classes.setdefault(address, made)


def native_of(cls: type) -> Any:
    """The C++ object under a class that `class_for` made; None for others."""
    return cls.__dict__.get("_native_backend")


class ClassHolder:
    """Stands for a Python class in C++. (tvm_ffi takes the class itself for a function.)"""

    def __init__(self, cls: type) -> None:
        self.cls = cls


def _class_over(backend: Any, name: str) -> type:
    impl = type(name.removesuffix("Backend") + "Impl", (NativeImpl,), {"_backend": backend, "__module__": __name__})

    def explain(problem: Problem | None = None, **fields: Any) -> list[str]:
        """Reasons against a problem, given whole or by its fields; an empty list means it is taken."""
        problem = dataclasses.replace(problem or Problem(), **fields)
        return [str(reason) for reason in _explain(backend, problem.to_native())]

    def kernel_name(problem: Problem | None = None, **fields: Any) -> str:
        """The kernel that would compute a problem that is taken; empty where the engine does not tell."""
        problem = dataclasses.replace(problem or Problem(), **fields)
        return str(_kernel_name(backend, problem.to_native()))

    body = {
        "__module__": __name__,
        "__doc__": f"{_get_name(backend)}, in C++.",
        "__new__": lambda cls: _never(),
        "accept_output_buffer": True,
        "_native_backend": backend,
        "get_name": staticmethod(lambda: str(_get_name(backend))),
        "get_impl_cls": staticmethod(lambda: impl),
        "get_supported_head_sizes": staticmethod(lambda: list(_get_supported_head_sizes(backend))),
        "supports_head_size": staticmethod(lambda head_size: _supports_head_size(backend, head_size)),
        "supports_attention_mask": staticmethod(lambda attention_spec=None: _supports_attention_mask(backend)),
        "supports_piecewise_spans": staticmethod(lambda: _supports_piecewise_spans(backend)),
        "validate_available": staticmethod(lambda: _validate_available(backend)),
        "capabilities": staticmethod(lambda: _native.plain(_capabilities(backend))),
        "explain": staticmethod(explain),
        "kernel_name": staticmethod(kernel_name),
    }
    return type(name, (AttentionBackend,), body)


def supported_head_sizes(cls: type) -> Sequence[int]:
    """A class's list, empty for any; also where it only answers `supports_head_size`."""
    sizes = list(getattr(cls, "get_supported_head_sizes", list)())
    asked = getattr(cls, "supports_head_size", None)
    own = getattr(asked, "__func__", asked) is not vars(AttentionBackend)["supports_head_size"].__func__
    if sizes or asked is None or not own:
        return sizes
    limit = 1024  # no model comes near
    sizes = [size for size in range(1, limit + 1) if asked(size)]
    return [] if len(sizes) == limit else sizes
