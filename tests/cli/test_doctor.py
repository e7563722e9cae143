"""`ditattn doctor`: what is there, what is not and why, on good and on broken machines."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import MODULES
from test_list import NOT_REGISTERED, PATHS, by_name

KEYS = {
    "machine": ["cpu", "threads", "memory_gb", "os", "ditattn", "cpu_features", "best_cpu_level", "cpu_level"],
    "library": ["version", "interface_version", "file", "search_path", "ignored"],
    "environment": ["name", "value", "note"],
    "libraries": ["name", "sonames", "found", "file", "reason", "purpose", "used_by", "install"],
    "devices": ["name", "present", "usable", "reason", "evidence"],
    "backends": ["name", "class_path", "overridden", "available", "engine", "reason", "remedy"],
    "defaults": ["device", "candidates", "platform_default", "explicit", "in_effect", "tuned"],
    "launches": ["role", "backend", "calls"],
}
FEATURES = "sse2 avx2 fma avx512f avx512bw avx512vl avx512_bf16 avx512_vnni amx_tile amx_bf16 amx_int8".split()
MISSING_FILE = MODULES / "sage_attn3.so"


def named(entries):
    return {entry["name"]: entry for entry in entries}


@pytest.fixture
def plugin_folder(tmp_path):
    """A search directory that may hold modules of vllm_omni.diffusion.attention.backends."""
    (tmp_path / MODULES).mkdir(parents=True)
    return tmp_path


def test_shape_of_the_document(ditattn, tmp_path):
    env = {"DITATTN_PLUGIN_PATH": f"relative:{tmp_path}", "DIFFUSION_ATTENTION_BACKEND": "sdpa"}
    for document in (ditattn.json("doctor"), ditattn.json("doctor", env=env)):
        assert list(document) == list(KEYS)
        for part, keys in KEYS.items():
            for entry in document[part] if isinstance(document[part], list) else [document[part]]:
                assert list(entry) == keys, part
        assert list(document["machine"]["cpu_features"]) == FEATURES
        for place in document["library"]["search_path"]:
            assert list(place) == ["directory", "exists"]
        for candidate in document["defaults"][0]["candidates"]:
            assert list(candidate) == ["backend", "accepted", "reason"]
    assert [list(entry) for entry in document["library"]["ignored"]] == [["entry", "reason"]]
    assert list(document["defaults"][0]["explicit"]) == ["source", "value", "reason"]


def test_machine(ditattn):
    machine = ditattn.json("doctor", env={"DITATTN_NUM_THREADS": "3"})["machine"]
    flags = next((x for x in open("/proc/cpuinfo") if x.startswith(("flags", "Features"))), ":").split(":")[1].split()
    assert machine["cpu_features"] == {feature: feature in flags for feature in FEATURES}
    assert machine["threads"] == 3
    assert machine["cpu_level"] == machine["best_cpu_level"]
    lower = ditattn.json("doctor", env={"DITATTN_CPU_LEVEL": "sse2"})
    assert (lower["machine"]["cpu_level"], lower["machine"]["best_cpu_level"]) == ("sse2", machine["best_cpu_level"])
    assert named(lower["backends"])["FLASH_ATTN"]["engine"].split("; ")[0].endswith("sse2"), "the kernels' own word"


def test_library(ditattn):
    library = ditattn.json("doctor")["library"]
    assert ditattn.ok("--version") == f"ditattn {library['version']}\n"
    assert Path(library["file"]).is_file() and Path(library["file"]).name == "libditattn.so.0.1"
    installed = str(Path(library["file"]).parent / "ditattn/backends")
    assert library["search_path"] == [{"directory": installed, "exists": True}]
    assert library["ignored"] == []


def test_backends_as_listed(ditattn):
    """The same members, paths and whole reasons as `list`; a remedy for each that is not available."""
    listed = by_name(ditattn.json("list"))
    backends = ditattn.json("doctor")["backends"]
    assert [backend["name"] for backend in backends] == list(PATHS)
    for backend in backends:
        same = ("class_path", "overridden", "available", "engine", "reason")
        assert {k: backend[k] for k in same} == {k: listed[backend["name"]][k] for k in same}
        assert (backend["remedy"] is None) == backend["available"]


def test_custom(ditattn):
    custom = named(ditattn.json("doctor")["backends"])["CUSTOM"]
    assert custom["reason"] == NOT_REGISTERED
    example = "register_diffusion_backend(DiffusionAttentionBackendEnum.CUSTOM, 'your.module.YourClass')"
    assert example in custom["remedy"]
    assert custom["remedy"] in ditattn.ok("doctor")


def test_what_is_not_included(stand_ins):
    """Without its plug-in and without a reason from the build, where a file would have to be put."""
    moved = stand_ins.json("doctor", env={"DITATTN_PLUGIN_PATH": ""})
    sage = named(moved["backends"])["SAGE_ATTN_3"]
    assert "no such module" in sage["reason"] and str(MISSING_FILE) in sage["remedy"]
    assert moved["library"]["search_path"][0]["exists"] is False
    assert named(moved["devices"])["cpu"]["usable"] is False
    assert moved["defaults"][0]["platform_default"] is None and moved["defaults"][0]["in_effect"] is None
    assert "none: no candidate is available" in stand_ins.ok("doctor", env={"DITATTN_PLUGIN_PATH": ""})


def test_not_built(ditattn, tmp_path):
    """A member whose reason the build left: how to build it, or what that reason names."""
    shutil.copytree(ditattn.program.parent.parent / "bin", tmp_path / "bin")
    library = tmp_path / "lib"
    library.mkdir()
    for name in ("libditattn.so.0.1", "libditattn_command.so", "libtvm_ffi.so"):
        shutil.copy(ditattn.program.parent.parent / "lib" / name, library)
    modules = library / "ditattn/backends" / MODULES
    modules.mkdir(parents=True)
    (modules / "flashinfer_attn.not_built").write_text("not built: ditattn was configured without DITATTN_CUDA\n")
    (modules / "cudnn_attn.not_built").write_text("cuDNN's headers were not found\n")
    command = type(ditattn)(tmp_path / "bin" / "ditattn")
    backends = named(command.json("doctor")["backends"])
    assert "DITATTN_CUDA" in backends["FLASHINFER_ATTN"]["reason"]
    assert backends["FLASHINFER_ATTN"]["remedy"] == "Build ditattn with its GPU back ends: make cuda."
    assert "cuDNN's headers were not found" in backends["CUDNN_ATTN"]["reason"]
    assert backends["CUDNN_ATTN"]["remedy"] == "Provide what the reason names, and build ditattn again."


def test_broken_plugin(stand_ins, plugin_folder):
    file = plugin_folder / MISSING_FILE
    file.write_bytes(b"no library at all" * 100)
    env = {"DITATTN_PLUGIN_PATH": str(plugin_folder)}
    sage = named(stand_ins.json("doctor", env=env)["backends"])["SAGE_ATTN_3"]
    assert f"{file}: module failed to load" in sage["reason"] and "invalid ELF header" in sage["reason"]
    assert sage["remedy"] == f"Replace {file} by a shared library built for this machine, or remove it."
    text = stand_ins.ok("doctor", env=env)
    assert "invalid ELF header" in text and sage["remedy"] in text


def test_plugin_cut_short(stand_ins, plugin_folder):
    file = plugin_folder / MISSING_FILE
    whole = Path(os.environ["DITATTN_TEST_PLUGIN"]).read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    sage = named(stand_ins.json("doctor", env={"DITATTN_PLUGIN_PATH": str(plugin_folder)})["backends"])["SAGE_ATTN_3"]
    assert f"Copy {file} again" in sage["remedy"]


def test_backend_without_its_device(stand_ins):
    cudnn = named(stand_ins.json("doctor")["backends"])["CUDNN_ATTN"]
    assert cudnn["reason"] == "CUDNN_ATTN needs a CUDA device; none was found."
    assert cudnn["engine"] == "stand-in for tests" and "NVIDIA GPU" in cudnn["remedy"]


@pytest.mark.parametrize(
    "name, value, note",
    [
        ("DIFFUSION_ATTENTION_BACKEND", "nope", "Unknown diffusion attention backend: 'NOPE'. Valid options are: "),
        ("DIFFUSION_ATTENTION_BACKEND", "custom", "CUSTOM is not available here"),
        ("DITATTN_PLUGIN_PATH", "here:/nowhere", "'here' is ignored, because it is not absolute. '/nowhere' is no dir"),
        ("DITATTN_NUM_THREADS", "many", "DITATTN_NUM_THREADS='many' is not a whole number from 1 to 1024."),
        ("DITATTN_NUM_THREADS", "0", "DITATTN_NUM_THREADS='0' is not a whole number from 1 to 1024."),
        ("DITATTN_CPU_LEVEL", "AVX9", "'AVX9' is not a level this CPU has. Valid here: sse2"),
        ("DITATTN_GPU_LEVEL", "9.0", "'9.0' is not one of 75, 80, 89, 90."),
        ("DITATTN_TUNE", "never", "DITATTN_TUNE is 'never'. Valid modes are: use, off, frozen, online"),
        ("DITATTN_TUNE_CACHE", "here", "DITATTN_TUNE_CACHE is 'here', expected an absolute directory."),
    ],
)
def test_broken_variables(ditattn, name, value, note):
    variable = named(ditattn.json("doctor", env={name: value})["environment"])[name]
    assert variable["value"] == value and note in variable["note"]
    assert note in ditattn.ok("doctor", env={name: value})


def test_good_variables(ditattn, tmp_path):
    env = {
        "DIFFUSION_ATTENTION_BACKEND": "flash_attn",
        "DITATTN_PLUGIN_PATH": str(tmp_path),
        "DITATTN_NUM_THREADS": "1",
        "DITATTN_CPU_LEVEL": "sse2",
        "DITATTN_GPU_LEVEL": "80",
        "DITATTN_TUNE": "frozen",
        "DITATTN_TUNE_CACHE": str(tmp_path),
    }
    variables = named(ditattn.json("doctor", env=env)["environment"])
    assert {name: variables[name] for name in env} == {
        name: {"name": name, "value": value, "note": None} for name, value in env.items()
    }
    unset = ditattn.json("doctor")["environment"]
    page = (Path(__file__).parents[2] / "docs/environment.md").read_text()
    documented = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    assert {variable["name"] for variable in unset} == documented
    given = {"DITATTN_TUNE": "off"}  # by every test
    assert all(variable["value"] == given.get(variable["name"]) and variable["note"] is None for variable in unset)


def test_everything_broken_at_once(ditattn):
    env = {
        "DIFFUSION_ATTENTION_BACKEND": "nope",
        "DITATTN_PLUGIN_PATH": "a:b",
        "DITATTN_NUM_THREADS": "-1",
        "DITATTN_CPU_LEVEL": "none",
    }
    document = ditattn.json("doctor", env=env)
    assert all(named(document["environment"])[name]["note"] for name in env)
    assert (document["machine"]["threads"], document["machine"]["cpu_level"]) == (None, None)
    backends = named(document["backends"])
    assert "DITATTN_CPU_LEVEL" in backends["FLASH_ATTN"]["remedy"]
    assert backends["TORCH_SDPA"]["available"]
    assert document["defaults"][0]["platform_default"] == "TORCH_SDPA"


def test_relative_search_path(ditattn, tmp_path):
    library = ditattn.json("doctor", env={"DITATTN_PLUGIN_PATH": f"relative/path:{tmp_path}:/nowhere"})["library"]
    assert library["search_path"][1:] == [
        {"directory": str(tmp_path), "exists": True},
        {"directory": "/nowhere", "exists": False},
    ]
    assert library["ignored"] == [{"entry": "relative/path", "reason": "it is not absolute"}]


def test_defaults(ditattn, stand_ins):
    entry = ditattn.json("doctor")["defaults"][0]
    assert entry["candidates"] == [
        {"backend": name, "accepted": True, "reason": None} for name in ("FLASH_ATTN", "TORCH_SDPA")
    ]
    assert (entry["device"], entry["platform_default"]) == ("cpu", "FLASH_ATTN")
    assert (entry["explicit"], entry["in_effect"]) == (None, "FLASH_ATTN")
    # FLASH_ATTN is broken there: the default moves on, and an explicit choice does not.
    broken = stand_ins.json("doctor")["defaults"][0]
    assert broken["candidates"][0]["accepted"] is False and "failed to load" in broken["candidates"][0]["reason"]
    assert (broken["platform_default"], broken["in_effect"]) == ("TORCH_SDPA", "TORCH_SDPA")


@pytest.mark.parametrize(
    "value, is_set, in_effect",
    [("torch_sdpa", True, "TORCH_SDPA"), ("SAGE_ATTN", True, "SAGE_ATTN"), ("auto", False, "TORCH_SDPA")],
)
def test_explicit_setting(stand_ins, value, is_set, in_effect):
    entry = stand_ins.json("doctor", env={"DIFFUSION_ATTENTION_BACKEND": value})["defaults"][0]
    setting = {"source": "DIFFUSION_ATTENTION_BACKEND", "value": value, "reason": None}
    assert (entry["explicit"], entry["in_effect"]) == (setting if is_set else None, in_effect)


@pytest.mark.parametrize("value, says", [("nope", "'NOPE'"), ("flash_attn", "failed to load")])
def test_explicit_setting_that_cannot_be_followed(stand_ins, value, says):
    entry = stand_ins.json("doctor", env={"DIFFUSION_ATTENTION_BACKEND": value})["defaults"][0]
    assert says in entry["explicit"]["reason"]
    assert (entry["platform_default"], entry["in_effect"]) == ("TORCH_SDPA", None)


def test_libraries(ditattn):
    """On this machine, whatever it has: where each was found, or the linker's own words and what to install."""
    libraries = ditattn.json("doctor")["libraries"]
    assert [library["name"] for library in libraries] == [
        "NVIDIA driver", "CUDA runtime", "cuDNN", "LibTorch", "NCCL", "MPI",
    ]  # fmt: skip
    for library in libraries:
        assert library["purpose"] and library["install"]
        assert (library["reason"] is None) == library["found"] == (library["file"] is not None)
        if library["found"]:
            assert Path(library["file"]).is_file()
        else:
            assert all(soname in library["reason"] for soname in library["sonames"])
            assert f"To have {library['name']}: {library['install']}" in ditattn.ok("doctor")


SOURCE = {
    "found": "",
    "crashes": "__attribute__((constructor)) static void f(void) { __builtin_trap(); }",
    "exits": "void _exit(int); __attribute__((constructor)) static void f(void) { _exit(0); }",
    "prints": '#include <stdio.h>\n__attribute__((constructor)) static void f(void) { puts("noise"); fflush(stdout); }',
}


@pytest.mark.parametrize("kind", [*SOURCE, "garbage"])
def test_libraries_of_all_kinds(ditattn, tmp_path, kind):
    """A library that fails in its own way breaks nothing else."""
    file = tmp_path / "libnccl.so.2"
    if kind == "garbage":
        file.write_bytes(b"no library at all" * 100)
    else:
        build = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(file)]
        subprocess.run(build, input=SOURCE[kind], text=True, check=True)
    env = {"LD_LIBRARY_PATH": str(tmp_path)}
    nccl = named(ditattn.json("doctor", env=env)["libraries"])["NCCL"]
    if kind in ("found", "prints"):
        assert (nccl["found"], nccl["file"]) == (True, str(file))
        assert "noise" not in ditattn.ok("doctor", env=env)
    else:
        says = {"crashes": "it crashed while", "exits": "ended the process", "garbage": "invalid ELF header"}[kind]
        assert not nccl["found"] and says in nccl["reason"]
        assert "pip install nvidia-nccl" in nccl["install"]


def test_what_was_tuned(ditattn, tmp_path):
    env = {"DITATTN_TUNE": "use", "DITATTN_TUNE_CACHE": str(tmp_path)}
    before = ditattn.json("doctor", env=env)["defaults"][0]["tuned"]
    file = Path(before["file"])
    assert before["problems"] == 0 and file.parent == tmp_path and not file.exists()
    ditattn("tune", "--shape", "1,2,64,64,32", "--budget", "50", env=env)
    assert ditattn.json("doctor", env=env)["defaults"][0]["tuned"] == {"problems": 1, "file": str(file)} and file.exists()
    assert f"problems: 1, in {file}" in ditattn("doctor", env=env).stdout


def test_devices(ditattn):
    cpu, cuda = ditattn.json("doctor")["devices"]
    assert (cpu["name"], cpu["present"], cpu["usable"], cpu["reason"]) == ("cpu", True, True, None)
    files = sorted(str(file) for file in Path("/dev").glob("nvidia[0-9]*"))
    assert (cuda["name"], cuda["present"]) == ("cuda", bool(files))
    driver = ["/proc/driver/nvidia"] if Path("/proc/driver/nvidia").exists() else []
    assert cuda["evidence"] == files + driver
    assert cuda["usable"] or cuda["reason"]


def test_text_has_every_part(ditattn):
    text = ditattn.ok("doctor")
    document = ditattn.json("doctor")
    starts = [line.split("  ")[0] for line in text.splitlines()]
    parts = ["machine", "library", "environment", "optional library", "device", "backend", "default"]
    assert [start for start in starts if start in parts and start] == [*parts, "device"]
    for library in document["libraries"]:
        assert library["name"] in text
    for backend in document["backends"]:
        assert backend["name"] in text and backend["class_path"] in text
        for line in (backend["reason"] or "").splitlines() + [backend["remedy"] or ""]:
            assert line.strip() in text
    assert "used by" in text or "This version uses none of them yet" in text


def test_nothing_commands_the_terminal(ditattn):
    """Piped: no codes of ours, and none from the environment; a value stays on its line."""
    evil = "\x1b[31mred\nFORGED  available\x9b\u0085"
    names = ("DIFFUSION_ATTENTION_BACKEND", "DITATTN_PLUGIN_PATH", "DITATTN_NUM_THREADS", "DITATTN_CPU_LEVEL")
    env = {name: evil for name in names} | {"NO_COLOR": ""}
    text = ditattn.ok("doctor", env=env)
    assert not [c for c in text if (ord(c) < 32 and c != "\n") or 0x7F <= ord(c) < 0xA0]
    assert "?[31mred?FORGED" in text
    assert named(ditattn.json("doctor", env=env)["environment"])["DITATTN_NUM_THREADS"]["value"] == evil


@pytest.mark.parametrize("verb", [["doctor"], ["info", "SAGE_ATTN_3"]])
def test_broken_utf8(stand_ins, verb):
    """Where looking for a back end fails, whose error has every place."""
    env = {**stand_ins.environment(), "DITATTN_PLUGIN_PATH": b"/" + b"\x80" * 300}
    done = subprocess.run([str(stand_ins.program), *verb], env=env, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"/" + b"?" * 300 in done.stdout


@pytest.mark.parametrize("args", [["stray"], ["--frobnicate"]])
def test_wrong_usage(ditattn, args):
    assert args[0] in ditattn.fails(2, "doctor", *args)
