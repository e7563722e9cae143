"""What ranks do in the tests of ditattn.parallel over PyTorch processes (torch_jobs.py)."""

import os
import signal
import time
import types

import torch
import torch.distributed as dist
from torch_jobs import serve

from ditattn import AttentionMetadata, parallel, torch_ranks

TOKENS, HEADS, KV_HEADS, SIZE, TEXT = 53, 6, 2, 32, 5


def problem(dtype=torch.float32):
    """Query, key, value, joint text, none of them contiguous, and a padding mask."""
    made = torch.Generator().manual_seed(4)
    tensors = {
        name: torch.randn(2, heads, tokens, SIZE, generator=made).to(dtype).transpose(1, 2)
        for name, tokens, heads in (
            ("query", TOKENS, HEADS), ("key", TOKENS, KV_HEADS), ("value", TOKENS, KV_HEADS),
            ("joint_query", TEXT, HEADS), ("joint_key", TEXT, KV_HEADS), ("joint_value", TEXT, KV_HEADS),
        )
    }  # fmt: skip
    mask = torch.arange(TOKENS) < torch.tensor([[TOKENS], [TOKENS - 9]])
    joint = {name: tensors[name] for name in tensors if name.startswith("joint")}
    return [tensors[name] for name in ("query", "key", "value")], joint, mask


CASES = {
    "plain": lambda joint, mask: None,
    "masked": lambda joint, mask: AttentionMetadata(attn_mask=mask),
    "text": lambda joint, mask: AttentionMetadata(**joint, joint_strategy="rear"),
    "causal": lambda joint, mask: None,
}


def uneven(size):
    """Token counts of ranks, one of them none where there are more than two."""
    lengths = parallel.balanced_lengths(TOKENS, size)
    if size > 2:
        lengths[-1], lengths[0] = 0, lengths[0] + lengths[-1]
    return lengths


def part(tensor, lengths, rank):
    return tensor.split(lengths, 1)[rank]


def results(rank, size, folder):
    """{mesh and case: (out, LSE, the same once more)}, by this rank."""
    found = {}
    for ulysses in (degree for degree in range(1, size + 1) if size % degree == 0):
        for second in ("ring", "allgather"):
            group = parallel.group(ulysses=ulysses, **{second: size // ulysses}, timeout=60)
            assert (group.communicator.rank, group.communicator.size) == (rank, size)
            for case, metadata_of in CASES.items():
                tensors, joint, mask = problem()
                layer = parallel.ParallelAttention(
                    "flash_attn", HEADS, SIZE, num_kv_heads=KV_HEADS, causal=case == "causal", group=group
                )
                mine = [part(tensor, uneven(size), rank) for tensor in tensors]
                metadata = metadata_of(joint, mask)
                once, twice = (layer.forward(*mine, metadata, return_lse=True) for _ in range(2))
                assert type(once[0]) is type(once[1]) is torch.Tensor
                found[f"{group.mesh}, {second}, {case}"] = (*once, all(map(torch.equal, once, twice)))
    return found


def error_of(call):
    """The kind and text of what `call` raises, and the seconds it took."""
    start = time.monotonic()
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return None


def refusals(rank, size, folder):
    """Errors that leave the group as it is, and, at the end, what it still computes."""
    tensors, _, _ = problem()
    mine = [part(tensor, uneven(size), rank) for tensor in tensors]
    group = parallel.group(ulysses=size, timeout=60)
    layer = parallel.ParallelAttention("flash_attn", HEADS, SIZE, num_kv_heads=KV_HEADS, group=group)
    with_gradient = [mine[0].clone().requires_grad_(rank == 1), *mine[1:]]
    other_mask = AttentionMetadata(attn_mask=torch.ones(2, TOKENS, dtype=torch.bool) if rank else None)
    found = {
        "degrees": error_of(lambda: parallel.group(ulysses=size + 1)),
        "meshes": error_of(lambda: parallel.group(ulysses=size if rank else 1, ring=1 if rank else size)),
        "gradient": error_of(lambda: layer.forward(*with_gradient)),
        "differing": error_of(lambda: layer.forward(*mine, other_mask)),
        "type": error_of(lambda: layer.forward("query" if rank == 1 else mine[0], *mine[1:])),
        "device": error_of(lambda: parallel.group(ulysses=size, device="mps")),
        "timeout": error_of(lambda: parallel.group(ulysses=size, timeout=0)),
    }
    return found, layer.forward(*mine)


def subgroup(rank, size, folder):
    """Only the odd ranks, by a process group of their own; beside it, messages of the program's own."""
    odd = dist.new_group(list(range(1, size, 2)))
    if rank % 2 == 0:
        return error_of(lambda: parallel.group(odd))
    tensors, _, _ = problem()
    group = parallel.group(odd, ring=size // 2, timeout=60)
    layer = parallel.ParallelAttention("torch_sdpa", HEADS, SIZE, num_kv_heads=KV_HEADS, group=group)
    peer, theirs = (rank + 2) % size, torch.zeros(3)
    works = [dist.isend(torch.full((3,), float(rank)), peer), dist.irecv(theirs, peer)] if size == 4 else []
    out = layer.forward(*(part(tensor, parallel.balanced_lengths(TOKENS, size // 2), rank // 2) for tensor in tensors))
    for work in works:
        work.wait()
    assert theirs[0] == peer or size != 4
    return out


def lost(how, rank, size, timeout, folder, victim=1):
    """What the others see of the victim, in the middle."""
    tensors, _, _ = problem()
    mine = [part(tensor, parallel.balanced_lengths(TOKENS, size), rank) for tensor in tensors]
    group = parallel.group(ring=size, timeout=timeout)
    layer = parallel.ParallelAttention("flash_attn", HEADS, SIZE, num_kv_heads=KV_HEADS, group=group)
    layer.forward(*mine)
    if rank == victim and how == "killed":
        (folder / "lost").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == victim and how == "late":
        time.sleep(3 * timeout)
        return None
    if rank == victim:
        group.communicator.abort("it was thrown out")
        return None
    return error_of(lambda: [layer.forward(*mine) for _ in range(3)]), error_of(lambda: layer.forward(*mine))


def killed(rank, size, folder):
    return lost("killed", rank, size, 20, folder)


def killed_host(rank, size, folder):
    """The rank that has the store."""
    return lost("killed", rank, size, 20, folder, victim=0)


def late(rank, size, folder):
    return lost("late", rank, size, 2, folder)


def aborted(rank, size, folder):
    return lost("aborted", rank, size, 20, folder)


def absent(rank, size, folder):
    """Rank 1 never asks for the group."""
    if rank == 1:
        time.sleep(5)
        return None
    return error_of(lambda: parallel.group(ring=size, timeout=2))


def released(rank, size, folder):
    """Groups that are gone leave no connection and no thread behind."""
    def count():
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    parallel.group(ring=size, timeout=60)
    before = count()
    for _ in range(5):
        parallel.group(ulysses=size, timeout=60)
    dist.barrier()
    return before, count()


def id_of_nccl(rank, size, folder):
    """What NCCL's part, for which something else stands, would be called with."""
    parts = {"nccl_id": lambda: bytes(range(128)), "nccl_communicator": lambda *arguments: arguments}
    torch_ranks._native = types.SimpleNamespace(function_of=lambda part, name: parts[name])
    found = torch_ranks.communicator(None, torch.device("cuda", rank), 60)
    dist.barrier()
    return found


if __name__ == "__main__":
    serve(globals())
