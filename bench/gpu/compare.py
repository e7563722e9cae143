"""Times GPU attention of ditattn beside PyTorch's back ends, and FlashAttention 3 (`fa3_fwd_interface`), FlashInfer
(`flashinfer`) and SageAttention 2 (`sageattention`) where they are there.

    compare.py [--shapes flux-1024,sit-d72] [--variants] [--libraries torch-cudnn,CUDNN_ATTN] [--rounds 5] [--dtype bf16]
               [--json FILE]

Per shape and library: the time of one call by CUDA events over many, by replaying a graph of many, and the host's time to
queue one; medians of interleaved rounds, TFLOP/s = 4·B·H·Sq·Skv·D / time (half when causal, of seen keys when padded). Inputs
are standard normals in (B, S, H, D) memory, as models have them, for all. The last lines of a shape are each of ours over the
best of all exact peers, and over the best of those it is measured by: its own engine elsewhere, for FLASH_ATTN FlashAttention 3
and cuDNN. SAGE_ATTN is compared with SageAttention 2, which quantizes in the call too, and with FlashAttention 3 in FP8 on
inputs that are FP8 already.

Variants, by their names in --shapes or all with --variants, are shapes (inputs.py) where
    -padded   a boolean mask (B, Skv) hides the last 512 keys;
    -joint    the last 512 tokens are text in tensors of their own: joint tokens to ours, put together in each call for peers;
    -mask     a boolean mask (1, 1, Sq, Skv) hides a tenth of the logits;
    -bias     a mask (1, 1, Sq, Skv) of the inputs' dtype is added to the logits.
FlashAttention 3 and SageAttention 2, which have no masks, and FlashInfer, whose own are not timed, are left out where there is
one. Each of ours is also timed without what is special, in the same rounds, and compared with that, "its own dense": beside
-padded that is the problem of fewer keys, and "full dense" the one that sees all.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import json
import random
import statistics
import subprocess
import time

import torch
from inputs import SHAPES, VARIANTS, inputs_of, shape_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import ditattn
from ditattn import DiffusionAttentionBackendEnum as Enum

RIVALS = {"FLASH_ATTN": ("fa3", "torch-cudnn"), "CUDNN_ATTN": ("torch-cudnn",), "FLASHINFER_ATTN": ("flashinfer",),
          "SAGE_ATTN": ("fa3-fp8",)}  # fmt: skip
QUANTIZED = ("fa3-fp8", "sage2")  # peers, too, that are not exact
MOST_MS = 60  # of one library in one round


# PyTorch's back ends are chosen by a context, which is entered before the clock starts.
CONTEXTS = {
    "torch-cudnn": lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
    "torch-flash": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    "torch-efficient": lambda: sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION),
}


def context_of(library):
    return CONTEXTS.get(library, contextlib.nullcontext)()


def call_of(function, layout, inputs):
    """A peer's call, which needs text and image in one tensor: where they are apart, it has to copy them each time."""
    if inputs.text is None:
        return functools.partial(function, *map(layout, inputs.tensors))
    pairs = list(zip(inputs.tensors, inputs.text))
    return lambda: function(*(layout(torch.cat(pair, dim=1)) for pair in pairs))


def torch_call(shape, inputs):
    mask = inputs.mask[:, None, None] if inputs.mask is not None and inputs.mask.ndim == 2 else inputs.mask
    function = functools.partial(scaled_dot_product_attention, attn_mask=mask, is_causal=shape[-1])
    return call_of(function, lambda tensor: tensor.transpose(1, 2), inputs)


def fa3_call(shape, inputs):
    from fa3_fwd_interface import flash_attn_func

    return call_of(functools.partial(flash_attn_func, causal=shape[-1]), lambda tensor: tensor, inputs)


def fa3_fp8_call(shape, inputs):
    from fa3_fwd_interface import flash_attn_func

    tensors = [tensor.to(torch.float8_e4m3fn) for tensor in inputs.tensors]
    return functools.partial(flash_attn_func, *tensors, causal=shape[-1])


def sage2_call(shape, inputs):
    from sageattention.core import sageattn_qk_int8_pv_fp8_cuda_sm90

    function = functools.partial(sageattn_qk_int8_pv_fp8_cuda_sm90, tensor_layout="NHD", is_causal=shape[-1])
    return call_of(function, lambda tensor: tensor, inputs)


def flashinfer_call(shape, inputs):
    import flashinfer

    batch, heads, rows, keys, head_size, causal = shape
    if head_size not in (64, 128, 256):
        raise ImportError("FlashInfer has no such head size")
    if batch == 1:
        function = functools.partial(flashinfer.single_prefill_with_kv_cache, causal=causal)
        return call_of(function, lambda tensor: tensor[0], inputs)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(torch.empty(1 << 28, dtype=torch.uint8, device="cuda"))
    starts = [torch.arange(batch + 1, dtype=torch.int32, device="cuda") * tokens for tokens in (rows, keys)]
    wrapper.plan(*starts, heads, heads, head_size, causal=causal, q_data_type=inputs.tensors[0].dtype)
    return call_of(wrapper.run, lambda tensor: tensor.flatten(0, 1), inputs)


def own_call(backend, causal, tensors, metadata, out):
    layer = backend.get_impl_cls()(out.shape[2], out.shape[3], None, causal)
    call = functools.partial(layer.forward, *tensors, metadata, out)
    call()  # may refuse; and metadata makes what it keeps
    return call


def libraries(shape, inputs, chosen):
    """By name: a call, and how many keys it sees."""
    peers = dict.fromkeys(CONTEXTS, torch_call)
    if inputs.mask is None:
        peers |= {"fa3": fa3_call, "flashinfer": flashinfer_call}
        if inputs.text is None:
            peers |= {"fa3-fp8": fa3_fp8_call, "sage2": sage2_call}
    calls = {}
    for library, make in peers.items():
        if not chosen or library in chosen:
            with contextlib.suppress(ImportError):
                calls[library] = make(shape, inputs), inputs.keys
    batch, heads, rows, _, head_size, causal = shape
    out = inputs.tensors[0].new_empty((batch, rows, heads, head_size))
    metadata = inputs.metadata()
    for member in Enum:
        if chosen and member.name not in chosen:
            continue
        try:
            backend = member.get_class()
            backend.validate_available()
            if "cuda" not in backend.capabilities()["devices"]:
                continue
            calls[member.name] = own_call(backend, causal, inputs.tensors, metadata, out), inputs.keys
            for dense, tensors in inputs.dense.items():
                calls[f"{member.name} {dense}"] = own_call(backend, causal, tensors, None, out), tensors[1].shape[1]
        except (ImportError, ValueError, NotImplementedError):
            continue
    return calls


def event_ms(call, count):
    """After as many calls that are not timed: clocks and power are then its own, not those of who ran before."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(count):
        call()
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / count


def host_us(call, count):
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


def measure(name, dtype, rounds, chosen):
    shape = shape_of(name)
    batch, heads, rows, _, head_size, causal = shape
    inputs = inputs_of(name, dtype)
    runs = {}
    for library, (call, keys) in libraries(shape, inputs, chosen).items():
        with context_of(library):
            try:
                call()
                torch.cuda.synchronize()
                ms = event_ms(call, 2)
            except (RuntimeError, ValueError, NotImplementedError):  # SageAttention 2 has head sizes to 128
                continue
            count = max(2, min(200, int(MOST_MS / ms)))
            work = 4 * batch * heads * rows * keys * head_size / (2 if causal else 1)
            graph = None if library == "sage2" else graph_of(call, count)  # its launches are in the default stream
            runs[library] = {"call": call, "work": work, "count": count, "graph": graph, "event": [], "replay": [],
                             "host": []}  # fmt: skip
    order = list(runs)
    for _ in range(rounds):
        random.shuffle(order)  # who follows a light kernel finds a cool GPU: not always the same
        for library in order:
            run = runs[library]
            with context_of(library):
                run["event"].append(event_ms(run["call"], run["count"]))
        for library in order:
            run = runs[library]
            if run["graph"] is not None:
                run["replay"].append(event_ms(run["graph"].replay, 1) / run["count"])
        for library in order:
            run = runs[library]
            with context_of(library):
                run["host"].append(host_us(run["call"], min(20, run["count"])))
    rows_out = []
    print(f"\n{name} {shape[:5]}{' causal' if causal else ''}")
    width = max(map(len, runs), default=0)
    for library, run in runs.items():
        event = statistics.median(run["event"])
        replay = statistics.median(run["replay"]) if run["replay"] else None
        row = {"shape": name, "library": library, "event_ms": event, "replay_ms": replay,
               "host_us": statistics.median(run["host"]), "tflops": run["work"] / event / 1e9}  # fmt: skip
        rows_out.append(row)
        shown = "     none" if replay is None else f"{replay:9.4f}"
        print(f"  {library:<{width}} {event:9.4f} ms by events, {shown} ms in a graph, {row['host_us']:6.1f} us host, "
              f"{row['tflops']:7.1f} TFLOP/s")  # fmt: skip
    print_ratios({row["library"]: row for row in rows_out}, inputs.dense)
    return rows_out


def ratio(other, ours, what):
    """How many times as fast ours is."""
    text = f"{other['event_ms'] / ours['event_ms']:.3f}x {what}"
    if other["replay_ms"] and ours["replay_ms"]:
        text += f" ({other['replay_ms'] / ours['replay_ms']:.3f}x in a graph, host {other['host_us'] / ours['host_us']:.2f}x)"
    return text


def print_ratios(times, dense):
    members = [member.name for member in Enum]
    peers = [row for library, row in times.items() if library.split()[0] not in members and library not in QUANTIZED]
    for member in members:
        if member not in times:
            continue
        ours = times[member]
        texts = []
        if peers:
            best = min(peers, key=lambda row: row["event_ms"])
            texts.append(f"{best['event_ms'] / ours['event_ms']:.3f}x {best['library']}")
        rivals = [times[rival] for rival in RIVALS.get(member, ()) if rival in times]
        if rivals:
            rival = min(rivals, key=lambda row: row["event_ms"])
            texts.append(ratio(rival, ours, rival["library"]))
        if member == "SAGE_ATTN" and "sage2" in times:
            texts.append(ratio(times["sage2"], ours, "sage2"))
        for name in dense:
            if f"{member} {name}" in times:
                texts.append(ratio(times[f"{member} {name}"], ours, f"of its own {name}"))
        if texts:
            print(f"  {member}: {'; '.join(texts)}")


def describe_machine():
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    parts = [torch.cuda.get_device_name()]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        parts.append("driver " + subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip())
    parts += [f"torch {torch.__version__}", f"cuDNN {torch.backends.cudnn.version()}"]
    for package in ("fa3_fwd", "flashinfer-python", "sageattention"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            parts.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="A,B: these, of the shapes and the variants")
    parser.add_argument("--variants", action="store_true", help="all variants too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--libraries", default="",
                        help=f"A,B: these only, of the peers ({', '.join(CONTEXTS)}, fa3, fa3-fp8, sage2, flashinfer) and ours")  # fmt: skip
    parser.add_argument("--json", help="write the figures there too")
    options = parser.parse_args()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[options.dtype]
    names = dict.fromkeys([*options.shapes.split(","), *(VARIANTS if options.variants else ())])
    for name in names:
        if name not in SHAPES and name not in VARIANTS:
            parser.error(f"unknown shape '{name}'. Shapes: {', '.join([*SHAPES, *VARIANTS])}")
    machine = describe_machine()
    print(f"{machine}; ditattn {ditattn.__version__}")
    rows = []
    for name in names:
        rows += measure(name, dtype, options.rounds, set(filter(None, options.libraries.split(","))))
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"machine": machine, "dtype": options.dtype, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
