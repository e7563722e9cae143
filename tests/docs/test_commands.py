"""Every command of the README and docs/*.md is run, here or by a test that is named, or has a reason why not."""

import os
import shutil

import page
import pytest

PAGES = ["README.md", *sorted(str(path.relative_to(page.ROOT)) for path in page.ROOT.glob("docs/*.md"))]
FOLLOWED = {"docs/adding_a_backend.md", "docs/numerics.md"}  # test_followed.py

# What is not run here: (page, the command's beginning) -> who runs it, or why nobody does.
ELSEWHERE = {
    ("README.md", "make demo"): "minutes; the main job",
    ("README.md", "make test"): "this",
    ("README.md", "ditattn compare --input"): "half a minute of timing: scripts/demo.sh; columns: tests/cli/test_compare.py",
    ("README.md", "ditattn -v run"): "tests/cli/test_selection.py",
    ("README.md", "DITATTN_PLUGIN_PATH=/opt"): "a broken file in /opt: tests/cli/test_doctor.py",
    ("docs/capture.md", "ditattn compare"): "a model's capture: tests/cli/test_layers.py",
    ("docs/fuzzing.md", "make fuzz"): "minutes; CI runs 15 seconds of each",
    ("docs/fuzzing.md", "DITATTN_CPU_LEVEL=avx2 make fuzz"): "minutes",
    ("docs/fuzzing.md", "build/asan/bin/fuzz_tensors"): "what to do with a finding, of which there is none",
    ("docs/fuzzing.md", "build/cuda/bin/conformance"): "needs a GPU",
    ("docs/parallel.md", "DITATTN_NUM_THREADS=1 mpirun"): "MPI, where there is any: tests/cli/test_compare_parallel.py",
    ("docs/python.md", "pip install"): "tests/wheel",
    ("docs/python.md", "ditattn list"): "of the wheel: tests/wheel",
    ("docs/python.md", "export PYTHONPATH"): "of the source tree: tests/python",
    ("docs/python.md", ".venv/bin/python"): "of the source tree: tests/python",
    ("docs/python.md", "python -m ditattn --register"): "tests/python/test_docs.py",
    ("docs/report.md", "ditattn compare"): "tests/cli/test_report.py",
    ("docs/robustness.md", "cmake --build"): "of the source tree, whose build this is part of",
    ("docs/robustness.md", "build/release/bin/faults_load"): "ten minutes; four seconds of it: tests/faults",
    ("docs/tuning.md", "ditattn"): "tests/cli/test_tune.py",
}


def commands(name):
    """(command, shown output or None) of a page."""
    found = []
    for language, body, _ in page.blocks((page.ROOT / name).read_text()):
        if language in ("sh", "bash"):
            found += [(command, None) for command in page.commands(body)]
        elif language == "console" or body.startswith("$ "):
            found += page.shown(body)
    return found


def is_elsewhere(name, command):
    return [key for key in ELSEWHERE if key[0] == name and command.startswith(key[1])]


HERE = [(name, *found) for name in PAGES if name not in FOLLOWED
        for found in commands(name) if not is_elsewhere(name, found[0])]  # fmt: skip


@pytest.mark.parametrize(("name", "command", "output"), HERE, ids=[f"{name}: {command}" for name, command, _ in HERE])
def test_command(follow, tmp_path, name, command, output):
    if os.environ["DITATTN_TEST_CUDA"] != "OFF":
        pytest.skip("what is shown is of a build without GPUs")
    shutil.copy(page.ROOT / "examples/digits/capture.safetensors", tmp_path / "qkv.safetensors")
    assert follow(f"```console\n$ {command}\n{output}```\n" if output is not None else f"```sh\n{command}\n```\n") == 1


def test_what_is_listed_is_on_its_page():
    assert HERE
    named = {key for name in PAGES for command, _ in commands(name) for key in is_elsewhere(name, command)}
    assert named == set(ELSEWHERE)


def test_named_tests_exist():
    for reason in ELSEWHERE.values():
        for word in reason.replace(";", " ").split():
            assert not word.startswith(("tests/", "scripts/")) or (page.ROOT / word).exists(), word
