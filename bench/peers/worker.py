"""The Python side of the workers' protocol (README.md): one process per library, commands on stdin, answers on stdout."""

import sys
import time

import numpy as np


def read_tensors(path, batch, heads, seq_q, seq_kv, head_size):
    """query, key, value as (B, S, H, D) float32 arrays, contiguous as a model has them, from a file of (B, H, S, D)."""
    values = np.fromfile(path, np.float32)
    tensors = []
    start = 0
    for tokens in (seq_q, seq_kv, seq_kv):
        count = batch * heads * tokens * head_size
        tensor = values[start : start + count].reshape(batch, heads, tokens, head_size)
        tensors.append(np.ascontiguousarray(tensor.transpose(0, 2, 1, 3)))
        start += count
    return tensors


def padding_mask(keys):
    """True where attention is paid: not to the last quarter of the keys."""
    return np.arange(keys) < keys - keys // 4


class Serving:
    """`make(configuration, query, key, value, threads)` gives a function to time, whose result `to_float32` turns into
    (B, H, S, D)."""

    def __init__(self, configurations, make, to_float32):
        self.configurations, self.make, self.to_float32 = configurations, make, to_float32
        self.tensors = None
        self.calls = {}
        self.results = {}

    def load(self, path, *shape):
        self.calls.clear()
        self.results.clear()
        self.tensors = read_tensors(path, *map(int, shape))
        return "ok"

    def run(self, configuration, threads, min_seconds):
        key = configuration, threads
        if key not in self.calls:
            self.calls[key] = self.make(configuration, *self.tensors, int(threads))
            self.calls[key]()  # warm-up
        call = self.calls[key]
        count, start = 0, time.perf_counter()
        while True:
            result = call()
            count += 1
            seconds = time.perf_counter() - start
            if seconds >= float(min_seconds):
                break
        self.results[configuration] = result
        return f"{seconds / count:.6e} {count}"

    def out(self, configuration, path):
        np.ascontiguousarray(self.to_float32(self.results.pop(configuration)), np.float32).tofile(path)
        return "ok"

    def serve(self):
        answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints must not be taken for an answer
        print("ready", *self.configurations, file=answers, flush=True)
        for line in sys.stdin:
            command, *arguments = line.split() or [""]
            if command == "quit":
                return
            try:
                if command not in ("load", "run", "out"):
                    raise ValueError(f"unknown command '{command}'")
                answer = getattr(self, command)(*arguments)
            except Exception as error:  # the library's own: told, and on to the next
                answer = "err " + " ".join(f"{type(error).__name__}: {error}".split())[:300]
            print(answer, file=answers, flush=True)
