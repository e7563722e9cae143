"""What holds for a whole process: libraries, imports, the end, and ``python -m ditattn``."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

START = "import ditattn, numpy as np\nfrom ditattn import *\nE = DiffusionAttentionBackendEnum\n"


def ok(done):
    """The output of a process that must end well and say nothing on stderr."""
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def test_one_libtvm_ffi(run_python):
    program = START + (
        "E.FLASH_ATTN.get_class()\n"
        "print({line.split()[-1] for line in open('/proc/self/maps') if line.rstrip().endswith('/libtvm_ffi.so')})\n"
    )
    (path,) = eval(ok(run_python("-c", program)))
    assert "site-packages/tvm_ffi/lib" in path


def test_importing_loads_no_back_end(run_python):
    program = "import sys, ditattn\nprint([m for m in sys.modules if m.startswith('vllm')])\n" + (
        "print('flash_attn.so' in open('/proc/self/maps').read())\n"
    )
    assert ok(run_python("-c", program)) == "[]\nFalse\n"


@pytest.mark.parametrize(
    "body",
    [
        "",
        "import numpy_backends\nregister_diffusion_backend(E.CUSTOM)(numpy_backends.NumpyBackend)\n"
        "q = np.ones((1, 2, 1, 16), 'float32')\nattention(q, q, q, backend='custom')\n"
        "kept = E.CUSTOM.get_class().get_impl_cls()(1, 16)\n",
        "import threading\nq = np.ones((1, 900, 4, 64), 'float32')\n"
        "threading.Thread(target=lambda: attention(q, q, q, backend='torch_sdpa'), daemon=True).start()\n",
        "try: resolve_class_path('left_out.LeftOutBackend')\nexcept ImportError: pass\nelse: raise SystemExit(1)\n",
        "class A: pass\nregister_diffusion_backend(E.CUSTOM)(A)\nmetadata = AttentionMetadata().to_native()\n",
        "import atexit\nq = np.ones((1, 2, 1, 16), 'float32')\natexit.register(lambda: attention(q, q, q))\n",
        "import logging\nE.FLASH_ATTN.get_class().get_impl_cls()(1, 16, backend_kwargs={})\nlogging.shutdown()\n",
    ],
)
def test_the_process_ends_well(run_python, body):
    assert ok(run_python("-c", START + body)) == ""


def test_nothing_of_python_is_called_after_its_end(run_python):
    """Handlers registered before the package are called after its own."""
    late = (
        "import atexit\ndef late():\n    q = np.ones((1, 2, 1, 16), 'float32')\n"
        "    attention(q, q, q, backend='flash_attn', backend_kwargs={'odd': 1})\n"
        "    register_diffusion_backend(E.CUSTOM, 'json.JSONDecoder')\n"
        "    try: E.CUSTOM.get_class()\n    except ImportError as error: print('importlib' in str(error))\n"
        "atexit.register(late)\n"
    )
    assert ok(run_python("-c", late + START)) == "False\n"


def test_a_class_over_cpp_has_its_name_however_it_is_found(run_python):
    program = START + "print(select_backend(head_size=64).backend.__name__)\n"
    assert ok(run_python("-c", program)) == "FlashAttentionBackend\n"


def test_numpy_is_not_needed(run_python, tmp_path):
    (tmp_path / "bare.py").write_text(
        "import sys\nsys.modules['numpy'] = sys.modules['torch'] = None\nimport runpy, tvm_ffi\n"
        "class Impl:\n  def __init__(self, num_heads, head_size): pass\n"
        "  def forward(self, query, key, value, metadata):\n"
        "    assert type(query) is tvm_ffi.Tensor\n    return query\n"
        "class Bare:\n  get_name = staticmethod(lambda: 'BARE')\n  get_impl_cls = staticmethod(lambda: Impl)\n"
        "if __name__ == '__main__': runpy.run_module('ditattn', run_name='__main__')\n"
    )
    done = run_python("bare.py", "--register", "CUSTOM=bare.Bare", "compare", "--backends", "CUSTOM,FLASH_ATTN",
                      "--shape", "1,1,8,8,16", "--json")  # fmt: skip
    mine, other = json.loads(done.stdout)["cases"][0]["results"]
    assert mine["status"] == "ok" and mine["rel_l2"] > 0.1 > other["rel_l2"], done.stderr


def test_fork(run_python):
    program = START + (
        "import os\nq = np.ones((1, 2, 1, 16), 'float32')\nset_num_threads(1)\nattention(q, q, q)\npid = os.fork()\n"
        "same = (attention(q, q, q) == q).all()\nif not pid: os._exit(7 if same else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    assert ok(run_python("-c", program)) == "7\n"


# --- python -m ditattn ------------------------------------------------------------------------------------------

REGISTER = ("--register", "CUSTOM=numpy_backends.NumpyBackend")


@pytest.fixture
def ditattn(run_python):
    """Runs the command line: ditattn("list")."""
    return lambda *args, **options: run_python("-m", "ditattn", *args, **options)


def entry(document, name="CUSTOM"):
    return next(backend for backend in json.loads(document)["backends"] if backend["name"] == name)


def test_list(ditattn):
    document = ok(ditattn("list", "--json"))
    assert entry(document, "FLASH_ATTN")["available"] and not entry(document)["available"]
    assert "FLASH_ATTN" in ok(ditattn("list")) and ok(ditattn("--version")).startswith("ditattn ")


def test_list_shows_classes_of_python(ditattn):
    custom = entry(ok(ditattn(*REGISTER, "list", "--json")))
    assert custom["available"] and custom["reason"] is None and custom["engine"] == "NumPy, float64"
    assert (custom["class_path"], custom["head_sizes"]) == ("numpy_backends.NumpyBackend", [16, 32, 64])
    assert custom["masks"] == ["padding", "bool", "additive"] and custom["gqa"] and custom["causal"] and custom["lse"]
    plain = entry(ok(ditattn("--register", "CUSTOM=numpy_backends.PlainBackend", "list", "--json")))
    assert plain["engine"] == "Python: numpy_backends.PlainBackend"


def test_list_tells_why_a_class_of_python_is_not_there(ditattn):
    custom = entry(ok(ditattn("--register", "CUSTOM=numpy_backends.NoSuch", "list", "--json")))
    assert not custom["available"] and "module 'numpy_backends' has no such class 'NoSuch'" in custom["reason"]


def test_compare_with_a_back_end_written_in_python(ditattn):
    document = json.loads(ok(ditattn(*REGISTER, "compare", "--backends", "CUSTOM,FLASH_ATTN", "--shape", "2,4,64,64,32",
                                     "--repeats", "2", "--json")))  # fmt: skip
    (case,) = document["cases"]
    mine, other = case["results"]
    assert (mine["backend"], mine["status"], mine["engine"]) == ("CUSTOM", "ok", "NumPy, float64")
    assert 0 < mine["rel_l2"] <= case["error_bound"] and mine["median_ms"] > 0 and other["status"] == "ok"


def test_a_back_end_in_the_current_folder(ditattn, tmp_path):
    (tmp_path / "here.py").write_text(
        "from numpy_backends import NumpyBackend\nprint('imported')\n"
        "class Mine(NumpyBackend): get_name = staticmethod(lambda: 'MINE')\n"
    )
    output = ok(ditattn("--register", "MINE=here.Mine", "compare", "--backends", "MINE", "--shape", "1,1,8,8,16"))
    assert "MINE" in output.partition("imported\n")[2]  # through one pipe, in order


def test_a_wrong_back_end_is_found_out(ditattn, tmp_path):
    (tmp_path / "wrong.py").write_text(
        "from numpy_backends import *\nclass Impl(NumpyImpl):\n"
        "  def forward(self, q, *rest, **kw): return q * 0 + 1\n"
        "class Wrong(NumpyBackend): get_impl_cls = staticmethod(lambda: Impl)\n"
    )
    done = ditattn("--register", "CUSTOM=wrong.Wrong", "compare", "--backends", "CUSTOM", "--shape", "1,1,8,8,16",
                   "--max-error", "0.01")  # fmt: skip
    assert done.returncode == 5, done.stderr


@pytest.mark.parametrize(
    "status, args",
    [
        (0, ["--help"]),
        (2, ["no_such_verb"]),
        (2, ["compare", "--backends", "NO_SUCH"]),
        (2, ["--register", "CUSTOM", "list"]),
        (2, ["--register", "CUSTOM=no/path.Class", "compare", "--backends", "CUSTOM", "--shape", "1,1,8,8,16"]),
        (3, ["--register", "CUSTOM=no_such.module.Class", "compare", "--backends", "CUSTOM", "--shape", "1,1,8,8,16"]),
        (4, ["run", "--backend", "FLASH_ATTN", "--input", "/no/such/file", "--output", "/tmp/never"]),
    ],
)
def test_exit_statuses(ditattn, status, args):
    done = ditattn(*args)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr and (status == 0) == (done.stderr == "")


def test_the_commands_output_comes_before_what_python_says_last(ditattn, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import atexit\natexit.register(print, 'last')\n")
    path = f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}"
    first, last = ok(ditattn("--version", PYTHONPATH=path)).splitlines()
    assert first.startswith("ditattn ") and last == "last"


def test_doctor_tells_what_computed_in_its_process(run_python):
    program = START + (
        "import ditattn.__main__\nq = np.ones((1, 2, 1, 16), 'float32')\nattention(q, q, q, role='self')\n"
        "ditattn.__main__.main(['doctor', '--json'])\n"
    )
    document = json.loads(ok(run_python("-c", program)))
    assert document["launches"] == [{"role": "self", "backend": "FLASH_ATTN", "calls": 1}]
    text = ok(run_python("-c", program.replace(", '--json'", "")))
    assert "launches, by role" in text


def test_interrupt_ends_it(tmp_path):
    (tmp_path / "slow.py").write_text(
        "from numpy_backends import *\nimport time\nclass Impl(NumpyImpl):\n"
        "  def forward(self, *a, **k):\n    print('here', flush=True)\n    time.sleep(60)\n"
        "class Slow(NumpyBackend): get_impl_cls = staticmethod(lambda: Impl)\n"
    )
    command = ["-m", "ditattn", "--register", "CUSTOM=slow.Slow", "compare", "--backends", "CUSTOM", "--shape",
               "1,1,8,8,16"]  # fmt: skip
    process = subprocess.Popen([sys.executable, *command], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "here\n"
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == -signal.SIGINT and time.monotonic() - start < 5
