"""The wheel, built as `make wheel` builds it and installed into environments that have nothing else of this project."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

SOURCE = Path(os.environ["DITATTN_TEST_SOURCE"])
PACKAGE = SOURCE / "python" / "ditattn"
VERSION = re.search(r'define DITATTN_VERSION "(.*)"', (SOURCE / "include/ditattn/version.hpp").read_text()).group(1)
PLUGINS = Path("ditattn/lib/ditattn/backends")
OURS = {"libditattn.so.0.1", "libtvm_ffi.so"}
SYSTEMS = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "ld-linux-x86-64.so.2"}  # of every manylinux
HIDDEN = ("DITATTN_", "DIFFUSION_ATTENTION_", "PYTHONPATH", "LD_LIBRARY_PATH")


def run(*command, **options):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(HIDDEN)} | {"DITATTN_TUNE": "off"}
    return subprocess.run(
        [*map(str, command)], env=environment, capture_output=True, text=True, timeout=800, **options
    )


def succeeded(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    succeeded(run(SOURCE / "scripts" / "wheel.sh", folder, "--config-settings=cmake.define.DITATTN_CUDA=OFF"))
    (file,) = folder.iterdir()
    return file


class Environment:
    """A virtual environment with copies of some of .venv's packages."""

    def __init__(self, folder, *packages):
        self.folder = folder
        succeeded(run(sys.executable, "-m", "venv", "--without-pip", folder))
        self.site = next(folder.glob("lib/python3*/site-packages"))
        for package in packages:
            self._lend(importlib.metadata.distribution(package))

    def _lend(self, distribution):
        for file in distribution.files:
            if ".." not in file.parts and "__pycache__" not in file.parts:
                (self.site / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file.locate(), self.site / file)

    def pip(self, *arguments):
        return run(sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", self.python, *arguments)

    @property
    def python(self):
        return self.folder / "bin" / "python"

    @property
    def files(self):
        return {path for path in self.folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    """The wheel and what it depends on."""
    environment = Environment(tmp_path_factory.mktemp("bare"), "apache-tvm-ffi", "typing_extensions")
    succeeded(environment.pip("install", "--no-index", wheel))
    return environment


@pytest.fixture(scope="module")
def with_numpy(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("numpy")
    environment = Environment(folder, "apache-tvm-ffi", "typing_extensions", "numpy", "ml_dtypes")
    succeeded(environment.pip("install", "--no-index", f"ditattn[numpy] @ {wheel.as_uri()}"))
    return environment


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(f"ditattn-{VERSION}.dist-info/METADATA").decode())


def test_it_is_for_every_python_and_for_most_linuxes(wheel):
    assert re.fullmatch(rf"ditattn-{re.escape(VERSION)}-py3-none-manylinux_2_\d+_x86_64\.whl", wheel.name)
    about = metadata(wheel)
    assert (about["Name"], about["Version"]) == ("ditattn", VERSION)
    assert (about["License-Expression"], about["Requires-Python"]) == ("Apache-2.0", ">=3.10")


def test_its_files_have_the_commits_time(wheel):
    """The same tree gives the same file."""
    done = run("git", "log", "-1", "--format=%ct", cwd=SOURCE)
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH") or (done.stdout if done.returncode == 0 else 1700000000))
    zips = time.gmtime(epoch - epoch % 2)[:6]  # zip files count two seconds at a time
    assert {entry.date_time for entry in zipfile.ZipFile(wheel).infolist()} == {zips}


def test_it_has_the_package_and_nothing_else(wheel):
    names = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    assert {name.parts[0] for name in names} == {"ditattn", f"ditattn-{VERSION}.dist-info"}
    sources = {file.relative_to(PACKAGE.parent) for file in PACKAGE.rglob("*.py")} | {Path("ditattn/py.typed")}
    assert sources == {name for name in names if name.suffix == ".py" or name.name == "py.typed"}
    assert not [name for name in names if re.match(r"lib(tvm_ffi|fmt|spdlog)", name.name)]
    assert [name.name for name in names if name.name.startswith("libditattn.so")] == ["libditattn.so.0.1"]
    licences = Path(f"ditattn-{VERSION}.dist-info/licenses")
    assert {name.name for name in names if licences in name.parents} == {"LICENSE", "THIRD_PARTY.md"}
    assert Path("ditattn/share/ditattn/ditattn.spdx.json") in names
    assert len([name for name in names if name.suffix == ".so" and PLUGINS in name.parents]) >= 4


def test_its_libraries_need_the_systems_and_each_other(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    libraries = [*tmp_path.rglob("*.so"), *tmp_path.rglob("*.so.*")]
    assert len(libraries) >= 7
    for library in libraries:
        dynamic = succeeded(run("readelf", "--dynamic", "--wide", library))
        needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
        assert needed <= OURS | SYSTEMS, f"{library}: {needed}"
        for path in re.findall(r"\((?:RUNPATH|RPATH)\).*\[(.*)\]", dynamic):
            assert path and all(part.startswith("$ORIGIN") for part in path.split(":")), f"{library}: {path}"


def test_tvm_ffi_is_one_version_everywhere(wheel):
    pinned = dict(re.findall(r"^(\S+)==(\S+)$", (SOURCE / "requirements.txt").read_text(), re.MULTILINE))
    required = re.search(r"^requires = (\[.*\])$", (SOURCE / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    for text in [*json.loads(required), *metadata(wheel).get_all("Requires-Dist")]:
        requirement = Requirement(text)
        if requirement.marker is None:  # not of an extra
            assert pinned[requirement.name] in requirement.specifier, text


def test_without_tvm_ffi_it_is_not_installed(wheel, tmp_path):
    done = Environment(tmp_path / "empty").pip("install", "--no-index", wheel)
    assert done.returncode != 0 and "apache-tvm-ffi" in done.stderr


def test_the_readmes_quick_start_runs(with_numpy, tmp_path):
    (text,) = re.findall(r"## In Python\n\n```python\n(.*?)```", (SOURCE / "README.md").read_text(), re.DOTALL)
    check = "assert out.shape == query.shape and np.isfinite(out).all()\nimport ditattn\nprint(ditattn.__version__)\n"
    (tmp_path / "example.py").write_text(text + check)
    assert succeeded(run(with_numpy.python, "example.py", cwd=tmp_path)).strip() == VERSION


def test_the_command_lists_the_back_ends(bare, tmp_path):
    command = bare.folder / "bin" / "ditattn"
    entries = {e["name"]: e for e in json.loads(succeeded(run(command, "list", "--json", cwd=tmp_path)))["backends"]}
    for name in ("FLASH_ATTN", "TORCH_SDPA", "SAGE_ATTN", "SAGE_ATTN_3"):
        assert entries[name]["available"], entries[name]["reason"]
    for name in ("CUDNN_ATTN", "FLASHINFER_ATTN"):
        assert "not built: ditattn was configured without DITATTN_CUDA" in entries[name]["reason"]


def test_the_commands_exit_status_is_the_librarys(bare, tmp_path):
    for command in ([bare.folder / "bin" / "ditattn"], [bare.python, "-m", "ditattn"]):
        done = run(*command, "info", "NO_SUCH", cwd=tmp_path)
        assert done.returncode > 1 and done.stderr.startswith("ditattn: error: ")


def test_doctor_runs(bare, tmp_path):
    shown = succeeded(run(bare.python, "-m", "ditattn", "doctor", cwd=tmp_path))
    assert str(bare.site / PLUGINS) in shown


def test_numpy_is_not_needed(bare, tmp_path):
    program = "import ditattn, sys; sys.exit('numpy' in sys.modules or ditattn.num_threads() < 1)"
    succeeded(run(bare.python, "-c", program, cwd=tmp_path))


LOADS_ALL = """
import re, ditattn
for name in ("FLASH_ATTN", "TORCH_SDPA", "SAGE_ATTN", "SAGE_ATTN_3"):
    ditattn.DiffusionAttentionBackendEnum[name].get_class()
print(*set(re.findall(r"/\\S*(?:attn|sdpa|ffi)[^/]*\\.so", open("/proc/self/maps").read())))
"""


def test_a_process_has_one_tvm_ffi_for_all_back_ends(bare, tmp_path):
    loaded = [Path(file) for file in succeeded(run(bare.python, "-c", LOADS_ALL, cwd=tmp_path)).split()]
    assert [file.is_relative_to(bare.site / "tvm_ffi") for file in loaded if file.name == "libtvm_ffi.so"] == [True]
    plugins = {file.stem for file in loaded if bare.site / PLUGINS in file.parents}
    assert plugins == {"flash_attn", "sdpa", "sage_attn", "sage_attn3"}


def test_it_needs_nothing_of_the_source_tree(bare, tmp_path):
    """The capture too is found in the wheel: the source tree is hidden behind an empty folder."""
    hide = f"mount -t tmpfs none '{SOURCE}' && exec \"$@\""
    hidden = ("unshare", "--map-root-user", "--mount", "sh", "-c", hide, "sh")
    if run(*hidden, "true").returncode != 0:
        pytest.skip("this machine does not allow mount namespaces")
    assert run(*hidden, "test", "-e", SOURCE / "README.md").returncode != 0
    arguments = ("compare", "--json", "--backends", "FLASH_ATTN", "--repeats", "1")
    shown = json.loads(succeeded(run(*hidden, bare.folder / "bin" / "ditattn", *arguments, cwd=tmp_path)))
    assert len(shown["cases"]) > 1 and all(case["results"][0]["status"] == "ok" for case in shown["cases"])


def test_uninstalling_leaves_nothing(wheel, tmp_path):
    environment = Environment(tmp_path / "short", "apache-tvm-ffi", "typing_extensions")
    before = environment.files
    succeeded(environment.pip("install", "--no-index", wheel))
    assert environment.site / "ditattn" / "_ditattn.so" in environment.files
    succeeded(run(environment.python, "-m", "ditattn", "list", cwd=tmp_path))
    succeeded(environment.pip("uninstall", "--yes", "ditattn"))
    assert environment.files == before
