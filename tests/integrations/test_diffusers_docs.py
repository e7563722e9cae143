"""The examples of docs/diffusers.md run as they stand, one after the other, and the benchmark beside it runs."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "diffusers.md").read_text()


def test_the_examples_of_the_page(run_python, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "example.py").write_text("\n".join(blocks))
    done = run_python("example.py")
    assert done.returncode == 0 and len(blocks) == 5, done.stderr


def test_the_page_lists_the_names():
    from ditattn.integrations.diffusers import NAMES

    listed = dict(re.findall(r"^\| `(ditattn\w*)` \| (?:the selector's choice|`(\w+)`)", PAGE, re.MULTILINE))
    assert listed == {name: "" if member == "auto" else member for name, member in NAMES.items()}


def test_the_benchmark_of_blocks_runs_on_the_cpu(run_python, tmp_path):
    done = run_python(ROOT / "bench" / "gpu" / "diffusers_blocks.py", "--device", "cpu", "--small", "--rounds", "1",
                      "--names", "ditattn_flash,ditattn_cudnn", "--json", "rows.json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    flash = [row for row in rows if row["name"] == "ditattn_flash"]
    assert [row["block"] for row in flash] == ["flux", "wan"]
    assert all(0 < row["distance"] < 1e-2 and row["speedup"]["native"] > 0 for row in flash)
    assert len(re.findall(r"ditattn_cudnn: (ImportError|ValueError): ", done.stdout)) == 2
