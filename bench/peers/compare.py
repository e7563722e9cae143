"""Times CPU attention of several libraries side by side: one worker process each, rounds interleaved.

    compare.py --worker ditattn=build/release/bin/ditattn_peer_worker [--worker torch=bench/peers/torch_worker.py …]

Per shape, variant and dtype: the median time of each, GFLOP/s (4·B·H·Sq·Skv·D / time, of what rows see), the error against
float64, ours over the best of the others, our quantized back ends over our own float32, and a variant over dense. README.md
says more.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from run_rows import EXACT, OURS, RunRows
from worker import padding_mask

VARIANTS = ("dense", "causal", "padded")


def read_shapes():
    """Name -> (B, H, Sq, Skv, D) and its variants."""
    text = (Path(__file__).parents[1] / "shapes.def").read_text()
    found = re.findall(r'^DITATTN_BENCH_SHAPE\("([\w-]+)", ([\d, ]+), (true|false)\)$', text, re.MULTILINE)
    variants = {"true": VARIANTS, "false": VARIANTS[:1]}
    return {name: (tuple(map(int, sizes.split(","))), variants[has]) for name, sizes, has in found}


SHAPES = read_shapes()
DTYPES = ("fp32", "bf16", "fp16")
SAMPLED_ROWS = 32


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

    def entries(self, case):
        return [Entry(self, configuration, *case) for configuration in self.configurations
                if (variant_of(configuration), configuration.split("-")[-1]) == case]  # fmt: skip


def variant_of(configuration):
    return next((v for v in configuration.split("-") if v in VARIANTS), "dense")


class Entry(NamedTuple):
    """One thing to time."""

    worker: Worker
    configuration: str
    variant: str
    dtype: str


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


def sees(variant, rows, keys):
    """Which keys each of the rows sees: all, those up to its own, or not the padding."""
    if variant == "causal":
        return np.arange(keys) <= rows[:, None]
    return padding_mask(keys) if variant == "padded" else np.ones(keys, bool)


def work_of(variant, keys):
    """As a part of dense's. Causal shapes are square."""
    return {"dense": 1.0, "causal": (keys + 1) / (2 * keys), "padded": padding_mask(keys).mean()}[variant]


def reference(path, shape, variant, dtype):
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
        logits = np.where(sees(variant, rows, seq_kv), logits, -np.inf)
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


def measure(workers, shape_name, options, folder):
    """All variants and dtypes of a shape in the same rounds: each is compared with others of its own, and across them."""
    shape, variants = SHAPES[shape_name]
    source, result = folder / "in.bin", folder / "out.bin"
    make_file(shape, source)
    cases = [(v, d) for d in options.dtypes.split(",") for v in variants if v in options.variants.split(",")]
    entries = [entry for case in cases for worker in workers for entry in worker.entries(case)]
    for worker in workers:
        worker.ask("load", source, *shape)
    times = {entry: [] for entry in entries}
    problems = {}
    for _ in range(options.rounds):
        for entry in entries:
            answer = entry.worker.ask("run", entry.configuration, options.threads, options.min_seconds)
            if answer.startswith("err"):
                problems[entry] = answer
            else:
                times[entry].append(float(answer.split()[0]))
    expected = {case: reference(source, shape, *case) for case in cases}
    dense_flops = 4.0 * np.prod([float(x) for x in shape])
    rows = []
    for entry in entries:
        worker, configuration, variant, dtype = entry
        row = {"library": worker.name, "configuration": configuration}
        row |= {"shape": shape_name, "variant": variant, "dtype": dtype}
        if entry in problems or not times[entry]:
            rows.append(row | {"error": problems.get(entry, "no time")})
            continue
        worker.ask("out", configuration, result)
        median = statistics.median(times[entry])
        rows.append(row | {
            "ms": median * 1e3,
            "spread": [min(times[entry]) / median, max(times[entry]) / median],
            "gflops": dense_flops * work_of(variant, shape[3]) / median / 1e9,
            "rel_l2": error_of(result, shape, expected[variant, dtype]),
        })  # fmt: skip
    return rows


def print_row(row):
    label = f"  {row['library']:<12} {row['configuration']:<22}"
    if "error" in row:
        print(f"{label} {row['error']}")
    else:
        low, high = row["spread"]
        print(f"{label} {row['ms']:9.2f} ms {row['gflops']:7.1f} GFLOP/s  {low:.2f}..{high:.2f}  error {row['rel_l2']:.1e}")


def print_case(rows, run, case):
    shape, variant, dtype = case
    sizes, _ = SHAPES[shape]
    print(f"\n{shape} {sizes} {variant} {dtype}")
    for row in rows:
        print_row(row)
    for row in run.peers(case)[1]:
        print(f"  {row['library']} computes {dtype} in a lower precision: not compared")
    if ratio := run.over_best_peer(case):
        print(f"  {EXACT} over the best of the others ({run.best_peer(case)['library']}): {ratio:.2f}x")
    for name in run.members:
        if name != EXACT and (ratio := run.over_own_float32(case, name)):
            print(f"  {name} over our own float32 {EXACT}: {ratio:.2f}x, error {run.ours(case, name)['rel_l2']:.1e}")
        if variant != "dense" and (ratio := run.time_over_dense(case, name)):
            print(f"  {name} over its dense time: {ratio:.3f}, of the work: {work_of(variant, sizes[3]):.3f}")


def print_rows(rows):
    run = RunRows(rows)
    cases = {}
    for row in rows:
        cases.setdefault((row["shape"], row["variant"], row["dtype"]), []).append(row)
    for case, of_case in cases.items():
        print_case(of_case, run, case)
    sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", action="append", required=True, metavar="NAME=PROGRAM", help=f"repeatable; ours is called {OURS}")
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--variants", default=",".join(VARIANTS), help="where a shape has them")
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
            rows = measure(workers, shape, options, Path(folder))
            print_rows(rows)
            document["rows"] += rows
    if options.json:
        Path(options.json).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
