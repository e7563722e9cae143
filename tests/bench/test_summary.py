"""summary.py and what it reads off rows, on made-up runs."""

import pytest
from run_rows import RunRows
from summary import summary


def row(library, configuration, ms, rel_l2=1e-7, **fields):
    dtype = configuration.split("-")[-1]
    return {"library": library, "configuration": configuration, "shape": "a", "dtype": dtype, "ms": ms, "rel_l2": rel_l2} | fields


ROWS = [
    row("ditattn", "FLASH_ATTN-fp32", 100.0),
    row("ditattn", "SAGE_ATTN-fp32", 50.0, rel_l2=1e-2),
    row("torch", "fp32", 120.0),
    row("openvino", "fp32", 110.0),
    row("ditattn", "FLASH_ATTN-bf16", 50.0, rel_l2=1e-4),
    row("torch", "bf16", 100.0, rel_l2=1e-4),
    row("openvino", "bf16", 40.0, rel_l2=1e-3),
    row("ditattn", "SAGE_ATTN-bf16", 40.0, rel_l2=1e-2),
    row("ditattn", "FLASH_ATTN-causal-fp32", 52.0, variant="causal"),
    row("torch", "causal-fp32", 78.0, variant="causal"),
    {"library": "openvino", "configuration": "fp16", "shape": "a", "dtype": "fp16", "error": "err no"},
]


def test_the_best_peer_is_the_fastest():
    run = RunRows(ROWS)
    assert run.best_peer(("a", "dense", "fp32"))["library"] == "openvino"
    assert run.over_best_peer(("a", "dense", "fp32")) == pytest.approx(1.1)


def test_a_peer_of_lower_precision_is_not_compared():
    exact, lower = RunRows(ROWS).peers(("a", "dense", "bf16"))
    assert [r["library"] for r in exact] == ["torch"]
    assert [r["library"] for r in lower] == ["openvino"]


def test_our_quantized_member_is_beside_our_float32_whatever_its_error():
    run = RunRows(ROWS)
    assert run.members == ["FLASH_ATTN", "SAGE_ATTN"]
    assert run.over_own_float32(("a", "dense", "fp32"), "SAGE_ATTN") == pytest.approx(2.0)
    assert run.over_own_float32(("a", "dense", "bf16"), "SAGE_ATTN") == pytest.approx(2.5)


def test_a_variant_is_beside_its_own_dense_time():
    run = RunRows(ROWS)
    assert run.time_over_dense(("a", "causal", "fp32"), "FLASH_ATTN") == pytest.approx(0.52)
    assert run.over_best_peer(("a", "causal", "fp32")) == pytest.approx(1.5)


def test_what_was_not_timed_has_no_figure():
    run = RunRows(ROWS)
    assert run.over_best_peer(("a", "dense", "fp16")) is None
    assert run.time_over_dense(("a", "causal", "fp32"), "SAGE_ATTN") is None


def test_the_table_has_one_figure_per_run():
    second = [r | {"ms": 55.0} if r["library"] == "ditattn" else r for r in ROWS[:4]]
    documents = [{"rows": ROWS, "ceilings": {"x float32": 236.5}}, {"rows": second}]
    assert summary(documents).splitlines() == [
        "| shape | float32 | bfloat16 | float16 | SAGE_ATTN over own float32 |",
        "|---|---|---|---|---|",
        "| a | 1.10, 2.00 | 2.00, – | – | 2.00, 1.00 |",
        "| a, causal | 1.50, – | – | – | – |",
        "",
        "ceilings, GFLOP/s: x float32 236, –",
    ]
