"""`ditattn list` and `ditattn info`."""

import os
import pty
import subprocess

import pytest

PREFIX = "vllm_omni.diffusion.attention.backends."
PATHS = {
    "FLASH_ATTN": PREFIX + "flash_attn.FlashAttentionBackend",
    "TORCH_SDPA": PREFIX + "sdpa.SDPABackend",
    "SAGE_ATTN": PREFIX + "sage_attn.SageAttentionBackend",
    "SAGE_ATTN_3": PREFIX + "sage_attn3.SageAttention3Backend",
    "CUDNN_ATTN": PREFIX + "cudnn_attn.CuDNNAttentionBackend",
    "FLASHINFER_ATTN": PREFIX + "flashinfer_attn.FlashInferAttentionBackend",
    "CUSTOM": "",
}
FIELDS = [
    "name", "class_path", "default_path", "overridden", "available", "reason", "engine", "devices", "dtypes",
    "head_sizes", "masks", "gqa", "causal", "lse",
]  # fmt: skip
NOT_REGISTERED = (
    "Backend CUSTOM must be registered before use. Use "
    "register_diffusion_backend(DiffusionAttentionBackendEnum.CUSTOM, 'your.module.YourClass')"
)


def by_name(document):
    return {entry["name"]: entry for entry in document["backends"]}


def test_members_in_order_with_their_paths(ditattn):
    document = ditattn.json("list")
    assert list(document) == ["backends"]
    assert [(b["name"], b["class_path"], b["default_path"]) for b in document["backends"]] == [
        (name, path, path) for name, path in PATHS.items()
    ]


def test_fields(ditattn):
    for entry in ditattn.json("list")["backends"]:
        assert list(entry) == FIELDS
        assert entry["overridden"] is False
        assert (entry["reason"] is None) == entry["available"]
        assert set(entry["masks"]) <= {"padding", "bool", "additive", "spans"}


@pytest.mark.parametrize("name", ["FLASH_ATTN", "TORCH_SDPA"])
def test_cpu_backends_are_available(ditattn, name):
    entry = by_name(ditattn.json("list"))[name]
    assert entry["available"], entry["reason"]
    assert entry["engine"]
    assert "cpu" in entry["devices"]
    assert entry["dtypes"] == ["float32", "float16", "bfloat16"]
    assert entry["head_sizes"] is None
    assert {"padding", "bool", "additive"} <= set(entry["masks"])
    assert entry["gqa"] and entry["causal"] and entry["lse"]


@pytest.mark.parametrize(
    "name, engine", [("SAGE_ATTN", "own quantized kernels, "), ("SAGE_ATTN_3", "emulated NVFP4, ")]
)
def test_the_quantized_cpu_backends_are_available(ditattn, name, engine):
    entry = by_name(ditattn.json("list"))[name]
    assert entry["available"], entry["reason"]
    assert entry["engine"].startswith(engine) and "cpu" in entry["devices"]
    assert entry["dtypes"] == ["float32", "float16", "bfloat16"]
    assert entry["head_sizes"] == {"min": 1, "max": 256, "multiple": 1}
    assert entry["masks"] == ["padding", "spans"]
    assert entry["gqa"] and entry["causal"] and entry["lse"]


def test_stand_ins(stand_ins):
    entries = by_name(stand_ins.json("list"))
    assert entries["TORCH_SDPA"]["available"] and entries["TORCH_SDPA"]["engine"] == "stand-in for tests"
    assert entries["TORCH_SDPA"]["lse"] is False
    assert entries["FLASHINFER_ATTN"]["head_sizes"] == [64, 128, 256]
    assert entries["FLASHINFER_ATTN"]["masks"] == []
    # Importable but without its device: what it could do is known, and why it cannot here.
    cudnn = entries["CUDNN_ATTN"]
    assert (cudnn["available"], cudnn["engine"]) == (False, "stand-in for tests")
    assert cudnn["reason"] == "CUDNN_ATTN needs a CUDA device; none was found."
    assert cudnn["head_sizes"] == {"min": 8, "max": 256, "multiple": 8}


def test_a_broken_plugin_breaks_only_itself(stand_ins):
    entries = by_name(stand_ins.json("list"))
    broken = entries["FLASH_ATTN"]
    assert not broken["available"]
    assert PATHS["FLASH_ATTN"] in broken["reason"] and "flash_attn.so: module failed to load" in broken["reason"]
    assert (broken["engine"], broken["devices"], broken["dtypes"], broken["head_sizes"]) == (None, [], [], None)


def test_custom_is_unset(ditattn):
    assert by_name(ditattn.json("list"))["CUSTOM"]["reason"] == NOT_REGISTERED


def test_table(stand_ins):
    lines = stand_ins.ok("list").splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(PATHS)
    start = lines[0].index("engine")
    assert all(line[start - 2 : start] == "  " and line[start] != " " for line in lines), lines
    assert "needs a CUDA device" in lines[5]


@pytest.mark.parametrize("no_color, coloured", [("", True), ("1", False)])
def test_colour_only_where_wanted(ditattn, no_color, coloured):
    """On a terminal, unless NO_COLOR is set; elsewhere never."""
    env = ditattn.environment(NO_COLOR=no_color)
    main, terminal = pty.openpty()
    done = subprocess.run([str(ditattn.program), "list"], env=env, stdout=terminal, timeout=60)
    shown = os.read(main, 100_000)
    os.close(terminal)
    os.close(main)
    assert done.returncode == 0 and b"FLASH_ATTN" in shown
    assert (b"\x1b[" in shown) == coloured
    assert "\x1b[" not in ditattn.ok("list", env={"NO_COLOR": no_color})


@pytest.mark.parametrize("name", ["FLASH_ATTN", "flash_attn", "Torch_Sdpa"])
def test_info_of_an_available_backend(ditattn, name):
    info = ditattn.json("info", name)
    member = name.upper()
    assert {field: info[field] for field in FIELDS} == by_name(ditattn.json("list"))[member]
    assert info["reported_name"] == ("SDPA" if member == "TORCH_SDPA" else member)
    assert info["causal_alignment"] == ("top-left" if member == "TORCH_SDPA" else "bottom-right")
    assert info["masked_nan"] == "hidden"
    assert [place["exists"] for place in info["looked_in"]] == [True]
    text = ditattn.ok("info", name)
    assert PATHS[member] in text and info["engine"] in text and info["causal_alignment"] in text


def test_info_of_an_unavailable_backend(stand_ins):
    info = stand_ins.json("info", "FLASH_ATTN")
    assert not info["available"] and "module failed to load" in info["reason"]
    assert (info["reported_name"], info["causal_alignment"], info["graph_safe"], info["masked_nan"]) == (None,) * 4
    assert [place["exists"] for place in info["looked_in"]] == [False, True]
    assert "module failed to load" in stand_ins.ok("info", "FLASH_ATTN")


def test_info_of_custom(ditattn):
    info = ditattn.json("info", "custom")
    assert (info["class_path"], info["reason"], info["looked_in"]) == ("", NOT_REGISTERED, [])


def test_info_of_no_member(ditattn):
    error = ditattn.fails(2, "info", "nope")
    assert f"Unknown diffusion attention backend: 'NOPE'. Valid options are: {', '.join(PATHS)}" in error
