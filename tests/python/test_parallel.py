"""ditattn.parallel with threads as ranks."""

import threading
import time

import numpy as np
import pytest
from conftest import PACKAGE, inputs
from numpy_backends import NumpyBackend
from tensors import attention, error_bound, relative_error

import ditattn
from ditattn import AttentionMetadata, parallel
from ditattn.parallel import Mesh, ParallelAttention, ParallelGroup, run_ranks

HEADS, KV_HEADS, SIZE, TOKENS = 6, 2, 32, 45
MESHES = [
    Mesh(), Mesh(ulysses=2), Mesh(ring=2), Mesh(allgather=2), Mesh(ulysses=3), Mesh(ring=3), Mesh(ulysses=4),
    Mesh(ulysses=2, ring=2), Mesh(ulysses=2, allgather=2), Mesh(ulysses=2, ring=4), Mesh(ulysses=8),
]  # fmt: skip


def problem(seed=5, dtype="float32"):
    return inputs(2, TOKENS, TOKENS, HEADS, KV_HEADS, SIZE, dtype=dtype, seed=seed)


def size_of(mesh):
    return mesh.ulysses * mesh.ring * mesh.allgather


def parts(tensors, lengths, rank):
    begin = sum(lengths[:rank])
    return [tensor[:, begin : begin + lengths[rank]] for tensor in tensors]


def compute(mesh, tensors, metadata=None, lengths=None, backend="FLASH_ATTN", **config):
    """The whole (out, LSE) by ranks that are threads, computed twice; text rows, if there are any, of rank 0."""
    size = size_of(mesh)
    lengths = lengths or parallel.balanced_lengths(TOKENS, size)

    def body(end):
        layer = ParallelAttention(
            backend, HEADS, SIZE, num_kv_heads=KV_HEADS, group=ParallelGroup(end, mesh), **config
        )
        mine = parts(tensors, lengths, end.rank)
        once, twice = (layer.forward(*mine, metadata, return_lse=True) for _ in range(2))
        assert all(map(np.array_equal, once, twice)), "other bits the second time"
        return once

    found = run_ranks(size, body, timeout=60)
    return [np.concatenate([each[i] for each in found], dim) for i, dim in ((0, 1), (1, 2))]


def test_meshes():
    assert str(Mesh(ulysses=2, ring=4)) == "ulysses=2, ring=4" and str(Mesh()) == "1 rank"
    assert Mesh.parse("ulysses=2,allgather=3") == Mesh(2, 1, 3)
    with pytest.raises(ValueError, match="'heads=2' in 'heads=2' is no degree. Give ulysses=N"):
        Mesh.parse("heads=2")
    assert parallel.balanced_lengths(10, 4) == [3, 3, 2, 2]
    with pytest.raises(ValueError, match="10 tokens cannot be shared by 0 ranks"):
        parallel.balanced_lengths(10, 0)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_the_result_is_that_of_one_rank(mesh, causal):
    tensors = problem()
    out, lse = compute(mesh, tensors, causal=causal)
    exact, magnitude, exact_lse = attention(*tensors, causal="bottom-right" if causal else None)
    error = relative_error(out, exact, magnitude)
    assert error < error_bound("float32", *tensors[:2]) and np.allclose(lse, exact_lse, atol=1e-5)
    print(f"{mesh}, causal={causal}: {error:.1e}")


@pytest.mark.parametrize("mesh", [Mesh(ulysses=3), Mesh(ulysses=2, ring=2), Mesh(allgather=3)], ids=str)
def test_masks_and_ranks_without_tokens(mesh):
    tensors = problem(seed=6)
    mask = np.arange(TOKENS) < np.array([[TOKENS], [7]])
    lengths = [0] * size_of(mesh)
    lengths[0], lengths[-2] = TOKENS - 5, 5
    out, lse = compute(mesh, tensors, AttentionMetadata(attn_mask=mask), lengths)
    exact, magnitude, exact_lse = attention(*tensors, mask=mask)
    assert relative_error(out, exact, magnitude) < error_bound("float32", *tensors[:2])
    assert np.allclose(lse, exact_lse, atol=1e-5)


@pytest.mark.parametrize("strategy", ["front", "rear"])
def test_joint_text_is_whole_on_every_rank(strategy):
    tensors, text, size = problem(), inputs(2, 4, 4, HEADS, KV_HEADS, SIZE, seed=9), 4
    metadata = AttentionMetadata(
        joint_query=text[0], joint_key=text[1], joint_value=text[2], joint_strategy=strategy
    )
    lengths = parallel.balanced_lengths(TOKENS, size)

    def body(end):
        group = ParallelGroup(end, Mesh(ulysses=2, ring=2))
        layer = ParallelAttention("FLASH_ATTN", HEADS, SIZE, num_kv_heads=KV_HEADS, group=group)
        return layer.forward(*parts(tensors, lengths, end.rank), metadata)

    found = run_ranks(size, body, timeout=60)
    front = strategy == "front"
    texts = [each[:, :4] if front else each[:, -4:] for each in found]
    images = [each[:, 4:] if front else each[:, :-4] for each in found]
    assert all(np.array_equal(each, texts[0]) for each in texts)
    order = slice(None, None, 1 if front else -1)
    exact, magnitude, _ = attention(*(np.concatenate(pair[order], 1) for pair in zip(text, tensors)))
    out = np.concatenate([texts[0], np.concatenate(images, 1)][order], 1)
    assert relative_error(out, exact, magnitude) < error_bound("float32", *tensors[:2])


@pytest.mark.parametrize("backend", ["torch_sdpa", "auto", ditattn.DiffusionAttentionBackendEnum.FLASH_ATTN, NumpyBackend])
def test_any_way_to_say_the_back_end(backend):
    tensors = problem()
    out, _ = compute(Mesh(ulysses=2, ring=2), tensors, backend=backend)
    exact, magnitude, _ = attention(*tensors)
    assert relative_error(out, exact, magnitude) < error_bound("float32", *tensors[:2])


def test_given_outputs_views_and_other_dtypes():
    tensors = [np.moveaxis(np.ascontiguousarray(np.moveaxis(each, 2, 1)), 1, 2) for each in problem(dtype="float16")]
    assert not tensors[0].flags.c_contiguous

    def body(end):
        group = ParallelGroup(end, Mesh(ring=3))
        layer = ParallelAttention("FLASH_ATTN", HEADS, SIZE, 0.3, num_kv_heads=KV_HEADS, group=group)
        mine = parts(tensors, [15] * 3, end.rank)
        out, lse = np.empty((2, 15, HEADS, SIZE), "float16"), np.empty((2, HEADS, 15), "float32")
        results = layer(*mine, out=out, lse=lse, return_lse=True)
        assert results[0] is out and results[1] is lse
        return out

    out = np.concatenate(run_ranks(3, body, timeout=60), 1)
    exact, magnitude, _ = attention(*tensors, scale=0.3)
    assert relative_error(out, exact, magnitude) < error_bound("float16", *tensors[:2], scale=0.3)


# --- Errors


def test_wrong_degrees_come_with_those_that_work():
    advice = "ulysses=2, ring=3 takes 6 ranks, there are 4. Degrees that work: ulysses=4; ulysses=2, ring=2; ring=4"
    with pytest.raises(ValueError, match=advice):
        run_ranks(4, lambda end: ParallelGroup(end, Mesh(2, 3)))
    with pytest.raises(ValueError, match="exclude each other"):
        run_ranks(4, lambda end: ParallelGroup(end, Mesh(1, 2, 2)))
    with pytest.raises(ValueError, match="Ranks differ in their mesh: rank 0 has ring=2, rank 1 has ulysses=2"):
        run_ranks(2, lambda end: ParallelGroup(end, Mesh(2, 1) if end.rank else Mesh(1, 2)))


def failing(call, size=2, timeout=30, **config):
    """What each rank's `call(layer, my tensors, rank)` raises, and what the group computes afterwards."""
    tensors = problem()
    lengths = parallel.balanced_lengths(TOKENS, size)

    def body(end):
        options = {"num_kv_heads": KV_HEADS, **config}
        layer = ParallelAttention("FLASH_ATTN", HEADS, SIZE, group=ParallelGroup(end, Mesh(ring=size)), **options)
        mine = parts(tensors, lengths, end.rank)
        with pytest.raises(Exception) as caught:
            call(layer, mine, end.rank)
        return caught.value, layer.forward(*mine)

    errors, outs = zip(*run_ranks(size, body, timeout))
    exact, magnitude, _ = attention(*tensors)
    assert relative_error(np.concatenate(outs, 1), exact, magnitude) < error_bound("float32", *tensors[:2])
    return errors


def test_what_one_rank_cannot_ask_is_told_to_the_others_and_ends_nothing():
    wrong_type = failing(lambda layer, mine, rank: layer.forward(*(["text"] if rank else mine[:1]), *mine[1:]))
    assert isinstance(wrong_type[1], TypeError) and type(wrong_type[0]) is RuntimeError
    assert str(wrong_type[0]).startswith("Rank 1 refused the call: TypeError: query must be a tensor")
    wrong_shape = failing(lambda layer, mine, rank: layer.forward(mine[0][:, :, : 5 if rank else 6], *mine[1:]))
    assert isinstance(wrong_shape[1], ValueError) and "Rank 1 refused the call: ValueError: query" in str(wrong_shape[0])
    read_only = np.empty((2, 23, HEADS, SIZE), "float32")
    read_only.flags.writeable = False
    outputs = failing(lambda layer, mine, rank: layer.forward(*mine, out=None if rank else read_only))
    assert isinstance(outputs[0], ValueError) and "Rank 0 refused the call: ValueError: out is read-only" in str(outputs[1])
    huge = np.lib.stride_tricks.as_strided(np.zeros(SIZE, "float32"), (2, 10**12, HEADS, SIZE), (0, 0, 0, 4))
    text = AttentionMetadata(joint_query=huge, joint_key=huge[:, :1], joint_value=huge[:, :1])
    memory = failing(lambda layer, mine, rank: layer.forward(*mine, text if rank else None))
    assert isinstance(memory[1], MemoryError) and "Rank 1 refused the call" in str(memory[0]), memory


def test_calls_that_differ_are_errors_everywhere():
    for found in failing(lambda layer, mine, rank: layer.forward(*mine, return_lse=rank == 0)):
        assert isinstance(found, ValueError) and "Ranks 0 and 1 differ in whether an LSE is wanted: 1 and 0" in str(found)
    mask = AttentionMetadata(attn_mask=np.ones((2, TOKENS), bool))
    for found in failing(lambda layer, mine, rank: layer.forward(*mine, mask if rank else None)):
        assert isinstance(found, ValueError) and "differ in attn_mask" in str(found)


def test_bad_layers_and_back_ends():
    def body(end):
        group = ParallelGroup(end, Mesh())
        for options, kind, text in (
            (("FLASH_ATTN", 5, 32, None, False, 2), ValueError, "q_heads=5 and kv_heads=2"),
            (("NO_SUCH", 4, 32), ValueError, "Unknown diffusion attention backend: 'NO_SUCH'"),
            ((3, 4, 32), TypeError, "backend must be a name, a member or a class, got 3"),
        ):
            with pytest.raises(kind, match=text):
                ParallelAttention(*options, group=group)

    run_ranks(1, body)


class OwnError(Exception):
    pass


def test_a_rank_that_raises_ends_the_others_and_its_error_is_the_one_that_comes():
    seen = []

    def body(end):
        try:
            group = ParallelGroup(end, Mesh(ring=3))
            if end.rank == 1:
                raise OwnError("no more")
            layer = ParallelAttention("FLASH_ATTN", HEADS, SIZE, num_kv_heads=KV_HEADS, group=group)
            layer.forward(*parts(problem(), [15] * 3, end.rank))
        except RuntimeError as error:
            seen.append(str(error))
            raise

    start = time.monotonic()
    with pytest.raises(OwnError, match="no more"):
        run_ranks(3, body, timeout=60)
    assert seen == ["parallel: rank 1 failed: OwnError: no more."] * 2 and time.monotonic() - start < 10
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rank ")]


def test_a_late_rank_is_a_timeout_error_of_python():
    def body(end):
        if end.rank == 0:
            time.sleep(1)
        end.barrier()

    text = r"rank 0 did not come within 0.2 s: it is lost or late \(rank 1 waits in barrier\)"
    with pytest.raises(TimeoutError, match=text):
        run_ranks(2, body, timeout=0.2)
    with pytest.raises(ValueError, match="A timeout of 0 s: it must be more than 0 s"):
        run_ranks(2, body, timeout=0)
    with pytest.raises(ValueError, match="A world of 0 ranks"):
        run_ranks(0, body)


def test_ranks_and_what_they_return():
    assert run_ranks(3, lambda end: (end.rank, end.size, end.timeout), timeout=7) == [(0, 3, 7), (1, 3, 7), (2, 3, 7)]


def test_waiting_leaves_pythons_lock_to_others():
    """A rank waits in C++ while another still works in Python: it would take for ever otherwise."""

    def body(end):
        if end.rank == 1:
            return sum(range(3_000_000))
        return None

    run_ranks(2, lambda end: (body(end), end.barrier()), timeout=30)


def test_pytorch_is_only_needed_for_its_own_groups(run_python):
    done = run_python("-c", "import sys\nsys.modules['torch'] = None\nfrom ditattn import parallel\n"
                            "print(parallel.run_ranks(1, lambda end: end.size))\nparallel.group()")  # fmt: skip
    assert done.stdout == "[1]\n" and "ImportError: ditattn.parallel.group needs PyTorch" in done.stderr


@pytest.mark.skipif(PACKAGE.joinpath("_ditattn_mpi.so").exists(), reason="built with MPI")
def test_without_mpi():
    with pytest.raises(ImportError, match="_ditattn_mpi.so is missing: ditattn was built without MPI"):
        with parallel.mpi_session():
            pass


@pytest.mark.skipif(PACKAGE.joinpath("_ditattn_nccl.so").exists(), reason="built with CUDA")
def test_without_cuda():
    with pytest.raises(ImportError, match="_ditattn_nccl.so is missing: .* build ditattn with nvcc, -DDITATTN_CUDA=ON"):
        run_ranks(1, lambda end: parallel.nccl_communicator(end, 0))
