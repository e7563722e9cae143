"""Records the attention calls of a running model, in a file that ``ditattn compare --input`` reads."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import logging
import math
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Callable, NamedTuple, Union

import tvm_ffi

from . import _native
from .tensors import as_tensor, copy_into, torch, torch_stream

_observe = _native.function("observe")
_fields = _native.function("metadata_fields")
_without_broadcasting = _native.function("without_broadcasting")
_copy_to_host = _native.function("copy_to_host")
_empty_on_host = _native.function("empty_on_host")
_save = _native.function("save_safetensors")

_LOGGER = logging.getLogger("ditattn")
_SDPA_NAME = "torch.nn.functional.scaled_dot_product_attention"
_MASKS = ("attn_mask", "joint_attn_mask")
_JOINT = ("joint_query", "joint_key", "joint_value")
_OFFSETS = ("cu_seqlens_q", "cu_seqlens_k")

Layers = Union[str, int, Iterable[Union[str, int]], Callable[[str], bool], None]


class _Case(NamedTuple):
    tensors: dict[str, tvm_ffi.Tensor]
    settings: dict[str, str]


class capture:  # in lower case, as other contexts are
    """A context in which attention calls are recorded; at its end, also by an error, `path` is written.

    Calls of ditattn in all threads and, with `sdpa`, this thread's calls of PyTorch's scaled_dot_product_attention.
    `model`, a torch.nn.Module or a dict of several by name: only what is called while it runs, named by the module; a
    step is one forward of it. Without: named by the layer's prefix, or "call"; each call of a layer is its next step.
    Every `every`-th step is recorded, from the first on, and of its layers those of `layers`: patterns of names
    ("blocks.*.attn"), places in the order of first calls (0), or a function of the name. What would go over
    `max_bytes` or `max_cases` is left out and counted; a warning tells it. Tensors are copied as they are.
    ValueError, TypeError or FileNotFoundError at once for arguments that make no sense. What fails later is logged,
    ends the recording, and is raised at the end of the block.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        model: Any = None,
        every: int = 1,
        layers: Layers = None,
        max_bytes: int = 1 << 30,
        max_cases: int | None = None,
        sdpa: bool = True,
    ) -> None:
        self.path = Path(path)
        if not self.path.absolute().parent.is_dir():
            raise FileNotFoundError(f"{self.path} cannot be written: there is no folder {self.path.absolute().parent}.")
        for name, number, least in (("every", every, 1), ("max_bytes", max_bytes, 0), ("max_cases", max_cases, 0)):
            if number is not None and number < least:
                raise ValueError(f"{name}={number} is too small: it must be {least} at least.")
        self._models = _named_models(model)
        self._every = every
        self._is_wanted = _selector(layers)
        self._max_bytes = max_bytes
        self._max_cases = math.inf if max_cases is None else max_cases
        self._sdpa = sdpa
        self._modules: Any = None
        self._open = contextlib.ExitStack()
        self._lock = threading.Lock()  # of all below
        self._state = "new"
        self._recorded: dict[str, _Case | None] = {}  # None while it is being copied
        self._bytes = 0
        self._calls: Counter[str] = Counter()
        self._order: dict[str, int] = {}
        self._skipped: Counter[str] = Counter()
        self._error: Exception | None = None

    @property
    def cases(self) -> list[str]:
        """Names of what is recorded, sorted as ``compare`` shows them."""
        with self._lock:
            return sorted(case for case, content in self._recorded.items() if content)

    @property
    def bytes(self) -> int:
        """Bytes of all recorded tensors."""
        return self._bytes

    @property
    def skipped(self) -> int:
        """Calls that were asked for and are not recorded: for want of room, or because no file can hold them."""
        return sum(self._skipped.values())

    def __enter__(self) -> capture:
        with self._lock:
            if self._state != "new":
                raise RuntimeError(f"The capture of {self.path} was begun before: make another.")
            self._state = "running"
        with contextlib.ExitStack() as stack:
            if self._models or (self._sdpa and torch() is not None):
                from .torch_calls import RunningModules, SdpaCalls, uncompiled

                stack.enter_context(uncompiled())
                if self._models:
                    self._modules = stack.enter_context(RunningModules(self._models))
                if self._sdpa:
                    stack.enter_context(SdpaCalls(self._see_sdpa))
            stack.callback(_observe(_native.callback(self._see)))
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._open.close()
        with self._lock:
            self._state = "ended"
        try:
            self._write()
        except Exception as failure:
            if error is None:
                raise
            _LOGGER.error("%s", failure)  # the block's own error goes first
        if error is None and self._error is not None:
            raise self._error

    # --- Calls ------------------------------------------------------------------------------------------------------

    def _see(self, query: Any, key: Any, value: Any, metadata: Any, layer: Any) -> None:
        """A call of ditattn, in the thread that makes it. Those of back ends written in Python are part of another."""
        if _native.depth() > 1:
            return
        with self._guard():
            place = self._wanted_place(str(layer["prefix"]))
            if place is None:
                return
            tensors, settings = _described(metadata)
            tensors = {"query": query, "key": key, "value": value, **tensors}
            settings |= {"backend": str(layer["backend"])}
            if layer["role"]:
                settings["role"] = str(layer["role"])
            self._record(place, tensors, settings, layer["causal"], layer["softmax_scale"])

    def _see_sdpa(self, *args: Any, **kwargs: Any) -> None:
        """A call of PyTorch's attention; one of a back end of ditattn is part of that call."""
        if _native.depth() > 0:
            return
        from .torch_calls import attention_arguments

        with self._guard():
            place = self._wanted_place("")
            if place is None:
                return
            arguments = attention_arguments(*args, **kwargs)
            if arguments is None:
                return self._skip(f"{_SDPA_NAME} took shapes that ditattn does not")
            views, causal, scale = arguments
            on_gpu = views["query"].is_cuda
            with torch_stream(views["query"]) if on_gpu else contextlib.nullcontext():
                tensors = {what: as_tensor(view, what) for what, view in views.items()}
                self._record(place, tensors, {"backend": _SDPA_NAME}, causal, scale)

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """A capture that fails must not fail what it watches: it stops, and raises at the end of the block."""
        try:
            yield
        except Exception as error:
            with self._lock:
                if self._error is not None:
                    return
                self._error = error
            _LOGGER.error("The capture of %s stops: %s: %s", self.path, type(error).__name__, error)

    def _wanted_place(self, prefix: str) -> tuple[int, str] | None:
        """Step and layer of the call that is made now; None where it is not asked for."""
        with self._lock:
            if self._state != "running" or self._error is not None:
                return None
            if self._modules is None:
                name = prefix or "call"
                place = (self._calls[name], name)
                self._calls[name] += 1
            else:
                place = self._modules.place()
            if place is None:
                return None
            step, name = place
            order = self._order.setdefault(name, len(self._order))
        return place if step % self._every == 0 and self._is_wanted(name, order) else None

    # --- What is kept -----------------------------------------------------------------------------------------------

    def _record(
        self, place: tuple[int, str], tensors: dict[str, Any], settings: dict[str, str], causal: bool, scale: float
    ) -> None:
        step, layer = place
        if not math.isfinite(scale):
            return self._skip(f"a scale of {scale}")
        if tensors["query"].device.type == "cuda" and torch() and torch().cuda.is_current_stream_capturing():
            return self._skip("a CUDA graph was being made, from which nothing can be copied")
        for what in _MASKS:
            if what in tensors and len(tensors[what].shape) == 4:
                tensors[what] = _without_broadcasting(tensors[what])
        size = sum(map(_size, tensors.values()))
        case = self._reserve(f"step{step:06d}/{layer}", size)
        if case is None:
            return
        try:
            copies = {what: _host_copy(tensor, what) for what, tensor in tensors.items()}
        except BaseException:
            with self._lock:
                del self._recorded[case]
                self._bytes -= size
            raise
        settings = settings | {"layer": layer, "causal": json.dumps(causal), "softmax_scale": repr(scale)}
        timestep = None if self._modules is None else self._modules.timestep()
        if timestep is not None:
            settings["timestep"] = repr(timestep)
        with self._lock:
            self._recorded[case] = _Case(copies, settings)

    def _reserve(self, case: str, size: int) -> str | None:
        with self._lock:
            if len(self._recorded) >= self._max_cases:
                self._skipped[f"max_cases={self._max_cases}"] += 1
                return None
            if self._bytes + size > self._max_bytes:
                self._skipped[f"max_bytes={self._max_bytes}"] += 1
                return None
            name, again = case, 1
            while name in self._recorded:  # a module may attend more than once
                again += 1
                name = f"{case}#{again}"
            self._recorded[name] = None
            self._bytes += size
        return name

    def _skip(self, reason: str) -> None:
        with self._lock:
            self._skipped[reason] += 1

    def _write(self) -> None:
        with self._lock:
            recorded = {name: case for name, case in self._recorded.items() if case}
            reasons = dict(self._skipped)
        if reasons:
            told = "; ".join(f"{count} ({reason})" for reason, count in reasons.items())
            _LOGGER.warning("The capture of %s left out %d calls: %s", self.path, sum(reasons.values()), told)
        if not recorded:
            _LOGGER.warning("The capture recorded nothing: %s is not written.", self.path)
            return
        tensors = {f"{name}.{what}": found for name, case in recorded.items() for what, found in case.tensors.items()}
        texts = {f"{name}.{key}": text for name, case in recorded.items() for key, text in case.settings.items()}
        _save(os.fspath(self.path), tensors, texts)


def _named_models(model: Any) -> dict[str, Any]:
    models = model if isinstance(model, Mapping) else {} if model is None else {"": model}
    for name, entry in models.items():
        if not isinstance(entry, getattr(getattr(torch(), "nn", None), "Module", ())):
            raise TypeError(f"model must be a torch.nn.Module or a dict of them, got {type(entry).__name__} {name}.")
    return dict(models)


def _selector(layers: Layers) -> Callable[[str, int], bool]:
    if layers is None:
        return lambda name, order: True
    if callable(layers):
        return lambda name, order: bool(layers(name))
    entries = [layers] if isinstance(layers, (str, int)) else list(layers)
    for entry in entries:
        if not isinstance(entry, (str, int)):
            raise TypeError(f"layers has {entry!r}; valid are patterns of names, numbers, or one function of a name.")
    return lambda name, order: any(
        entry == order if isinstance(entry, int) else fnmatch.fnmatchcase(name, entry) for entry in entries
    )


def _described(metadata: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """What metadata of C++ adds to a case: tensors, and texts."""
    if metadata is None:
        return {}, {}
    fields = dict(_fields(metadata).items())
    extra = {str(key): value for key, value in fields["extra"].items()}
    tensors = {name: fields[name] for name in (*_MASKS, *_JOINT)} | {name: extra.get(name) for name in _OFFSETS}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    settings = {}
    if "joint_key" in tensors:
        settings["joint_strategy"] = str(fields["joint_strategy"])
    if extra.get("valid_kv_length") is not None:
        settings["valid_kv_length"] = str(extra["valid_kv_length"])
    if fields.get("full_attn_spans") is not None:
        settings["full_attn_spans"] = json.dumps(_native.plain(fields["full_attn_spans"]))
        settings["query_ranges"] = json.dumps(_native.plain(fields["query_ranges"]))
    return tensors, settings


def _size(tensor: tvm_ffi.Tensor) -> int:
    return math.prod(tensor.shape) * int(tensor.dtype.bits) // 8


def _host_copy(tensor: tvm_ffi.Tensor, what: str) -> tvm_ffi.Tensor:
    """Contiguous. On a GPU in the order of this thread's stream, for which it waits."""
    made: tvm_ffi.Tensor = _empty_on_host(tensor)
    copy_into(made, tensor if tensor.device.type == "cpu" else _copy_to_host(tensor), what)
    return made
