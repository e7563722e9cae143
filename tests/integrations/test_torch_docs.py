"""The examples of docs/pytorch.md, and PyTorch's of docs/parallel.md, run as they stand."""

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "pytorch.md").read_text()


def test_the_pages_examples(run_python, tmp_path):
    (tmp_path / "example.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)))
    done = run_python("example.py")
    assert done.returncode == 0, done.stderr
    (text,) = re.findall(r"# (query cannot be taken over: .*?) …", PAGE)
    assert done.stdout.startswith(text)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="PyTorch was built without Gloo")
def test_the_example_of_several_processes(run_python, tmp_path):
    (block,) = re.findall(r"```python\n(import torch\n.*?)```", (DOCS / "parallel.md").read_text(), re.DOTALL)
    (tmp_path / "example.py").write_text(block + 'print(out.shape, lse.shape, group.mesh)\n')
    done = run_python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "example.py")
    line = "torch.Size([1, 100, 6, 64]) torch.Size([1, 6, 100]) ring=2"
    assert done.returncode == 0 and done.stdout.splitlines() == [line] * 2, done.stderr
