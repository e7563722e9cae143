"""Times GPU attention of ditattn beside PyTorch's back ends, and FlashAttention 3 (`fa3_fwd_interface`) and FlashInfer
(`flashinfer`) where they are there.

    compare.py [--shapes flux-1024,sit-d72] [--libraries torch-cudnn,CUDNN_ATTN] [--rounds 5] [--dtype bf16] [--json FILE]

Per shape and library: the time of one call by CUDA events over many, by replaying a graph of many, and the host's time to
queue one; medians of interleaved rounds, TFLOP/s = 4·B·H·Sq·Skv·D / time (half when causal). Inputs are standard normals in
(B, S, H, D) memory, as models have them, for all. The last lines of a shape are each of ours over the best of all peers, and
over the best of those it is measured by: its own engine elsewhere, for FLASH_ATTN FlashAttention 3 and cuDNN.
"""

import argparse
import contextlib
import json
import random
import statistics
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import ditattn
from ditattn import DiffusionAttentionBackendEnum as Enum

# name: (B, H, Sq, Skv, D, causal)
SHAPES = {
    "flux-1024": (1, 24, 4608, 4608, 128, False),
    "sd3-1024": (2, 24, 4250, 4250, 64, False),
    "qwen-image": (2, 24, 4352, 4352, 128, False),
    "wan1.3b-480p": (1, 12, 32760, 32760, 128, False),
    "wan14b-cross": (1, 40, 32760, 512, 128, False),
    "hunyuan-16k": (1, 24, 16384, 16384, 128, False),
    "ltx-d64": (1, 32, 12288, 12288, 64, False),
    "cogvideox-d64": (2, 48, 17776, 17776, 64, False),
    "d96-8k": (1, 16, 8192, 8192, 96, False),
    "d256-8k": (1, 16, 8192, 8192, 256, False),
    "sit-d72": (8, 16, 256, 256, 72, False),
    "dit-xl-d72-cfg": (2, 16, 1024, 1024, 72, False),
    "tiny-launch": (1, 8, 128, 128, 64, False),
    "causal-16k": (1, 24, 16384, 16384, 128, True),
}
RIVALS = {"FLASH_ATTN": ("fa3", "torch-cudnn"), "CUDNN_ATTN": ("torch-cudnn",), "FLASHINFER_ATTN": ("flashinfer",)}
MOST_MS = 60  # of one library in one round


# PyTorch's back ends are chosen by a context, which is entered before the clock starts.
CONTEXTS = {
    "torch-cudnn": lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
    "torch-flash": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
}


def context_of(library):
    return CONTEXTS.get(library, contextlib.nullcontext)()


def flashinfer_call(query, key, value, causal):
    import flashinfer

    batch, rows, heads, head_size = query.shape
    keys, kv_heads = key.shape[1], key.shape[2]
    if head_size not in (64, 128, 256):
        raise ImportError("FlashInfer has no such head size")
    if batch == 1:
        return lambda: flashinfer.single_prefill_with_kv_cache(query[0], key[0], value[0], causal=causal)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(torch.empty(1 << 28, dtype=torch.uint8, device="cuda"))
    starts = [torch.arange(batch + 1, dtype=torch.int32, device="cuda") * tokens for tokens in (rows, keys)]
    wrapper.plan(*starts, heads, kv_heads, head_size, causal=causal, q_data_type=query.dtype)
    flat = [tensor.flatten(0, 1) for tensor in (query, key, value)]
    return lambda: wrapper.run(*flat)


def libraries(query, key, value, causal, chosen):
    transposed = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    calls = dict.fromkeys(CONTEXTS, lambda: scaled_dot_product_attention(*transposed, is_causal=causal))
    try:
        from fa3_fwd_interface import flash_attn_func

        calls["fa3"] = lambda: flash_attn_func(query, key, value, causal=causal)
    except ImportError:
        pass
    with contextlib.suppress(ImportError):
        calls["flashinfer"] = flashinfer_call(query, key, value, causal)
    out = torch.empty_like(query)
    for member in Enum:
        try:
            backend = member.get_class()
            backend.validate_available()
            if "cuda" not in backend.capabilities()["devices"]:
                continue
            layer = backend.get_impl_cls()(query.shape[2], query.shape[3], None, causal)
            layer.forward(query, key, value, None, out)
        except (ImportError, ValueError, NotImplementedError):
            continue
        calls[member.name] = lambda layer=layer: layer.forward(query, key, value, None, out)
    return {library: call for library, call in calls.items() if not chosen or library in chosen}


def event_ms(call, count):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / count


def host_us(call, count=20):
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / count * 1e6


def graph_of(call, count):
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                call()
        return graph
    except RuntimeError:
        return None


def measure(name, shape, dtype, rounds, chosen):
    batch, heads, rows, keys, head_size, causal = shape
    generator = torch.Generator("cuda").manual_seed(1)
    query, key, value = (
        torch.randn((batch, tokens, heads, head_size), generator=generator, device="cuda").to(dtype)
        for tokens in (rows, keys, keys)
    )
    calls = libraries(query, key, value, causal, chosen)
    runs = {}
    for library, call in list(calls.items()):
        with context_of(library):
            try:
                call()
                torch.cuda.synchronize()
                ms = event_ms(call, 2)
            except (RuntimeError, NotImplementedError):
                del calls[library]
                continue
            count = max(2, min(200, int(MOST_MS / ms)))
            runs[library] = {"count": count, "graph": graph_of(call, count), "event": [], "replay": [], "host": []}
    order = list(calls)
    shuffled = random.Random(1)
    for _ in range(rounds):
        shuffled.shuffle(order)  # who follows a light kernel finds a cool GPU: not always the same
        for library in order:
            with context_of(library):
                runs[library]["event"].append(event_ms(calls[library], runs[library]["count"]))
        for library in order:
            run = runs[library]
            if run["graph"] is not None:
                run["replay"].append(event_ms(run["graph"].replay, 1) / run["count"])
        for library in order:
            with context_of(library):
                runs[library]["host"].append(host_us(calls[library]))
    work = 4 * batch * heads * rows * keys * head_size / (2 if causal else 1)
    rows_out = []
    print(f"\n{name} {shape[:5]}{' causal' if causal else ''}")
    for library, run in runs.items():
        event = statistics.median(run["event"])
        replay = statistics.median(run["replay"]) if run["replay"] else None
        row = {"shape": name, "library": library, "event_ms": event, "replay_ms": replay,
               "host_us": statistics.median(run["host"]), "tflops": work / event / 1e9}  # fmt: skip
        rows_out.append(row)
        shown = "     none" if replay is None else f"{replay:9.4f}"
        print(f"  {library:<12} {event:9.4f} ms by events, {shown} ms in a graph, {row['host_us']:6.1f} us host, "
              f"{row['tflops']:7.1f} TFLOP/s")  # fmt: skip
    times = {row["library"]: row for row in rows_out}
    peers = [row for row in rows_out if row["library"] not in Enum.__members__]
    for member in Enum:
        if member.name not in times or not peers:
            continue
        ours = times[member.name]
        best = min(peers, key=lambda row: row["event_ms"])
        text = f"  {member.name}: {best['event_ms'] / ours['event_ms']:.3f}x {best['library']}"
        rivals = [times[rival] for rival in RIVALS.get(member.name, ()) if rival in times]
        if rivals:
            rival = min(rivals, key=lambda row: row["event_ms"])
            text += f"; {rival['event_ms'] / ours['event_ms']:.3f}x {rival['library']}"
            if rival["replay_ms"] and ours["replay_ms"]:
                text += f" ({rival['replay_ms'] / ours['replay_ms']:.3f}x in a graph, host {rival['host_us'] / ours['host_us']:.2f}x)"
        print(text)
    return rows_out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--libraries", default="", help="A,B: these only, of the peers (torch-cudnn, torch-flash, fa3, flashinfer) and ours")
    parser.add_argument("--json", help="write the figures there too")
    options = parser.parse_args()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[options.dtype]
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
    print(f"{machine}; ditattn {ditattn.__version__}")
    rows = []
    for name in options.shapes.split(","):
        if name not in SHAPES:
            parser.error(f"unknown shape '{name}'. Shapes: {', '.join(SHAPES)}")
        rows += measure(name, SHAPES[name], dtype, options.rounds, set(filter(None, options.libraries.split(","))))
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"machine": machine, "dtype": options.dtype, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
