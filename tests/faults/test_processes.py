"""Fork and signals, in whole processes of Python."""

import os
import signal
import subprocess
import sys
import time

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


def test_interrupted_tuning_leaves_no_part_of_a_file(environment, tmp_path):
    program = "import ditattn.__main__\nditattn.__main__.main(['tune', '--shape', '1,8,700,700,64', '--budget', '60000'])"
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE)
    while "flash_attn.so" not in open(f"/proc/{process.pid}/maps").read():  # it is at work
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    folder = tmp_path / "tuned"
    assert not folder.exists() or [n for n in os.listdir(folder) if not n.endswith(".lock")] == []
