"""`guard`: what it finds around calls from Python, what it leaves alone, and what a safer back end makes right."""

import json
import logging
import math
import threading

import numpy as np
import pytest
from conftest import inputs, layer
from numpy_backends import NumpyBackend, NumpyImpl
from tensors import attention as reference

from ditattn import DiffusionAttentionBackendEnum as Enum
from ditattn import attention, capture, guard, launch_counts, reset_launch_counts


class WrongImpl(NumpyImpl):
    """A tenth too large, or as `spoil` says."""

    spoil = staticmethod(lambda out: out * np.asarray(1.1, out.dtype))

    def forward(self, query, key, value, attn_metadata=None, return_lse=False):
        result = super().forward(query, key, value, attn_metadata, return_lse)
        out = type(self).spoil(result[0] if return_lse else result)
        return (out, result[1]) if return_lse else out


class WrongBackend(NumpyBackend):
    @staticmethod
    def get_name():
        return "WRONG_ATTN"

    @staticmethod
    def get_impl_cls():
        return WrongImpl


@pytest.fixture
def spoil(monkeypatch):
    """Sets how the numbers are wrong."""
    return lambda function: monkeypatch.setattr(WrongImpl, "spoil", staticmethod(function))


def is_right(out, query, key, value):
    return np.allclose(out, reference(query, key, value)[0], rtol=1e-4, atol=1e-5)


def test_exact_back_ends_are_right():
    query, key, value = inputs(seq_q=70, seq_kv=90)
    with guard(every=1) as watch:
        attention(query, key, value)
        attention(query, key, value, backend="TORCH_SDPA", attn_mask=np.arange(90) < np.array([[40], [0]]))
        attention(query.astype("float16"), key.astype("float16"), value.astype("float16"), causal=True)
        attention(query, key, value, backend=NumpyBackend)
    report = watch.report()
    assert report.failures == 0 and sum(seen.checks for seen in report.layers) == 4
    assert all(seen.worst.error < seen.worst.bound for seen in report.layers)


def test_an_error_of_a_tenth_is_reported(caplog):
    query, key, value = inputs()
    with caplog.at_level(logging.WARNING, "ditattn"), guard() as watch:
        attention(query, key, value, backend=WrongBackend)
    (seen,) = watch.report().layers
    assert (seen.backend, seen.calls, seen.checks, seen.failures) == ("WRONG_ATTN", 1, 1, 1)
    assert 0.05 < seen.worst.error < 0.1001 and seen.worst.bound < 1e-4
    assert seen.worst.row[0] < 2 and seen.worst.row[1] < 4 and seen.worst.row[2] < 7
    assert [record.getMessage() for record in caplog.records] == [seen.worst.text]
    assert "WRONG_ATTN is wrong by" in seen.worst.text


def test_nan_on_one_layer(spoil):
    def nan(out):
        out[1, 3, 2, 5] = np.nan
        return out

    spoil(nan)
    query, key, value = inputs()
    with guard(every=1, rows=2) as watch:
        for step in range(2):
            for role, backend in (("self", "FLASH_ATTN"), ("cross", WrongBackend), ("text", "TORCH_SDPA")):
                attention(query, key, value, backend=backend, role=role)
    report = watch.report()
    assert [seen.failures for seen in report.layers] == [2, 0, 0]
    worst = report.layers[0]
    assert worst.role == "cross" and worst.non_finite == 2 and worst.worst.row == (1, 2, 3)
    assert math.isinf(worst.worst.error)
    assert json.loads(report.json)["layers"][0]["worst"]["error"] is None
    assert str(report).splitlines()[1].split()[:3] == ["-", "cross", "WRONG_ATTN"]


def test_every_and_filters():
    query, key, value = inputs()
    layers = [layer(prefix=f"blocks.{i}.attn", role=role) for i, role in enumerate(("self", "cross"))]
    with guard(every=4) as all_of_them, guard(layers="blocks.1.*") as one, guard(roles=["self", "no"]) as by_role:
        for step in range(10):
            for each in layers:
                each(query, key, value)
    assert [(seen.calls, seen.checks) for seen in all_of_them.report().layers] == [(10, 3)] * 2
    assert [seen.layer for seen in one.report().layers] == ["blocks.1.attn"]
    assert [seen.role for seen in by_role.report().layers] == ["self"]


@pytest.mark.parametrize("safer", [None, "torch_sdpa", Enum["TORCH_SDPA"]])
def test_replace(safer):
    query, key, value = inputs()
    reset_launch_counts()
    with guard(on_failure="replace", safer=safer) as watch:
        for step in range(3):
            assert is_right(attention(query, key, value, backend=WrongBackend, role="self"), query, key, value)
        out, lse = attention(query, key, value, backend=WrongBackend, role="self", return_lse=True)
        assert is_right(out, query, key, value)
    (seen,) = watch.report().layers
    name = "FLASH_ATTN" if safer is None else "SDPA"
    assert (seen.replaced_by, seen.replaced_at, seen.failures) == (name, 0, 1)
    counts = {(count.role, count.backend): count.calls for count in launch_counts()}
    assert counts == {("self", "WRONG_ATTN"): 1, ("self", name): 4}
    assert not is_right(attention(query, key, value, backend=WrongBackend), query, key, value)


@pytest.mark.parametrize("scope", ["layer", "role"])
def test_replace_a_layer_or_its_role(scope):
    query, key, value = inputs()
    reset_launch_counts()
    with guard(on_failure="replace", scope=scope, safer="TORCH_SDPA") as watch:
        attention(query, key, value, backend=WrongBackend, role="self")
        layer(prefix="blocks.1", role="self")(query, key, value)
        layer(prefix="blocks.1", role="cross")(query, key, value)
    counts = {(count.role, count.backend): count.calls for count in launch_counts()}
    assert counts[("cross", "FLASH_ATTN")] == 1
    assert counts[("self", "SDPA")] == (2 if scope == "role" else 1)
    replaced = {(seen.layer, seen.role) for seen in watch.report().layers if seen.replaced_by}
    assert replaced == ({("", "self"), ("blocks.1", "self")} if scope == "role" else {("", "self")})


def test_raise():
    query, key, value = inputs()
    out = np.zeros_like(query)
    with guard(on_failure="raise", every=2), pytest.raises(RuntimeError, match="role 'self', call 0: WRONG_ATTN is wrong"):
        attention(query, key, value, backend=WrongBackend, out=out, role="self")
    assert np.any(out != 0)


def test_events():
    query, key, value = inputs()
    found = []
    with guard(every=1, on_event=found.append):
        attention(query, key, value)
        attention(query, key, value, backend=WrongBackend)
    (finding,) = found
    assert finding.backend == "WRONG_ATTN" and finding.error > finding.bound

    class Mine(Exception):
        pass

    def refuse(finding):
        raise Mine(finding.text)

    with guard(on_event=refuse), pytest.raises(Mine, match="WRONG_ATTN"):
        attention(query, key, value, backend=WrongBackend)


def test_quantized_attention_has_an_error_of_its_own():
    query, key, value = inputs(seq_q=64, seq_kv=300)
    with guard() as strict, guard(max_error=0.1) as fair:
        attention(query, key, value, backend="SAGE_ATTN")
    assert strict.report().failures == 1 and fair.report().failures == 0
    assert 1e-4 < fair.report().layers[0].worst.error < 0.1


def test_beside_a_capture(tmp_path):
    query, key, value = inputs()
    with capture(tmp_path / "file.safetensors") as recording, guard(on_failure="replace"):
        attention(query, key, value, backend=WrongBackend)
    assert recording.cases == ["step000000/call"]


def test_threads():
    query, key, value = inputs(seq_q=40, seq_kv=50)
    wrong = []

    def work():
        for _ in range(20):
            if not is_right(attention(query, key, value, backend=WrongBackend, role="many"), query, key, value):
                wrong.append(1)

    with guard(on_failure="replace", every=2) as watch:
        attention(query, key, value, backend=WrongBackend, role="many")
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            watch.report()
        for thread in threads:
            thread.join()
    assert not wrong
    assert watch.report().layers[0].calls == 81


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"every": 0}, "every=0 is too small"),
        ({"rows": -1}, "rows=-1 is too small"),
        ({"max_error": math.nan}, "max_error=nan"),
        ({"on_failure": "panic"}, "on_failure='panic' is not known. Valid values are: report, raise, replace"),
        ({"scope": "model"}, "scope='model' is not known. Valid values are: layer, role"),
        ({"safer": "NO_SUCH"}, "NO_SUCH"),
    ],
)
def test_arguments_that_make_no_sense(arguments, text):
    with pytest.raises(ValueError, match=text.replace("(", r"\(")):
        with guard(**arguments):
            pass


def test_a_guard_begins_once():
    watch = guard()
    assert watch.report().layers == [] and "not begun" in str(watch.report())
    with watch:
        pass
    assert str(watch.report()) == "The guard saw no call.\n"
    with pytest.raises(RuntimeError, match="begun before"), watch:
        pass


def test_torch_tensors():
    torch = pytest.importorskip("torch")
    query, key, value = map(torch.from_numpy, inputs())
    with guard(every=1, on_failure="replace") as watch:
        right = attention(query, key, value)
        assert torch.allclose(attention(query, key, value, backend=WrongBackend), right, atol=1e-5)
    assert watch.report().failures == 1
