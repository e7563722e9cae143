"""Times CPU attention of several libraries side by side: one worker process each, rounds interleaved.

    compare.py --worker ditattn=build/release/bin/ditattn_peer_worker [--worker torch=bench/peers/torch_worker.py …]

Per shape and dtype: the median time of each, GFLOP/s (4·B·H·Sq·Skv·D / time), the error against float64, and ours over the
best of the others. README.md says more.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SHAPES = {  # B, H, Sq, Skv, D
    "flux": (1, 24, 4608, 4608, 128),
    "sd3": (2, 24, 1024, 1024, 64),
    "wan": (1, 12, 4096, 4096, 128),
    "sit": (8, 16, 256, 256, 72),
    "cross": (1, 40, 2048, 512, 128),
    "long": (1, 8, 16384, 16384, 64),
    "dit-xl": (2, 16, 1024, 1024, 72),
}
DTYPES = ("fp32", "bf16", "fp16")
SAMPLED_ROWS = 32
LOWER_PRECISION = 8  # times our error: a library that does not compute in the dtype it was asked for


class Worker:
    """One library's process."""

    def __init__(self, text):
        self.name, _, command = text.partition("=")
        self.command = [sys.executable, command] if command.endswith(".py") else [command]
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        word, *configurations = self.answer().split()
        if word != "ready":
            raise SystemExit(f"{self.name}: the worker did not start: {' '.join(self.command)}")
        self.configurations = configurations

    def answer(self):
        return self.process.stdout.readline().strip() or "err the worker ended"

    def ask(self, *words):
        try:
            print(*words, file=self.process.stdin, flush=True)
        except OSError:
            pass  # told by the missing answer
        return self.answer()

    def of_dtype(self, dtype):
        return [c for c in self.configurations if c.split("-")[-1] == dtype]


def make_file(shape, path):
    batch, heads, seq_q, seq_kv, size = shape
    rng = np.random.default_rng(0)
    with open(path, "wb") as file:
        for tokens in (seq_q, seq_kv, seq_kv):
            rng.standard_normal((batch, heads, tokens, size), dtype=np.float32).tofile(file)


def round_to(x, dtype):
    if dtype == "fp16":
        return x.astype(np.float16).astype(np.float64)
    if dtype == "bf16":
        bits = x.view(np.uint32)
        bits = bits + 0x7FFF + ((bits >> 16) & 1) & np.uint32(0xFFFF0000)
        return bits.view(np.float32).astype(np.float64)
    return x.astype(np.float64)


def reference(path, shape, dtype):
    """Rows of the first and the last head in float64, from inputs rounded to dtype: (heads, rows, values, magnitude)."""
    batch, heads, seq_q, seq_kv, size = shape
    sizes = [batch * heads * tokens * size for tokens in (seq_q, seq_kv, seq_kv)]
    values = np.memmap(path, np.float32, mode="r")
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    q, k, v = (values[offsets[i] : offsets[i + 1]].reshape(batch * heads, -1, size) for i in range(3))
    rows = np.unique(np.linspace(0, seq_q - 1, SAMPLED_ROWS).astype(int))
    which = sorted({0, batch * heads - 1})
    out, magnitude = [], []
    for head in which:
        logits = round_to(np.array(q[head, rows]), dtype) @ round_to(np.array(k[head]), dtype).T / np.sqrt(size)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        value = round_to(np.array(v[head]), dtype)
        out.append(weights @ value)
        magnitude.append(weights @ abs(value))
    return which, rows, np.stack(out), np.stack(magnitude)


def error_of(path, shape, expected):
    batch, heads, seq_q, _, size = shape
    which, rows, out, magnitude = expected
    got = np.fromfile(path, np.float32).reshape(batch * heads, seq_q, size)[which][:, rows]
    return float(np.linalg.norm(got - out) / np.linalg.norm(magnitude))


def cpu_name():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def measure(workers, shape_name, dtype, options, folder):
    shape = SHAPES[shape_name]
    source, result = folder / "in.bin", folder / "out.bin"
    make_file(shape, source)
    expected = reference(source, shape, dtype)
    entries = [(worker, configuration) for worker in workers for configuration in worker.of_dtype(dtype)
               if not configuration.startswith(tuple(options.skip.split(",")))]  # fmt: skip
    for worker in workers:
        worker.ask("load", source, *shape)
    times = {entry: [] for entry in entries}
    problems = {}
    for _ in range(options.rounds):
        for entry in entries:
            worker, configuration = entry
            answer = worker.ask("run", configuration, options.threads, options.min_seconds)
            if answer.startswith("err"):
                problems[entry] = answer
            else:
                times[entry].append(float(answer.split()[0]))
    flops = 4.0 * np.prod([float(x) for x in shape])
    rows = []
    for entry in entries:
        worker, configuration = entry
        row = {"library": worker.name, "configuration": configuration, "shape": shape_name, "dtype": dtype}
        if entry in problems or not times[entry]:
            rows.append(row | {"error": problems.get(entry, "no time")})
            continue
        worker.ask("out", configuration, result)
        median = statistics.median(times[entry])
        rows.append(row | {
            "ms": median * 1e3,
            "spread": [min(times[entry]) / median, max(times[entry]) / median],
            "gflops": flops / median / 1e9,
            "rel_l2": error_of(result, shape, expected),
        })  # fmt: skip
    return rows


def print_rows(rows, ours):
    print(f"\n{rows[0]['shape']} {SHAPES[rows[0]['shape']]} {rows[0]['dtype']}")
    for row in rows:
        label = f"  {row['library']:<12} {row['configuration']:<18}"
        if "error" in row:
            print(f"{label} {row['error']}")
        else:
            low, high = row["spread"]
            print(f"{label} {row['ms']:9.2f} ms {row['gflops']:7.1f} GFLOP/s  {low:.2f}..{high:.2f}  error {row['rel_l2']:.1e}")
    mine = [r for r in rows if r["library"] == ours and r["configuration"].startswith("FLASH") and "ms" in r]
    others = [r for r in rows if r["library"] != ours and "ms" in r]
    for row in [r for r in others if mine and r["rel_l2"] > LOWER_PRECISION * mine[0]["rel_l2"]]:
        print(f"  {row['library']} computes {row['dtype']} in a lower precision: not compared")
        others.remove(row)
    if mine and others:
        best = min(others, key=lambda r: r["ms"])
        print(f"  FLASH_ATTN over the best of the others ({best['library']}): {best['ms'] / mine[0]['ms']:.2f}x", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", action="append", required=True, metavar="NAME=PROGRAM", help="repeatable; the first is ours")
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--skip", default="TORCH_SDPA", help="configurations that begin so (default: our slow engine)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--min-seconds", type=float, default=0.3, help="of calls per configuration and round")
    parser.add_argument("--ceilings", help="program that prints the machine's rates as JSON (ditattn_ceilings)")
    parser.add_argument("--json", help="write all figures here")
    options = parser.parse_args()
    workers = [Worker(text) for text in options.worker]
    document = {"cpu": cpu_name(), "threads": options.threads, "date": time.strftime("%Y-%m-%d"), "rows": []}
    if options.ceilings:
        document["ceilings"] = json.loads(subprocess.check_output([options.ceilings, str(options.threads)]))
        print("ceilings:", ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in document["ceilings"].items()))
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for shape in options.shapes.split(","):
            for dtype in options.dtypes.split(","):
                rows = measure(workers, shape, dtype, options, Path(folder))
                print_rows(rows, workers[0].name)
                document["rows"] += rows
    if options.json:
        Path(options.json).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
