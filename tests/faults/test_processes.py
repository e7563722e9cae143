"""Fork and signals, in whole processes of Python."""

import os
import signal
import subprocess
import sys
import time

import pytest

START = "import os, signal, numpy as np, ditattn\nfrom ditattn import *\n"


def test_multiprocessing_by_fork_while_threads_compute(run_python):
    done = run_python(
        START + "import multiprocessing, threading\nq = np.random.rand(2, 130, 4, 40).astype('float32')\n"
        "expected = attention(q, q, q)\nstop = False\n"
        "def work():\n    while not stop: attention(q, q, q, backend='sage_attn')\n"
        "def child(i): return bool((attention(q, q, q) == expected).all())\n"
        "threads = [threading.Thread(target=work) for _ in range(4)]\n[t.start() for t in threads]\n"
        "with multiprocessing.get_context('fork').Pool(4) as pool:\n"
        "    print(pool.map_async(child, range(16)).get(timeout=60) == [True] * 16)\n"
        "stop = True\n[t.join() for t in threads]\n"
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_a_handler_runs_and_the_answer_is_right(run_python):
    """An alarm every millisecond, with a handler of Python's, while attention computes and files are written."""
    done = run_python(
        START + "q = np.random.rand(1, 300, 4, 64).astype('float32')\nexpected = attention(q, q, q)\nalarms = 0\n"
        "def count(*_):\n    global alarms\n    alarms += 1\n"
        "signal.signal(signal.SIGALRM, count)\nsignal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)\n"
        "while alarms < 20:\n"
        "    with ditattn.capture('capture.safetensors'): assert (attention(q, q, q) == expected).all()\n"
        "signal.setitimer(signal.ITIMER_REAL, 0)\nprint(alarms >= 20)\n"
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_keyboard_interrupt_between_calls(run_python):
    done = run_python(
        START + "q = np.random.rand(1, 700, 8, 64).astype('float32')\nexpected = attention(q, q, q)\n"
        "signal.signal(signal.SIGALRM, signal.default_int_handler)\n"
        "try:\n    signal.setitimer(signal.ITIMER_REAL, 0.05)\n    while True: attention(q, q, q)\nexcept KeyboardInterrupt: print((attention(q, q, q) == expected).all())\n"
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_keyboard_interrupt_during_one_call(run_python):
    """It comes when the call returns, which has computed to its end; the result that nobody gets is freed."""
    done = run_python(
        START + "import resource, threading\nq = np.random.rand(1, 500, 32, 64).astype('float32')\n"
        "expected, sums = attention(q, q, q, return_lse=True)\nduring, used = 0, []\n"
        "lse = np.empty_like(sums)\n"
        "def interrupt():\n"
        "    global during\n"
        "    while np.isnan(lse).all(): pass\n"  # until it writes
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    during += bool(np.isnan(lse).any())\n"  # it is not done yet
        "while during < 40:\n"
        "    lse.fill(np.nan)\n    sender = threading.Thread(target=interrupt)\n    sender.start()\n"
        "    try:\n        attention(q, q, q, lse=lse, return_lse=True)\n        sender.join()\n        assert False\n"
        "    except KeyboardInterrupt: pass\n"
        "    sender.join()\n    assert (lse == sums).all()\n"
        "    used.append(int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize())\n"
        "print((attention(q, q, q) == expected).all(), (used[-1] - used[-21]) // q.nbytes)\n"
    )
    assert done.returncode == 0, done.stderr
    right, outputs_kept = done.stdout.split()
    assert right == "True" and int(outputs_kept) < 10, done.stdout  # of 20; arenas of threads may take some


INTERRUPTED = {
    "tune": ["tune", "--shape", "1,8,700,700,64", "--budget", "60000"],
    "compare": ["compare", "--shape", "1,8,700,700,64", "--repeats", "100000", "--report", "report.html"],
}


@pytest.mark.parametrize("python", [True, False])
@pytest.mark.parametrize("verb", INTERRUPTED)
def test_an_interrupted_command_leaves_no_part_of_a_file(command, environment, tmp_path, verb, python):
    """It ends as killed by SIGINT, which shells show as 130. What an end in the middle of a write leaves: unit_core."""
    program = [sys.executable, "-m", "ditattn"] if python else [command]
    process = subprocess.Popen([*program, *INTERRUPTED[verb]], env=environment, cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    while "flash_attn.so" not in open(f"/proc/{process.pid}/maps").read():  # it is at work
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"] == []
