"""Bad input: each a clear error on stderr and its exit status, nothing on stdout, nothing written."""

import json
import os
import struct
import subprocess

import numpy as np
import pytest
from tensors import encode, save

SHAPE = (1, 8, 2, 16)
ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
DATA = bytes(16)


def good_tensors(**changes):
    tensors = {name: np.ones(SHAPE, np.float32) for name in ("query", "key", "value")} | changes
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.fixture
def good(tmp_path):
    folder = tmp_path / "input"
    folder.mkdir()
    return save(folder / "good.safetensors", good_tensors())


@pytest.fixture
def target(tmp_path):
    """Where output would go; the test fails if anything is there afterwards."""
    folder = tmp_path / "output"
    folder.mkdir()
    yield folder / "out.safetensors"
    assert list(folder.iterdir()) == []


# Usage: status 2.


@pytest.mark.parametrize(
    "args, says",
    [
        ([], "list, info, run, compare, models"),
        (["frobnicate"], "frobnicate"),
        (["list", "--frobnicate"], "--frobnicate"),
        (["list", "info"], "info"),
        (["info"], "NAME"),
        (["run"], "--input"),
        (["run", "--input", "a"], "--output"),
        (["run", "--input", "a", "--input", "b", "--output", "c"], "--input"),
        (["run", "--input", "a", "--output", "b", "--scale", "nan"], "nan"),
        (["run", "--input", "a", "--output", "b", "--scale", "inf"], "inf"),
        (["run", "--input", "a", "--output", "b", "--scale", "big"], "big"),
        (["run", "--input", "a", "--output", "b", "--device", "tpu"], "Valid devices are: cpu, cuda"),
        (["run", "--input", "a", "--output", "b", "--backend", "x.y/../Z"], "'X.Y/../Z'"),
        (["run", "--input", "a", "--output", "b", "--joint-strategy", "middle"], "middle"),
        (["run", "--input", "a", "--output", "b", "--valid-kv-length", "some"], "--valid-kv-length"),
        (["compare", "--shape", "1,2,3,4"], "has 4 sizes, expected 5"),
        (["compare", "--shape", "1,2,3,4,5,6"], "has 6 sizes, expected 5"),
        (["compare", "--shape", "1,2,3,4,0"], "'0' is not a whole number"),
        (["compare", "--shape", "1,2,3,4,-5"], "'-5' is not a whole number"),
        (["compare", "--shape", "1,2,3,4,5x"], "'5x' is not a whole number"),
        (["compare", "--shape", "1,2,3,4,99999999999999999999"], "'99999999999999999999'"),
        (["compare", "--shape", "1,2,,4,5"], "'' is not a whole number"),
        (["compare", "--shape", "1,1,1,1,8", "stray"], "stray"),
        (["compare", "--dtype", "int8"], "'int8' is not one of float32, float16, bfloat16"),
        (["compare", "--dtype", "bool"], "'bool' is not one of"),
        (["compare", "--backends", "FLASH_ATTN,"], "empty name"),
        (["compare", "--backends", "FLASH_ATTN,nope"], "Unknown diffusion attention backend: 'NOPE'"),
        (["compare", "--max-error", "-1"], "--max-error"),
        (["compare", "--max-error", "nan"], "--max-error"),
        (["compare", "--repeats", "0"], "--repeats"),
        (["compare", "--seed", "-1"], "--seed"),
        (["compare", "--seed", "1.5"], "--seed"),
        (["compare", "--device", "tpu"], "Unknown device 'tpu'"),
    ],
)
def test_wrong_usage(ditattn, args, says):
    assert says in ditattn.fails(2, *args)


def test_unknown_backend_in_the_environment(ditattn, good, target):
    error = ditattn.fails(
        2, "run", "--input", good, "--output", target, "--json", env={"DIFFUSION_ATTENTION_BACKEND": "nope"}
    )
    assert (
        "Unknown diffusion attention backend: 'NOPE'. Valid options are: FLASH_ATTN, TORCH_SDPA, SAGE_ATTN, "
        "SAGE_ATTN_3, CUDNN_ATTN, FLASHINFER_ATTN, CUSTOM" in error
    )


@pytest.mark.parametrize("count", ["0", "-3", "many", "4096"])
def test_bad_thread_count(ditattn, good, target, count):
    error = ditattn.fails(2, "run", "--input", good, "--output", target, env={"DITATTN_NUM_THREADS": count})
    assert f"DITATTN_NUM_THREADS='{count}'" in error


def test_help_and_version(ditattn):
    assert ditattn.ok("--version").startswith("ditattn 0.")
    text = ditattn.ok("--help")
    for needed in ("Exit status:", "DIFFUSION_ATTENTION_BACKEND", "DITATTN_PLUGIN_PATH", "compare"):
        assert needed in text
    assert "--max-error" in ditattn.ok("compare", "--help")


# Unavailable: status 3.


def test_unregistered_backend(ditattn, good, target):
    error = ditattn.fails(3, "run", "--backend", "CUSTOM", "--input", good, "--output", target)
    assert "Backend CUSTOM must be registered before use." in error


def test_backend_that_cannot_be_imported(stand_ins, good, target):
    error = stand_ins.fails(3, "run", "--backend", "FLASH_ATTN", "--input", good, "--output", target)
    assert "flash_attn.FlashAttentionBackend" in error and "module failed to load" in error


def test_environment_is_an_explicit_choice(stand_ins, good, target):
    """FLASH_ATTN is broken there: never silently replaced."""
    env = {"DIFFUSION_ATTENTION_BACKEND": "flash_attn"}
    assert "module failed to load" in stand_ins.fails(3, "run", "--input", good, "--output", target, env=env)


def test_backend_without_its_device(stand_ins, good, target):
    error = stand_ins.fails(3, "run", "--backend", "cudnn_attn", "--input", good, "--output", target)
    assert "needs a CUDA device" in error
    assert "needs a CUDA device" in stand_ins.fails(3, "compare", "--backends", "TORCH_SDPA,CUDNN_ATTN")


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="there is a GPU")
def test_device_that_this_machine_lacks(ditattn, good, target):
    missing = "Device 'cuda' is unavailable: the NVIDIA driver"
    assert missing in ditattn.fails(3, "run", "--device", "cuda", "--input", good, "--output", target)
    assert missing in ditattn.fails(3, "compare", "--device", "cuda")


# Files: status 4.


def entry(**changes):
    return ENTRY | changes


BAD_FILES = {
    "empty": (b"", "too few"),
    "shorter than its length field": (b"\x01\x02\x03", "too few"),
    "truncated header": (encode({"query": ENTRY}, DATA)[:20], "past the end"),
    "truncated data": (encode({"query": ENTRY}, DATA)[:-5], "outside"),
    "header length lies by one": (encode({"query": ENTRY}, DATA, length=500), "past the end"),
    "header length too short": (encode({"query": ENTRY}, DATA, length=9), "JSON"),
    "huge header length": (struct.pack("<Q", 2**63) + b"{}", "over the limit"),
    "largest header length": (struct.pack("<Q", 2**64 - 1) + b"{}", "over the limit"),
    "not JSON": (encode(b"{query", b""), "JSON"),
    "not UTF-8": (encode(b'{"\xff\xfe": 1}', b""), "JSON"),
    "an array": (encode(b"[]", b""), "not a JSON object"),
    "nested too deeply": (encode(b'{"a":' * 20000 + b"1" + b"}" * 20000, b""), "nested too deeply"),
    "arrays nested too deeply": (encode(b'{"a":' + b"[" * 100000, b""), "nested too deeply"),
    "a name twice": (
        encode(b'{"query":%s,"query":%s}' % ((json.dumps(ENTRY).encode(),) * 2), DATA),
        "'query' occurs twice",
    ),
    "an entry that is no object": (encode({"query": 7}, b""), "not an object"),
    "offsets outside the file": (encode({"query": entry(data_offsets=[1000, 1016])}, DATA), "outside"),
    "offsets backwards": (encode({"query": entry(data_offsets=[16, 0])}, DATA), "outside"),
    "negative offsets": (encode({"query": entry(data_offsets=[-16, 0])}, DATA), "data_offsets"),
    "three offsets": (encode({"query": entry(data_offsets=[0, 8, 16])}, DATA), "data_offsets"),
    "no offsets": (encode({"query": {"dtype": "F32", "shape": [2, 2]}}, DATA), "data_offsets"),
    "overlapping tensors": (
        encode({"query": entry(), "key": entry(data_offsets=[8, 24])}, bytes(24)),
        "hole or overlap",
    ),
    "a hole": (encode({"query": entry(), "key": entry(data_offsets=[24, 40])}, bytes(40)), "hole or overlap"),
    "data of no tensor": (encode({"query": ENTRY}, DATA + b"more"), "belong to no tensor"),
    "unknown dtype": (encode({"query": entry(dtype="F8_E4M3")}, DATA), "F8_E4M3"),
    "dtype that is no text": (encode({"query": entry(dtype=32)}, DATA), "dtype 32"),
    "shape and offsets disagree": (encode({"query": entry(shape=[2, 3])}, DATA), "needs 24 bytes"),
    "negative size": (encode({"query": entry(shape=[-2, -2])}, DATA), "shape"),
    "fractional size": (encode({"query": entry(shape=[2.5, 2])}, DATA), "shape"),
    "overflowing shape": (encode({"query": entry(shape=[2**40, 2**40])}, DATA), "overflows"),
    "size past 64 bits": (encode({"query": entry(shape=[2**70])}, DATA), "shape"),
    "metadata that is no object": (encode({"__metadata__": 3}, b""), "__metadata__"),
    "metadata that is no text": (encode({"__metadata__": {"a": 1}}, b""), "__metadata__"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_malformed_file(ditattn, tmp_path, target, kind):
    content, says = BAD_FILES[kind]
    source = tmp_path / "bad.safetensors"
    source.write_bytes(content)
    for args in (["run", "--input", source, "--output", target], ["compare", "--input", source]):
        error = ditattn.fails(4, *args, "--json")
        assert "bad.safetensors" in error and says in error
        assert len(error) < 2000


def test_header_that_is_really_huge(ditattn, tmp_path, target):
    """Within the format's 100 MB limit, but more than the file holds: refused before anything is allocated."""
    source = tmp_path / "bad.safetensors"
    source.write_bytes(struct.pack("<Q", 99_000_000) + b"{}")
    assert "past the end" in ditattn.fails(4, "run", "--input", source, "--output", target)


def test_missing_file_and_directory(ditattn, tmp_path, target):
    assert "no such file" in ditattn.fails(4, "run", "--input", tmp_path / "none", "--output", target)
    assert "directory" in ditattn.fails(4, "run", "--input", tmp_path, "--output", target)
    assert "no such file" in ditattn.fails(4, "compare", "--input", tmp_path / "none")


ones = np.ones


def joint(*names):
    return {f"joint_{name}": ones(SHAPE, np.float32) for name in names}


def packed(**offsets):
    return {f"cu_seqlens_{side}": np.array(numbers, np.int32) for side, numbers in offsets.items()}


BAD_TENSORS = {
    "query missing": ({"query": None}, "has no tensor 'query'"),
    "value missing": ({"value": None}, "has no tensor 'value'"),
    "rank 3": ({"query": ones((8, 2, 16), np.float32)}, "query must have 4 dimensions"),
    "key of rank 1": ({"key": ones(16, np.float32)}, "key must have 4 dimensions"),
    "rank 0": ({"value": ones((), np.float32)}, "value must have 4 dimensions"),
    "dtypes differ": ({"key": ones(SHAPE, np.float16)}, "same dtype"),
    "int32": ({n: ones(SHAPE, np.int32) for n in ("query", "key", "value")}, "dtype=int32"),
    "float64": ({n: ones(SHAPE, np.float64) for n in ("query", "key", "value")}, "dtype=float64"),
    "batches differ": ({n: ones((2, 8, 2, 16), np.float32) for n in ("key", "value")}, "batch=2"),
    "head sizes differ": ({n: ones((1, 8, 2, 8), np.float32) for n in ("key", "value")}, "head_size=8"),
    "key and value differ": ({"value": ones((1, 9, 2, 16), np.float32)}, "same shape"),
    "heads do not divide": ({n: ones((1, 8, 3, 16), np.float32) for n in ("key", "value")}, "multiple of KV heads"),
    "no heads": ({n: ones((1, 8, 0, 16), np.float32) for n in ("query", "key", "value")}, "num_heads=0"),
    "no head size": ({n: ones((1, 8, 2, 0), np.float32) for n in ("query", "key", "value")}, "head_size=0"),
    "mask that does not fit": ({"attn_mask": ones((1, 9), bool)}, "does not broadcast"),
    "mask of rank 5": ({"attn_mask": ones((1, 1, 1, 8, 8), bool)}, "1 to 4 dimensions"),
    "integer mask": ({"attn_mask": ones((1, 8), np.int32)}, "attn_mask has dtype int32"),
    "joint_query alone": (joint("query"), "should be None or not None simultaneously"),
    "joint_value missing": (joint("query", "key"), "should be None or not None simultaneously"),
    "joint_attn_mask alone": ({"joint_attn_mask": ones((1, 8), bool)}, "joint_attn_mask needs joint_query"),
    "joint tensors of rank 1": (
        {f"joint_{n}": ones(8, np.float32) for n in ("query", "key", "value")},
        "joint_query must have 4 dimensions",
    ),
    "joint heads differ": (
        joint("key", "value") | {"joint_query": ones((1, 8, 3, 16), np.float32)},
        "joint_query has heads=3",
    ),
    "joint dtypes differ": (joint("key", "value") | {"joint_query": ones(SHAPE, np.float16)}, "joint_query is float16"),
    "joint mask that does not fit": (
        joint("query", "key", "value") | {"joint_attn_mask": ones((1, 9), bool)},
        "joint_attn_mask of shape (1, 9) does not broadcast",
    ),
    "cu_seqlens_q alone": (packed(q=[0, 8]), "missing ['cu_seqlens_k', 'max_seqlen_k']"),
    "max_seqlen alone": ({"max_seqlen_k": np.array(8, np.int32)}, "missing ['cu_seqlens_q', 'cu_seqlens_k', 'max"),
    "cu_seqlens of int64": (
        packed(q=[0, 8]) | {"cu_seqlens_k": np.array([0, 8])},
        "cu_seqlens_k must be a one-dimensional int32 tensor",
    ),
    "cu_seqlens that fall": (packed(q=[0, 5, 3, 8], k=[0, 2, 4, 8]), "cu_seqlens_q must start at 0 and ascend"),
    "cu_seqlens that end early": (packed(q=[0, 8], k=[0, 7]), "cu_seqlens_k ends at 7, expected 8"),
    "sequences that do not pair": (packed(q=[0, 8], k=[0, 4, 8]), "describes 1 sequences, cu_seqlens_k 2"),
    "max_seqlen too short": (
        packed(q=[0, 8], k=[0, 8]) | {"max_seqlen_q": np.array(7, np.int32)},
        "max_seqlen_q is 7, but the longest sequence has 8 tokens",
    ),
    "max_seqlen of float": (
        packed(q=[0, 8], k=[0, 8]) | {"max_seqlen_q": np.array(8, np.float32)},
        "'max_seqlen_q' is float32 (), expected one int32 or int64 number",
    ),
    "packed and joint": (
        packed(q=[0, 8], k=[0, 8]) | joint("query", "key", "value"),
        "cannot be combined",
    ),
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
@pytest.mark.parametrize("backend", ["FLASH_ATTN", "TORCH_SDPA"])
def test_refused_tensors(ditattn, tmp_path, target, kind, backend):
    changes, says = BAD_TENSORS[kind]
    source = save(tmp_path / "in.safetensors", good_tensors(**changes))
    assert says in ditattn.fails(4, "run", "--backend", backend, "--input", source, "--output", target)


@pytest.mark.parametrize("kind", [k for k in BAD_TENSORS if k not in ("int32", "float64")])
def test_compare_refuses_a_case_that_is_wrong_in_itself(ditattn, tmp_path, kind):
    changes, says = BAD_TENSORS[kind]
    source = save(tmp_path / "in.safetensors", good_tensors(**changes))
    assert says in ditattn.fails(4, "compare", "--input", source)


@pytest.mark.parametrize("length", [9, -1])
def test_valid_prefix_outside_the_keys(ditattn, good, target, length):
    error = ditattn.fails(4, "run", "--valid-kv-length", length, "--input", good, "--output", target)
    assert f"valid_kv_length must be within the K/V sequence, got {length} for length 8" in error


def test_problem_that_a_backend_refuses(stand_ins, good, target):
    error = stand_ins.fails(4, "run", "--backend", "FLASHINFER_ATTN", "--input", good, "--output", target)
    assert "head_size=16" in error and "64, 128, 256" in error and "would do" in error


def test_lse_from_a_backend_without(stand_ins, good, target):
    error = stand_ins.fails(4, "run", "--backend", "TORCH_SDPA", "--lse", "--input", good, "--output", target)
    assert "log-sum-exp" in error


def test_backend_that_breaks_down(stand_ins, tmp_path, target):
    tensors = {name: np.ones((1, 8, 2, 64), np.float32) for name in ("query", "key", "value")}
    source = save(tmp_path / "in.safetensors", tensors)
    error = stand_ins.fails(1, "run", "--backend", "FLASHINFER_ATTN", "--input", source, "--output", target)
    assert "the engine broke down" in error


def test_more_than_memory(ditattn):
    assert "this machine has" in ditattn.fails(4, "compare", "--shape", "100000,100000,25600,256,64")


# Output: status 4, nothing left behind.


def test_unwritable_output(ditattn, good, tmp_path):
    a_file = tmp_path / "file"
    a_file.write_text("mine")
    a_folder = tmp_path / "folder"
    a_folder.mkdir()
    for output in (tmp_path / "missing" / "out", a_file / "out", a_folder):
        assert str(output) in ditattn.fails(4, "run", "--input", good, "--output", output)
        assert str(output) in ditattn.fails(
            4, "compare", "--input", good, "--repeats", "1", "--report", output, "--json"
        )
    assert {file.name for file in tmp_path.iterdir()} == {"file", "folder", "input"}
    assert a_file.read_text() == "mine" and list(a_folder.iterdir()) == []


def test_failure_leaves_the_old_output(ditattn, good, tmp_path):
    output = tmp_path / "out"
    output.write_text("mine")
    ditattn.fails(3, "run", "--backend", "CUSTOM", "--input", good, "--output", output)
    ditattn.fails(4, "run", "--input", tmp_path / "none", "--output", output)
    assert output.read_text() == "mine"


@pytest.mark.parametrize("status, arguments", [
    (2, ["nonsense"]),
    (2, ["list", "--nonsense"]),
    (3, ["compare", "--backends", "CUSTOM", "--shape", "1,1,8,8,16"]),
    (4, ["run", "--input", "/none", "--output", "/none"]),
])  # fmt: skip
def test_where_no_error_can_be_written_the_status_tells(ditattn, status, arguments):
    with open("/dev/full", "w") as full:
        assert subprocess.run([str(ditattn.program), *arguments], stderr=full).returncode == status
    closed = subprocess.run([str(ditattn.program), *arguments], preexec_fn=lambda: os.close(2))
    assert closed.returncode == status


def test_full_disk_behind_stdout(ditattn):
    with open("/dev/full", "w") as full:
        done = subprocess.run([str(ditattn.program), "list"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 4 and "standard output" in done.stderr
