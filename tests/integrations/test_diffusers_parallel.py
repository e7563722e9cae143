"""diffusers' context parallelism by ditattn's names: real models over processes, against the model on one."""

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers_programs
from diffusers_programs import TOKENS
from small_models import padding, tensors
from torch_jobs import run_job

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="PyTorch was built without Gloo")
TOLERANCE = {"ditattn_sage": 2e-3}  # tokens lie in other blocks: other roundings before the 8 bits


def run(name, size, tmp_path):
    ranks, statuses = run_job(diffusers_programs.__file__, name, size, tmp_path)
    assert statuses == [0] * size
    return ranks


def distance(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("size", [2, 4])
def test_a_model_over_processes_is_the_model_on_one(size, tmp_path):
    ranks = run("models", size, tmp_path)
    for name, backend, config in diffusers_programs.CONFIGURATIONS[size]:
        for found in ranks:
            alone, once, twice = found[str((name, backend, config))]
            error = distance(once, alone)
            assert error < TOLERANCE.get(backend, 5e-6), (name, backend, config, error)
            assert torch.equal(once, twice)
        print(f"{name}, {backend}, {config}: {error:.1e}")


def test_a_choice_may_end_after_the_model_was_spread(tmp_path):
    for alone, ours, later, is_known in run("chosen_around", 2, tmp_path):
        assert max(distance(ours, alone), distance(later, alone)) < 5e-6 and is_known


def exact(keep=None):
    query, key, value = (each.double() for each in tensors(seq_q=TOKENS, seq_kv=TOKENS))
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    logits = logits if keep is None else logits.masked_fill(~keep, -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), value), logits.logsumexp(-1)


@pytest.mark.parametrize("program", ["ulysses_calls", "ring_calls"])
def test_what_the_dispatcher_may_ask_for(program, tmp_path):
    ranks = run(program, 2, tmp_path)
    whole = {
        case: torch.cat([found[case] for found in ranks], 1)
        for case in ("own_mask", "whole_mask", "added", "causal", "autocast")
    }
    masked = exact(padding(TOKENS, 4, size=TOKENS)[:, None, None])[0]
    for case in ("own_mask", "whole_mask", "added"):
        assert distance(whole[case].double(), masked) < 2e-6, case
    assert distance(whole["causal"].double(), exact(torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril())[0]) < 2e-6
    assert whole["autocast"].dtype == torch.bfloat16 and distance(whole["autocast"].double(), exact()[0]) < 1e-2
    lse = torch.cat([found["lse"][1] for found in ranks], 2)
    assert distance(lse.double(), exact()[1]) < 2e-6
    for found in ranks:
        assert found["rows"][0] == "NotImplementedError" and "differs by row" in found["rows"][1]
        assert found["dropout"][0] == "NotImplementedError" and "no dropout" in found["dropout"][1]
        assert found["gradient"][0] == "NotImplementedError" and "cannot be taken over" in found["gradient"][1]
