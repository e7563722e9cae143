"""Disks that are full and folders that cannot be written: a clear error, old files whole, nothing left behind."""

import os
import resource
import signal
import subprocess

import pytest


def full_disk():
    """In the child: files may grow to 100 bytes, which fails as on a full disk, with EFBIG for ENOSPC."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


WRITERS = {
    "run": lambda qkv, target: ["run", "--backend", "FLASH_ATTN", "--input", qkv, "--output", target],
    "report": lambda qkv, target: ["compare", "--shape", "1,1,8,8,16", "--repeats", "1", "--report", target],
}


@pytest.mark.parametrize("writer", WRITERS)
def test_full_disk(command, environment, qkv, tmp_path, writer):
    folder = tmp_path / "out"
    folder.mkdir()
    target = folder / "old"
    target.write_text("as it was")
    done = subprocess.run([command, *map(str, WRITERS[writer](qkv, target))], env=environment, preexec_fn=full_disk,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 4 and str(target) in done.stderr and "File too large" in done.stderr, done.stderr
    assert os.listdir(folder) == ["old"] and target.read_text() == "as it was"


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_in_place_of_the_folder(command, environment, qkv, tmp_path, writer):
    (tmp_path / "file").write_text("as it was")
    target = tmp_path / "file" / "out"
    done = subprocess.run([command, *map(str, WRITERS[writer](qkv, target))], env=environment, capture_output=True,
                          text=True, timeout=120)  # fmt: skip
    assert done.returncode == 4 and str(target) in done.stderr and "Not a directory" in done.stderr, done.stderr
    assert (tmp_path / "file").read_text() == "as it was"


def tune(command, environment, **options):
    return subprocess.run([command, "tune", "--shape", "1,1,16,16,16", "--budget", "5"], env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120, **options)  # fmt: skip


def test_tuned_choices_on_a_full_disk(command, environment, tmp_path):
    assert tune(command, environment).returncode == 0
    folder = tmp_path / "tuned"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = tune(command, environment, preexec_fn=full_disk)
    assert done.returncode == 4 and str(folder) in done.stderr and "File too large" in done.stderr, done.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_online_tuning_on_a_full_disk_goes_on(run_python, tmp_path):
    folder = tmp_path / "tuned"
    done = run_python(
        "import os, resource, signal, numpy as np, ditattn\nos.environ['DITATTN_TUNE'] = 'online'\n"
        "q = np.ones((1, 8, 1, 16), 'float32')\nditattn.attention(q, q, q, backend='flash_attn')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "for _ in range(2): print((ditattn.attention(q, q, q) == 1).all())\n"
    )
    assert done.stdout == "True\nTrue\n", done.stderr
    assert done.stderr.count("Measuring at the first call failed: Cannot write tuned choices") == 1, done.stderr
    assert str(folder) in done.stderr and "File too large" in done.stderr
    assert [name for name in os.listdir(folder) if not name.endswith(".lock")] == []


def test_tuned_choices_where_there_can_be_no_folder(command, environment, tmp_path):
    (tmp_path / "tuned").write_text("a file")
    done = tune(command, environment)
    assert done.returncode == 4 and str(tmp_path / "tuned") in done.stderr, done.stderr


def test_capture_on_a_full_disk(run_python, tmp_path):
    target = tmp_path / "out" / "capture.safetensors"
    target.parent.mkdir()
    target.write_text("as it was")
    done = run_python(
        "import resource, signal, numpy as np, ditattn\nq = np.ones((1, 8, 1, 16), 'float32')\n"
        "ditattn.attention(q, q, q)\nresource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try:\n  with ditattn.capture('out/capture.safetensors'): ditattn.attention(q, q, q)\n"
        "except OSError as error: print(error)\nprint((ditattn.attention(q, q, q) == 1).all())\n"
    )
    assert "capture.safetensors" in done.stdout and done.stdout.endswith("\nTrue\n"), done.stderr
    assert os.listdir(target.parent) == ["capture.safetensors"] and target.read_text() == "as it was"
