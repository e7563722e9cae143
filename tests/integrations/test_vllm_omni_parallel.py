"""vLLM-Omni's sequence parallelism with ditattn's classes: its own layers and groups, over Gloo on the CPU."""

import pytest

pytest.importorskip(
    "vllm_omni.diffusion.attention.layer",
    reason="vLLM-Omni is not installed: requirements-vllm-omni.txt",
    exc_type=ImportError,
)

import torch
import vllm_omni_programs
from torch_jobs import run_job
from vllm_omni_programs import CASES, TEXT, TOKENS, problem
from vllm_omni_reference import TOLERANCE, causal, expected

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="written for vLLM-Omni's platform without a device")


def run(name, size, tmp_path):
    ranks, statuses = run_job(vllm_omni_programs.__file__, name, size, tmp_path)
    assert statuses == [0] * size
    return ranks


def exact(case):
    """The whole in float64: the image's rows, the text's."""
    tensors, text = problem()
    if case in ("front", "rear"):
        out = expected(*(torch.cat(pair, 1) for pair in zip(tensors, text.values())))
        return out[:, :TOKENS], out[:, TOKENS:]
    keep = torch.arange(TOKENS) < TOKENS - 11 if case == "padded" else None
    return expected(*tensors, keep), torch.zeros(2, 0, *tensors[0].shape[2:])


@pytest.mark.parametrize("size", [2, 4])
def test_layers_over_processes(size, tmp_path):
    ranks = run("layers", size, tmp_path)
    for degrees, member in vllm_omni_programs.MESHES[size]:
        for case in CASES:
            found = [rank[str((degrees, member, case))] for rank in ranks]
            assert not isinstance(found[0][0], str), (degrees, member, case, found)
            runner = "RingRunner" if "ring_degree" in degrees else "NoneType"
            assert {each[1] for each in found} == {runner}
            text = TEXT if case in ("front", "rear") else 0
            lengths = [TOKENS // size, text] if case == "rear" else [text, TOKENS // size]
            parts = [each[0].split(lengths, 1)[:: -1 if case == "rear" else 1] for each in found]
            error = max(
                float((mine.double() - wanted).norm() / wanted.norm()) if wanted.numel() else 0.0
                for mine, wanted in zip((torch.cat([part[1] for part in parts], 1), parts[0][0]), exact(case))
            )
            assert all(torch.equal(part[0], parts[0][0]) for part in parts) or "ring_degree" not in degrees
            assert error < TOLERANCE[member or "FLASH_ATTN"], (degrees, member, case, error)
            print(f"{degrees}, {member}, {case}: {error:.1e}")


def test_other_rings(tmp_path):
    ranks = run("others", 2, tmp_path)
    tensors, text = problem()
    with_text = [torch.cat(pair, 1) for pair in zip(tensors[1:], list(text.values())[1:])]
    wanted = {"causal": expected(*tensors, causal(TOKENS, TOKENS)), "only_keys": expected(tensors[0], *with_text)}
    for case, exact_out in wanted.items():
        out = torch.cat([found[case] for found in ranks], 1).double()
        assert (out - exact_out).norm() < 1e-5 * exact_out.norm(), case
    for found in ranks:
        assert found["mask"][0] == "ValueError" and found["mask"][1].startswith("Ring attention does not support attn_mask")
        assert found["restored"]
