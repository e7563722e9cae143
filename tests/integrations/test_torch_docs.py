"""The examples of docs/pytorch.md run as they stand, one after the other."""

import re
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "pytorch.md").read_text()


def test_the_pages_examples(run_python, tmp_path):
    (tmp_path / "example.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)))
    done = run_python("example.py")
    assert done.returncode == 0, done.stderr
    (text,) = re.findall(r"# (query cannot be taken over: .*?) …", PAGE)
    assert done.stdout.startswith(text)
