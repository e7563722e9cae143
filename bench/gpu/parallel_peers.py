"""Attention over several GPUs by `ditattn.parallel`, beside PyTorch's own means, a process per GPU.

    parallel_peers.py [--gpus 2] [--rounds 7]

Peers: PyTorch's `context_parallel` (ring attention), and Ulysses written by hand as many models have it, `all_to_all_single`
around `scaled_dot_product_attention` with cuDNN. Milliseconds per call by CUDA events, medians of interleaved rounds, on rank 0;
and the result's relative distance from one GPU's. It needs torch with NCCL.
"""

import argparse
import os
import statistics
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ditattn import attention, parallel

SHAPES = {"flux-1024": (4608, 24, 128, 20), "wan1.3b-480p": (32760, 12, 128, 3), "wan14b-720p": (75600, 40, 128, 1)}


def cudnn(query, key, value):
    """(B, S, H, D), as diffusers' `_native_cudnn` computes it."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        turned = (t.transpose(1, 2) for t in (query, key, value))
        return functional.scaled_dot_product_attention(*turned).transpose(1, 2)


def exchange(tensor, forward):
    """All tokens of some heads for some tokens of all heads, or back; one batch entry."""
    ranks = dist.get_world_size()
    _, tokens, heads, size = tensor.shape
    if forward:
        sent = tensor.reshape(tokens, ranks, heads // ranks, size).transpose(0, 1).contiguous()
        came = torch.empty_like(sent)
        dist.all_to_all_single(came, sent)
        return came.reshape(1, ranks * tokens, heads // ranks, size)
    sent = tensor.reshape(ranks, tokens // ranks, heads, size).contiguous()
    came = torch.empty_like(sent)
    dist.all_to_all_single(came, sent)
    return came.transpose(0, 1).reshape(1, tokens // ranks, ranks * heads, size)


def ulysses_by_hand(query, key, value):
    return exchange(cudnn(*(exchange(t, True) for t in (query, key, value))), False)


def ring_of_torch(mesh):
    """Takes whole tensors, enters the context over this process's part of them, and returns it and the call."""
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import _cp_options

    _cp_options.enable_load_balance = False  # which is for causal attention

    def call(whole):
        turned = [t.transpose(1, 2).contiguous() for t in whole]
        entered = context_parallel(mesh, buffers=turned, buffer_seq_dims=[2, 2, 2])
        entered.__enter__()
        return entered, lambda: functional.scaled_dot_product_attention(*turned)

    return call


def milliseconds(call, calls):
    torch.cuda.synchronize()
    dist.barrier()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def measure(name, rounds, groups):
    tokens, heads, size, calls = SHAPES[name]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    whole = [torch.randn(1, tokens, heads, size, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    first = sum(parallel.balanced_lengths(tokens, ranks)[:rank])
    mine = slice(first, first + parallel.balanced_lengths(tokens, ranks)[rank])
    local = [t[:, mine].contiguous() for t in whole]
    ways = {
        "1 GPU, ditattn FLASH_ATTN": lambda: attention(*whole, backend="FLASH_ATTN")[:, mine],
        "1 GPU, PyTorch's cuDNN": lambda: cudnn(*whole)[:, mine],
    }
    for mesh, group in groups.items():
        layer = parallel.ParallelAttention("FLASH_ATTN", num_heads=heads, head_size=size, group=group)
        ways[f"ditattn {mesh}"] = lambda layer=layer: layer.forward(*local)
    ways["Ulysses by hand, cuDNN"] = lambda: ulysses_by_hand(*local)
    expected = ways["1 GPU, ditattn FLASH_ATTN"]().float()
    errors = {way: ((call().float() - expected).norm() / expected.norm()).item() for way, call in ways.items()}
    times = {way: [] for way in ways}
    for _ in range(rounds):
        for way, call in ways.items():
            milliseconds(call, 1)
            times[way].append(milliseconds(call, calls))
    try:  # it changes what scaled_dot_product_attention does, so it has rounds of its own
        way = "PyTorch's context_parallel"
        entered, call = ring_of_torch(dist.init_device_mesh("cuda", (ranks,)))(whole)
        milliseconds(call, 2)
        times[way] = [milliseconds(call, calls) for _ in range(rounds)]
        errors[way] = float("nan")
        entered.__exit__(None, None, None)
    except Exception as error:
        if rank == 0:
            print(f"  {way}: not run, {type(error).__name__}: {error}")
    if rank == 0:
        print(f"{name}: {tokens} tokens, {heads} heads of {size}, bfloat16, {ranks} GPUs")
        alone = statistics.median(times["1 GPU, ditattn FLASH_ATTN"])
        for way, values in times.items():
            ms = statistics.median(values)
            print(f"  {way:<28} {ms:9.3f} ms  {alone / ms:5.2f} times 1 GPU  error {errors[way]:.1e}", flush=True)


def main(arguments):
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    meshes = [parallel.Mesh(ulysses=arguments.gpus), parallel.Mesh(ring=arguments.gpus), parallel.Mesh(allgather=arguments.gpus)]
    groups = {}
    for mesh in meshes:
        groups[str(mesh)] = parallel.group(ulysses=mesh.ulysses, ring=mesh.ring, allgather=mesh.allgather, device="cuda")
    for name in SHAPES:
        measure(name, arguments.rounds, groups)
    groups.clear()
    dist.barrier()
    dist.destroy_process_group()


def spawn(arguments):
    """Each process with a GPU, as torchrun would."""
    import subprocess

    environment = {**os.environ, "WORLD_SIZE": str(arguments.gpus), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}
    children = [
        subprocess.Popen([sys.executable, *sys.argv], env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(arguments.gpus)
    ]
    return max(child.wait() for child in children)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    sys.exit(main(given) if "RANK" in os.environ else spawn(given))
