"""Choice by measurement: which back end was the fastest for a problem on this machine, within an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import tvm_ffi

from . import _native
from .backend import call_with_native
from .enum import DiffusionAttentionBackendEnum
from .functional import with_mask
from .metadata import AttentionMetadata, native_metadata
from .problem import Problem, TunedResult

_tune = _native.function("tune")
_tune_call = _native.function("tune_call")
_tuned = _native.function("tuned")
_tuned_member = _native.function("tuned_member")
_tuned_problems = _native.function("tuned_problems")
_tune_cache_file = _native.function("tune_cache_file")
_exact_error = _native.function("exact_error")
_reload_tuned = _native.function("reload_tuned")

Members = Iterable[str | DiffusionAttentionBackendEnum]


class TunedProblem(NamedTuple):
    """What was measured for one problem: usable results first, the fastest of them first."""

    problem: Problem
    results: tuple[TunedResult, ...]


def _problem(native: Any) -> TunedProblem:
    plain = _native.plain(native)
    return TunedProblem(Problem(**plain["problem"]), tuple(TunedResult(**result) for result in plain["results"]))


def _names(backends: Members | None) -> list[str]:
    members = backends or ()
    return [member.upper() if isinstance(member, str) else member.name for member in members]


def tune(
    problem: Problem | None = None,
    *,
    backends: Members | None = None,
    budget_ms: float = 600,
    seed: int = 0,
    publish: bool = True,
    **fields: Any,
) -> TunedProblem:
    """Measures a problem, given whole or by its fields, on standard normal tensors; defaults choose by the result.

    Every back end (or those of `backends`) that takes it is timed in interleaved rounds of `budget_ms` together, and its
    error measured. What was measured of others than `backends` before is kept, and returned with the rest. `publish`
    False keeps the result to this process. Seconds, and for as long the GPU, are this call's.
    """
    problem = dataclasses.replace(problem or Problem(), **fields)
    return _problem(_tune(problem.to_native(), _names(backends), budget_ms, seed, publish))


def tune_call(
    query: Any,
    key: Any,
    value: Any,
    *,
    attn_mask: Any = None,
    metadata: AttentionMetadata | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    backends: Members | None = None,
    budget_ms: float = 600,
    seed: int = 0,
    publish: bool = True,
) -> TunedProblem:
    """`tune` for real tensors, given as to `attention`."""
    known = native_metadata(with_mask(metadata, attn_mask))

    def call(query: Any, key: Any, value: Any) -> Any:
        config = {
            "num_heads": query.shape[2],
            "num_kv_heads": key.shape[2],
            "head_size": query.shape[3],
            "softmax_scale": softmax_scale,
            "causal": causal,
        }
        return _tune_call(query, key, value, known, config, _names(backends), budget_ms, seed, publish)

    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if len(tensor.shape) != 4:
            raise ValueError(f"{name} must be 4-D, (batch, tokens, heads, head_size), got {tuple(tensor.shape)}.")
    return _problem(call_with_native(call, query, key, value))


def tuned(problem: Problem | None = None, **fields: Any) -> TunedProblem | None:
    """What is known of exactly this problem, or else of one near it; None where nothing is."""
    found = _tuned(dataclasses.replace(problem or Problem(), **fields).to_native())
    return None if found is None else _problem(found)


def tuned_member(
    problem: Problem | None = None, max_error: float | None = None, **fields: Any
) -> DiffusionAttentionBackendEnum | None:
    """Who is chosen for a problem by measurement, with an error of at most `max_error` (None: exact ones only)."""
    name = _tuned_member(dataclasses.replace(problem or Problem(), **fields).to_native(), max_error)
    return None if name is None else DiffusionAttentionBackendEnum[str(name)]


def tuned_problems(device: str = "cpu") -> list[TunedProblem]:
    """All that is known for a device."""
    return [_problem(found) for found in _tuned_problems(tvm_ffi.device(device))]


def tune_cache_file(device: str = "cpu") -> str:
    """The file it is kept in, present or not; empty where there is no folder for it."""
    return str(_tune_cache_file(tvm_ffi.device(device)))


def exact_error(dtype: str) -> float:
    """The largest error of a back end that counts as exact."""
    return float(_exact_error(dtype))


def reload_tuned() -> None:
    """Reads the files again: what other processes have published since."""
    _reload_tuned()
