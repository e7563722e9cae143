"""ditattn's back ends in Hugging Face diffusers.

    from ditattn.integrations.diffusers import install, use

    install()
    with use(pipeline.transformer, "ditattn_flash"):
        image = pipeline(prompt).images[0]

`install` adds names to diffusers' attention dispatcher, which its own ways of choosing then know; `use` chooses for one
model. Everything is forward only, and an explicit choice is never replaced: what a back end cannot do is its error.
"""

from __future__ import annotations

import copy
import functools
import importlib
import json
import logging
import sys
import threading
from collections.abc import Callable, Mapping
from types import MappingProxyType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ditattn import DiffusionAttentionBackendEnum
from ditattn.integrations.diffusers_parallel import parallel_attention

_LOGGER = logging.getLogger("ditattn")
_DISPATCHER = "diffusers.models.attention_dispatch"

#: diffusers' names and what computes under them: a member, or "auto", the selector's choice.
NAMES: Mapping[str, str] = MappingProxyType({
    "ditattn": "auto",
    "ditattn_flash": "FLASH_ATTN",
    "ditattn_sdpa": "TORCH_SDPA",
    "ditattn_sage": "SAGE_ATTN",
    "ditattn_sage3": "SAGE_ATTN_3",
    "ditattn_cudnn": "CUDNN_ATTN",
    "ditattn_flashinfer": "FLASHINFER_ATTN",
})  # fmt: skip

_lock = threading.Lock()
_installed: dict[str, tuple[str, str]] = {}  # name: (back end, options as JSON)
_active_before: Any = None  # diffusers' active back end when the first name was added


def install(extra: Mapping[str, str] | None = None, options: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Adds `NAMES` to diffusers' attention dispatcher; again: nothing happens but for what is given.

    `extra` are more names, each with a member's name, for members that were defined or registered by the user:
    ``{"ditattn_mine": "MY_ATTN"}``. `options` are the `backend_kwargs` of a name,
    ``{"ditattn_sage": {"smooth_k": False}}``; they hold until others are given for it. Where DIFFUSERS_ATTN_BACKEND is
    one of the names, call this before any model of diffusers is imported. ValueError for a name that is taken or
    malformed, an unknown member, and options of an unknown name, and nothing is changed; ImportError without diffusers.
    """
    global _active_before
    extra, options = dict(extra or {}), dict(options or {})
    with _lock:
        wanted = {**{name: backend for name, (backend, _) in _installed.items()}, **NAMES, **extra}
        dispatcher = _dispatcher(wanted)
        enum, registry = dispatcher.AttentionBackendName, dispatcher._AttentionBackendRegistry
        for name, backend in extra.items():
            _check_extra(name, backend, enum)
        for name in options.keys() - wanted.keys():
            raise ValueError(f"options are given for {name!r}, which is none of the names: {', '.join(wanted)}.")
        texts = {name: json.dumps(dict(given)) for name, given in options.items()}
        first = not _installed
        for name, backend in wanted.items():
            entry = (backend, texts.get(name, _installed.get(name, ("", ""))[1]))
            if _installed.get(name) != entry:
                member = enum(name) if name in _installed else _add_member(enum, name)
                registry.register(member, supports_context_parallel=True)(_function(*entry))
                _installed[name] = entry
        if first:
            _active_before = registry._active_backend
            if _asked_for() in wanted:
                registry.set_active_backend(enum(_asked_for()))


def uninstall() -> None:
    """Takes all names away again. Nothing may use them any more: models, compiled ones and open `with` blocks."""
    with _lock:
        if not _installed:
            return
        dispatcher = sys.modules[_DISPATCHER]
        enum, registry = dispatcher.AttentionBackendName, dispatcher._AttentionBackendRegistry
        if registry._active_backend in _installed:
            registry.set_active_backend(_active_before)
        for name in _installed:
            for table in (registry._backends, registry._constraints, registry._supported_arg_names):
                del table[name]
            registry._supports_context_parallel.discard(name)
            _remove_member(enum, name)
        _installed.clear()


def _asked_for() -> str:
    """DIFFUSERS_ATTN_BACKEND, as diffusers has read it."""
    from diffusers.utils import constants

    return constants.DIFFUSERS_ATTN_BACKEND


def _dispatcher(names: Mapping[str, str]) -> ModuleType:
    """diffusers' dispatcher. While it is imported it looks the environment's name up, and has none of `names` yet."""
    if _DISPATCHER in sys.modules:
        return sys.modules[_DISPATCHER]
    try:
        from diffusers.utils import constants
    except ModuleNotFoundError as error:
        raise ImportError(f"ditattn.integrations.diffusers needs diffusers: {error}") from error
    asked = constants.DIFFUSERS_ATTN_BACKEND
    constants.DIFFUSERS_ATTN_BACKEND = "native" if asked in names else asked
    try:
        return importlib.import_module(_DISPATCHER)
    finally:
        constants.DIFFUSERS_ATTN_BACKEND = asked


def _check_extra(name: str, backend: str, enum: Any) -> None:
    if not (name.isidentifier() and name.islower()):
        raise ValueError(f"{name!r} is no name for diffusers: lower-case letters, digits and underscores are allowed.")
    if name in NAMES or (name not in _installed and (name in enum._value2member_map_ or hasattr(enum, name.upper()))):
        raise ValueError(f"{name!r} is taken already: choose another name, for example 'ditattn_{backend.lower()}'.")
    if backend != "auto":
        DiffusionAttentionBackendEnum[backend]  # ValueError with the valid ones


def _add_member(enum: Any, value: str) -> Any:
    """A member like those of the class's body. `enum` has no way to add one; Python 3.10 to 3.14 keep these tables."""
    member = str.__new__(enum, value)
    member._name_ = value.upper()
    member._value_ = value
    member.__objclass__ = enum
    member._sort_order_ = len(enum._member_names_)
    enum._member_names_.append(member._name_)
    enum._member_map_[member._name_] = member
    enum._value2member_map_[value] = member
    if hasattr(enum, "_hashable_values_"):  # from Python 3.13 on
        enum._hashable_values_.append(value)
    type.__setattr__(enum, member._name_, member)
    return member


def _remove_member(enum: Any, value: str) -> None:
    member = enum._value2member_map_.pop(value)
    enum._member_names_.remove(member._name_)
    del enum._member_map_[member._name_]
    if hasattr(enum, "_hashable_values_"):
        enum._hashable_values_.remove(value)
    type.__delattr__(enum, member._name_)


def _function(backend: str, options: str) -> Callable[..., Any]:
    """What diffusers' dispatcher calls; it goes by the names of the arguments, and leaves out others."""

    def ditattn_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        _parallel_config: Any = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        _refuse(query, key, dropout_p, is_causal, enable_gqa)
        if _parallel_config is not None and _parallel_config.context_parallel_config is not None:
            return parallel_attention(
                query, key, value, attn_mask, is_causal, scale, return_lse, _parallel_config, backend, options
            )
        if attn_mask is not None and attn_mask.ndim == 2 and attn_mask.shape != (query.shape[0], key.shape[1]):
            attn_mask = attn_mask[None, None]  # as native has it; to ditattn two dimensions are (B, Skv)
        if is_causal and query.shape[1] < key.shape[1]:
            # Native aligns the mask top left, ditattn's members differ; without keys that nobody sees all agree.
            key, value = key[:, : query.shape[1]], value[:, : query.shape[1]]
            if attn_mask is not None and attn_mask.shape[-1] > 1:
                attn_mask = attn_mask[..., : query.shape[1]]
        operator = torch.ops.ditattn.attention_with_lse if return_lse else torch.ops.ditattn.attention
        mask = () if attn_mask is None else (attn_mask,)  # the overload without one is the faster
        return operator(
            query, key, value, *mask, backend=backend, softmax_scale=scale, causal=is_causal, backend_kwargs=options
        )

    return ditattn_attention


def _refuse(query: torch.Tensor, key: torch.Tensor, dropout_p: float, is_causal: bool, enable_gqa: bool) -> None:
    """Raises for what diffusers may ask for and ditattn does not have; gradients the operator refuses."""
    if dropout_p:
        raise NotImplementedError(f"dropout_p is {dropout_p}: ditattn is forward only and has no dropout. Give 0.")
    if query.shape[2] != key.shape[2] and not enable_gqa:
        raise ValueError(
            f"query has {query.shape[2]} heads and key {key.shape[2]}. They must be equal unless enable_gqa=True."
        )
    if is_causal and query.shape[1] > key.shape[1]:
        raise NotImplementedError(
            f"is_causal with more queries ({query.shape[1]}) than keys ({key.shape[1]}) is not computed: "
            "ditattn's members differ from PyTorch there. Give a mask."
        )


class Use:
    """What `use` has set: `restore()`, or the end of a ``with`` block, puts back what was there."""

    def __init__(self, layers: list[torch.nn.Module], backend: Any) -> None:
        self._replaced = [(layer, layer.processor, _copy_with(layer.processor, backend)) for layer in layers]
        for layer, _, ours in self._replaced:
            layer.processor = ours

    def restore(self) -> None:
        """Puts the processors back, but for those that others have replaced meanwhile. Again: nothing happens."""
        while self._replaced:
            layer, before, ours = self._replaced.pop()
            if layer.processor is ours:
                layer.processor = before
                if hasattr(before, "_parallel_config"):  # the model may have been spread over processes meanwhile
                    before._parallel_config = ours._parallel_config

    def __enter__(self) -> Use:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.restore()


def use(module: torch.nn.Module, name: str) -> Use:
    """Chooses for one model, or a part of it, and nothing else; from now on, or for a ``with`` block.

    `name` is any that diffusers' dispatcher knows. Each attention layer gets a copy of its processor, so what models
    share stays as it is. Processors that call PyTorch's attention themselves (SD 3, PixArt, CogVideoX, UNets) follow
    too. A processor that does neither keeps what it has, which is logged. ValueError where none follows, and for an
    unknown name; TypeError for what is no module. Not while the model runs in another thread.
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"use takes a model, as pipeline.transformer is one, got {type(module).__name__}.")
    dispatcher = importlib.import_module(_DISPATCHER)
    registry = dispatcher._AttentionBackendRegistry
    if name not in registry._backends:
        known = ", ".join(sorted(backend.value for backend in registry._backends))
        raise ValueError(f"{name!r} is not known to diffusers (call install() first?). It has: {known}.")
    backend = dispatcher.AttentionBackendName(name)
    dispatcher._check_attention_backend_requirements(backend)
    dispatcher._maybe_download_kernel_for_backend(backend)
    able, unable = [], set()
    for layer in module.modules():
        processor = getattr(layer, "processor", None)
        if processor is not None and _follows(processor):
            able.append(layer)
        elif processor is not None:
            unable.add(type(processor).__name__)
    if not able:
        raise ValueError(
            f"{type(module).__name__} has no attention that can be chosen for it alone (its processors: "
            f"{', '.join(sorted(unable)) or 'none'}). Does diffusers' attention_backend({name!r}), for all models, do?"
        )
    if unable:
        _LOGGER.warning("%s: %s do not follow %r.", type(module).__name__, ", ".join(sorted(unable)), name)
    return Use(able, backend)


def _follows(processor: Any) -> bool:
    """Whether a processor gives its back end to the dispatcher, or calls PyTorch's attention itself."""
    code = getattr(type(processor).__call__, "__code__", None)
    return hasattr(processor, "_attention_backend") or (
        code is not None and F.scaled_dot_product_attention.__name__ in code.co_names
    )


def _copy_with(processor: Any, backend: Any) -> Any:
    made = copy.copy(processor)
    if not hasattr(made, "_attention_backend"):
        made.__class__ = _dispatching(processor.__class__)
    made._attention_backend = backend
    return made


class _ToDispatcher(TorchFunctionMode):
    """In it, calls of PyTorch's attention by this thread go to diffusers' dispatcher."""

    def __init__(self, backend: Any) -> None:
        super().__init__()
        self.backend = backend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = functools.partial(_dispatch, self.backend) if func is F.scaled_dot_product_attention else func
        return call(*args, **(kwargs or {}))


def _dispatch(
    backend: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """PyTorch's attention, (B, H, S, D), by diffusers' dispatcher."""
    if attn_mask is not None and attn_mask.ndim < 4:  # four dimensions mean the same to both
        attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    dispatch = sys.modules[_DISPATCHER].dispatch_attention_fn
    out = dispatch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend=backend)
    return out.transpose(1, 2)


@functools.lru_cache(maxsize=None)
def _dispatching(cls: type) -> type:
    """A processor class like `cls`, with the attribute by which diffusers chooses, whose attention follows it."""

    @functools.wraps(cls.__call__)  # diffusers reads the names of its arguments
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._attention_backend is None:
            return cls.__call__(self, *args, **kwargs)
        with _ToDispatcher(self._attention_backend):
            return cls.__call__(self, *args, **kwargs)

    body = {
        "__module__": cls.__module__,
        "__call__": call,
        "_attention_backend": None,
        "__reduce__": lambda self: (_blank, (cls,), self.__dict__),
    }
    return type(cls.__name__, (cls,), body)


def _blank(cls: Any) -> Any:
    made: Any = _dispatching(cls)
    return made.__new__(made)
