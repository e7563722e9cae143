"""`ditattn compare --parallel`: ranks that are threads, and the processes of an MPI job where there is MPI."""

import json
import os
import re
import signal
import subprocess
import time
import uuid

import numpy as np
import pytest
from tensors import attention, normal, relative_error, rounded, save

MPIRUN = os.environ.get("DITATTN_TEST_MPIRUN", "").split()
needs_mpi = pytest.mark.skipif(not MPIRUN, reason="built without MPI")
EXACT = ("FLASH_ATTN", "TORCH_SDPA")
MESHES = ["ulysses=2", "ring=3", "allgather=2", "ulysses=2,ring=2", "ulysses=3, allgather=2", ""]
SEED = 11


def by_backend(entries):
    return {entry["backend"]: entry for entry in entries}


def check_parallel(case, exact=EXACT):
    """What every case shows: exact back ends within the bound, a speed that is the quotient of the two times."""
    one, all_ranks = by_backend(case["results"]), by_backend(case["parallel"])
    assert list(one) == list(all_ranks)
    for name in exact:
        entry = all_ranks[name]
        assert entry["status"] == "ok" and 0 < entry["rel_l2"] <= case["error_bound"], (name, entry)
        assert 0 < entry["min_ms"] <= entry["median_ms"]
        assert entry["speed"] == pytest.approx(one[name]["median_ms"] / entry["median_ms"])
    for name, entry in all_ranks.items():
        assert entry["speed"] is None or entry["status"] == "ok", name
    return one, all_ranks


def mpi_job(ditattn, ranks, *arguments, **environment):
    """A finished job, and that no process of it is left."""
    marker = f"job-{uuid.uuid4()}"
    extra = {"DITATTN_NUM_THREADS": "1", "DITATTN_TEST_MARKER": marker, **environment}
    command = [*MPIRUN, str(ranks), str(ditattn.program), "compare", *map(str, arguments)]
    done = subprocess.run(command, env=ditattn.environment(**extra), capture_output=True, text=True, timeout=120)
    deadline = time.monotonic() + 10  # the launcher's own children may still be on their way out
    while processes_with(marker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_with(marker) == []
    return done


def processes_with(*markers):
    """Ids of processes that have all of `markers` in their environment."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                variables = file.read().split(b"\0")
        except OSError:
            continue  # gone, or not ours
        if all(any(variable.endswith(marker.encode()) for variable in variables) for marker in markers):
            found.append(int(pid))
    return found


@pytest.mark.parametrize("mesh", MESHES)
def test_threads(ditattn, mesh):
    """Odd lengths, heads that degrees do not divide, rows and keys of different numbers."""
    document = ditattn.json("compare", "--shape", "2,5,61,77,24", "--repeats", "1", "--parallel", mesh)
    degrees = {name: int(number) for name, number in re.findall(r"(\w+)=(\d)", mesh)}
    ranks = document["parallel"]
    assert ranks == {
        "ranks": int(np.prod(list(degrees.values()), dtype=int)), "kind": "threads of one process",
        "ulysses": degrees.get("ulysses", 1), "ring": degrees.get("ring", 1), "allgather": degrees.get("allgather", 1),
    }  # fmt: skip
    (case,) = document["cases"]
    one, all_ranks = check_parallel(case)
    for name in ("SAGE_ATTN", "SAGE_ATTN_3"):  # parts are rounded on their own: near one rank's error
        assert all_ranks[name]["rel_l2"] == pytest.approx(one[name]["rel_l2"], rel=0.5)
    for name in ("CUDNN_ATTN", "CUSTOM"):
        assert all_ranks[name]["status"] == "unavailable" and all_ranks[name]["speed"] is None


@pytest.mark.parametrize("strategy", ["front", "rear"])
def test_joint_text_masks_and_shared_heads(ditattn, tmp_path, strategy):
    rng = np.random.default_rng(SEED)
    names = ("query", "key", "value", "joint_query", "joint_key", "joint_value")
    shapes = [(2, 31, 6, 16), (2, 31, 2, 16), (2, 31, 2, 16), (2, 7, 6, 16), (2, 7, 2, 16), (2, 7, 2, 16)]
    tensors = {name: rounded(x, "float16") for name, x in zip(names, normal(rng, *shapes))}
    tensors["attn_mask"] = np.arange(31)[None] < np.array([[31], [19]])
    source = save(tmp_path / "in.safetensors", tensors, {"joint_strategy": strategy})
    arguments = ["compare", "--input", source, "--repeats", "1", "--backends", ",".join(EXACT)]
    for mesh in ("ulysses=2,ring=2", "allgather=3"):
        (case,) = ditattn.json(*arguments, "--parallel", mesh)["cases"]
        check_parallel(case)


def test_causal(ditattn):
    arguments = ["--shape", "1,4,50,70,16", "--causal", "--repeats", "1", "--parallel", "ulysses=2,ring=2"]
    (case,) = ditattn.json("compare", *arguments)["cases"]
    check_parallel(case)


def test_several_cases(ditattn):
    arguments = ["--shape", "1,2,40,40,8", "--shape", "2,3,17,9,16", "--repeats", "1", "--parallel", "ring=2"]
    cases = ditattn.json("compare", *arguments)["cases"]
    assert [case["shape"] for case in cases] == [[1, 2, 40, 40, 8], [2, 3, 17, 9, 16]]
    for case in cases:
        check_parallel(case)


def test_the_error_is_of_what_the_ranks_computed(stand_ins, tmp_path):
    """A stand-in that gives zeros, on ranks too; in NumPy."""
    rng = np.random.default_rng(SEED)
    shapes = [(1, 30, 4, 8), (1, 41, 4, 8), (1, 41, 4, 8)]
    tensors = dict(zip(("query", "key", "value"), (rounded(x, "float32") for x in normal(rng, *shapes))))
    source = save(tmp_path / "in.safetensors", tensors)
    (case,) = stand_ins.json("compare", "--input", source, "--repeats", "1", "--parallel", "ulysses=3")["cases"]
    _, all_ranks = check_parallel(case, exact=["TORCH_SDPA"])
    expected, magnitude, _ = attention(*tensors.values())
    zeros = all_ranks["SAGE_ATTN_3"]
    assert zeros["rel_l2"] == pytest.approx(relative_error(0, expected, magnitude), rel=1e-9)
    assert zeros["max_abs"] == pytest.approx(np.abs(expected).max(), rel=1e-9)
    assert "exceeds the bound" in zeros["reason"]
    unwritten = all_ranks["SAGE_ATTN"]  # memory that happens to hold the right answer must not save it
    assert unwritten["status"] == "failed" and unwritten["rel_l2"] is None and unwritten["speed"] is None


def test_tables(ditattn):
    text = ditattn.ok("compare", "--shape", "1,4,40,40,8", "--repeats", "1", "--parallel", "ulysses=2,ring=2")
    lines = text.splitlines()
    (start,) = [i for i, line in enumerate(lines) if line.startswith("over 4 ranks (ulysses=2, ring=2), threads")]
    assert lines[start + 1].split()[:5] == ["backend", "status", "one", "rank", "ms"]
    assert lines[start + 2].startswith("FLASH_ATTN") and "×" in lines[start + 2]


def test_report(ditattn, tmp_path):
    page = tmp_path / "out.html"
    ditattn.ok("compare", "--shape", "1,2,16,16,8", "--repeats", "1", "--parallel", "ulysses=2", "--report", page)
    assert "over 2 ranks (ulysses=2), threads of one process" in page.read_text()


@pytest.mark.parametrize(
    "degrees, words",
    [
        ("ulysses=0", "'ulysses=0' in 'ulysses=0' is no degree. Give ulysses=N"),
        ("ulysses=2;ring=2", "is no degree"),
        ("tensor=2", "Give ulysses=N, ring=N, allgather=N"),
        ("ring=2,allgather=2", "exclude each other. Degrees that work: ulysses=4; ulysses=2, ring=2; ring=4"),
        ("ring=65", "more ranks than the 64"),
        ("ulysses=2000000000,ring=2000000000,allgather=2000000000", "more ranks than the 64"),
    ],
)
def test_bad_degrees(ditattn, degrees, words):
    assert words in ditattn.fails(2, "compare", "--shape", "1,1,8,8,8", "--parallel", degrees)


def test_other_refusals(ditattn):
    arguments = ["compare", "--shape", "1,1,8,8,8", "--parallel", "ring=2"]
    assert "--timeout" in ditattn.fails(2, *arguments, "--timeout", "0")
    # Without a GPU there is none to compute on, with one it is not used yet.
    done = ditattn(*arguments, "--device", "cuda")
    assert done.returncode in (3, 4) and "--device cpu" in done.stderr
    missing = ditattn.fails(4, "compare", "--input", "/does/not/exist", "--parallel", "ring=2")
    assert missing.count("/does/not/exist") == 1


def wrong_cases(folder):
    """Files that hold what no back end takes, and words of the error."""
    right = np.zeros((1, 8, 2, 8), np.float32)
    for name, tensors, words in (
        ("flat", {"query": right[0], "key": right, "value": right}, "must have 4 dimensions"),
        ("sizes", {"query": right, "key": np.zeros((1, 8, 2, 16), np.float32), "value": right}, "key"),
    ):
        yield save(folder / name, tensors), words


def test_wrong_cases_are_told_once(ditattn, tmp_path):
    for source, words in wrong_cases(tmp_path):
        error = ditattn.fails(4, "compare", "--input", source, "--parallel", "ulysses=2,ring=2")
        assert words in error and error.count("error: ") == 1


@needs_mpi
def test_mpi_wrong_cases_are_told_once(ditattn, tmp_path):
    for source, words in wrong_cases(tmp_path):
        done = mpi_job(ditattn, 2, "--input", source, "--parallel", "ring=2")
        assert done.returncode == 4 and words in done.stderr and done.stderr.count("ditattn: error: ") == 1


def test_what_a_back_end_cannot_do_over_ranks(stand_ins):
    """The stand-ins return no LSE: they ring not, and a named one is an error then."""
    arguments = ["--shape", "1,2,8,8,16", "--repeats", "1", "--parallel", "ring=2", "--json"]
    done = stand_ins("compare", *arguments)
    assert done.returncode == 0
    (case,) = json.loads(done.stdout)["cases"]
    entry = by_backend(case["parallel"])["TORCH_SDPA"]
    assert entry["status"] == "unsupported" and "log-sum-exp" in entry["reason"] and entry["median_ms"] is None
    named = stand_ins("compare", *arguments, "--backends", "TORCH_SDPA")
    assert named.returncode == 4 and "TORCH_SDPA on 1,2,8,8,16 over all ranks: " in named.stderr


def test_a_rank_that_fails_ends_all(stand_ins):
    """A stand-in that breaks down where it gets one head: on the second of two ranks that share three."""
    arguments = ["--shape", "1,3,8,8,128", "--backends", "FLASHINFER_ATTN", "--repeats", "1"]
    assert stand_ins("compare", *arguments).returncode == 0
    error = stand_ins.fails(1, "compare", *arguments, "--parallel", "ulysses=2", "--timeout", "60")
    assert "the engine broke down" in error


def test_without_the_mpi_transport(stand_ins):
    """The stand-ins' folder has no libditattn_mpi.so."""
    arguments = ["compare", "--shape", "1,1,8,8,8", "--parallel", "ring=2"]
    error = stand_ins.fails(3, *arguments, env={"OMPI_COMM_WORLD_SIZE": "2"})
    assert "libditattn_mpi.so" in error and "scripts/setup.sh mpi" in error
    assert stand_ins(*arguments[:3], env={"OMPI_COMM_WORLD_SIZE": "2"}).returncode == 0  # asked of no rank


def test_the_command_does_not_link_to_mpi(ditattn):
    libraries = subprocess.run(["ldd", ditattn.program], capture_output=True, text=True, check=True).stdout
    assert "libditattn_command.so" in libraries and "libmpi" not in libraries


@needs_mpi
@pytest.mark.parametrize("ranks, mesh", [(1, ""), (2, "ring=2"), (3, "ulysses=3"), (4, "ulysses=2,allgather=2")])
def test_mpi(ditattn, ranks, mesh):
    """One document, by rank 0; the same errors as threads make, to the bit."""
    arguments = ["--shape", "1,5,61,77,24", "--dtype", "bf16", "--repeats", "2", "--parallel", mesh, "--json"]
    done = mpi_job(ditattn, ranks, *arguments)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["parallel"]["ranks"] == ranks and document["parallel"]["kind"] == "MPI processes"
    (case,) = document["cases"]
    check_parallel(case)
    (threads,) = json.loads(ditattn.ok("compare", *arguments))["cases"]
    for mine, other in zip(case["parallel"], threads["parallel"]):
        assert (mine["backend"], mine["rel_l2"]) == (other["backend"], other["rel_l2"])


@needs_mpi
@pytest.mark.parametrize(
    "arguments, status, words",
    [
        (["--parallel", "ulysses=3"], 2, "A degree of 3 among 2 ranks. Degrees that work: ulysses=2; ring=2"),
        (["--parallel", "ring=2", "--backends", "NONE"], 2, "NONE"),
        (["--parallel", "ring=2", "--input", "/does/not/exist"], 4, "/does/not/exist"),
        (["--parallel", "ring=2", "--report", "/does/not/exist/page"], 4, "/does/not/exist"),
    ],
)
def test_mpi_refusals_are_told_once(ditattn, arguments, status, words):
    done = mpi_job(ditattn, 2, "--shape", "1,2,8,8,8", "--repeats", "1", *arguments)
    assert done.returncode == status, done.stderr
    assert done.stdout == "" and done.stderr.count("ditattn: error: ") == 1 and words in done.stderr


@needs_mpi
def test_mpi_a_rank_that_fails_ends_all(stand_ins, ditattn):
    arguments = ["--shape", "1,3,8,8,128", "--backends", "FLASHINFER_ATTN", "--repeats", "1", "--parallel", "ulysses=2"]
    plugins = {"DITATTN_PLUGIN_PATH": str(stand_ins.plugin_path)}
    name = "vllm_omni.diffusion.attention.backends.flashinfer_attn.FlashInferAttentionBackend"
    done = mpi_job(ditattn, 2, *arguments, "--register", f"FLASHINFER_ATTN={name}", "--timeout", 20, **plugins)
    assert done.returncode != 0 and "the engine broke down" in done.stderr


@needs_mpi
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_mpi_a_lost_rank_ends_all(ditattn, how):
    """Killed: the launcher ends the job. Stopped: the others give up after --timeout."""
    marker = f"job-{uuid.uuid4()}"
    extra = {"DITATTN_NUM_THREADS": "1", "DITATTN_TEST_MARKER": marker}
    command = [*MPIRUN, "3", str(ditattn.program), "compare", "--shape", "1,4,600,600,64", "--repeats", "100000",
               "--parallel", "ring=3", "--timeout", "15"]  # fmt: skip
    job = subprocess.Popen(
        command, env=ditattn.environment(**extra), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    victims = []
    deadline = time.monotonic() + 60
    while not victims and time.monotonic() < deadline:
        victims = processes_with(marker, "OMPI_COMM_WORLD_RANK=1")
        time.sleep(0.1)
    time.sleep(3)  # in the rounds
    (victim,) = victims
    start = time.monotonic()
    os.kill(victim, how)
    try:
        _, errors = job.communicate(timeout=120)
    finally:
        job.kill()
    assert job.returncode != 0 and time.monotonic() - start < 60
    if how == signal.SIGSTOP:
        assert "rank 1 did not come within 15 s" in errors
    deadline = time.monotonic() + 10
    while processes_with(marker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_with(marker) == []
