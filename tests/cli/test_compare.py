"""`ditattn compare`; errors are computed again in NumPy."""

import json
import math
import os
import pty
import shutil
import subprocess

import numpy as np
import pytest
from tensors import attention, error_bound, load, normal, relative_error, rounded, save

CASE_FIELDS = {
    "case", "shape", "kv_heads", "dtype", "device", "mask", "causal", "sample_rows", "error_bound", "results",
    "recommended",
}  # fmt: skip
RESULT_FIELDS = [
    "backend", "engine", "status", "reason", "median_ms", "min_ms", "tflops", "rel_l2", "max_abs", "cosine",
]  # fmt: skip
NUMBERS = RESULT_FIELDS[4:]
MEMBERS = ["FLASH_ATTN", "TORCH_SDPA", "SAGE_ATTN", "SAGE_ATTN_3", "CUDNN_ATTN", "FLASHINFER_ATTN", "CUSTOM"]
QUANTIZED = {"SAGE_ATTN": (5e-3, 0.999), "SAGE_ATTN_3": (8e-2, 0.97)}  # error at most, cosine at least: random normals
SEED = 7


def inputs(dtype="float32", batch=2, seq_q=50, seq_kv=70, heads=4, kv_heads=2, size=24):
    rng = np.random.default_rng(SEED)
    shapes = [(batch, seq_q, heads, size), (batch, seq_kv, kv_heads, size), (batch, seq_kv, kv_heads, size)]
    return {name: rounded(x, dtype) for name, x in zip(("query", "key", "value"), normal(rng, *shapes))}


def results_of(case):
    return {entry["backend"]: entry for entry in case["results"]}


def only_case(document):
    assert list(document) == ["machine", "cases"]
    assert len(document["cases"]) == 1
    return document["cases"][0]


def test_schema(ditattn):
    document = ditattn.json("compare", "--shape", "1,2,64,96,40", "--repeats", "3")
    case = only_case(document)
    assert {"cpu", "threads", "os"} <= set(document["machine"])
    assert set(case) == CASE_FIELDS
    assert (case["case"], case["shape"], case["dtype"], case["device"]) == (
        "1,2,64,96,40", [1, 2, 64, 96, 40], "float32", "cpu")  # fmt: skip
    assert case["sample_rows"] is None
    assert [entry["backend"] for entry in case["results"]] == MEMBERS
    for entry in case["results"]:
        assert list(entry) == RESULT_FIELDS
        assert entry["status"] in ("ok", "unavailable", "unsupported", "failed")
        if entry["status"] == "ok":
            assert 0 < entry["min_ms"] <= entry["median_ms"]
            work = 4 * 2 * 64 * 96 * 40
            assert math.isclose(entry["tflops"], work / (entry["median_ms"] * 1e-3) / 1e12, rel_tol=1e-9)
            bound, cosine = QUANTIZED.get(entry["backend"], (case["error_bound"], 0.999))
            assert 0 < entry["rel_l2"] <= bound and cosine < entry["cosine"] <= 1.0000001
        else:
            assert entry["reason"] and all(entry[field] is None for field in NUMBERS)


def test_causal_counts_half(ditattn):
    arguments = ["--shape", "1,2,64,64,40", "--causal", "--backends", "FLASH_ATTN", "--repeats", "1"]
    case = only_case(ditattn.json("compare", *arguments))
    entry = case["results"][0]
    assert case["causal"] is True
    assert math.isclose(entry["tflops"], 2 * 2 * 64 * 64 * 40 / (entry["median_ms"] * 1e-3) / 1e12, rel_tol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["plain", "padding", "additive", "causal"])
def test_errors_are_those_of_the_output(ditattn, tmp_path, dtype, kind):
    """What `run` writes, compared in NumPy, has the errors that `compare` reports."""
    tensors = inputs(dtype)
    if kind == "padding":
        tensors["attn_mask"] = np.arange(70) < np.array([[70], [31]])
    if kind == "additive":
        tensors["attn_mask"] = np.random.default_rng(1).standard_normal((1, 4, 50, 70)).astype(np.float32)
    source = save(tmp_path / "in.safetensors", tensors)
    causal = ["--causal"] if kind == "causal" else []
    # A level that is forced is used whole: else each process times bfloat16's product, and may choose otherwise.
    env = {"DITATTN_CPU_LEVEL": ditattn.json("doctor")["machine"]["best_cpu_level"]}
    case = only_case(ditattn.json("compare", "--input", source, "--repeats", "1", *causal, env=env))
    assert case["case"] == "in" and case["shape"] == [2, 4, 50, 70, 24] and case["kv_heads"] == 2
    bound = error_bound(dtype, tensors["query"], tensors["key"])
    if dtype != "float32":  # nor more than what is exact relative to the output
        result, magnitude, _ = attention(
            tensors["query"], tensors["key"], tensors["value"], tensors.get("attn_mask"), "top-left" if causal else None
        )
        exact = {"bfloat16": 6e-3, "float16": 1.5e-3}[dtype]
        bound = min(bound, exact * np.linalg.norm(result) / np.linalg.norm(magnitude))
    assert math.isclose(case["error_bound"], bound, rel_tol=1e-6)
    for backend in ("FLASH_ATTN", "TORCH_SDPA", *QUANTIZED):
        alignment = "top-left" if backend == "TORCH_SDPA" else "bottom-right"
        if backend in QUANTIZED and kind == "additive":
            refused = results_of(case)[backend]
            assert refused["status"] == "unsupported" and "a mask of kind additive" in refused["reason"]
            continue
        target = tmp_path / backend
        ditattn.ok("run", "--backend", backend, "--input", source, "--output", target, *causal, env=env)
        out = load(target)["out"][1]
        expected, magnitude, _ = attention(
            tensors["query"], tensors["key"], tensors["value"], tensors.get("attn_mask"), alignment if causal else None
        )
        entry = results_of(case)[backend]
        print(f"{backend} {dtype} {kind}: {entry['rel_l2']:.3e}")
        assert math.isclose(entry["rel_l2"], relative_error(out, expected, magnitude), rel_tol=1e-6)
        assert math.isclose(entry["max_abs"], np.abs(out - expected).max(), rel_tol=1e-6)
        cosine = (out * expected).sum() / np.linalg.norm(out) / np.linalg.norm(expected)
        assert math.isclose(entry["cosine"], cosine, rel_tol=1e-12)


@pytest.mark.parametrize("kind", ["joint", "packed"])
def test_joint_and_packed_inputs(ditattn, tmp_path, kind):
    """Causal too: sequences of other lengths than the whole, where alignments differ though Sq = Skv."""
    tensors = inputs(seq_q=60, seq_kv=60)
    if kind == "joint":
        text = inputs(seq_q=9, seq_kv=14)
        whole = [np.concatenate([text[name], tensors[name]], axis=1) for name in tensors]
        sequences = [whole]
        tensors |= {f"joint_{name}": tensor for name, tensor in text.items()}
    else:
        q, k = [slice(0, 20), slice(20, 60)], [slice(0, 35), slice(35, 60)]
        sequences = [(tensors["query"][:, a], tensors["key"][:, b], tensors["value"][:, b]) for a, b in zip(q, k)]
        tensors |= {"cu_seqlens_q": np.array([0, 20, 60], np.int32), "cu_seqlens_k": np.array([0, 35, 60], np.int32)}
    source = save(tmp_path / "in.safetensors", tensors)
    case = only_case(ditattn.json("compare", "--input", source, "--causal", "--repeats", "1"))
    assert case["shape"] == ([2, 4, 69, 74, 24] if kind == "joint" else [2, 4, 60, 60, 24])
    for backend, alignment in (("FLASH_ATTN", "bottom-right"), ("TORCH_SDPA", "top-left")):
        target = tmp_path / backend
        ditattn.ok("run", "--backend", backend, "--input", source, "--output", target, "--causal")
        answers = [attention(*sequence, causal=alignment) for sequence in sequences]
        expected, magnitude = (np.concatenate([answer[i] for answer in answers], axis=1) for i in (0, 1))
        entry = results_of(case)[backend]
        print(f"{backend} {kind}: {entry['rel_l2']:.3e}")
        assert entry["status"] == "ok" and entry["rel_l2"] <= 2e-6
        assert math.isclose(entry["rel_l2"], relative_error(load(target)["out"][1], expected, magnitude), rel_tol=1e-6)


def test_capture_of_many_cases(ditattn, tmp_path):
    rng = np.random.default_rng(SEED)
    tensors = {}
    for case, size in (("layer0.noise9", 16), ("layer1.noise9", 32)):
        for name, x in zip(("query", "key", "value"), normal(rng, *[(1, 20, 2, size)] * 3)):
            tensors[f"{case}.{name}"] = rounded(x, "bfloat16")
    tensors["layer1.noise9.attn_mask"] = np.arange(20)[None] < 13
    source = save(tmp_path / "capture.safetensors", tensors)
    cases = ditattn.json("compare", "--input", source, "--shape", "1,1,4,4,8", "--repeats", "1")["cases"]
    assert [(c["case"], c["shape"], c["dtype"], c["mask"]) for c in cases] == [
        ("capture/layer0.noise9", [1, 2, 20, 20, 16], "bfloat16", "none"),
        ("capture/layer1.noise9", [1, 2, 20, 20, 32], "bfloat16", "padding"),
        ("1,1,4,4,8", [1, 1, 4, 4, 8], "float32", "none"),
    ]


def test_default_input_is_the_capture_beside_the_command(stand_ins):
    """bin/ditattn finds share/ditattn/capture.safetensors."""
    share = stand_ins.program.parent.parent / "share" / "ditattn"
    share.mkdir(parents=True)
    save(share / "capture.safetensors", {f"layer3.{name}": tensor for name, tensor in inputs().items()})
    try:
        assert only_case(stand_ins.json("compare", "--repeats", "1"))["case"] == "capture/layer3"
    finally:
        shutil.rmtree(share)


def test_shipped_capture_of_a_real_model(ditattn):
    cases = ditattn.json("compare", "--repeats", "1")["cases"]
    assert len(cases) >= 4  # noise levels
    for case in cases:
        for backend in ("FLASH_ATTN", "TORCH_SDPA"):
            entry = results_of(case)[backend]
            assert entry["status"] == "ok" and entry["rel_l2"] <= case["error_bound"], (case["case"], entry)


def test_files_are_rounded_to_a_given_dtype(ditattn, tmp_path):
    tensors = inputs("float32")
    source = save(tmp_path / "in.safetensors", tensors)
    case = only_case(ditattn.json("compare", "--input", source, "--dtype", "f16", "--repeats", "1"))
    assert case["dtype"] == "float16" and case["error_bound"] == 3.5e-4
    assert results_of(case)["TORCH_SDPA"]["rel_l2"] <= 3.5e-4


def test_wrong_output_is_measured_and_not_recommended(stand_ins, tmp_path):
    """A stand-in that gives zeros, in no time."""
    tensors = inputs()
    source = save(tmp_path / "in.safetensors", tensors)
    case = only_case(stand_ins.json("compare", "--input", source, "--repeats", "3"))
    zeros = results_of(case)["SAGE_ATTN_3"]
    expected, magnitude, _ = attention(*tensors.values())
    assert zeros["status"] == "ok" and "exceeds the bound" in zeros["reason"]
    assert math.isclose(zeros["rel_l2"], relative_error(0, expected, magnitude), rel_tol=1e-9)
    assert math.isclose(zeros["max_abs"], np.abs(expected).max(), rel_tol=1e-9)
    assert zeros["median_ms"] < results_of(case)["TORCH_SDPA"]["median_ms"]
    assert case["recommended"] == "TORCH_SDPA"


def test_statuses(stand_ins):
    by_shape = stand_ins.json("compare", "--shape", "1,1,8,8,40", "--shape", "1,1,8,8,64", "--repeats", "1")["cases"]
    first, second = map(results_of, by_shape)
    assert first["FLASH_ATTN"]["status"] == "unavailable" and "failed to load" in first["FLASH_ATTN"]["reason"]
    assert first["CUDNN_ATTN"]["status"] == "unavailable" and "CUDA device" in first["CUDNN_ATTN"]["reason"]
    assert first["FLASHINFER_ATTN"]["status"] == "unsupported" and "head_size=40" in first["FLASHINFER_ATTN"]["reason"]
    assert second["FLASHINFER_ATTN"]["status"] == "failed"
    assert "the engine broke down" in second["FLASHINFER_ATTN"]["reason"]


def test_unwritten_output_shows_as_nan(stand_ins):
    """A stand-in that writes nothing: memory that happens to hold the right answer must not save it."""
    entry = results_of(only_case(stand_ins.json("compare", "--shape", "1,2,8,8,16", "--repeats", "1")))["SAGE_ATTN"]
    assert entry["status"] == "failed" and entry["reason"].startswith("256 elements of the output are NaN")
    assert entry["rel_l2"] is None and entry["cosine"] is None


def test_nan_in_the_input_is_not_the_backends_fault(stand_ins, tmp_path):
    tensors = inputs()
    tensors["query"][0, 3, 1] = np.nan
    case = only_case(stand_ins.json("compare", "--input", save(tmp_path / "in", tensors), "--repeats", "1"))
    results = results_of(case)
    assert results["TORCH_SDPA"]["status"] == "ok" and results["TORCH_SDPA"]["rel_l2"] <= 2e-6
    assert results["SAGE_ATTN_3"]["status"] == "failed"  # zeros where NaN belongs


def test_a_sample_of_rows_is_stated(stand_ins):
    arguments = ["compare", "--shape", "1,8,2048,2048,64", "--backends", "SAGE_ATTN_3", "--repeats", "1"]
    case = only_case(stand_ins.json(*arguments))
    assert 0 < case["sample_rows"] < 8 * 2048
    # Zeros for the mean of 2,048 normal numbers, weighted by exp of normal numbers: √(e / 2048) over the mean of |x|.
    assert math.isclose(case["results"][0]["rel_l2"], math.sqrt(math.e / 2048) / math.sqrt(2 / math.pi), rel_tol=0.05)
    assert only_case(stand_ins.json(*arguments))["results"][0]["rel_l2"] == case["results"][0]["rel_l2"]
    other = only_case(stand_ins.json(*arguments, "--seed", "5"))
    assert other["results"][0]["rel_l2"] != case["results"][0]["rel_l2"]


def test_named_backends_in_their_order(ditattn):
    names = "torch_sdpa,Flash_Attn,TORCH_SDPA"
    document = ditattn.json("compare", "--shape", "1,1,8,8,8", "--backends", names, "--repeats", "1")
    assert list(results_of(only_case(document))) == ["TORCH_SDPA", "FLASH_ATTN"]


def test_max_error(ditattn):
    arguments = ["compare", "--shape", "1,2,64,64,40", "--repeats", "1", "--json"]
    done = ditattn(*arguments, "--backends", "FLASH_ATTN", "--max-error", "1e-12")
    assert done.returncode == 5
    case = only_case(json.loads(done.stdout))
    assert case["results"][0]["rel_l2"] > 1e-12 and case["error_bound"] == 1e-12 and case["recommended"] is None
    assert "FLASH_ATTN" in done.stderr and "exceeds the bound" in done.stderr
    assert ditattn(*arguments, "--backends", "FLASH_ATTN", "--max-error", "1e-3").returncode == 0
    # Not named: nobody asked for it, so nothing is wrong; only none is recommended.
    unnamed = ditattn(*arguments, "--max-error", "1e-12")
    assert unnamed.returncode == 0 and only_case(json.loads(unnamed.stdout))["recommended"] is None


@pytest.mark.parametrize("backend", QUANTIZED)
def test_a_quantized_backend_shows_its_error(ditattn, backend):
    """Over the bound of exact ones it is told so and not recommended; that is a failure only where it is named."""
    arguments = ["compare", "--shape", "1,2,64,64,40", "--repeats", "1", "--json"]
    for bound in ([], ["--max-error", "1e-5"]):
        done = ditattn(*arguments, *bound)
        assert (done.returncode, done.stderr) == (0, "")
        case = only_case(json.loads(done.stdout))
        entry = results_of(case)[backend]
        assert entry["status"] == "ok" and case["error_bound"] < entry["rel_l2"] <= QUANTIZED[backend][0]
        assert "exceeds the bound" in entry["reason"] and case["recommended"] in ("FLASH_ATTN", "TORCH_SDPA")
    named = [*arguments, "--backends", f"FLASH_ATTN,{backend}"]
    assert ditattn(*named).returncode == 0
    assert ditattn(*named, "--max-error", QUANTIZED[backend][0]).returncode == 0
    done = ditattn(*named, "--max-error", "1e-5")
    assert done.returncode == 5 and f"error: {backend} on" in done.stderr and "FLASH_ATTN" not in done.stderr


@pytest.mark.parametrize(
    "backend, size, max_error, status",
    [
        ("SAGE_ATTN", 16, ["--max-error", "1e9"], 5),  # NaN is over every bound
        ("SAGE_ATTN", 16, [], 1),
        ("FLASHINFER_ATTN", 16, [], 4),
        ("FLASHINFER_ATTN", 64, [], 1),
        ("SAGE_ATTN_3", 16, [], 0),
        ("TORCH_SDPA", 16, ["--max-error", "1e-6"], 0),
    ],
)
def test_status_of_named_backends(stand_ins, backend, size, max_error, status):
    arguments = ["--shape", f"1,1,8,8,{size}", "--backends", backend, "--repeats", "1", *max_error]
    done = stand_ins("compare", *arguments, "--json")
    assert done.returncode == status, done.stderr
    assert only_case(json.loads(done.stdout))["results"][0]["backend"] == backend
    assert (f"ditattn: error: {backend} on 1,1,8,8,{size}: " in done.stderr) == (status != 0)


def test_tables(stand_ins):
    text = stand_ins.ok("compare", "--shape", "1,2,16,16,40", "--repeats", "1")
    lines = text.splitlines()
    assert "thread" in lines[0] and "Linux" in lines[0]
    header = next(line for line in lines if line.startswith("backend"))
    assert all(title in header for title in ("median ms", "min ms", "TFLOP/s", "rel L2 error", "cosine"))
    exact = next(line for line in lines if line.startswith("TORCH_SDPA"))
    assert exact.index("ok") == header.index("status") and exact.endswith("recommended")
    assert any(line.startswith("CUDNN_ATTN") and "needs a CUDA device" in line for line in lines)


def test_names_cannot_command_the_terminal(stand_ins, tmp_path):
    tensors = {f"\x1b[2J.{name}": tensor for name, tensor in inputs().items()}
    text = stand_ins.ok("compare", "--input", save(tmp_path / "in", tensors), "--repeats", "1")
    assert "\x1b" not in text and "?[2J" in text


def test_progress_only_on_a_terminal(stand_ins):
    """Work of three seconds, by a stand-in that sleeps and writes nothing: a bar on a terminal, nothing in a pipe."""
    arguments = ["compare", "--shape", "1,1,4,4,8", "--backends", "SAGE_ATTN", "--repeats", "600"]
    main, terminal = pty.openpty()
    command = [str(stand_ins.program), *arguments]
    done = subprocess.run(command, env=stand_ins.environment(), stdout=subprocess.PIPE, stderr=terminal, timeout=120)
    shown = os.read(main, 100_000)
    os.close(terminal)
    os.close(main)
    assert done.returncode == 1 and b"\x1b" not in done.stdout
    assert b"0/1 1,1,4,4,8: SAGE_ATTN round" in shown and b"\r\x1b[K" in shown
    assert 3 <= shown.count(b"SAGE_ATTN round") <= 100  # of 600: ten a second, from the third second on
    piped = stand_ins(*arguments).stderr
    assert "\x1b" not in piped and "SAGE_ATTN round" not in piped
