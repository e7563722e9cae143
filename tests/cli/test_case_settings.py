"""What a file's metadata says of its cases (docs/capture.md): how `run` and `compare` call them, against NumPy."""

import json
import math

import numpy as np
import pytest
from tensors import attention, load, normal, relative_error, rounded, save


def inputs(seq_q=12, seq_kv=12, seed=3):
    shapes = [(2, seq_q, 4, 8), (2, seq_kv, 2, 8), (2, seq_kv, 2, 8)]
    numbers = normal(np.random.default_rng(seed), *shapes)
    return {name: rounded(x, "float32") for name, x in zip(("query", "key", "value"), numbers)}


def run(ditattn, tmp_path, tensors, settings, *flags, backend="FLASH_ATTN"):
    source = save(tmp_path / "in.safetensors", tensors, settings)
    target = tmp_path / "out.safetensors"
    ditattn.ok("run", "--backend", backend, "--input", source, "--output", target, *flags)
    return load(target)["out"][1]


def assert_close(out, *tensors, **options):
    expected, magnitude, _ = attention(*tensors, **options)
    assert out.shape == expected.shape and relative_error(out, expected, magnitude) <= 2e-6


def test_scale_and_causality_of_a_file_hold_unless_flags_say_otherwise(ditattn, tmp_path):
    tensors = inputs()
    said = {"softmax_scale": "0.9", "causal": "true"}
    assert_close(run(ditattn, tmp_path, tensors, said), *tensors.values(), scale=0.9, causal="bottom-right")
    assert_close(run(ditattn, tmp_path, tensors, {"causal": "false"}), *tensors.values())
    other = run(ditattn, tmp_path, tensors, said, "--scale", "0.2")
    assert_close(other, *tensors.values(), scale=0.2, causal="bottom-right")
    asked = run(ditattn, tmp_path, tensors, {"causal": "false"}, "--causal")
    assert_close(asked, *tensors.values(), causal="bottom-right")


def test_compare_calls_each_case_as_it_says(ditattn, tmp_path):
    tensors = inputs()
    cases = {"a.b": {"softmax_scale": "0.9"}, "c": {"causal": "true"}, "d": {}}
    file = {f"{case}.{name}": tensor for case in cases for name, tensor in tensors.items()}
    texts = {f"{case}.{key}": text for case, said in cases.items() for key, text in said.items()}
    texts |= {"softmax_scale": "7", "causal": "true", "b.causal": "true", "d.role": "cross"}  # of no case, or not read
    source = save(tmp_path / "in.safetensors", file, texts)
    found = ditattn.json("compare", "--input", source, "--repeats", "1")["cases"]
    assert [(case["case"], case["causal"]) for case in found] == [("in/a.b", False), ("in/c", True), ("in/d", False)]
    for case, said in zip(found, cases.values()):
        scale = float(said["softmax_scale"]) if said.get("softmax_scale") else None
        rule = "bottom-right" if said.get("causal") else None
        out = run(ditattn, tmp_path, tensors, said)
        expected, magnitude, _ = attention(*tensors.values(), scale=scale, causal=rule)
        (entry,) = [entry for entry in case["results"] if entry["backend"] == "FLASH_ATTN"]
        assert entry["status"] == "ok" and entry["rel_l2"] <= case["error_bound"]
        assert math.isclose(entry["rel_l2"], relative_error(out, expected, magnitude), rel_tol=1e-6)


def test_a_flag_makes_every_case_causal(ditattn, tmp_path):
    file = {f"{case}.{name}": tensor for case in "ab" for name, tensor in inputs().items()}
    source = save(tmp_path / "in.safetensors", file, {"a.causal": "false"})
    found = ditattn.json("compare", "--input", source, "--repeats", "1", "--causal", "--backends", "FLASH_ATTN")
    assert [case["causal"] for case in found["cases"]] == [True, True]


def test_text_at_the_rear_and_valid_keys(ditattn, tmp_path):
    tensors, text = inputs(), inputs(5, 7, seed=4)
    file = tensors | {f"joint_{name}": tensor for name, tensor in text.items()}
    said = {"joint_strategy": "rear", "valid_kv_length": "9"}
    rear = [np.concatenate([tensors["query"], text["query"]], axis=1)]
    rear += [np.concatenate([tensors[name][:, :9], text[name]], axis=1) for name in ("key", "value")]
    assert_close(run(ditattn, tmp_path, file, said), *rear)
    front = [np.concatenate([text["query"], tensors["query"]], axis=1)]
    front += [np.concatenate([text[name], tensors[name][:, :10]], axis=1) for name in ("key", "value")]
    flags = ["--joint-strategy", "front", "--valid-kv-length", "10"]
    assert_close(run(ditattn, tmp_path, file, said, *flags), *front)


def test_spans_and_the_places_of_rows(ditattn, tmp_path):
    tensors = inputs(seq_q=6)
    spans, positions = [[[2, 5]], [[0, 3], [8, 12]]], [1, 2, 3, 8, 9, 10]
    said = {"full_attn_spans": json.dumps(spans), "query_ranges": "[[0, 3, 1], [3, 6, 8]]"}
    mask = np.zeros((2, 1, 6, 12), bool)
    for sample, of_sample in enumerate(spans):
        for row, position in enumerate(positions):
            ends = [end for begin, end in of_sample if begin <= position < end]
            mask[sample, 0, row, : max([position + 1, *ends])] = True
    assert_close(run(ditattn, tmp_path, tensors, said), *tensors.values(), mask=mask)


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"causal": "yes"}, "its metadata has causal='yes', expected true or false"),
        ({"causal": "1"}, "its metadata has causal='1', expected true or false"),
        ({"softmax_scale": "big"}, "its metadata has softmax_scale='big', expected a number"),
        ({"softmax_scale": ""}, "its metadata has softmax_scale='', expected a number"),
        ({"softmax_scale": "1e999"}, "softmax_scale"),
        ({"valid_kv_length": "some"}, "its metadata has valid_kv_length='some', expected a whole number"),
        ({"valid_kv_length": "99"}, "valid_kv_length must be within the K/V sequence, got 99"),
        ({"full_attn_spans": "[[1, 2]]"}, "full_attn_spans='[[1, 2]]', expected lists of [begin, end]"),
        ({"full_attn_spans": "[[[1]]]"}, "full_attn_spans='[[[1]]]', expected lists of [begin, end]"),
        ({"full_attn_spans": "[" * 5000}, "expected lists of [begin, end]"),
        ({"full_attn_spans": "[[]]", "query_ranges": "3"}, "query_ranges='3', expected a list of [local_start"),
    ],
)
def test_malformed_settings_are_refused_by_name(ditattn, tmp_path, settings, says):
    source = save(tmp_path / "in.safetensors", inputs(), settings)
    error = ditattn.fails(4, "run", "--input", source, "--output", tmp_path / "out.safetensors")
    assert says in error and not (tmp_path / "out.safetensors").exists()
    assert says in ditattn.fails(4, "compare", "--input", source)
