"""ditattn: attention for diffusion transformers. One name picks the kernel, and every name works.

    import numpy as np
    from ditattn import DiffusionAttentionBackendEnum, attention

    query, key, value = np.random.rand(3, 1, 1024, 24, 128).astype("float32")  # (batch, tokens, heads, head size)
    out = attention(query, key, value)  # the platform's default
    layer = DiffusionAttentionBackendEnum["FLASH_ATTN"].get_class().get_impl_cls()(num_heads=24, head_size=128)
    out = layer.forward(query, key, value)

Names and behaviour are those of vLLM-Omni's diffusion attention backend registry.
"""

from __future__ import annotations

from . import _native, parallel
from ._native import set_log_handler
from .backend import AttentionBackend, AttentionImpl
from .capture import capture
from .enum import DiffusionAttentionBackendEnum
from .functional import attention
from .guard import GuardedLayer, GuardFinding, GuardReport, guard
from .launches import LaunchCount, launch_counts, reset_launch_counts
from .metadata import AttentionMetadata, QueryRange
from .problem import Problem, TunedResult
from .registry import plugin_search_path, register_diffusion_backend, resolve_class_path
from .selection import (
    HEAD_SIZE_UNKNOWN,
    AttentionConfig,
    AttentionSpec,
    Explanation,
    MemberVerdict,
    Selection,
    define_platform,
    explain,
    get_attn_backend_for_role,
    platform_candidates,
    select_backend,
)
from .tuning import (
    TunedProblem,
    exact_error,
    reload_tuned,
    tune,
    tune_cache_file,
    tune_call,
    tuned,
    tuned_member,
    tuned_problems,
)

__version__ = str(_native.function("version")())

_num_threads = _native.function("num_threads")
_set_num_threads = _native.function("set_num_threads")


def num_threads() -> int:
    """Threads that CPU kernels use, the caller's included."""
    return int(_num_threads())


def set_num_threads(count: int) -> None:
    """Sets that for later calls; 0 goes back to the default."""
    _set_num_threads(count)


__all__ = [
    "HEAD_SIZE_UNKNOWN",
    "AttentionBackend",
    "AttentionConfig",
    "AttentionImpl",
    "AttentionMetadata",
    "AttentionSpec",
    "DiffusionAttentionBackendEnum",
    "Explanation",
    "GuardFinding",
    "GuardReport",
    "GuardedLayer",
    "LaunchCount",
    "MemberVerdict",
    "Problem",
    "QueryRange",
    "Selection",
    "TunedProblem",
    "TunedResult",
    "attention",
    "capture",
    "define_platform",
    "exact_error",
    "explain",
    "get_attn_backend_for_role",
    "guard",
    "launch_counts",
    "num_threads",
    "parallel",
    "platform_candidates",
    "plugin_search_path",
    "register_diffusion_backend",
    "reload_tuned",
    "reset_launch_counts",
    "resolve_class_path",
    "select_backend",
    "set_log_handler",
    "set_num_threads",
    "tune",
    "tune_cache_file",
    "tune_call",
    "tuned",
    "tuned_member",
    "tuned_problems",
]
