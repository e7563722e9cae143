"""What only PyTorch tells: the calls of its own attention, and which module of a model is running."""

from __future__ import annotations

import contextlib
import math
import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any, Callable

import torch
from torch.overrides import TorchFunctionMode

_SDPA = torch._C._nn.scaled_dot_product_attention  # also where somebody has replaced torch.nn.functional's


def uncompiled() -> contextlib.AbstractContextManager[None]:
    """A context in which what torch.compile made runs as it was written: else nobody sees the calls in it."""
    set_stance = getattr(torch.compiler, "set_stance", None)  # before PyTorch 2.6 there is none
    return set_stance("force_eager") if set_stance else contextlib.nullcontext()


class SdpaCalls(TorchFunctionMode):
    """While it is entered, tells `seen` the arguments of this thread's calls of scaled_dot_product_attention."""

    def __init__(self, seen: Callable[..., None]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is _SDPA:  # after it: what PyTorch refuses is no call
            self._seen(*args, **kwargs)
        return result


def attention_arguments(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[dict[str, Any], bool, float] | None:
    """A call of scaled_dot_product_attention in ditattn's terms: tensors (views), causality, scale.

    None for what ditattn's attention cannot be asked: tensors that have no 4 dimensions, other head sizes of values,
    batches or heads that broadcast, nothing to compute.
    """
    if any(tensor.ndim != 4 for tensor in (query, key, value)) or query.numel() == 0:
        return None
    batch, heads, _, head_size = query.shape
    kv_heads = key.shape[1]
    if key.shape != value.shape or (key.shape[0], key.shape[3]) != (batch, head_size) or heads % kv_heads:
        return None
    tensors = {
        name: tensor.detach().transpose(1, 2) for name, tensor in (("query", query), ("key", key), ("value", value))
    }
    if attn_mask is not None:  # two dimensions are (queries, keys) here, and (batch, keys) in ditattn
        tensors["attn_mask"] = attn_mask.detach()[(None,) * (4 - attn_mask.ndim)]
    return tensors, is_causal, head_size**-0.5 if scale is None else float(scale)


class _Stack(threading.local):
    def __init__(self) -> None:
        self.running: list[tuple[int, str]] = []
        self.timestep: Any = None  # as the outermost of them was given it


class RunningModules:
    """While it is entered, knows which module of `models` runs in a thread, by hooks on all of them."""

    def __init__(self, models: Mapping[str, torch.nn.Module]) -> None:
        self._models = models
        self._stack = _Stack()
        self._forwards: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._hooks: list[Any] = []

    def place(self) -> tuple[int, str] | None:
        """The step and the name of this thread's innermost module; None where none runs.

        A step is an outermost forward: of the model, or of that part of it which is called by itself.
        """
        return self._stack.running[-1] if self._stack.running else None

    def timestep(self) -> float | None:
        """The argument `timestep` of the outermost forward, by that name; None where it has none, or several.

        Waits for a GPU that holds it.
        """
        given = self._stack.timestep
        numbers = set(given.flatten().tolist() if isinstance(given, torch.Tensor) else [given])
        number = numbers.pop() if len(numbers) == 1 else None
        return float(number) if isinstance(number, (int, float)) and math.isfinite(number) else None

    def __enter__(self) -> RunningModules:
        for model_name, model in self._models.items():
            for name, module in getattr(model, "_orig_mod", model).named_modules():  # of what torch.compile made
                self._watch(module, ".".join(filter(None, (model_name, name))) or type(model).__name__)
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _watch(self, module: torch.nn.Module, name: str) -> None:
        def enter(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            running = self._stack.running
            if not running:
                timestep = kwargs.get("timestep")
                self._stack.timestep = timestep if isinstance(timestep, (torch.Tensor, int, float)) else None
            running.append((running[-1][0] if running else self._next_step(name), name))

        def leave(module: torch.nn.Module, args: Any, output: Any) -> None:
            running = self._stack.running
            if running and running[-1][1] == name:  # else its forward began before the hooks were there
                running.pop()
            if not running:
                self._stack.timestep = None

        self._hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        self._hooks.append(module.register_forward_hook(leave, always_call=True))

    def _next_step(self, name: str) -> int:
        with self._lock:
            self._forwards[name] += 1
            return self._forwards[name] - 1
