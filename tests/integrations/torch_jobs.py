"""Runs programs as ranks, in processes of their own: `python FILE PROGRAM RANK SIZE FOLDER`.

A program is a function of rank, number of ranks and folder, and returns what the test compares; `serve` is what its
file calls. Ranks find each other at the port in the folder's file `port`.
"""

import os
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import torch
import torch.distributed as dist

MARKER = "DITATTN_TEST_JOB"


def serve(programs):
    """Computes this process's part, with Gloo, and writes its result."""
    import ditattn

    name, rank, size, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    ditattn.set_num_threads(1)
    store = f"tcp://localhost:{(folder / 'port').read_text()}"
    dist.init_process_group("cpu:gloo", init_method=store, rank=rank, world_size=size)
    torch.save(programs[name](rank, size, folder), folder / f"result{rank}")
    (folder / f"done{rank}").touch()
    deadline = time.monotonic() + 30  # rank 0 has the store, which others may still ask
    while rank == 0 and time.monotonic() < deadline and len(list(folder.glob("done*"))) < size and not is_lost(folder):
        time.sleep(0.01)


def is_lost(folder):
    """Whether a rank said that it will not come to its end."""
    return (folder / "lost").exists()


def processes_with(marker):
    """Ids of processes that have `marker` in their environment."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if marker.encode() in Path("/proc", pid, "environ").read_bytes():
                found.append(int(pid))
        except OSError:
            continue  # gone, or not ours
    return found


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def run_job(program, name, size, folder, timeout=200):
    """What the ranks return, by rank (None for those that wrote nothing), and their statuses. No process is left."""
    marker = f"job-{uuid.uuid4()}"
    (folder / "port").write_text(str(free_port()))
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("DITATTN_", "DIFFUS"))}
    environment = {**clean, MARKER: marker, "DITATTN_TUNE": "off", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                   "PYTHONWARNINGS": "ignore"}  # fmt: skip
    logs = [folder / f"log{rank}" for rank in range(size)]
    ranks = [
        subprocess.Popen([sys.executable, program, name, str(rank), str(size), str(folder)], env=environment,
                         stdout=log.open("w"), stderr=subprocess.STDOUT)
        for rank, log in enumerate(logs)
    ]  # fmt: skip
    deadline = time.monotonic() + timeout
    try:
        statuses = [rank.wait(max(0.1, deadline - time.monotonic())) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        print(*(f"rank {rank}: {log.read_text()}" for rank, log in enumerate(logs) if log.stat().st_size), sep="\n")
    assert processes_with(marker) == []
    files = [folder / f"result{rank}" for rank in range(size)]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files], statuses
