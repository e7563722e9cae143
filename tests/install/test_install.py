"""The installed tree, moved to another place, and examples/custom_backend built with it and nothing else."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import OWN_VARIABLES, Command
from tensors import attention, load, normal, relative_error, rounded, save

SOURCE, BUILD = (Path(os.environ["DITATTN_TEST_" + name]) for name in ("SOURCE", "BUILD"))
LIBDIR = os.environ["DITATTN_TEST_LIBDIR"]
CMAKE = os.environ["DITATTN_TEST_CMAKE"]
CLASS_PATH = "acme.attention.OnlineSoftmaxBackend"
ENGINE = "online softmax, row by row"
BOUND = 2e-6  # what the project demands of float32 at these sizes


def clean_environment(**extra):
    hidden = (*OWN_VARIABLES, "LD_LIBRARY_PATH", "CMAKE_", "PYTHONPATH")
    return {k: v for k, v in os.environ.items() if not k.startswith(hidden)} | {"DITATTN_TUNE": "off"} | extra


def cmake(*args):
    return subprocess.run(
        [CMAKE, *map(str, args)], env=clean_environment(), capture_output=True, text=True, timeout=200
    )


def succeeded(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def configure(source, build, prefix):
    return cmake(
        "-S", source, "-B", build, "-G", os.environ["DITATTN_TEST_GENERATOR"], f"-DCMAKE_PREFIX_PATH={prefix}",
        f"-DCMAKE_CXX_COMPILER={os.environ['DITATTN_TEST_COMPILER']}", "-DCMAKE_DISABLE_FIND_PACKAGE_Python=ON",
    )  # fmt: skip


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """An installed tree that is no longer where it was installed."""
    root = tmp_path_factory.mktemp("install")
    succeeded(cmake("--install", BUILD, "--prefix", root / "installed"))
    (root / "installed").rename(root / "moved")
    return root / "moved"


@pytest.fixture(scope="module")
def example(prefix, tmp_path_factory):
    """The build folder of examples/custom_backend, built from a copy far from this source tree."""
    root = tmp_path_factory.mktemp("example")
    source = shutil.copytree(SOURCE / "examples" / "custom_backend", root / "source")
    succeeded(configure(source, root / "build", prefix))
    succeeded(cmake("--build", root / "build"))
    return root / "build"


@pytest.fixture(scope="module")
def ditattn(prefix):
    return Command(prefix / "bin" / "ditattn")


@pytest.fixture(scope="module")
def with_example(prefix, example):
    return Command(prefix / "bin" / "ditattn", example / "plugins")


def by_name(document):
    return {entry["name"]: entry for entry in document["backends"]}


def test_the_moved_command_finds_its_back_ends(ditattn, prefix):
    entries = by_name(ditattn.json("list"))
    for name in ("FLASH_ATTN", "TORCH_SDPA"):
        assert entries[name]["available"], entries[name]["reason"]
        (place,) = ditattn.json("info", name)["looked_in"]
        assert place["exists"] and prefix in Path(place["file"]).parents
    for name, entry in entries.items():
        assert entry["available"] or "no such module" not in entry["reason"], f"{name}: its reason was not installed"


def expect_own_libraries(files, prefix):
    """The dynamic linker finds all they need, and ditattn's and tvm-ffi's libraries in the installed tree."""
    for file in files:
        listing = subprocess.run(["ldd", file], env=clean_environment(), capture_output=True, text=True).stdout
        for line in listing.splitlines():
            assert "not found" not in line, f"{file}: {line}"
            if "ditattn" in line or "tvm_ffi" in line:
                assert prefix in Path(os.path.normpath(line.split("=>")[1].split()[0])).parents, f"{file}: {line}"


def test_the_python_package_works_from_there(prefix, tmp_path):
    package = prefix / LIBDIR / "python"
    if not package.is_dir():
        pytest.skip("built without the Python package")
    program = "import ditattn, sys; print(ditattn.__file__); sys.argv = ['', 'list', '--json']; " \
              "import ditattn.__main__ as m; sys.exit(m.main())"  # fmt: skip
    environment = clean_environment(PYTHONPATH=str(package), PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run([sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True)
    file, _, document = succeeded(done).partition("\n")
    assert Path(file) == package / "ditattn" / "__init__.py"
    assert by_name(json.loads(document))["FLASH_ATTN"]["available"]


def test_its_libraries_are_its_own(prefix):
    files = [prefix / "bin" / "ditattn", *(prefix / LIBDIR).rglob("*.so"), *(prefix / LIBDIR).glob("libditattn.so.*")]
    assert len(files) >= 6
    expect_own_libraries(files, prefix)


def test_what_is_built_with_it_uses_its_libraries(prefix, example):
    expect_own_libraries([example / "use_it", example / "plugins" / "acme" / "attention.so"], prefix)


def test_nothing_names_where_it_was_built(prefix):
    places = (str(BUILD), str(SOURCE), str(prefix.parent / "installed"))
    for file in [*prefix.rglob("*.cmake"), *prefix.rglob("*.hpp")]:
        assert not [place for place in places if place in file.read_text()], file


def test_the_capture_is_installed(ditattn, prefix):
    name = "capture.safetensors"
    installed = prefix / "share" / "ditattn" / name
    assert installed.read_bytes() == (SOURCE / "examples" / "digits" / name).read_bytes()
    shown = ditattn.json("compare", "--backends", "FLASH_ATTN", "--repeats", "1")
    assert len(shown["cases"]) > 1 and all(case["results"][0]["status"] == "ok" for case in shown["cases"])


def user_project(folder, version, program="int main() {}\n"):
    (folder / "main.cpp").write_text(program)
    (folder / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(user LANGUAGES CXX)\n"
        f"find_package(ditattn {version} REQUIRED)\nadd_executable(user main.cpp)\n"
        "target_link_libraries(user PRIVATE ditattn::ditattn)\n"
    )
    return folder


@pytest.mark.parametrize("version", ["0.2", "1.0", "0.1.0 EXACT COMPONENTS none"])
def test_what_it_does_not_have_is_not_found(prefix, tmp_path, version):
    done = configure(user_project(tmp_path, version), tmp_path / "build", prefix)
    assert done.returncode != 0 and "ditattn" in done.stderr


USES_IT = """
#include <cstdio>
int main() {
  const ditattn::Tensor query = ditattn::empty({1, 8, 2, 16}, ditattn::kFloat32);
  for (std::int64_t i = 0; i < query.numel(); ++i) static_cast<float*>(query.data_ptr())[i] = 2.F;
  const ditattn::Tensor out = ditattn::attention(query, query, query, {.backend = "FLASH_ATTN"});
  std::printf("%g\\n", static_cast<const float*>(out.data_ptr())[77]);
}
"""


def uses_every_header(prefix):
    """Each public header on its own line, and the door last: a program that the linker has to make whole."""
    names = sorted(file.name for file in (prefix / "include" / "ditattn").glob("*.hpp") if file.name != "ditattn.hpp")
    assert len(names) > 20
    return "".join(f"#include <ditattn/{name}>\n" for name in [*names, "ditattn.hpp"]) + USES_IT


def test_a_project_with_every_header(prefix, tmp_path):
    source = user_project(tmp_path, "0.1", uses_every_header(prefix))
    succeeded(configure(source, tmp_path / "build", prefix))
    succeeded(cmake("--build", tmp_path / "build"))
    assert succeeded(subprocess.run([tmp_path / "build" / "user"], env=clean_environment(), capture_output=True, text=True)) == "2\n"


def test_pkg_config_alone(prefix, tmp_path):
    if shutil.which("pkg-config") is None:
        pytest.skip("there is no pkg-config")
    (tmp_path / "main.cpp").write_text("#include <ditattn/ditattn.hpp>\n" + USES_IT)
    environment = clean_environment(PKG_CONFIG_PATH=str(prefix / LIBDIR / "pkgconfig"))

    def shell(command):
        return succeeded(subprocess.run(["sh", "-c", command], env=environment, cwd=tmp_path, capture_output=True, text=True))

    assert shell("pkg-config --modversion 'ditattn >= 0.1 ditattn < 0.2'").strip().startswith("0.1.")
    compiler = os.environ["DITATTN_TEST_COMPILER"]
    shell(f"{compiler} -std=c++20 main.cpp $(pkg-config --cflags --libs ditattn) -o main")
    assert shell("./main") == "2\n"
    expect_own_libraries([tmp_path / "main"], prefix)


def test_a_destdir_is_put_before_the_prefix(tmp_path):
    done = subprocess.run([CMAKE, "--install", BUILD, "--prefix", "/usr/lib/ditattn", "--component", "runtime"],
                          env=clean_environment(DESTDIR=str(tmp_path)), capture_output=True, text=True)  # fmt: skip
    succeeded(done)
    here = tmp_path / "usr/lib/ditattn"
    files = {file.relative_to(here).as_posix() for file in here.rglob("*") if file.is_file()}
    docs = {f"share/doc/ditattn/{name}" for name in ("LICENSE", "THIRD_PARTY.md", "CHANGELOG.md")}
    assert files == {"bin/ditattn", f"{LIBDIR}/libtvm_ffi.so", *docs}


def test_the_package_may_be_looked_for_twice_and_checks_module_paths(prefix, tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(user LANGUAGES CXX)\n"
        "find_package(ditattn 0.1 REQUIRED)\nfind_package(ditattn REQUIRED)\n"
        "get_target_property(features ditattn::ditattn INTERFACE_COMPILE_FEATURES)\nmessage(STATUS ${features})\n"
        "ditattn_add_plugin(user_plugin MODULE acme.2nd-try SOURCES x.cpp)\n"
    )
    done = configure(tmp_path, tmp_path / "build", prefix)
    assert done.returncode != 0 and done.stderr.count("CMake Error") == 1, done.stderr
    assert "cxx_std_20" in done.stdout
    assert "'acme.2nd-try' is no module path." in done.stderr


def test_the_program_runs_custom_and_its_own_member(example):
    done = subprocess.run(
        [example / "use_it"], env=clean_environment(DITATTN_PLUGIN_PATH=str(example / "plugins")),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    lines = succeeded(done).splitlines()
    assert lines[0].startswith(f"CUSTOM: {ENGINE}, largest error ")
    assert lines[1].startswith(f"MY_ATTN: {ENGINE}, largest error ")
    assert lines[2].startswith("refused: ONLINE_SOFTMAX does not support head_size=512. Supported head sizes: 1 to 256")


def test_without_the_path_the_plugin_is_not_there(example):
    done = subprocess.run([example / "use_it"], env=clean_environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"use_it: Cannot import '{CLASS_PATH}': no such module" in done.stderr


def inputs(kind):
    """Tensors for `run` and `compare`: two samples, four heads over two K/V heads."""
    rng = np.random.default_rng(5)
    shapes = [(2, 40, 4, 24), (2, 56, 2, 24), (2, 56, 2, 24)]
    tensors = {name: rounded(x, "float32") for name, x in zip(("query", "key", "value"), normal(rng, *shapes))}
    if kind == "padding":
        tensors["attn_mask"] = np.arange(56) < np.array([[56], [31]])
    if kind == "bool":
        tensors["attn_mask"] = rng.random((1, 4, 40, 56)) < 0.7
    if kind == "additive":
        tensors["attn_mask"] = rng.standard_normal((2, 1, 40, 56)).astype(np.float32)
    if kind == "joint":
        text = normal(rng, (2, 9, 4, 24), (2, 9, 2, 24), (2, 9, 2, 24))
        tensors |= {f"joint_{name}": rounded(x, "float32") for name, x in zip(("query", "key", "value"), text)}
        tensors["joint_attn_mask"] = np.arange(9) < np.array([[4], [9]])
    return tensors


@pytest.mark.parametrize("name", ["CUSTOM", "MY_ATTN", "SAGE_ATTN"])
def test_list_shows_it(with_example, name):
    flag = f"--register={name}={CLASS_PATH}"
    entry = by_name(with_example.json("list", flag))[name]
    assert entry["available"] and (entry["class_path"], entry["engine"]) == (CLASS_PATH, ENGINE)
    assert (entry["dtypes"], entry["head_sizes"]) == (["float32"], {"min": 1, "max": 256, "multiple": 1})
    assert ENGINE in with_example.ok("list", flag)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["plain", "padding", "bool", "additive"])
def test_run_agrees_with_numpy(with_example, tmp_path, kind, causal):
    tensors = inputs(kind)
    source, target = save(tmp_path / "in.safetensors", tensors), tmp_path / "out.safetensors"
    flags = ["--causal"] if causal else []
    with_example.ok("run", "--register", f"MY_ATTN={CLASS_PATH}", "--backend", "my_attn", "--lse", "--input", source,
                    "--output", target, *flags)  # fmt: skip
    saved = load(target)
    out, magnitude, lse = attention(
        *(tensors[name] for name in ("query", "key", "value")), mask=tensors.get("attn_mask"),
        causal="bottom-right" if causal else None,
    )  # fmt: skip
    assert 0 < relative_error(saved["out"][1], out, magnitude) <= BOUND
    np.testing.assert_allclose(saved["lse"][1], lse, rtol=1e-5, atol=1e-5)


def test_compare_has_it_beside_the_others(with_example, tmp_path):
    """Against the float64 oracle, joint text tokens too; named backends have to do every case."""
    files = [save(tmp_path / f"{kind}.safetensors", inputs(kind)) for kind in ("padding", "bool", "additive", "joint")]
    shown = with_example.json("compare", "--register", f"MY_ATTN={CLASS_PATH}", "--backends", "TORCH_SDPA,MY_ATTN",
                              "--repeats", "1", *(flag for file in files for flag in ("--input", file)))  # fmt: skip
    assert len(shown["cases"]) == len(files)
    for case in shown["cases"]:
        others, mine = case["results"]
        assert (others["backend"], mine["backend"], mine["engine"]) == ("TORCH_SDPA", "MY_ATTN", ENGINE)
        assert 0 < mine["rel_l2"] <= case["error_bound"]


def test_what_it_does_not_declare_is_refused(with_example, tmp_path):
    tensors = {name: tensor.astype(np.float16) for name, tensor in inputs("plain").items()}
    source = save(tmp_path / "half.safetensors", tensors)
    error = with_example.fails(4, "run", "--register", f"CUSTOM={CLASS_PATH}", "--backend", "CUSTOM", "--input", source,
                               "--output", tmp_path / "out.safetensors")  # fmt: skip
    assert "ONLINE_SOFTMAX" in error and "float16" in error and "float32" in error
