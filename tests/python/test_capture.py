"""`capture`: what is recorded of a call, which calls, how much; and that `compare` reads it."""

import json
import re
import sys
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import inputs, layer
from tensors import header_of, load

from ditattn import AttentionBackend, AttentionImpl, AttentionMetadata, QueryRange, attention, capture
from ditattn import DiffusionAttentionBackendEnum as Enum


@pytest.fixture
def path(tmp_path):
    return tmp_path / "qkv.safetensors"


def texts_of(path, case):
    texts = header_of(path)[0]["__metadata__"]
    return {key.removeprefix(case + "."): text for key, text in texts.items() if key.rpartition(".")[0] == case}


def tensors_of(path, case):
    return {name.rpartition(".")[2]: found for name, found in load(path).items() if name.rpartition(".")[0] == case}


def assert_same(found, expected):
    """The same numbers, to the bit, in a file that holds nothing else."""
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert found[name][1].shape == array.shape, name
        assert np.array_equal(found[name][1], np.asarray(array).astype(np.float64)), name


@pytest.mark.parametrize("dtype, stored", [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")])
def test_a_call_is_recorded_as_it_was(path, dtype, stored):
    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    query, key, value = inputs(dtype=dtype)
    mask = np.arange(9) < np.array([[9], [4]])
    with capture(path) as recording:
        layer(prefix="blocks.0.attn", role="cross", softmax_scale=0.3, causal=True)(
            query, key, value, AttentionMetadata(attn_mask=mask)
        )
    assert recording.cases == ["step000000/blocks.0.attn"]
    found = tensors_of(path, "step000000/blocks.0.attn")
    assert_same(found, {"query": query, "key": key, "value": value, "attn_mask": mask})
    assert {name: kind for name, (kind, _) in found.items()} == {
        "query": stored, "key": stored, "value": stored, "attn_mask": "BOOL"}  # fmt: skip
    assert texts_of(path, "step000000/blocks.0.attn") == {
        "layer": "blocks.0.attn", "role": "cross", "backend": "FLASH_ATTN", "causal": "true", "softmax_scale": "0.3",
    }  # fmt: skip
    assert recording.bytes == sum(array.nbytes for array in (query, key, value, mask)) and recording.skipped == 0


def test_views_are_recorded_as_what_they_show(path):
    packed = np.random.default_rng(0).standard_normal((9, 2, 3, 4, 16)).astype("float32")
    query, key, value = (packed[::2, :, i].swapaxes(0, 1) for i in range(3))
    one_head = np.broadcast_to(value[:, :, :1], value.shape)
    with capture(path):
        layer(kv_heads=4)(query[:, ::-1], key, one_head)
    assert_same(tensors_of(path, "step000000/call"), {"query": query[:, ::-1], "key": key, "value": one_head})


def test_a_mask_that_repeats_itself_is_stored_once(path):
    query, key, value = inputs()
    rows = np.random.default_rng(0).standard_normal((1, 1, 7, 9)).astype("float32")
    with capture(path):
        attention(query, key, value, attn_mask=np.broadcast_to(rows, (2, 4, 7, 9)))
        attention(query, key, value, attn_mask=np.broadcast_to(rows[0, 0, 0] > 0, (2, 9)))  # two dimensions: as it is
    assert_same({"attn_mask": tensors_of(path, "step000000/call")["attn_mask"]}, {"attn_mask": rows})
    assert tensors_of(path, "step000001/call")["attn_mask"][1].shape == (2, 9)


def test_text_tokens_and_valid_keys(path):
    query, key, value = inputs()
    text = dict(zip(("joint_query", "joint_key", "joint_value"), inputs(seq_q=3, seq_kv=5, seed=2)))
    masks = {"attn_mask": np.arange(9) < np.array([[9], [5]]), "joint_attn_mask": np.arange(5) < np.array([[2], [5]])}
    metadata = AttentionMetadata(**text, **masks, joint_strategy="rear", extra={"valid_kv_length": 8, "unknown": 3})
    with capture(path):
        layer()(query, key, value, metadata)
    assert_same(tensors_of(path, "step000000/call"), {"query": query, "key": key, "value": value, **text, **masks})
    said = texts_of(path, "step000000/call")
    assert (said["joint_strategy"], said["valid_kv_length"]) == ("rear", "8") and "role" not in said


def test_packed_sequences_and_spans(path):
    query, key, value = inputs(batch=1, seq_q=9)
    offsets = {"cu_seqlens_q": np.array([0, 4, 9], np.int32), "cu_seqlens_k": np.array([0, 2, 9], np.int32)}
    with capture(path):
        layer()(query, key, value, AttentionMetadata(extra={**offsets, "max_seqlen_q": 5, "max_seqlen_k": 7}))
        spans = AttentionMetadata(full_attn_spans=[[(1, 3)]], query_ranges=[QueryRange(0, 7, 0), QueryRange(7, 9, 7)])
        layer()(query, key, value, spans)
    assert_same(tensors_of(path, "step000000/call"), {"query": query, "key": key, "value": value, **offsets})
    said = texts_of(path, "step000001/call")
    assert json.loads(said["full_attn_spans"]) == [[[1, 3]]]
    assert json.loads(said["query_ranges"]) == [[0, 7, 0], [7, 9, 7]]


def test_what_is_written_to_after_the_call_is_not_what_is_recorded(path):
    query, key, value = inputs()
    before = query.copy()
    with capture(path):
        layer()(query, key, value)
        query[:] = 0
    assert np.array_equal(tensors_of(path, "step000000/call")["query"][1], before)


def test_results_are_the_same_while_recording(path):
    arrays = inputs()
    out, lse = attention(*arrays, return_lse=True)
    with capture(path):
        again, lse_again = attention(*arrays, return_lse=True)
    assert np.array_equal(out, again) and np.array_equal(lse, lse_again)


def test_compare_finds_small_errors_in_what_was_recorded(path, run_python):
    query, key, value = inputs(seq_q=40, seq_kv=50)
    text = dict(zip(("joint_query", "joint_key", "joint_value"), inputs(seq_q=3, seq_kv=5, seed=2)))
    mask = np.random.default_rng(1).random((2, 1, 40, 50)) < 0.7
    mask[..., 0] = True
    with capture(path) as recording:
        attention(query, key, value, softmax_scale=0.9)
        attention(query, key, value, causal=True)
        attention(query, key, value, attn_mask=mask)
        attention(query, key, value, metadata=AttentionMetadata(**text, joint_strategy="rear"))
        attention(*inputs(dtype="float16"))
    done = run_python("-m", "ditattn", "compare", "--input", path, "--json", "--repeats", 1)
    assert done.returncode == 0, done.stderr
    cases = json.loads(done.stdout)["cases"]
    assert [case["case"] for case in cases] == [f"qkv/{name}" for name in recording.cases]
    assert [(case["causal"], case["mask"], case["dtype"], case["shape"][2:4]) for case in cases] == [
        (False, "none", "float32", [40, 50]),
        (True, "none", "float32", [40, 50]),
        (False, "bool", "float32", [40, 50]),
        (False, "none", "float32", [43, 55]),
        (False, "none", "float16", [7, 9]),
    ]
    for case in cases:
        for entry in case["results"]:
            if entry["backend"] in ("FLASH_ATTN", "TORCH_SDPA"):
                assert entry["status"] == "ok" and entry["rel_l2"] <= case["error_bound"], (case["case"], entry)


# Which calls.


def run_model(steps=4, blocks=3):
    query, key, value = inputs(batch=1)
    layers = [layer(prefix=f"blocks.{i}.{kind}") for i in range(blocks) for kind in ("self", "cross")]
    for step in range(steps):
        for attend in layers:
            attend(query + np.float32(step), key, value)


@pytest.mark.parametrize(
    "options, cases",
    [
        ({"every": 3, "layers": "blocks.1.*"}, ["0/blocks.1.cross", "0/blocks.1.self", "3/blocks.1.cross",
                                                "3/blocks.1.self"]),
        ({"every": 2, "layers": ["blocks.?.self"]}, [f"{i}/blocks.{b}.self" for i in (0, 2) for b in range(3)]),
        ({"every": 9, "layers": [0, "*.2.cross"]}, ["0/blocks.0.self", "0/blocks.2.cross"]),
        ({"every": 9, "layers": range(1, 3)}, ["0/blocks.0.cross", "0/blocks.1.self"]),
        ({"every": 3, "layers": 5}, ["0/blocks.2.cross", "3/blocks.2.cross"]),
        ({"every": 9, "layers": lambda name: name.endswith("2.self")}, ["0/blocks.2.self"]),
        ({"every": 9, "layers": "blocks.0"}, []),
        ({"every": 9, "layers": []}, []),
    ],
)  # fmt: skip
def test_steps_and_layers_are_chosen(path, options, cases):
    with capture(path, **options) as recording:
        run_model()
    assert recording.cases == [f"step00000{case}" for case in cases]
    assert path.exists() == bool(cases) and recording.skipped == 0
    for case in recording.cases:  # the right step's tensors
        step = int(case[4:10])
        expected = inputs(batch=1)[0] + np.float32(step)
        assert np.array_equal(tensors_of(path, case)["query"][1], expected)


def test_calls_before_and_after_the_block_are_not_recorded(path):
    run_model()
    with capture(path) as recording:
        run_model(steps=1, blocks=1)
    run_model()
    assert recording.cases == ["step000000/blocks.0.cross", "step000000/blocks.0.self"]


def test_refused_and_empty_calls_are_not_recorded(path):
    query, key, value = inputs()
    with capture(path) as recording:
        with pytest.raises(ValueError, match="head_size"):
            layer()(query[..., :8], key, value)
        layer()(query[:, :0], key, value)
    assert recording.cases == [] and recording.skipped == 0


class WrappingImpl(AttentionImpl):
    def forward(self, query, key, value, attn_metadata=None):
        return attention(query, key, value, backend="flash_attn")


class WrappingBackend(AttentionBackend):
    @staticmethod
    def get_name():
        return "WRAPPING"

    @staticmethod
    def get_impl_cls():
        return WrappingImpl

    @classmethod
    def capabilities(cls):
        return {"gqa": True, "tensors": "numpy"}


def test_a_back_end_that_calls_another_is_one_call(path):
    with capture(path) as recording:
        attention(*inputs(), backend=WrappingBackend)
    assert recording.cases == ["step000000/call"]
    assert texts_of(path, "step000000/call")["backend"] == "WRAPPING"


def test_threads_are_recorded_together(path):
    arrays = [inputs(seed=seed) for seed in range(8)]

    def work(seed):
        attend = layer(prefix=f"thread{seed}")
        for _ in range(20):
            attend(*arrays[seed])

    with capture(path) as recording:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert recording.cases == [f"step{step:06d}/thread{seed}" for step in range(20) for seed in range(8)]
    for seed in range(8):
        found = tensors_of(path, f"step000019/thread{seed}")
        assert_same(found, dict(zip(("query", "key", "value"), arrays[seed])))


def test_captures_within_each_other_record_each_on_their_own(tmp_path):
    with capture(tmp_path / "outer", layers="blocks.0.*") as outer:
        run_model(steps=1)
        with capture(tmp_path / "inner", layers="blocks.1.self") as inner:
            run_model(steps=1)
        run_model(steps=1)
    assert inner.cases == ["step000000/blocks.1.self"]
    assert outer.cases == [f"step00000{step}/blocks.0.{kind}" for step in range(3) for kind in ("cross", "self")]


# How much.


def test_what_does_not_fit_is_counted_and_told_once(path, caplog):
    small, large = inputs(seq_q=1, seq_kv=1), inputs()
    size = sum(array.nbytes for array in small)
    with capture(path, max_bytes=2 * size) as recording:
        layer(prefix="small")(*small)
        layer(prefix="large")(*large)
        layer(prefix="small")(*small)
        layer(prefix="small")(*small)
    assert recording.cases == ["step000000/small", "step000001/small"]
    assert (recording.bytes, recording.skipped) == (2 * size, 2)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", f"The capture of {path} left out 2 calls: 2 (max_bytes={2 * size})")
    ]
    assert sum(tensor[1].nbytes // 2 for tensor in load(path).values()) == 2 * size  # float64 for float32


def test_at_most_max_cases_are_recorded(path):
    with capture(path, max_cases=3) as recording:
        run_model()
    assert len(recording.cases) == 3 and recording.skipped == 4 * 6 - 3
    assert len({name.rpartition(".")[0] for name in load(path)}) == 3


# Errors.


def test_an_error_in_the_block_saves_what_was_recorded(path):
    with pytest.raises(KeyError, match="mine"):
        with capture(path):
            run_model(steps=1, blocks=1)
            raise KeyError("mine")
    assert len(load(path)) == 6


def test_a_capture_that_fails_does_not_fail_the_model(path, caplog):
    """It stops, keeps what it has, and raises at the end."""
    arrays = inputs()

    def wanted(name):
        return {"good": True}[name]

    with pytest.raises(KeyError, match="odd"):
        with capture(path, layers=wanted) as recording:
            layer(prefix="good")(*arrays)
            assert layer(prefix="odd")(*arrays).shape == arrays[0].shape
            layer(prefix="good")(*arrays)
            layer(prefix="odd")(*arrays)
    assert recording.cases == ["step000000/good"] and len(load(path)) == 3
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert f"The capture of {path} stops: KeyError: 'odd'" in caplog.text
    with pytest.raises(RuntimeError, match="mine"):  # goes first
        with capture(path, layers=wanted):
            layer(prefix="odd")(*arrays)
            raise RuntimeError("mine")


def test_a_call_that_cannot_be_copied_leaves_nothing_behind(path, monkeypatch):
    copy = sys.modules["ditattn.capture"]._host_copy

    def failing(tensor, what):
        if what == "value":
            raise MemoryError("no more")
        return copy(tensor, what)

    arrays = inputs()
    with pytest.raises(MemoryError, match="no more"):
        with capture(path) as recording:
            layer(prefix="a")(*arrays)
            monkeypatch.setattr(sys.modules["ditattn.capture"], "_host_copy", failing)
            layer(prefix="b")(*arrays)
    assert recording.cases == ["step000000/a"] and recording.bytes == sum(array.nbytes for array in arrays)
    assert len(load(path)) == 3


def test_the_blocks_own_error_goes_before_that_of_writing(tmp_path, caplog):
    def record(error):
        folder = tmp_path / "gone"
        folder.mkdir()
        with capture(folder / "file"):
            run_model(steps=1, blocks=1)
            folder.rmdir()
            if error:
                raise error

    with pytest.raises(OSError, match="Cannot write safetensors file"):
        record(None)
    with pytest.raises(RuntimeError, match="mine"):
        record(RuntimeError("mine"))
    assert "Cannot write safetensors file" in caplog.text


def test_nothing_is_written_where_nothing_was_recorded(path, caplog):
    path.write_text("before")
    with capture(path):
        pass
    assert path.read_text() == "before" and f"recorded nothing: {path} is not written" in caplog.text


def test_a_capture_runs_once(path):
    recording = capture(path)
    with recording:
        with pytest.raises(RuntimeError, match="begun before"):
            recording.__enter__()
    with pytest.raises(RuntimeError, match="begun before"):
        recording.__enter__()


@pytest.mark.parametrize(
    "options, kind, says",
    [
        ({"every": 0}, ValueError, "every=0 is too small: it must be 1 at least"),
        ({"max_bytes": -1}, ValueError, "max_bytes=-1"),
        ({"max_cases": -1}, ValueError, "max_cases=-1"),
        ({"layers": [1.5]}, TypeError, "layers has 1.5"),
        ({"layers": [None]}, TypeError, "layers has None"),
        ({"model": object()}, TypeError, "model must be a torch.nn.Module or a dict of them, got object"),
        ({"model": {"a": 3}}, TypeError, "got int a"),
    ],
)
def test_bad_arguments_are_refused_at_once(path, options, kind, says):
    with pytest.raises(kind, match=says):
        capture(path, **options)


def test_a_folder_that_is_not_there_is_told_before_anything_runs(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        capture(tmp_path / "missing" / "file")


def test_a_capture_left_open_does_not_disturb_the_end_of_the_process(run_python, tmp_path):
    (tmp_path / "left_open.py").write_text(
        "import numpy as np, ditattn\n"
        "ditattn.capture('never').__enter__()\n"
        "query = np.ones((1, 2, 1, 8), np.float32)\n"
        "print(ditattn.attention(query, query, query).sum())\n"
    )
    done = run_python("left_open.py")
    assert (done.returncode, done.stdout, done.stderr) == (0, "16.0\n", "")


def test_the_first_example_of_the_docs_runs_and_the_command_reads_its_file(run_python, tmp_path):
    page = Path(__file__).resolve().parents[2] / "docs" / "capture.md"
    (tmp_path / "example.py").write_text(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)[0])
    done = run_python("example.py")
    names = [f"step00000{step}/blocks.{i}.attn" for step in (0, 5) for i in (0, 3)]
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{names}\n", "")
    (command,) = re.findall(r"^ditattn (compare .*)$", page.read_text(), re.MULTILINE)
    done = run_python("-m", "ditattn", *command.split(), "--json", "--repeats", 1)
    assert [case["case"] for case in json.loads(done.stdout)["cases"]] == [f"qkv/{name}" for name in names]
