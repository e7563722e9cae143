"""vLLM-Omni's ring, computed by ditattn.parallel for layers that have one of ditattn's classes.

vLLM-Omni's own ring knows kernels of its own and none of a back end's; what a layer computes it by is its attribute
`ring_runner`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata

import ditattn
from ditattn.integrations.parallel_layers import layer_for

_before: list[Any] = []  # vLLM-Omni's own constructor of layers, and ours, where it is in its place


class RingRunner:
    """Stands in the place of vLLM-Omni's `RingParallelAttention` in a layer."""

    def __init__(self, impl: Any, ring_group: Any) -> None:
        self._impl = impl
        self._ring_group = ring_group

    @torch.compiler.disable
    def run_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: AttentionMetadata | None,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> torch.Tensor:
        """The ring's attention for this process's queries; `query` has the joint text's in it, key and value do not."""
        impl, size = self._impl, torch.distributed.get_world_size(self._ring_group)
        scale = impl.softmax_scale if softmax_scale is None else softmax_scale
        layer = layer_for(
            query, key, impl.own_class(), scale, causal, impl.backend_kwargs, self._ring_group, ring=size
        )
        if attn_metadata is None:
            return layer.forward(query, key, value)
        query, metadata = _whole(query, attn_metadata)
        return layer.forward(query, key, value, metadata)


def _whole(query: torch.Tensor, given: AttentionMetadata) -> tuple[torch.Tensor, ditattn.AttentionMetadata]:
    """The image's queries, and metadata with the text as ditattn takes it: this process's heads of it.

    Text may have keys only; no more than this of the metadata reaches vLLM-Omni's ring.
    """
    length = given.extra.get("valid_kv_length")
    extra = {} if length is None else {"valid_kv_length": length}
    if given.joint_key is None:
        return query, ditattn.AttentionMetadata(extra=extra)
    rows = 0 if given.joint_query is None else given.joint_query.shape[1]
    places = [rows, query.shape[1] - rows]
    if given.joint_strategy == "rear":
        image, text = query.split(places[::-1], 1)
    else:
        text, image = query.split(places, 1)
    joint = {"joint_query": text, "joint_key": given.joint_key, "joint_value": given.joint_value}
    return image, ditattn.AttentionMetadata(**joint, joint_strategy=given.joint_strategy, extra=extra)


def install(impl_cls: type) -> None:
    """From now on layers of that class are made with a `RingRunner`, where they are made for a ring."""
    from vllm_omni.diffusion.attention.layer import Attention

    if _before:
        return
    own_init = Attention.__init__

    @functools.wraps(own_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        own_init(self, *args, **kwargs)
        if _before and self.use_ring and isinstance(self.attention, impl_cls):
            self.ring_runner = RingRunner(self.attention, self.ring_pg)

    _before.append((own_init, init))
    Attention.__init__ = init


def uninstall() -> None:
    """vLLM-Omni's own again."""
    from vllm_omni.diffusion.attention.layer import Attention

    if _before:
        own_init, ours = _before.pop()
        if Attention.__init__ is ours:  # else somebody has wrapped it since: ours does nothing any more
            Attention.__init__ = own_init
