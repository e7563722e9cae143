"""ditattn.parallel over PyTorch process groups: Gloo between processes of this machine."""

import math
import signal
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import torch_programs
from torch_jobs import run_job
from torch_programs import CASES, HEADS, KV_HEADS, SIZE, problem, uneven

import ditattn
from ditattn import parallel

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="PyTorch was built without Gloo")
TOLERANCE = 2e-6  # float32, relative by norms


def run(name, size, tmp_path):
    return run_job(torch_programs.__file__, name, size, tmp_path)


def exact(case):
    """(out, LSE) of the whole problem in float64, text behind the image."""
    (query, key, value), joint, mask = problem()
    keep = mask[:, None, None] if case == "masked" else torch.ones(1, 1, 1, 1, dtype=torch.bool)
    if case == "causal":
        keep = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).tril()
    if case == "text":
        query, key, value = (torch.cat((image, text), 1) for image, text in zip((query, key, value), joint.values()))
    key, value = (tensor.double().repeat_interleave(HEADS // KV_HEADS, 2) for tensor in (key, value))
    logits = torch.einsum("bqhd,bkhd->bhqk", query.double(), key) / math.sqrt(SIZE)
    logits = logits.masked_fill(~keep, -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), value), logits.logsumexp(-1)


def whole(parts, dim, rows, text):
    """The ranks' parts along `dim` as one, of which the last `text` must be the same bits everywhere."""
    images = [part.narrow(dim, 0, length) for part, length in zip(parts, rows)]
    texts = [part.narrow(dim, length, text) for part, length in zip(parts, rows)]
    assert all(torch.equal(each, texts[0]) for each in texts)
    return torch.cat([*images, texts[0]], dim)


def distance(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_results_are_one_ranks_and_the_same_bits_each_time(size, tmp_path):
    ranks, statuses = run("results", size, tmp_path)
    assert statuses == [0] * size
    worst = 0.0
    for key in ranks[0]:
        case = key.rpartition(", ")[2]
        parts = [found[key] for found in ranks]
        text = torch_programs.TEXT if case == "text" else 0
        wanted = exact(case)
        errors = [
            distance(whole([part[i] for part in parts], dim, uneven(size), text), wanted[i])
            for i, dim in ((0, 1), (1, 2))
        ]
        worst = max(worst, *errors)
        assert max(errors) < TOLERANCE, (key, errors)
        assert all(part[2] for part in parts), f"{key}: other bits the second time"
    meshes = sum(size % degree == 0 for degree in range(1, size + 1))
    assert len(ranks[0]) == 2 * meshes * len(CASES)
    print(f"{size} ranks: relative error of {len(ranks[0])} results at most {worst:.1e}")


def test_what_is_refused_is_so_on_all_ranks_and_leaves_the_group_as_it_is(tmp_path):
    ranks, statuses = run("refusals", 3, tmp_path)
    assert statuses == [0] * 3
    for rank, (found, _) in enumerate(ranks):
        kind, text, _ = found["degrees"]
        assert kind == "ValueError" and "A degree of 4 among 3 ranks" in text, (kind, text)
        assert found["degrees"][1].count("ulysses=3; ring=3") == 1
        assert found["meshes"][:2] == ("ValueError", "Ranks differ in their mesh: rank 0 has ring=3, rank 1 has ulysses=3.")
        for case, own in (("gradient", "NotImplementedError"), ("type", "TypeError")):
            kind, text, _ = found[case]
            assert kind == (own if rank == 1 else "RuntimeError"), (case, rank, kind, text)
            assert rank == 1 or text.startswith(f"Rank 1 refused the call: {own}: query "), text
        kind, text, _ = found["differing"]
        assert kind == "ValueError" and text.startswith("Ranks 0 and 1 differ in attn_mask"), text
        assert found["device"][:2] == ("ValueError", "device is mps. Valid values are: cpu, cuda, cuda:N.")
        assert found["timeout"][0] == "ValueError" and "more than 0 s" in found["timeout"][1]
    out = torch.cat([out for _, out in ranks], 1)
    assert distance(out, exact("plain")[0]) < TOLERANCE


def test_some_processes_by_a_group_of_their_own(tmp_path):
    ranks, statuses = run("subgroup", 4, tmp_path)
    assert statuses == [0] * 4
    assert ranks[0][:2] == ("ValueError", "This process, rank 0 of all, is not in the process group.")
    assert distance(torch.cat([ranks[1], ranks[3]], 1), exact("plain")[0]) < TOLERANCE


@pytest.mark.parametrize("program, victim", [("killed", 1), ("killed_host", 0)])
def test_a_killed_rank_is_an_error_of_the_others_at_once(program, victim, tmp_path):
    ranks, statuses = run(program, 3, tmp_path)
    assert statuses == [-signal.SIGKILL if rank == victim else 0 for rank in range(3)]
    for rank in {0, 1, 2} - {victim}:
        (kind, text, seconds), (again, later, at_once) = ranks[rank]
        assert kind == again == "RuntimeError" and f"rank {victim} is lost" in text, text
        assert seconds < 20 and at_once < 15  # long before the timeout, on a busy machine too
        assert f"rank {victim} is lost" in later or victim == 0, later  # nobody has the reason without a store
        print(f"rank {rank}: {kind} after {seconds:.2f} s: {text}")


def test_a_late_rank_is_a_timeout_that_names_it(tmp_path):
    ranks, statuses = run("late", 3, tmp_path)
    assert statuses == [0] * 3
    kinds = {ranks[rank][0][0] for rank in (0, 2)}
    assert "TimeoutError" in kinds <= {"TimeoutError", "RuntimeError"}
    for rank in (0, 2):
        kind, text, seconds = ranks[rank][0]
        assert "rank 1 did not come within 2 s: it is lost or late (rank " in text and 1.5 < seconds < 30, (text, seconds)


def test_a_rank_that_gives_up_tells_the_others_why(tmp_path):
    ranks, statuses = run("aborted", 3, tmp_path)
    assert statuses == [0] * 3
    for rank in (0, 2):
        for kind, text, seconds in ranks[rank]:
            assert (kind, text) == ("RuntimeError", "parallel: rank 1 failed: it was thrown out.") and seconds < 5


def test_a_rank_that_never_comes_is_a_timeout(tmp_path):
    ranks, _ = run("absent", 3, tmp_path)
    for rank in (0, 2):
        kind, text, seconds = ranks[rank]
        assert kind == "TimeoutError" and text.startswith("parallel: not all 3 ranks came within 2 s"), text
        assert 1 < seconds < 10


def test_groups_that_are_gone_leave_nothing_behind(tmp_path):
    ranks, _ = run("released", 2, tmp_path)
    for before, after in ranks:
        assert before == after


def test_nccls_id_is_rank_0s_everywhere(tmp_path):
    ranks, _ = run("id_of_nccl", 2, tmp_path)
    assert ranks == [((bytes(range(128)), rank, 2, rank, 60), f"cuda:{rank}") for rank in (0, 1)]


def test_before_init_process_group():
    with pytest.raises(RuntimeError, match="Call torch.distributed.init_process_group first"):
        parallel.group(ulysses=2)


def test_without_the_part_for_nccl_it_is_an_import_error_with_what_to_do(tmp_path):
    if Path(ditattn.__file__).with_name("_ditattn_nccl.so").exists():
        pytest.skip("this build has it")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ImportError, match=r"_ditattn_nccl.so is missing: .* build ditattn with nvcc"):
            parallel.group(device="cuda:0")
    finally:
        torch.distributed.destroy_process_group()
