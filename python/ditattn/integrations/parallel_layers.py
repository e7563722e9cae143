"""Layers over the processes of a process group, for libraries that know no layer of ours: each made once."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ditattn.parallel import ParallelAttention, ParallelGroup, group

_KEPT = 64  # layers of a group: a model has a few kinds

_Layers = tuple[ParallelGroup, OrderedDict[Any, ParallelAttention]]
# Process group → {(ulysses, ring, device): layers}; they go with their process group.
_groups: WeakKeyDictionary[Any, dict[tuple[int, int, str], _Layers]] = WeakKeyDictionary()


def layer_for(
    query: torch.Tensor,
    key: torch.Tensor,
    backend: str | type,
    scale: float | None,
    causal: bool,
    options: Mapping[str, Any],
    process_group: Any,
    ulysses: int = 1,
    ring: int = 1,
) -> ParallelAttention:
    """The layer for such tensors. Called by all processes of the group, which join when they first come here."""
    known = _groups.setdefault(process_group, {})
    place = (ulysses, ring, str(query.device))
    if place not in known:
        known[place] = group(process_group, ulysses=ulysses, ring=ring, device=query.device), OrderedDict()
    over, layers = known[place]
    kind = (backend, query.shape[2], query.shape[3], scale, causal, key.shape[2], json.dumps(options, default=repr))
    layer = layers.get(kind)
    if layer is None:
        layer = layers[kind] = ParallelAttention(*kind[:6], backend_kwargs=options, group=over)
        if len(layers) > _KEPT:
            layers.popitem(last=False)
    return layer
