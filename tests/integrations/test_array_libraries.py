"""Arrays of JAX and CuPy: taken over through DLPack, and results are arrays of theirs."""

import numpy as np
import pytest

from ditattn import AttentionMetadata, attention


def jax_arrays():
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    return jax.Array, jax.numpy.asarray, np.asarray


def cupy_arrays():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    if not cupy.cuda.is_available():
        pytest.skip("no CUDA device")
    return cupy.ndarray, cupy.asarray, cupy.asnumpy


@pytest.fixture(params=[jax_arrays, cupy_arrays])
def library(request):
    return request.param()


def inputs(dtype="float32"):
    rng = np.random.default_rng(4)
    shapes = [(2, 7, 4, 16), *2 * [(2, 9, 2, 16)]]
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def assert_close(out, host_inputs, bound, mask=None):
    query, key, value = (np.asarray(array, np.float64) for array in host_inputs)
    key, value = (array.repeat(query.shape[2] // array.shape[2], 2) for array in (key, value))
    logits = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(logits) * (1 if mask is None else mask[:, None, None])
    expected = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), value)
    found = np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected)
    print(f"relative L2 {found:.2e} of {bound:.0e}")
    assert found <= bound


@pytest.mark.parametrize("dtype, bound", [("float32", 2e-6), ("float16", 1e-3)])
def test_results_are_of_the_querys_library(library, dtype, bound):
    kind, make, host = library
    arrays = inputs(dtype)
    out, lse = attention(*map(make, arrays), backend="torch_sdpa", return_lse=True)
    assert isinstance(out, kind) and out.shape == (2, 7, 4, 16) and out.dtype == dtype
    assert isinstance(lse, kind) and lse.shape == (2, 4, 7) and lse.dtype == "float32"
    assert_close(host(out), arrays, bound)


def test_masks_of_the_same_library(library):
    kind, make, host = library
    arrays = inputs()
    mask = np.arange(9) < np.array([[4], [9]])
    for given in ({"attn_mask": make(mask)}, {"metadata": AttentionMetadata(attn_mask=make(mask))}):
        out = attention(*map(make, arrays), backend="torch_sdpa", **given)
        assert isinstance(out, kind)
        assert_close(host(out), arrays, 2e-6, mask)


def test_bfloat16_of_jax():
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    arrays = [jax.numpy.asarray(array, "bfloat16") for array in inputs()]
    out = attention(*arrays, backend="torch_sdpa")
    assert isinstance(out, jax.Array) and out.dtype == "bfloat16"
    assert_close(np.asarray(out, "float32"), [np.asarray(array, "float32") for array in arrays], 5e-3)
