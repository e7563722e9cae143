"""The examples of docs/python.md, docs/guard.md, docs/parallel.md and of the package's own text run as they stand."""

import re
import textwrap
from pathlib import Path

import pytest

import ditattn

DOCS = Path(__file__).resolve().parents[2] / "docs" / "python.md"
BLOCKS = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
GUARD = re.findall(r"```python\n(.*?)```", DOCS.with_name("guard.md").read_text(), re.DOTALL)
PARALLEL = re.findall(r"```python\n(.*?)```", DOCS.with_name("parallel.md").read_text(), re.DOTALL)[:1]  # PyTorch's is the next
DOOR = re.search(r"\n\n((?:    .*\n)+)", ditattn.__doc__).group(1)


@pytest.mark.parametrize("text", [*BLOCKS, *GUARD, *PARALLEL, textwrap.dedent(DOOR)])
def test_example(run_python, tmp_path, text):
    (tmp_path / "example.py").write_text(text)
    done = run_python("example.py", DITATTN_TUNE_CACHE=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_of_the_docs(run_python, tmp_path):
    (tmp_path / "my_module.py").write_text(BLOCKS[2])
    (line,) = re.findall(r"^python (-m ditattn --register .*)$", DOCS.read_text(), re.MULTILINE)
    done = run_python(*line.split())
    assert done.returncode == 0 and "Python: my_module.MyBackend" in done.stdout, done.stderr
