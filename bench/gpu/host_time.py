"""The host's time to queue one call of attention from Python, beside PyTorch's own; host_time.cpp has C++'s.

    host_time.py [--rounds 31]

Of (1, 128, 8, 64) in bfloat16: microseconds, medians of interleaved rounds of 200 calls, and each over
scaled_dot_product_attention in the median of what the rounds gave. `relu`, an operator of one small kernel and its memory,
and `empty_like`, the memory alone, tell what of it is PyTorch's.
"""

import argparse
import functools
import random
import statistics

import torch
import tvm_ffi
from compare import host_us
from torch.nn.functional import scaled_dot_product_attention

import ditattn
from ditattn import DiffusionAttentionBackendEnum as Enum

SDPA = "scaled_dot_product_attention"
CALLS = 200


def calls_of(query, key, value):
    heads, head_size = query.shape[2:]
    out = torch.empty_like(query)
    in_ffi = [tvm_ffi.from_dlpack(tensor) for tensor in (query, key, value, out)]
    impl = Enum.FLASH_ATTN.get_class().get_impl_cls()(heads, head_size)
    operator = torch.ops.ditattn.attention
    transposed = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    return {
        "a layer, out given, tensors of tvm_ffi": functools.partial(impl.forward, *in_ffi[:3], None, in_ffi[3]),
        "torch.ops.ditattn.attention": lambda: operator(query, key, value),
        "torch.ops.ditattn.attention.default": functools.partial(operator.default, query, key, value),
        "ditattn.attention": lambda: ditattn.attention(query, key, value),
        "ditattn.attention, out given": lambda: ditattn.attention(query, key, value, out=out),
        SDPA: lambda: scaled_dot_product_attention(*transposed),
        "torch.relu": lambda: torch.relu(query),
        "torch.relu_": lambda: torch.relu_(out),
        "torch.empty_like": lambda: torch.empty_like(query),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    rounds = parser.parse_args().rounds
    tensors = [torch.randn(1, 128, 8, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, ditattn {ditattn.__version__}")
    with torch.inference_mode():
        calls = calls_of(*tensors)
        times = {name: [] for name in calls}
        for call in calls.values():
            host_us(call, CALLS)
        order = list(calls)
        for _ in range(rounds):
            random.shuffle(order)
            for name in order:
                times[name].append(host_us(calls[name], CALLS))
    for name, samples in times.items():
        over = statistics.median(ours / theirs for ours, theirs in zip(samples, times[SDPA]))
        low, high = min(samples), max(samples)
        print(f"  {name:<40} {statistics.median(samples):6.2f} us ({low:.2f} to {high:.2f}), {over:.3f} of SDPA")


if __name__ == "__main__":
    main()
