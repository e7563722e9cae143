"""Back ends written in Python, called through C++."""

import gc
import sys
import threading
import weakref

import numpy as np
import numpy_backends
import pytest
import tensors
import tvm_ffi
from conftest import inputs
from numpy_backends import NumpyBackend, NumpyImpl, PlainBackend

from ditattn import AttentionBackend, AttentionImpl, AttentionMetadata, QueryRange, attention
from ditattn import DiffusionAttentionBackendEnum as Enum
from ditattn import register_diffusion_backend
from ditattn.backend import class_for
from ditattn.python_backend import adapted
from ditattn.tensors import torch

WITHOUT_TORCH = pytest.mark.skipif(torch() is not None, reason="with PyTorch, back ends get its tensors")

WITH_TORCH = pytest.mark.skipif(torch() is None, reason="PyTorch is not installed")


def through_cpp(cls):
    """The class as C++ sees it."""
    return class_for(adapted(cls))


def with_forward(forward, **capabilities):
    """A back end with this `forward(self, query, key, value, attn_metadata, **options)`."""
    impl = type("Impl", (AttentionImpl,), {"forward": forward})
    body = {
        "get_name": staticmethod(lambda: "MINE"),
        "get_impl_cls": staticmethod(lambda: impl),
        "capabilities": staticmethod(lambda: capabilities),
    }
    return type("Mine", (AttentionBackend,), body)


def assert_attends(out, query, key, value, **options):
    expected, magnitude, _ = tensors.attention(query, key, value, **options)
    assert tensors.relative_error(out, expected, magnitude) < 2e-6


def test_a_full_class():
    query, key, value = inputs()
    mask = np.arange(9) < np.array([[4], [9]])
    out, lse = attention(query, key, value, backend=NumpyBackend, attn_mask=mask, causal=True, softmax_scale=0.1,
                         return_lse=True)  # fmt: skip
    options = {"mask": mask, "causal": "bottom-right", "scale": 0.1}
    assert_attends(out, query, key, value, **options)
    np.testing.assert_allclose(lse, tensors.attention(query, key, value, **options)[2], rtol=1e-5, atol=1e-5)


def test_a_class_without_a_base():
    query, key, value = inputs(heads=2)
    assert_attends(attention(query, key, value, backend=PlainBackend), query, key, value)


def test_what_a_silent_class_is_taken_for():
    can = through_cpp(PlainBackend).capabilities()
    torch_dtypes = ["bfloat16"] if torch() is not None else []
    assert can == {
        "engine": "Python: numpy_backends.PlainBackend", "devices": ["cpu"],
        "dtypes": ["float32", "float16", *torch_dtypes], "head_sizes": None, "masks": [], "gqa": False,
        "causal": False, "causal_top_left": False, "lse": False, "packed": False, "joint": False, "fp8_kv": False,
        "alignment": 1, "graph_safe": False, "masked_nan_propagates": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"head_sizes": {"min": 8, "max": 64, "multiple": 8}}, {"min": 8, "max": 64, "multiple": 8}),
        ({"head_sizes": {"min": 8, "max": None, "multiple": 8}}, {"min": 8, "max": None, "multiple": 8}),
        ({"head_sizes": [64, 128]}, [64, 128]),
        ({"head_sizes": None}, None),
    ],
)
def test_declared_head_sizes(given, expected):
    assert through_cpp(with_forward(None or (lambda *a: None), **given)).capabilities()["head_sizes"] == expected


def test_head_sizes_of_methods():
    assert through_cpp(NumpyBackend).get_supported_head_sizes() == [16, 32, 64]

    class Multiples(NumpyBackend):
        get_supported_head_sizes = staticmethod(list)
        supports_head_size = classmethod(lambda cls, size: size % 64 == 0 and size <= 256)

    assert through_cpp(Multiples).get_supported_head_sizes() == [64, 128, 192, 256]


def test_unknown_capabilities_are_refused():
    with pytest.raises(ImportError, match=r"has the unknown keys \['dtype'\]. Valid keys are: engine, "):
        attention(*inputs(), backend=with_forward(lambda *a: None, dtype="float32"))


@pytest.mark.parametrize(
    "options, text",
    [
        ({"causal": True}, "causal"),
        ({"return_lse": True}, "LSE|lse|log-sum-exp"),
        ({"attn_mask": np.arange(9) < np.array([[4], [9]])}, "mask"),
        ({"metadata": AttentionMetadata(full_attn_spans=[[(0, 2)]])}, "span"),
    ],
)
def test_what_is_not_declared_is_refused(options, text):
    arrays = inputs(heads=2)
    with pytest.raises(ValueError, match=f"PLAIN.*({text})"):
        attention(*arrays, backend=PlainBackend, **options)
    with pytest.raises(ValueError, match="PLAIN.*(GQA|heads)"):
        attention(*inputs(heads=4), backend=PlainBackend)


def test_what_the_constructor_gets():
    arrays = inputs()
    attention(*arrays, backend=NumpyBackend, backend_kwargs={"block": 3, "list": [1, {"a": "b"}], "none": None})
    config = NumpyImpl.seen[-1][-1]
    assert (config["num_heads"], config["num_kv_heads"], config["head_size"]) == (4, 2, 16)
    assert config["softmax_scale"] == 0.25 and config["causal"] is False and config["prefix"] == ""
    assert config["backend_kwargs"] == {"block": 3, "list": [1, {"a": "b"}], "none": None}
    assert type(config["backend_kwargs"]["list"]) is list and type(config["prefix"]) is str


def test_options_that_are_equal_but_not_the_same():
    for value in (1, True, 1.0):
        attention(*inputs(), backend=NumpyBackend, backend_kwargs={"value": value})
        assert type(NumpyImpl.seen[-1][-1]["backend_kwargs"]["value"]) is type(value)


def test_options_a_class_does_not_know_are_warned_about(caplog):
    attention(*inputs(heads=2), backend=PlainBackend, backend_kwargs={"odd": 1})
    attention(*inputs(), backend=NumpyBackend, backend_kwargs={"any": 1})  # it takes backend_kwargs
    knows = with_forward(lambda self, q, k, v, m: q, backend_kwargs=["block"], gqa=True)
    attention(*inputs(), backend=knows, backend_kwargs={"block": 1, "other": 2})
    assert [record.getMessage() for record in caplog.records] == [
        "PLAIN ignoring backend_kwargs: ['odd']", "MINE ignoring backend_kwargs: ['other']",
    ]  # fmt: skip


@pytest.mark.parametrize("library", ["numpy", "tvm_ffi", pytest.param("torch", marks=WITH_TORCH)])
def test_a_class_says_what_tensors_it_wants(library):
    kinds = []

    def forward(self, query, key, value, metadata):
        tensors_of = (query, key, value, metadata.attn_mask, metadata.extra["cu_seqlens_q"])
        kinds.append({type(tensor).__module__.partition(".")[0] for tensor in tensors_of})
        return query

    extra = {key: np.array([0, 7 if key.endswith("q") else 9], "int32") for key in ("cu_seqlens_q", "cu_seqlens_k")}
    metadata = AttentionMetadata(attn_mask=np.ones((2, 9), bool), extra=extra | {"max_seqlen_q": 7, "max_seqlen_k": 9})
    cls = with_forward(forward, tensors=library, gqa=True, packed=True, masks=["padding"])
    query, key, value = inputs()
    assert np.array_equal(attention(query, key, value, metadata=metadata, backend=cls), query)
    assert kinds == [{library}]


def test_tensors_of_a_library_nobody_knows():
    with pytest.raises(ImportError, match="tensors='jax'. Valid values are: torch, numpy, tvm_ffi"):
        attention(*inputs(), backend=with_forward(lambda *a: None, tensors="jax"))


def test_forward_gets_read_only_numpy_arrays():
    query, key, value = inputs()
    attention(query, key, value, backend=NumpyBackend)
    for given, got in zip((query, key, value), NumpyImpl.seen[-1]):
        assert type(got) is np.ndarray and np.shares_memory(given, got) and not got.flags.writeable


@WITHOUT_TORCH
def test_forward_gets_tvm_ffi_tensors_where_numpy_has_no_such_dtype(monkeypatch):
    monkeypatch.delitem(sys.modules, "ml_dtypes", raising=False)  # which has it, once imported
    kinds = []

    def forward(self, query, key, value, metadata):
        kinds.append((type(query), str(query.dtype)))
        return query

    from ditattn import _native

    as_dtype = _native.function("reinterpret")
    arrays = [tvm_ffi.from_dlpack(tensors.BFloat16(array).bits) for array in inputs(seq_q=9, heads=2)]
    query, key, value = (as_dtype(array, tvm_ffi.dtype("bfloat16")) for array in arrays)
    out = attention(query, key, value, backend=with_forward(forward, dtypes=["bfloat16"]))
    assert kinds == [(tvm_ffi.Tensor, "bfloat16")] and str(out.dtype) == "bfloat16"
    assert np.array_equal(*(np.from_dlpack(as_dtype(t, tvm_ffi.dtype("uint16"))) for t in (out, query)))


def test_forward_gets_the_metadata():
    mask = np.arange(9) < np.array([[4], [9]])
    mine = object()
    text = inputs(seq_q=3, seq_kv=5, seed=2)
    given = AttentionMetadata(
        attn_mask=mask, joint_query=text[0], joint_key=text[1], joint_value=text[2], joint_strategy="rear",
        joint_attn_mask=np.ones((2, 5), bool), full_attn_spans=[[(0, 2), (4, 5)]],
        query_ranges=[QueryRange(0, 10, 2)], extra={"mine": mine, "valid_kv_length": 9, "kv_cache_dtype": "auto"},
    )  # fmt: skip
    got = []

    def forward(self, query, key, value, metadata):
        got.append(metadata)
        return np.zeros((2, 10, 4, 16), "float32")

    cls = with_forward(forward, gqa=True, joint=True, masks=["padding", "bool", "additive", "spans"])
    out = attention(*inputs(), backend=cls, metadata=given)
    assert out.shape == (2, 10, 4, 16)
    (metadata,) = got
    assert isinstance(metadata, AttentionMetadata) and metadata is not given
    for name in ("attn_mask", "joint_attn_mask", "joint_query", "joint_key", "joint_value"):
        assert np.array_equal(np.asarray(getattr(metadata, name)), getattr(given, name)), name
    assert metadata.joint_strategy == "rear" and metadata.full_attn_spans == [[(0, 2), (4, 5)]]
    assert metadata.query_ranges == (QueryRange(0, 10, 2),)
    assert metadata.extra == {"mine": mine, "valid_kv_length": 9, "kv_cache_dtype": "auto"}
    got.clear()
    attention(*inputs(), backend=with_forward(lambda s, q, k, v, m: got.append(m) or q, gqa=True))
    assert got == [None]


def test_metadata_is_not_kept_alive():
    metadata = AttentionMetadata(attn_mask=np.ones((2, 9), bool))
    attention(*inputs(), metadata=metadata)
    seen = weakref.ref(metadata)
    gc.disable()
    try:
        del metadata
        assert seen() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "result, text",
    [
        (lambda q: q.astype("float64"), "MINE: what forward returned is float64 .2, 7, 4, 16. on cpu, expected"),
        (lambda q: q[:, 1:], "MINE: what forward returned is float32 .2, 6, 4, 16. on cpu, expected float32 .2, 7, 4"),
        (lambda q: q[0], "what forward returned is float32 .7, 4, 16. on cpu"),
        (lambda q: None, "what forward returned must be a tensor with __dlpack__ .*, got NoneType"),
        (lambda q: (q, q), "what forward returned must be a tensor with __dlpack__ .*, got tuple"),
    ],
)
def test_a_wrong_result_is_refused(result, text):
    query, key, value = inputs()
    cls = with_forward(lambda self, q, k, v, m: result(np.asarray(q)), gqa=True)
    with pytest.raises((ValueError, TypeError), match=text):
        attention(query, key, value, backend=cls)


def test_a_wrong_lse_is_refused():
    cls = with_forward(lambda self, q, k, v, m, return_lse=False: q, gqa=True, lse=True)
    with pytest.raises(TypeError, match=r"MINE declares lse: forward\(…, return_lse=True\) must return \(out, lse\)"):
        attention(*inputs(), backend=cls, return_lse=True)
    cls = with_forward(lambda self, q, k, v, m, return_lse=False: (q, np.zeros((2, 4, 7))), gqa=True, lse=True)
    with pytest.raises(ValueError, match="MINE: the LSE that forward returned is float64"):
        attention(*inputs(), backend=cls, return_lse=True)


def test_results_of_any_strides_are_copied():
    query, key, value = inputs()
    views = [
        lambda q: q, lambda q: np.ascontiguousarray(q.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3),
        lambda q: np.broadcast_to(q[:, :1, :, :1], q.shape), lambda q: q[:, ::-1, :, ::-1],
    ]  # fmt: skip
    for view in views:
        out = attention(query, key, value, backend=with_forward(lambda s, q, k, v, m: view(np.asarray(q)), gqa=True))
        assert np.array_equal(out, view(query)) and not np.shares_memory(out, query)
        given = np.zeros((2, 7, 4, 32), "float32")[..., ::1][..., :16]
        cls = with_forward(lambda s, q, k, v, m: view(np.asarray(q)), gqa=True)
        assert attention(query, key, value, backend=cls, out=given) is given and np.array_equal(given, view(query))


def test_validate_available_is_asked():
    class Absent(NumpyBackend):
        @classmethod
        def validate_available(cls):
            raise ImportError("needs a machine that is not here")

    register_diffusion_backend(Enum.CUSTOM)(Absent)
    assert Enum.CUSTOM.get_class() is Absent  # the class is there
    with pytest.raises(ImportError, match="needs a machine that is not here"):
        attention(*inputs(), backend="custom")


def test_a_refusal_names_a_back_end_that_would_do():
    with pytest.raises(ValueError, match="PLAIN.* FLASH_ATTN would do."):
        attention(*inputs(heads=2), backend=PlainBackend, causal=True)
    register_diffusion_backend(Enum.FLASH_ATTN)(NumpyBackend)
    with pytest.raises(ValueError, match="NUMPY_ATTN.*head_size=17.* TORCH_SDPA would do."):
        attention(*inputs(head_size=17), backend="flash_attn")


def test_the_platforms_default_may_be_written_in_python():
    register_diffusion_backend(Enum.FLASH_ATTN)(NumpyBackend)
    query, key, value = inputs()
    calls = len(NumpyImpl.seen)
    assert_attends(attention(query, key, value), query, key, value)
    assert len(NumpyImpl.seen) == calls + 1
    attention(*inputs(head_size=17))  # goes to the next
    assert len(NumpyImpl.seen) == calls + 1


@pytest.mark.parametrize("name", ["FLASH_ATTN", "TORCH_SDPA"])
def test_a_class_derived_from_one_in_cpp(name):
    class Derived(Enum[name].get_class()):
        get_name = staticmethod(lambda: "DERIVED")

    query, key, value = inputs()
    options = {"attn_mask": np.arange(9) < np.array([[4], [9]]), "causal": True, "return_lse": True}
    got, expected = (attention(query, key, value, backend=cls, **options) for cls in (Derived, name))
    assert all(np.array_equal(a, b) for a, b in zip(got, expected))


def test_a_back_end_may_call_others_but_not_itself():
    query, key, value = inputs()
    inner = "flash_attn"
    cls = with_forward(lambda self, q, k, v, m: attention(q, k, v, backend=inner), gqa=True)
    register_diffusion_backend(Enum.CUSTOM)(cls)
    assert np.array_equal(attention(query, key, value, backend="custom"), attention(query, key, value))
    inner = "custom"
    with pytest.raises(RecursionError, match="does a back end call itself"):
        attention(query, key, value, backend="custom")
    inner = "flash_attn"
    assert np.array_equal(attention(query, key, value, backend="custom"), attention(query, key, value))


def test_registrations_and_calls_from_many_threads():
    query, key, value = inputs()
    expected = attention(query, key, value, backend="torch_sdpa")
    failures = []

    def step(action, number):
        if action == 0:
            register_diffusion_backend(Enum.CUSTOM)(type("Local", (NumpyBackend,), {"__qualname__": "a.<locals>.Local"}))
        elif action == 1:
            Enum.CUSTOM.clear_override()
        elif action == 2:
            register_diffusion_backend(Enum.SAGE_ATTN, f"no.such.Class{number}")
            with pytest.raises(ImportError):
                Enum.SAGE_ATTN.get_class()
            gc.collect(0)
        else:
            try:
                out = attention(query, key, value, backend="custom", backend_kwargs={"number": number})
            except ValueError as error:
                assert "must be registered before use" in str(error)
            else:
                assert np.allclose(out, expected, atol=1e-5)

    def work(seed):
        choices = np.random.default_rng(seed).integers(0, 5, 150)
        try:
            for number, action in enumerate(choices):
                step(action, number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert failures == [] and not any(thread.is_alive() for thread in threads)


# --- The base classes, used from Python -------------------------------------------------------------------------


class UpstreamImpl(AttentionImpl):
    """As vLLM-Omni's are: a method per platform."""

    def __init__(self, num_heads, head_size, softmax_scale, causal=False, num_kv_heads=None, prefix="", **extra):
        self.softmax_scale = softmax_scale

    def forward_cpu(self, query, key, value, attn_metadata=None):
        query, key, value = map(np.asarray, (query, key, value))
        return numpy_backends.attention(query, key, value, scale=self.softmax_scale)[0].astype(query.dtype)


class UpstreamBackend(AttentionBackend):
    """As vLLM-Omni's are."""

    @staticmethod
    def get_name():
        return "UPSTREAM"

    @staticmethod
    def get_impl_cls():
        return UpstreamImpl

    @staticmethod
    def get_supported_head_sizes():
        return [16]


def test_a_class_in_upstreams_style():
    query, key, value = inputs(heads=2)
    impl = UpstreamBackend.get_impl_cls()(2, 16, 0.25)
    assert_attends(impl.forward(query, key, value), query, key, value)
    assert UpstreamBackend.supports_head_size(16) and not UpstreamBackend.supports_head_size(32)
    assert UpstreamBackend.supports_attention_mask() is False is UpstreamBackend.supports_piecewise_spans()
    assert UpstreamBackend.get_metadata_cls() is AttentionMetadata and UpstreamBackend.accept_output_buffer is False
    assert_attends(attention(query, key, value, backend=UpstreamBackend), query, key, value)


def test_a_platform_without_a_method():
    class Impl(AttentionImpl):
        pass

    with pytest.raises(NotImplementedError, match="^No forward implementation for platform: cpu$"):
        Impl(1, 16).forward(*inputs())
    with pytest.raises(NotImplementedError, match="^Impl does not support paged KV attention$"):
        Impl(1, 16).forward_paged()


def test_the_base_class_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        AttentionBackend()
    with pytest.raises(NotImplementedError, match="metadata builder"):
        UpstreamBackend.get_builder_cls()
