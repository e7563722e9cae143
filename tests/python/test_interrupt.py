"""KeyboardInterrupt in a back end written in Python: it ends whatever asked, and nothing is remembered of the class."""

import sys

import numpy as np
import pytest
from numpy_backends import NumpyBackend, NumpyImpl

import ditattn
from ditattn import DiffusionAttentionBackendEnum as Enum

Q = np.random.default_rng(5).standard_normal((1, 8, 2, 16)).astype(np.float32)


class Impl(NumpyImpl):
    """Interrupted at its `left`-th call."""

    left = 0

    def forward(self, *args, **kwargs):
        Impl.left -= 1
        if Impl.left == 0:
            raise KeyboardInterrupt
        return super().forward(*args, **kwargs)


class Interrupted(NumpyBackend):
    get_impl_cls = staticmethod(lambda: Impl)


@pytest.fixture(autouse=True)
def tuned(tmp_path, monkeypatch):
    """Choices of the test's own."""
    monkeypatch.setenv("DITATTN_TUNE", "online")
    monkeypatch.setenv("DITATTN_TUNE_CACHE", str(tmp_path / "tuned"))
    ditattn.reload_tuned()
    yield tmp_path / "tuned"
    monkeypatch.undo()
    ditattn.reload_tuned()


@pytest.fixture
def interrupted(monkeypatch):
    monkeypatch.setitem(sys.modules, "interrupted", sys.modules[__name__])
    ditattn.register_diffusion_backend(Enum.CUSTOM, "interrupted.Interrupted")


def files(folder):
    return [path.name for path in folder.rglob("*") if path.suffix == ".json"]


@pytest.mark.parametrize("call", [1, 2, 7])  # warming up, and in rounds
def test_tuning(interrupted, tuned, call):
    Impl.left = call
    with pytest.raises(KeyboardInterrupt):
        ditattn.tune_call(Q, Q, Q, budget_ms=30)
    assert files(tuned) == [] and ditattn.tuned_problems() == []
    result = ditattn.tune_call(Q, Q, Q, budget_ms=5)
    assert [r.reason for r in result.results if r.backend == "CUSTOM"] == [""]


def test_measuring_at_the_first_call(interrupted, tuned):
    Impl.left = 3
    with pytest.raises(KeyboardInterrupt):
        ditattn.attention(Q, Q, Q)
    assert files(tuned) == [] and ditattn.tuned_problems() == []
    np.testing.assert_allclose(
        ditattn.attention(Q, Q, Q), ditattn.attention(Q, Q, Q, backend="custom"), rtol=1e-4, atol=1e-5
    )
    assert len(files(tuned)) == 1


ASKERS = {
    "select_backend": lambda: ditattn.select_backend(head_size=16),
    "explain": lambda: ditattn.explain(head_size=16),
    "attention": lambda: ditattn.attention(Q, Q, Q),
    "by name": lambda: ditattn.attention(Q, Q, Q, backend="flash_attn"),
}


@pytest.mark.parametrize("asker", ASKERS)
def test_import(module, monkeypatch, asker):
    """The first of the platform's order."""
    monkeypatch.setenv("DITATTN_TUNE", "off")
    ditattn.reload_tuned()
    name = "imported_" + asker.replace(" ", "_")
    monkeypatch.setattr(Impl, "left", 0)
    monkeypatch.setattr(sys, "interruptions", [1], raising=False)
    module(name, "import sys\nif sys.interruptions:\n    sys.interruptions.pop()\n    raise KeyboardInterrupt\n"
                 "from numpy_backends import NumpyBackend\n")  # fmt: skip
    ditattn.register_diffusion_backend(Enum.FLASH_ATTN, f"{name}.NumpyBackend")
    with pytest.raises(KeyboardInterrupt):
        ASKERS[asker]()
    NumpyImpl.seen.clear()
    assert ditattn.select_backend(head_size=16).member == Enum.FLASH_ATTN
    ditattn.attention(Q, Q, Q)
    assert len(NumpyImpl.seen) == 1


def test_asking_a_class_that_is_no_candidate(module):
    module("no_candidate", "raise KeyboardInterrupt\n")
    ditattn.register_diffusion_backend(Enum.CUSTOM, "no_candidate.Class")
    with pytest.raises(KeyboardInterrupt):
        ditattn.explain(head_size=16)


def test_replacing_by_a_guard(interrupted):
    class Wrong(NumpyBackend):
        get_name = staticmethod(lambda: "WRONG_ATTN")
        get_impl_cls = staticmethod(lambda: type("Impl", (NumpyImpl,), {"forward": lambda self, q, k, v, m: v * 2}))

    with ditattn.guard(on_failure="replace", safer="CUSTOM") as watch:
        Impl.left = 1
        with pytest.raises(KeyboardInterrupt):
            ditattn.attention(Q, Q, Q, backend=Wrong)
        assert [layer.replaced_by for layer in watch.report().layers] in ([], [""])
        ditattn.attention(Q, Q, Q, backend=Wrong)
        assert [layer.replaced_by for layer in watch.report().layers] == ["NUMPY_ATTN"]
