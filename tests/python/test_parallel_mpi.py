"""ditattn.parallel with the processes of an MPI job as ranks."""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from conftest import PACKAGE

pytestmark = pytest.mark.skipif(
    not PACKAGE.joinpath("_ditattn_mpi.so").exists() or not shutil.which("mpirun"),
    reason="built without MPI, or there is no mpirun",
)
PROGRAM = """
import sys, time
import numpy as np
from ditattn import attention, parallel
how = sys.argv[1]
rng = np.random.default_rng(3)
query, key, value = rng.standard_normal((3, 1, 40, 4, 32), dtype="float32")
with parallel.mpi_session(timeout=20) as world:
    mesh = parallel.Mesh(ulysses=2, ring=world.size // 2)
    group = parallel.ParallelGroup(world, mesh)
    layer = parallel.ParallelAttention("FLASH_ATTN", 4, 32, group=group)
    lengths = parallel.balanced_lengths(40, world.size)
    begin = sum(lengths[: world.rank])
    mine = slice(begin, begin + lengths[world.rank])
    out = layer.forward(query[:, mine], key[:, mine], value[:, mine])
    wanted = attention(query, key, value, backend="FLASH_ATTN")[:, mine]
    print(f"rank {world.rank} of {world.size}: {abs(out - wanted).max():.1e}", flush=True)
    assert abs(out - wanted).max() < 1e-6
    if how == "raises" and world.rank == 1:
        raise KeyError("thrown out")
    world.barrier()
"""


def run_mpi(tmp_path, how, size):
    (tmp_path / "program.py").write_text(PROGRAM)
    job = ["mpirun", "--oversubscribe", "--allow-run-as-root", "-n", str(size), sys.executable, "program.py", how]
    environment = {**os.environ, "DITATTN_NUM_THREADS": "1"}
    return subprocess.run(job, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("size", [2, 4])
def test_mpis_processes(tmp_path, size):
    done = run_mpi(tmp_path, "well", size)
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"rank (\d) of (\d)", done.stdout)) == [(str(rank), str(size)) for rank in range(size)]


def test_an_error_in_a_session_ends_the_job_and_is_printed(tmp_path):
    start = time.monotonic()
    done = run_mpi(tmp_path, "raises", 2)
    assert done.returncode != 0 and "KeyError: 'thrown out'" in done.stderr and time.monotonic() - start < 60
