"""Implementations in C++, called from Python: arrays in and out, options, threads."""

import copy
import gc
import logging
import pickle
import threading
import time
import weakref

import numpy as np
import pytest
import tensors
import tvm_ffi
from conftest import inputs, layer

import ditattn
from ditattn import AttentionBackend, AttentionImpl, AttentionMetadata, _native, attention, register_diffusion_backend
from ditattn import DiffusionAttentionBackendEnum as Enum


BACKENDS = ["FLASH_ATTN", "TORCH_SDPA"]


def as_dtype(tensor, name):
    """The same memory as another dtype."""
    return _native.function("reinterpret")(tensor, tvm_ffi.dtype(name))


def assert_close(out, query, key, value, bound=2e-6, **options):
    expected, magnitude, _ = tensors.attention(query, key, value, **options)
    assert tensors.relative_error(np.asarray(out, np.float64), expected, magnitude) <= bound


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype, bound", [("float32", 2e-6), ("float16", 6e-4)])
def test_forward(name, dtype, bound):
    query, key, value = inputs(dtype=dtype)
    impl = layer(name)
    out = impl.forward(query, key, value)
    assert type(out) is np.ndarray and out.shape == query.shape and out.dtype == dtype
    assert_close(out, query, key, value, bound)
    assert np.array_equal(impl(query, key, value), out)


@pytest.mark.parametrize("name", BACKENDS)
def test_config(name):
    query, key, value = inputs()
    rule = "top-left" if name == "TORCH_SDPA" else "bottom-right"
    assert_close(layer(name, causal=True)(query, key, value), query, key, value, causal=rule)
    assert_close(layer(name, softmax_scale=0.1)(query, key, value), query, key, value, scale=0.1)


def test_attributes_and_ignored_arguments():
    impl = layer(prefix="block.0", qkv_layout="BSND", role="self", backend_explicit=True)
    assert (impl.num_heads, impl.head_size, impl.num_kv_heads, impl.causal) == (4, 16, 2, False)
    assert (impl.softmax_scale, impl.prefix) == (0.25, "block.0")


@pytest.mark.parametrize(
    "config, text",
    [
        ({"kv_heads": 3}, "GQA requires query heads to be a multiple of KV heads, got q_heads=4 and kv_heads=3."),
        ({"head_size": 0}, "head_size=0 is not from 1 to"),
        ({"softmax_scale": float("nan")}, "softmax_scale=nan is not finite"),
        ({"qkv_layout": "BNSD"}, "qkv_layout is 'BNSD'"),
    ],
)
def test_bad_config(config, text):
    with pytest.raises(ValueError, match=text):
        layer(**config)


def test_unknown_backend_kwargs_are_warned_about_once(caplog):
    layer(backend_kwargs={"odd": 1, "even": object()})
    assert [(r.name, r.levelname, r.getMessage()) for r in caplog.records] == [
        ("ditattn", "WARNING", "FLASH_ATTN ignoring backend_kwargs: ['even', 'odd']")
    ]


# --- Arrays -----------------------------------------------------------------------------------------------------


def test_nothing_is_copied_in_or_out():
    query, key, value = inputs()
    before = [array.copy() for array in (query, key, value)]
    out = np.full_like(query, np.nan)
    assert layer()(query, key, value, out=out) is out
    assert_close(out, query, key, value)
    assert all(np.array_equal(a, b) for a, b in zip(before, (query, key, value)))


def test_inputs_are_let_go():
    query, key, value = inputs()
    seen = weakref.ref(query)
    out = layer()(query, key, value)
    del query
    gc.collect()
    assert seen() is None and out.shape == (2, 7, 4, 16)


def test_a_result_outlives_everything():
    query, key, value = inputs()
    out = layer()(query, key, value)
    kept = out.copy()
    del query, key, value
    gc.collect()
    assert np.array_equal(out, kept)


def test_read_only_inputs():
    arrays = inputs()
    for array in arrays:
        array.flags.writeable = False
    assert_close(layer()(*arrays), *arrays)


def test_a_read_only_out_is_refused():
    query, key, value = inputs()
    out = np.zeros_like(query)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        layer()(query, key, value, out=out)
    assert not out.any()


def test_strided_inputs():
    query, key, value = inputs(seq_q=9)
    packed = np.stack([np.repeat(query, 2, 0), np.repeat(query, 2, 0)], axis=3)[::2, :, :, 1]  # views of a larger array
    assert not packed.flags.c_contiguous
    assert_close(layer()(packed, key, value), query, key, value)
    transposed = np.ascontiguousarray(key.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    assert_close(layer()(query, transposed, value), query, key, value)


def test_zero_strides():
    query, key, value = inputs(batch=1)
    key, value = (np.broadcast_to(x[:, :1], x.shape) for x in (key, value))
    assert key.strides[1] == 0 and not key.flags.writeable
    assert_close(layer()(query, key, value), query, key, value)


def test_negative_strides():
    query, key, value = inputs()
    assert_close(layer()(query[:, ::-1], key, value), query[:, ::-1], key, value)
    with pytest.raises(ValueError, match="query must have a unit last stride, got strides"):
        layer()(query[..., ::-1], key, value)


def test_tvm_ffi_tensors_give_tvm_ffi_tensors():
    arrays = inputs()
    out = layer()(*map(tvm_ffi.from_dlpack, arrays))
    assert isinstance(out, tvm_ffi.Tensor)
    assert_close(np.from_dlpack(out), *arrays)


def test_bfloat16():
    """NumPy has no bfloat16: its bits, called bfloat16."""
    rounded = [tensors.BFloat16(array) for array in inputs()]
    as_bfloat16 = [as_dtype(tvm_ffi.from_dlpack(array.bits), "bfloat16") for array in rounded]
    out = layer()(*as_bfloat16)
    assert str(out.dtype) == "bfloat16"
    bits = np.from_dlpack(as_dtype(out, "uint16"))
    assert_close(tensors.BFloat16(bits=bits).numbers(), *rounded, bound=4e-3)


def test_bfloat16_of_ml_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    arrays = [array.astype(ml_dtypes.bfloat16) for array in inputs()]
    out = layer()(*arrays)
    assert type(out) is np.ndarray and out.dtype == ml_dtypes.bfloat16
    assert_close(out, *arrays, bound=4e-3)


class Foreign:
    """An array of a library that nobody knows, with nothing but DLPack."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_anything_with_dlpack():
    arrays = inputs()
    out = layer()(*map(Foreign, arrays))
    assert isinstance(out, tvm_ffi.Tensor)  # the library of the query has no from_dlpack
    assert_close(np.from_dlpack(out), *arrays)


@pytest.mark.parametrize(
    "change, kind, text",
    [
        (lambda q, k, v: ([1], k, v), TypeError, r"query must be a tensor with __dlpack__ .*, got list"),
        (lambda q, k, v: (q, None, v), TypeError, "key must be a tensor with __dlpack__ .*, got NoneType"),
        (lambda q, k, v: (q, k, v.astype(">f4")), ValueError, "value cannot be taken over: "),
        (lambda q, k, v: (q[0], k, v), ValueError, r"query must have 4 dimensions .* got shape \(7, 4, 16\)"),
        (lambda q, k, v: (q, k.astype("float16"), v), ValueError, "must have the same dtype"),
        (lambda q, k, v: (q, k, v[:, 1:]), ValueError, "Key and value must have the same shape"),
        (lambda q, k, v: (q[:, :, 1:], k, v), ValueError, "query has heads=3, expected 4"),
        (lambda q, k, v: (q.astype(object), k, v), ValueError, "query cannot be taken over"),
    ],
)
def test_bad_inputs(change, kind, text):
    with pytest.raises(kind, match=text):
        layer()(*change(*inputs()))


@pytest.mark.parametrize(
    "out, text",
    [
        (lambda q: np.zeros((1, 1)), "out must have shape"),
        (lambda q: np.zeros_like(q, "float64"), "out has dtype float64, expected float32"),
        (lambda q: q, "out shares memory with query"),
        (lambda q: np.broadcast_to(q[:1], q.shape), "out is read-only"),
    ],
)
def test_bad_out(out, text):
    query, key, value = inputs()
    before = query.copy()
    with pytest.raises(ValueError, match=text):
        layer()(query, key, value, out=out(query))
    assert np.array_equal(query, before)


@pytest.mark.parametrize("name", BACKENDS)
def test_lse(name):
    query, key, value = inputs()
    _, _, expected = tensors.attention(query, key, value)
    out, lse = layer(name)(query, key, value, return_lse=True)
    assert_close(out, query, key, value)
    assert type(lse) is np.ndarray and lse.dtype == np.float32
    np.testing.assert_allclose(lse, expected, rtol=1e-5, atol=1e-5)
    given = np.zeros_like(lse)
    out, returned = layer(name)(query, key, value, lse=given, return_lse=True)
    assert returned is given and np.array_equal(given, lse)
    given[:] = 0
    assert type(layer(name)(query, key, value, lse=given)) is np.ndarray and np.array_equal(given, lse)


def test_lse_of_joint_tokens_has_their_rows():
    query, key, value = inputs()
    text = inputs(seq_q=3, seq_kv=3, seed=2)
    metadata = AttentionMetadata(joint_query=text[0], joint_key=text[1], joint_value=text[2])
    out, lse = layer()(query, key, value, metadata, return_lse=True)
    assert out.shape == (2, 10, 4, 16) and lse.shape == (2, 4, 10)


def test_empty_tensors():
    _, key, value = inputs()
    nothing = np.lib.stride_tricks.as_strided(np.zeros(1, "float32"), (2, 0, 4, 16), (0, 0, 0, 0))  # as NumPy 2.4's
    for query in (nothing, np.zeros((2, 0, 4, 16), "float32")):
        assert layer()(query, key, value).shape == (2, 0, 4, 16)


def test_implementations_cannot_be_copied_or_pickled():
    for action in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="FlashAttentionImpl holds C\\+\\+ objects"):
            action(layer())


# --- attention() ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "AUTO", "flash_attn", "Torch_SDPA", Enum.FLASH_ATTN, "class"])
def test_attention(backend):
    query, key, value = inputs()
    cls = Enum.TORCH_SDPA.get_class() if backend == "class" else backend
    mask = np.arange(9) < np.array([[4], [9]])
    out, lse = attention(query, key, value, backend=cls, attn_mask=mask, softmax_scale=0.2, return_lse=True)
    assert_close(out, query, key, value, mask=mask, scale=0.2)
    given = np.zeros_like(query)
    assert attention(query, key, value, backend=cls, out=given) is given
    assert_close(given, query, key, value)


def test_attention_takes_a_mask_or_metadata():
    query, key, value = inputs()
    mask = np.arange(9) < np.array([[4], [9]])
    metadata = AttentionMetadata(extra={"valid_kv_length": 6})
    out = attention(query, key, value, attn_mask=mask, metadata=metadata)
    assert_close(out, query, key[:, :6], value[:, :6], mask=mask[:, :6])
    with pytest.raises(ValueError, match="attn_mask is given twice"):
        attention(query, key, value, attn_mask=mask, metadata=AttentionMetadata(attn_mask=mask))


def test_attention_asks_the_environment(monkeypatch, not_built):
    arrays = inputs()
    monkeypatch.setenv("DIFFUSION_ATTENTION_BACKEND", not_built.name.lower())
    with pytest.raises(ImportError, match="not built: there was no compiler"):
        attention(*arrays)
    assert_close(attention(*arrays, backend="flash_attn"), *arrays)


def test_attention_asks_the_configuration(not_built):
    arrays = inputs()
    config = {"default": "flash_attn", "per_role": {"cross": not_built.name.lower()}}
    assert_close(attention(*arrays, config=config, role="self"), *arrays)
    with pytest.raises(ImportError, match="not built: there was no compiler"):
        attention(*arrays, config=config, role="cross")


@pytest.mark.parametrize(
    "backend, kind, text",
    [
        ("no_such", ValueError, "Unknown diffusion attention backend: 'NO_SUCH'. Valid options are: FLASH_ATTN, "),
        (3, TypeError, "backend must be a name, a member or a class, got 3"),
        ("custom", ValueError, "Backend CUSTOM must be registered before use"),
        (int, ImportError, "builtins.int is not an attention back end"),
    ],
)
def test_attention_refuses_what_is_no_back_end(backend, kind, text):
    with pytest.raises(kind, match=text):
        attention(*inputs(), backend=backend)


def test_attention_keeps_implementations_but_not_for_ever():
    alive = weakref.WeakSet()

    class Impl(AttentionImpl):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            alive.add(self)

        def forward(self, query, key, value, attn_metadata=None):
            return query

    class Backend(AttentionBackend):
        get_name = staticmethod(lambda: "COUNTED")
        get_impl_cls = staticmethod(lambda: Impl)

    query, key, value = inputs(kv_heads=4)
    for _ in range(3):
        attention(query, key, value, backend=Backend)
    assert len(alive) == 1
    different = [{"softmax_scale": 0.5}, {"backend_kwargs": {"a": 1}}, {"backend_kwargs": {"a": "1"}}]
    for count, options in enumerate(different, 2):
        attention(query, key, value, backend=Backend, **options)
        assert len(alive) == count
    for index in range(1100):
        attention(query, key, value, backend=Backend, softmax_scale=1 + index)
    gc.collect()
    assert 1 <= len(alive) <= 512


def test_attention_sees_registrations_at_once():
    query, key, value = inputs(kv_heads=4)

    def answering(number):
        class Impl(AttentionImpl):
            def forward(self, query, key, value, attn_metadata=None):
                return query * 0 + number

        class Backend(AttentionBackend):
            get_name = staticmethod(lambda: f"ANSWERS_{number}")
            get_impl_cls = staticmethod(lambda: Impl)

        return Backend

    for number in (1, 2):
        register_diffusion_backend(Enum.CUSTOM)(answering(number))
        assert (attention(query, key, value, backend="custom") == number).all()
    Enum.CUSTOM.clear_override()
    with pytest.raises(ValueError, match="must be registered before use"):
        attention(query, key, value, backend="custom")


def test_options_that_cannot_be_hashed_are_passed_too(caplog):
    attention(*inputs(), backend="flash_attn", backend_kwargs={"odd": [1]})
    assert "ignoring backend_kwargs: ['odd']" in caplog.text


def test_launches_are_counted_by_role():
    query, key, value = inputs()
    ditattn.reset_launch_counts()
    assert ditattn.launch_counts() == []
    for role in ("self", "self", "cross"):
        layer("FLASH_ATTN", role=role)(query, key, value)
    attention(query, key, value, role="cross", config={"default": "torch_sdpa"})
    attention(query, key, value)
    with pytest.raises(ValueError):
        attention(query, key[:1], value)
    assert sorted(ditattn.launch_counts()) == [
        ("", "FLASH_ATTN", 1), ("cross", "FLASH_ATTN", 1), ("cross", "SDPA", 1), ("self", "FLASH_ATTN", 2)
    ]  # fmt: skip


# --- Threads ----------------------------------------------------------------------------------------------------


def test_python_runs_while_a_kernel_does():
    """One thread in a kernel that takes long, another that counts; where Python is locked it counts nothing."""
    query, key, value = inputs(batch=1, seq_q=2048, seq_kv=2048, heads=4, kv_heads=4, head_size=64)
    impl = layer("TORCH_SDPA", kv_heads=4, head_size=64)
    impl(query[:, :4], key, value)
    times, done = [], threading.Event()

    def kernel():
        start = time.perf_counter()
        impl(query, key, value)
        times.extend((start, time.perf_counter()))
        done.set()

    thread = threading.Thread(target=kernel)
    ticks = []
    thread.start()
    while not done.is_set():
        ticks.append(time.perf_counter())
        time.sleep(0.0005)
    thread.join()
    start, end = times
    inside = [tick for tick in ticks if start + 0.2 * (end - start) < tick < start + 0.8 * (end - start)]
    assert end - start > 0.02 and len(inside) > 3, f"{len(inside)} ticks within {end - start:.3f} s"


def test_many_threads_call_at_once():
    query, key, value = inputs()
    expected = layer()(query, key, value)
    mask = np.arange(9) < np.array([[4], [9]])
    metadata = AttentionMetadata(attn_mask=mask)
    masked = layer()(query, key, value, metadata)
    failures = []

    def work(index):
        try:
            for step in range(50):
                cls = Enum["FLASH_ATTN"].get_class()
                impl = cls.get_impl_cls()(4, 16, num_kv_heads=2)
                assert np.array_equal(impl(query, key, value), expected)
                assert np.array_equal(attention(query, key, value, backend="flash_attn", metadata=metadata), masked)
                Enum.define(f"THREAD_{index}_{step}")
                assert f"THREAD_{index}_{step}" in Enum.__members__
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# --- Logging, threads of kernels --------------------------------------------------------------------------------


def test_messages_go_to_logging(caplog):
    caplog.set_level(logging.DEBUG, "ditattn")
    attention(*inputs(heads=8, kv_heads=8, head_size=24), config={"default": "torch_sdpa"}, role="odd role")
    text = "Resolved diffusion attention backend 'TORCH_SDPA' for role='odd role' via attention_config.default"
    assert ("ditattn", logging.INFO, text) in caplog.record_tuples


def test_a_log_handler_of_ones_own(caplog):
    seen = []
    ditattn.set_log_handler(lambda level, message: seen.append((level, message)))
    try:
        layer(backend_kwargs={"odd": 1})
        ditattn.set_log_handler(lambda level, message: 1 / 0)
        layer(backend_kwargs={"odd": 1})  # its error is its own
        ditattn.set_log_handler(None)
        layer(backend_kwargs={"odd": 1})
    finally:
        ditattn.set_log_handler()
    assert seen == [(2, "FLASH_ATTN ignoring backend_kwargs: ['odd']")] and caplog.records == []


def test_num_threads():
    try:
        ditattn.set_num_threads(1)
        assert ditattn.num_threads() == 1
        with pytest.raises(ValueError, match="2000"):
            ditattn.set_num_threads(2000)
    finally:
        ditattn.set_num_threads(0)
