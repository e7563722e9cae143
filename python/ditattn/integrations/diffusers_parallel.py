"""diffusers' context parallelism, computed by ditattn.parallel over the processes of the mesh that diffusers made."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from ditattn.integrations.parallel_layers import layer_for
from ditattn.metadata import AttentionMetadata


@torch.compiler.disable
def parallel_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    return_lse: bool,
    parallel_config: Any,
    backend: str,
    options: str,
) -> Any:
    """Attention of all processes' tokens for this one's queries; called by all processes of the mesh.

    Query, key and value are this process's tokens, as `enable_parallelism` cuts them. A mask of this process's keys is
    gathered, one of all keys is taken as it is. NotImplementedError for masks that differ by row.
    """
    context = parallel_config.context_parallel_config
    process_group = context._flattened_mesh.get_group()
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (each.to(torch.get_autocast_dtype(query.device.type)) for each in (query, key, value))
    if is_causal and query.shape[1] != key.shape[1]:
        raise NotImplementedError(
            f"is_causal over several processes wants as many keys ({key.shape[1]}) as queries ({query.shape[1]})."
        )
    metadata = None
    if attn_mask is not None:
        metadata = AttentionMetadata(attn_mask=_of_all_keys(attn_mask, key.shape[0], key.shape[1], process_group))
    # diffusers' ring gathers all keys and values at once; going round needs less memory, and the result is the same.
    degrees = {"ulysses": context.ulysses_degree, "ring": context.ring_degree}
    given = json.loads(options or "{}")
    layer = layer_for(query, key, backend, scale, is_causal, given, process_group, **degrees)
    return layer.forward(query, key, value, metadata, return_lse=return_lse)


def _of_all_keys(mask: torch.Tensor, batch: int, keys: int, process_group: Any) -> torch.Tensor:
    """A mask over all processes' keys; `keys` are this one's. Two dimensions are (batch, keys)."""
    if mask.ndim > 1 and mask.shape[-2] != 1 and (mask.ndim > 2 or mask.shape[0] != batch):
        raise NotImplementedError(
            f"A mask of shape {tuple(mask.shape)} differs by row: over several processes masks over keys are taken."
        )
    size = dist.get_world_size(process_group)
    mine = torch.tensor([mask.shape[-1], keys], device=mask.device)
    lengths = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(lengths, mine, group=process_group)
    table = [row.tolist() for row in lengths]
    if any(row[0] != row[1] for row in table):
        return mask
    longest = max(row[1] for row in table)
    padded = torch.nn.functional.pad(mask, (0, longest - keys)).contiguous()
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded, group=process_group)
    return torch.cat([part[..., : row[1]] for part, row in zip(parts, table)], -1)
