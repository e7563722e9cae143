"""Times whole transformer blocks of diffusers under each of ditattn's names, beside diffusers' own PyTorch attention.

    diffusers_blocks.py [--blocks flux,wan] [--names ditattn,ditattn_sage,native] [--rounds 7] [--compile]
                        [--device cuda] [--small] [--json FILE]

`flux` is a double block of FLUX at 1024 x 1024 (4,096 image and 512 text tokens, 24 heads of 128), `wan` a block of Wan 14B at
480p with 81 frames (32,760 tokens, 40 heads of 128, cross attention to 512 text tokens). Weights and inputs are random, bfloat16.
Per name: the time of one block by CUDA events over many, medians of interleaved rounds; how many times as fast as `native` and
`_native_cudnn` it is; and its result's relative distance from that of `native`. A name that cannot run here is listed with its
error. --compile times blocks under torch.compile. --small, with --device cpu, only shows that the program runs.

It needs torch and diffusers 0.42.1 (requirements-integrations.txt). Without a network these wheels are enough, beside torch and
what torch needs: diffusers, huggingface-hub, httpx, httpcore, h11, anyio, certifi, idna, pyyaml, tqdm, packaging, filelock,
typing-extensions, numpy, safetensors, regex, requests, urllib3, charset-normalizer and pillow; apache-tvm-ffi for ditattn.
"""

import argparse
import json
import random
import statistics
import time

import torch
from diffusers import __version__ as diffusers_version
from diffusers.models.transformers.transformer_flux import FluxPosEmbed, FluxTransformerBlock
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock

import ditattn
from ditattn.integrations.diffusers import NAMES, install, use

PEERS = ("native", "_native_cudnn")
MOST_MS = 300  # of one name in one round


def flux(small):
    """A block, and the arguments of a call."""
    heads, side, text = (2, 8, 16) if small else (24, 64, 512)
    width = heads * 128
    places = torch.zeros(text + side * side, 3)
    places[text:, 1] = torch.arange(side * side) // side
    places[text:, 2] = torch.arange(side * side) % side
    block = FluxTransformerBlock(dim=width, num_attention_heads=heads, attention_head_dim=128)
    return block, {"hidden_states": torch.randn(1, side * side, width), "encoder_hidden_states": torch.randn(1, text, width),
                   "temb": torch.randn(1, width),
                   "image_rotary_emb": FluxPosEmbed(theta=10000, axes_dim=[16, 56, 56])(places)}  # fmt: skip


def wan(small):
    """A block, and the arguments of a call."""
    heads, frames, rows, columns, text = (2, 2, 8, 8, 16) if small else (40, 21, 60, 104, 512)
    width = heads * 128
    tokens = frames * rows * columns // 4  # patches of 1 x 2 x 2
    block = WanTransformerBlock(dim=width, ffn_dim=width * 27 // 10, num_heads=heads, cross_attn_norm=True)
    rotary = WanRotaryPosEmbed(attention_head_dim=128, patch_size=(1, 2, 2), max_seq_len=1024)
    return block, {"hidden_states": torch.randn(1, tokens, width), "encoder_hidden_states": torch.randn(1, text, width),
                   "temb": torch.randn(1, 6, width),
                   "rotary_emb": rotary(torch.empty(1, 16, frames, rows, columns))}  # fmt: skip


BLOCKS = {"flux": flux, "wan": wan}


def built(name, small, device):
    torch.manual_seed(1)
    with torch.device(device):
        block, inputs = BLOCKS[name](small)
    rotary = [key for key in inputs if "rotary" in key]  # stays float32, as in the models
    return block.eval().to(torch.bfloat16), {
        key: value if key in rotary else value.to(torch.bfloat16) for key, value in inputs.items()
    }


def milliseconds(call, count, device):
    """Of one call, over `count`."""
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) * 1e3 / count
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / count


def result_of(call):
    out = call()
    return torch.cat([part.flatten() for part in out]).double() if isinstance(out, tuple) else out.flatten().double()


def measure(name, names, options):
    """One row per name that runs here."""
    block, inputs = built(name, options.small, options.device)
    run = torch.compile(block, fullgraph=True) if options.compile else block

    def call():
        return run(**inputs)

    rows = {}
    for backend in dict.fromkeys(("native", *names)):
        with use(block, backend):
            try:
                out = result_of(call)
                ms = milliseconds(call, 2, options.device)
            except (ImportError, RuntimeError, ValueError) as error:  # NotImplementedError is a RuntimeError
                print(f"  {backend}: {type(error).__name__}: {str(error).splitlines()[0]}")
                continue
        exact = out if backend == "native" else exact
        rows[backend] = {"block": name, "name": backend, "count": max(2, min(200, int(MOST_MS / ms))), "rounds_ms": [],
                         "distance": float((out - exact).norm() / exact.norm())}  # fmt: skip
    order = list(rows)
    for _ in range(options.rounds):
        random.shuffle(order)  # who follows a light kernel finds a cool GPU: not always the same
        for backend in order:
            with use(block, backend):
                call()
                rows[backend]["rounds_ms"].append(milliseconds(call, rows[backend]["count"], options.device))
    for row in rows.values():
        row["ms"] = statistics.median(row["rounds_ms"])
    for row in rows.values():
        row["speedup"] = {peer: rows[peer]["ms"] / row["ms"] for peer in PEERS if peer in rows}
    return list(rows.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", default=",".join(BLOCKS))
    parser.add_argument("--names", default=",".join((*NAMES, *PEERS)))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    machine = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    machine += f", torch {torch.__version__}, diffusers {diffusers_version}, ditattn {ditattn.__version__}"
    print(machine + (", compiled" if options.compile else ""))
    install()
    torch._dynamo.config.recompile_limit = 64  # one graph per name
    rows = []
    with torch.inference_mode():
        for name in options.blocks.split(","):
            print(f"\n{name}")
            for row in measure(name, options.names.split(","), options):
                rows.append(row)
                ratios = ", ".join(f"{ratio:.3f}x {peer}" for peer, ratio in row["speedup"].items())
                print(f"  {row['name']:<19} {row['ms']:9.4f} ms  {ratios}  distance {row['distance']:.1e}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"machine": machine, "compiled": options.compile, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
