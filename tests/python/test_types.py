"""What type checkers see: the package itself, a user's program, and mistakes in one."""

import subprocess
import sys

import pytest
from conftest import PACKAGE

pytest.importorskip("mypy", reason="mypy is not installed")

GOOD = """
import numpy as np
from ditattn import AttentionMetadata, DiffusionAttentionBackendEnum, attention, capture, guard, select_backend
from ditattn import AttentionBackend, AttentionImpl, register_diffusion_backend
from ditattn.parallel import Mesh, ParallelAttention, ParallelGroup, run_ranks

query = np.zeros((1, 4, 2, 16), "float32")
out = attention(query, query, query, backend="FLASH_ATTN", causal=True, backend_kwargs={"num_threads": 1})
member: DiffusionAttentionBackendEnum = DiffusionAttentionBackendEnum["FLASH_ATTN"]
sizes: list[int] = member.get_class().get_supported_head_sizes()
layer = member.get_class().get_impl_cls()(num_heads=2, head_size=16, softmax_scale=None)
metadata = AttentionMetadata(attn_mask=query, joint_strategy="rear")
source: str = select_backend(head_size=16, role="self").source
names: list[str] = [each.name for each in DiffusionAttentionBackendEnum]
with capture("file", every=2, layers=["a.*", 3]) as recording:
    cases: list[str] = recording.cases
with guard(every=2, safer=member, layers=["a.*"], on_event=lambda finding: print(finding.error)) as watch:
    worst: float = watch.report().layers[0].last_error
numbers: list[int] = run_ranks(2, lambda end: ParallelGroup(end, Mesh(ring=2)).communicator.rank)
run_ranks(1, lambda end: ParallelAttention("auto", 2, 16, causal=True, group=ParallelGroup(end, Mesh())))


@register_diffusion_backend(DiffusionAttentionBackendEnum["CUSTOM"])
class Mine(AttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "MINE"

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        return AttentionImpl


own: type[Mine] = Mine
"""

MISTAKES = [
    'attention(1, 1, 1, causal="yes")',
    "attention(1, 1, 1, backend=3)",
    "attention(1, 1, 1, no_such=1)",
    "AttentionMetadata(joint_strategy=1)",
    'select_backend(role=1)',
    "number: int = DiffusionAttentionBackendEnum.define('X').name",
    'capture("file", every="two")',
    "guard(on_event=3)",
    'guard(every="two")',
    'Mesh(ulysses="2")',
    'ParallelAttention("auto", 2, 16)',
]  # fmt: skip


def mypy(*arguments):
    command = [sys.executable, "-m", "mypy", "--python-executable", sys.executable, "--ignore-missing-imports", *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=250)
    return done.returncode, done.stdout + done.stderr


def test_the_package(tmp_path):
    status, text = mypy("--cache-dir", tmp_path, PACKAGE)
    assert status == 0, text


def test_a_users_program_and_mistakes_in_one(tmp_path):
    (tmp_path / "good.py").write_text(GOOD)
    lines = GOOD.count("\n")
    (tmp_path / "bad.py").write_text(GOOD + "\n".join(MISTAKES))
    status, text = mypy("--strict", "--cache-dir", tmp_path / "cache", tmp_path / "good.py")
    assert status == 0, text
    status, text = mypy("--strict", "--cache-dir", tmp_path / "cache", tmp_path / "bad.py")
    found = {int(line.split(":")[1]) for line in text.splitlines() if ": error:" in line}
    assert found == set(range(lines + 1, lines + 1 + len(MISTAKES))), text
