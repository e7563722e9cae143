"""The Debian packages of this build, laid out as dpkg would and run from there; and what they say of themselves."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import OWN_VARIABLES, Command
from tensors import attention, load, normal, relative_error, rounded, save

SOURCE, BUILD = (Path(os.environ["DITATTN_TEST_" + name]) for name in ("SOURCE", "BUILD"))
VERSION = re.search(r'define DITATTN_VERSION "(.*)"', (SOURCE / "include/ditattn/version.hpp").read_text()).group(1)
TREE = "usr/lib/ditattn"
LIBRARIES_OF_MPI = ("libopenmpi", "libmpich")


def run(*command):
    environment = {k: v for k, v in os.environ.items() if not k.startswith((*OWN_VARIABLES, "LD_LIBRARY_PATH"))}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """The packages' files by name."""
    for tool in ("dpkg-deb", "dpkg-shlibdeps"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool}")
    folder = tmp_path_factory.mktemp("debian")
    run(SOURCE / "scripts" / "deb.sh", BUILD, folder)
    return {file.name.split("_")[0]: file for file in folder.glob(f"*_{VERSION}_*.deb")}


@pytest.fixture(scope="module")
def root(packages, tmp_path_factory):
    """A root directory that has `ditattn` and `ditattn-dev`."""
    folder = tmp_path_factory.mktemp("root")
    for name in ("ditattn", "ditattn-dev"):
        run("dpkg-deb", "--extract", packages[name], folder)
    return folder


def fields(package):
    return dict(re.findall(r"^([\w-]+): (.*(?:\n .*)*)", run("dpkg-deb", "--field", package), re.MULTILINE))


def depends(package):
    return re.findall(r"([a-z0-9.+-]+)(?: \([^)]*\))?(?:, |$)", fields(package).get("Depends", ""))


def test_each_says_what_it_is(packages):
    assert {"ditattn", "ditattn-dev"} <= packages.keys() <= {"ditattn", "ditattn-dev", "ditattn-mpi"}
    for name, package in packages.items():
        told = fields(package)
        assert (told["Package"], told["Version"]) == (name, VERSION)
        assert told["Section"] == ("libdevel" if name == "ditattn-dev" else "science")
        assert len(told["Description"].splitlines()) > 1 and re.search(r"<.+@.+>", told["Maintainer"])


def test_they_depend_on_what_their_libraries_need(packages):
    needed = depends(packages["ditattn"])
    assert {"libc6", "libstdc++6"} <= set(needed)
    assert not [name for name in needed if name.startswith(("python", "ditattn", *LIBRARIES_OF_MPI))]
    assert depends(packages["ditattn-dev"]) == ["ditattn"]
    if "ditattn-mpi" in packages:
        needed = depends(packages["ditattn-mpi"])
        assert "ditattn" in needed and [name for name in needed if name.startswith(LIBRARIES_OF_MPI)]


def test_files_are_where_they_may_be(packages):
    """The tree in a folder of its own: no library lies where the linker would offer it to others."""
    for name, package in packages.items():
        files = run("dpkg-deb", "--contents", package).splitlines()
        for line in files:
            path = line.split()[5].removeprefix("./")
            assert line.split()[1] == "root/root" and (line.startswith("l") or line[5] + line[8] == "--"), line
            if line.startswith("-"):
                allowed = (f"{TREE}/", f"usr/share/doc/{name}/", "usr/lib/cmake/ditattn/")
                assert path.startswith(allowed) or re.fullmatch(r"usr/lib/(.+/)?pkgconfig/ditattn\.pc", path), line
        assert [line for line in files if line.endswith(f"/usr/share/doc/{name}/copyright")]


def test_no_file_names_where_it_was_built(root):
    places = [str(place).encode() for place in (BUILD, SOURCE / "include", SOURCE / ".venv")]
    for file in root.rglob("*"):
        if file.is_file():
            assert not [place for place in places if place in file.read_bytes()], file


def test_the_command_runs_from_there(root):
    command = Command(root / "usr/bin/ditattn")
    entries = {entry["name"]: entry for entry in command.json("list")["backends"]}
    for name in ("FLASH_ATTN", "TORCH_SDPA", "SAGE_ATTN", "SAGE_ATTN_3"):
        assert entries[name]["available"], entries[name]["reason"]


def test_a_forward_from_there_agrees_with_numpy(root, tmp_path):
    shapes = [(2, 33, 4, 24), (2, 50, 2, 24), (2, 50, 2, 24)]
    tensors = [rounded(x, "float32") for x in normal(np.random.default_rng(), *shapes)]
    source = save(tmp_path / "in.safetensors", dict(zip(("query", "key", "value"), tensors)))
    Command(root / "usr/bin/ditattn").ok("run", "--backend", "FLASH_ATTN", "--input", source, "--output", tmp_path / "out.safetensors")
    out, magnitude, _ = attention(*tensors)
    error = relative_error(load(tmp_path / "out.safetensors")["out"][1], out, magnitude)
    print(f"error {error:.2e}")
    assert 0 < error <= 2e-6


def test_pkg_config_and_cmake_lead_there(root, tmp_path):
    files = set((root / "usr/lib").rglob("pkgconfig/ditattn.pc"))
    (file,) = files - {root / TREE / "lib/pkgconfig/ditattn.pc"}
    if shutil.which("pkg-config"):
        flags = run("env", f"PKG_CONFIG_PATH={file.parent}", "pkg-config", "--variable=libdir", "ditattn").strip()
        assert Path(os.path.normpath(flags)).samefile(root / TREE / "lib")
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(user LANGUAGES CXX)\nfind_package(ditattn 0.1 REQUIRED)\n"
        "get_target_property(place ditattn::ditattn LOCATION)\nmessage(STATUS \"place ${place}\")\n"
    )
    shown = run(os.environ["DITATTN_TEST_CMAKE"], "-S", tmp_path, "-B", tmp_path / "b", f"-DCMAKE_PREFIX_PATH={root}/usr")
    (place,) = re.findall("place (.*)", shown)
    assert Path(place).samefile(root / TREE / "lib/libditattn.so")


def test_lintian_finds_no_error(packages):
    """But for the maintainer's address, which who publishes sets (DITATTN_MAINTAINER)."""
    if shutil.which("lintian") is None:
        pytest.skip("there is no lintian")
    tags = "bogus-mail-host,bogus-mail-host-in-debian-changelog"
    run("lintian", "--fail-on", "error", "--allow-root", "--suppress-tags", tags, *packages.values())


def page(text):
    """Name -> version and licence of THIRD_PARTY.md's table."""
    return {n: (v, licence) for n, v, licence in re.findall(r"^\| \[(.+?)\]\(\S+\) \| (.+?) \| (.+?) \|", text, re.MULTILINE)}


def test_the_page_of_third_parties_is_the_table():
    text = (SOURCE / "THIRD_PARTY.md").read_text()
    assert text == run(sys.executable, SOURCE / "scripts/sbom.py", "page"), "python3 scripts/sbom.py page > THIRD_PARTY.md"
    pinned = {}
    for file in SOURCE.glob("requirements*.txt"):
        pinned |= dict(re.findall(r"^(\S+)==(\S+)$", file.read_text(), re.MULTILINE))
    names = {"apache-tvm-ffi": "apache-tvm-ffi", "cudnn-frontend": "nvidia-cudnn-frontend", "NCCL": "nvidia-nccl-cu13",
             "FlashInfer": "flashinfer-python", "NVIDIA CUDA runtime": "nvidia-cuda-runtime"}  # fmt: skip
    for name, package in names.items():
        assert page(text)[name][0] == pinned[package], name


def test_the_list_of_contents_is_spdx(root):
    """SPDX 2.3's required fields, each reference resolved, each licence as THIRD_PARTY.md has it."""
    document = json.loads((root / TREE / "share/ditattn/ditattn.spdx.json").read_text())
    assert (document["spdxVersion"], document["dataLicense"], document["SPDXID"]) == ("SPDX-2.3", "CC0-1.0", "SPDXRef-DOCUMENT")
    assert re.fullmatch(r"https://\S+[0-9a-f]{32}", document["documentNamespace"]) and "#" not in document["documentNamespace"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", document["creationInfo"]["created"])
    assert document["creationInfo"]["creators"][0].startswith("Tool: ")
    identifiers = [entry["SPDXID"] for entry in document["packages"]]
    assert len(set(identifiers)) == len(identifiers) and all(re.fullmatch(r"SPDXRef-[A-Za-z0-9.-]+", i) for i in identifiers)
    for entry in document["packages"]:
        assert {"name", "downloadLocation", "licenseConcluded", "licenseDeclared", "copyrightText"} <= entry.keys()
    licences = {entry["name"]: entry["licenseDeclared"] for entry in document["packages"]}
    told = page((SOURCE / "THIRD_PARTY.md").read_text())
    assert licences.pop("ditattn") == "Apache-2.0"
    assert licences == {name: told[name][1] for name in licences}
    assert {"apache-tvm-ffi", "fmt", "spdlog", "nlohmann-json", "CLI11"} <= licences.keys()
    assert not {"Google Test", "Google Benchmark", "OpenBLAS", "libpng"} & licences.keys()
    for relation in document["relationships"]:
        assert {relation["spdxElementId"], relation["relatedSpdxElement"]} <= {"SPDXRef-DOCUMENT", *identifiers}
    own = [r["relatedSpdxElement"] for r in document["relationships"] if r["relationshipType"] == "DESCRIBES"]
    assert own == ["SPDXRef-ditattn"]
    assert {r["relatedSpdxElement"] for r in document["relationships"]} == set(identifiers)
