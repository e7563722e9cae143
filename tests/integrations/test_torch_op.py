"""``torch.ops.ditattn``: values against PyTorch in float64, compilation, autocast, gradients, streams and graphs."""

import gc
import json
import threading

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import ditattn  # noqa: E402
from ditattn import DiffusionAttentionBackendEnum as Enum  # noqa: E402

attention, with_lse = torch.ops.ditattn.attention, torch.ops.ditattn.attention_with_lse
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
BOUNDS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def inputs(batch=2, rows=7, keys=9, heads=4, kv_heads=2, size=16, dtype=torch.float32, device="cpu", seed=1):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, rows, heads, size), *2 * [(batch, keys, kv_heads, size)]]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def expected(query, key, value, mask=None, scale=None, causal=False):
    """Out and LSE in float64, on the host; causal from the bottom right."""
    query, key, value = (tensor.double().cpu().transpose(1, 2) for tensor in (query, key, value))
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        mask = mask.cpu()
        mask = mask[:, None, None] if mask.ndim == 2 else mask
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.double()
    if causal:
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool).tril(logits.shape[-1] - logits.shape[-2])
        logits = logits.masked_fill(~seen, -torch.inf)
    return (logits.softmax(-1).nan_to_num(0) @ value).transpose(1, 2), logits.logsumexp(-1)


def error(out, reference):
    return ((out.double().cpu() - reference).norm() / reference.norm()).item()


def assert_close(out, reference, bound=2e-6):
    found = error(out, reference)
    print(f"relative L2 {found:.2e} of {bound:.0e}")
    assert found < bound


def masks(rows=7, keys=9):
    generator = torch.Generator().manual_seed(3)
    lengths = torch.arange(keys) < torch.tensor([[4], [keys]])
    return {
        "none": None,
        "padding": lengths,
        "holes": torch.rand(2, keys, generator=generator) < 0.6,
        "rows": torch.rand(2, 1, rows, keys, generator=generator) < 0.7,
        "heads": torch.rand(1, 4, rows, keys, generator=generator) < 0.7,
        "added": torch.randn(2, 4, rows, keys, generator=generator),
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("kind", masks())
def test_values(device, dtype, kind):
    tensors = inputs(dtype=dtype, device=device)
    mask = masks()[kind]
    mask = None if mask is None else mask.to(device, mask.dtype if mask.dtype == torch.bool else dtype)
    reference, reference_lse = expected(*tensors, mask, scale=0.3)
    assert_close(attention(*tensors, mask, softmax_scale=0.3), reference, BOUNDS[dtype])
    out, lse = with_lse(*tensors, mask, softmax_scale=0.3)
    assert out.dtype == dtype and lse.dtype == torch.float32 and lse.shape == (2, 4, 7) and lse.device == out.device
    assert_close(out, reference, BOUNDS[dtype])
    assert torch.allclose(lse.cpu().double(), reference_lse, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rows, keys", [(7, 9), (1, 1), (5, 5), (1, 64), (130, 257)])
def test_causal_and_odd_lengths(rows, keys):
    tensors = inputs(rows=rows, keys=keys)
    assert_close(attention(*tensors, causal=True), expected(*tensors, causal=True)[0])


def test_backends_and_options_by_name():
    tensors = inputs(heads=4, kv_heads=4, size=64, rows=65, keys=65)
    exact = expected(*tensors)[0]
    for name, bound in {"flash_attn": 2e-6, "TORCH_SDPA": 2e-6, "SAGE_ATTN": 8e-2, "SAGE_ATTN_3": 0.4}.items():
        found = error(attention(*tensors, backend=name), exact)
        print(f"{name}: relative L2 {found:.2e} of {bound:.0e}")
        assert found < bound
    smooth, plain = (
        attention(*tensors, backend="SAGE_ATTN", backend_kwargs=json.dumps({"smooth_k": flag})) for flag in (True, False)
    )
    assert not torch.equal(smooth, plain)


def test_a_bound_of_the_error_is_for_auto_alone():
    tensors = inputs(heads=4, kv_heads=4, size=64, rows=65, keys=65)
    assert torch.equal(attention(*tensors, max_error=0.5), attention(*tensors))  # nothing was measured
    with pytest.raises(ValueError, match='max_error bounds the choice of backend "auto", but the backend is FLASH_ATTN'):
        attention(*tensors, backend="FLASH_ATTN", max_error=0.5)


def test_the_engine_that_computes_is_named():
    def kernel(**fields):
        answers = ditattn.explain(num_heads=4, num_kv_heads=4, seq_q=65, seq_kv=65, head_size=64, **fields).members
        return next(answer.kernel for answer in answers if answer.member == Enum.TORCH_SDPA)

    assert kernel().startswith("aten 2.") and kernel(mask="bool").startswith("aten 2.")
    assert kernel(lse=True) == "native: PyTorch does not take calls that want an LSE"
    assert kernel(joint=True) == "native: PyTorch does not take joint tokens"
    assert kernel(causal=True, mask="bool") == "native: PyTorch does not take causal with a mask"


def test_views_are_read_where_they_are():
    fused = torch.randn(2, 7, 3, 4, 16)
    query, key, value = fused.unbind(2)
    assert_close(attention(query, key, value), expected(query, key, value)[0])
    expanded = key[:, :, :1].expand(-1, -1, 4, -1)
    assert_close(attention(query, expanded, value), expected(query, expanded, value)[0])
    swapped = torch.randn(2, 4, 7, 16).transpose(1, 2)
    out = attention(swapped, key, value)
    assert out.is_contiguous()
    assert_close(out, expected(swapped, key, value)[0])


def test_lazy_negation_and_parameters():
    query, key, value = inputs()
    negative = torch._neg_view(key)
    assert negative.is_neg()
    assert_close(attention(query, negative, value), expected(query, -key, value)[0])
    parameter = torch.nn.Parameter(value)
    with torch.no_grad():
        assert torch.equal(attention(query, key, parameter), attention(query, key, value))


def test_a_sparse_tensor_is_refused():
    query, key, value = inputs()
    with pytest.raises((NotImplementedError, RuntimeError), match="ditattn::attention"):
        attention(query.to_sparse(), key.to_sparse(), value.to_sparse())


# --- Errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, kind, text",
    [
        ({"backend": "nothing"}, ValueError, "Unknown diffusion attention backend: 'NOTHING'. Valid options are: FLASH"),
        ({"backend": "custom"}, ValueError, "Backend CUSTOM must be registered before use"),
        ({"backend_kwargs": "{"}, ValueError, "backend_kwargs must be a JSON object .*, got '{'"),
        ({"backend_kwargs": "[1]"}, ValueError, "backend_kwargs must be a JSON object .*, got '\\[1\\]'"),
        ({"softmax_scale": float("nan")}, ValueError, "softmax_scale=nan is not finite"),
        ({"attn_mask": torch.ones(3, 4)}, ValueError, "attn_mask of shape \\(3, 4\\) does not broadcast"),
        ({"attn_mask": torch.ones(2, 9, dtype=torch.int32)}, ValueError, "int32"),
        ({"backend": "SAGE_ATTN", "attn_mask": torch.rand(2, 1, 7, 9) < 0.5}, ValueError, "mask of kind bool"),
    ],
)
def test_errors_are_those_of_the_library(options, kind, text):
    with pytest.raises(kind, match=text) as caught:
        attention(*inputs(), **options)
    assert type(caught.value) is kind


def test_tensors_that_do_not_fit():
    query, key, value = inputs()
    for bad in ((query[0], key, value), (query, key[:1], value), (query, key.double(), value), (query, key, value[..., :8])):
        with pytest.raises(ValueError):
            attention(*bad)
        with pytest.raises(ValueError):
            with_lse(*bad)


@pytest.mark.parametrize("which", range(4))
def test_gradients_are_refused(which):
    tensors = [*inputs(), torch.zeros(2, 1, 7, 9)]
    reference = attention(*tensors)
    tensors[which].requires_grad_()
    name = ("query", "key", "value", "attn_mask")[which]
    for call in (attention, with_lse, lambda *t: ditattn.attention(*t[:3], attn_mask=t[3])):
        with pytest.raises(NotImplementedError, match=f"{name} cannot be taken over: it requires a gradient"):
            call(*tensors)
    with torch.no_grad():
        assert torch.equal(attention(*tensors), reference)
    with torch.inference_mode():
        assert torch.equal(attention(*tensors), reference)


# --- Masks are looked at once -----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_a_mask_that_is_written_to_is_looked_at_again(device):
    tensors = inputs(device=device, dtype=torch.float16)
    mask = torch.ones(2, 9, dtype=torch.bool, device=device)
    assert_close(attention(*tensors, mask), expected(*tensors)[0], 2e-3)
    mask[:, 3:] = False
    assert_close(attention(*tensors, mask), expected(*tensors, mask)[0], 2e-3)
    with torch.inference_mode():
        born = torch.ones(2, 9, dtype=torch.bool, device=device)
        attention(*tensors, born)
        born[:, 3:] = False
        assert_close(attention(*tensors, born), expected(*tensors, mask)[0], 2e-3)


def test_masks_are_not_kept():
    from ditattn import torch_ops

    before = len(torch_ops._described)
    tensors = inputs()
    for _ in range(10):
        attention(*tensors, torch.rand(2, 9) < 0.5)
    gc.collect()
    assert len(torch_ops._described) == before


# --- Compilation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_pytorchs_own_check_of_operators(device):
    tensors = inputs(device=device, dtype=torch.float16)
    for operator in (attention, with_lse):
        torch.library.opcheck(operator.default, tuple(tensors), {"backend": "FLASH_ATTN", "softmax_scale": 0.5})
        torch.library.opcheck(operator.masked, (*tensors, torch.rand(2, 9, device=device) < 0.6), {"causal": True})
        torch.library.opcheck(operator.masked, (*tensors, None))


def block(query, key, value, mask):
    out, lse = with_lse(query * 2, key, value, mask, "FLASH_ATTN")
    return out.flatten(2).relu(), attention(query, key, value).sum() + lse.mean()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_without_a_break_for_any_length(device, backend):
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=backend)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for rows, keys in ((40, 49), (41, 133), (65, 72)):  # past where TorchInductor compiles for small ones
        tensors = [*inputs(rows=rows, keys=keys, device=device, dtype=torch.float16), torch.ones(2, keys, device=device) > 0]
        for found, reference in zip(compiled(*tensors), block(*tensors)):
            assert torch.allclose(found, reference, rtol=2e-3, atol=2e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_the_function_takes_arrays_of_several_libraries():
    query, key, value = inputs()
    mask = torch.rand(2, 9, generator=torch.Generator().manual_seed(1)) < 0.6
    out = ditattn.attention(query, key.numpy(), value, attn_mask=mask.numpy())
    assert type(out) is torch.Tensor
    assert_close(out, expected(query, key, value, mask)[0])


def test_the_function_too_is_compiled_without_a_break():
    torch._dynamo.reset()
    function = torch.compile(lambda *t: ditattn.attention(*t, backend="torch_sdpa", causal=True) + 1, fullgraph=True,
                             backend="aot_eager")  # fmt: skip
    tensors = inputs()
    assert torch.equal(function(*tensors), ditattn.attention(*tensors, backend="torch_sdpa", causal=True) + 1)


def test_gradients_are_refused_in_compiled_code_too():
    torch._dynamo.reset()
    tensors = inputs()
    tensors[0].requires_grad_()
    with pytest.raises(Exception, match="it requires a gradient, and ditattn is forward only"):
        torch.compile(lambda *t: attention(*t), fullgraph=True, backend="aot_eager")(*tensors)


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, query, key, value):
            return attention(query, key, value, backend="FLASH_ATTN")

    tensors = tuple(inputs())
    program = torch.export.export(Layer(), tensors)
    assert torch.equal(program.module()(*tensors), attention(*tensors))


# --- Autocast, threads, streams, graphs ---------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_in_its_dtype(device, dtype):
    query, key, value = inputs(device=device)
    mask = torch.randn(2, 1, 7, 9, device=device)
    with torch.autocast(device, dtype):
        out = attention(query, key.to(dtype), value, mask)
        assert out.dtype == dtype
        assert_close(out, expected(query, key, value, mask)[0], BOUNDS[dtype])
        assert attention(query, key.to(dtype), value, torch.ones(2, 9, device=device) > 0).dtype == dtype
    with pytest.raises(ValueError, match="float"):
        attention(query, key.to(dtype), value)


def test_many_threads_share_a_mask():
    tensors, mask = inputs(), torch.rand(2, 9) < 0.6
    reference, failures = attention(*tensors, mask), []

    def work():
        for _ in range(200):
            if not torch.equal(attention(*tensors, mask), reference):
                failures.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_registrations_are_seen_at_once():
    @ditattn.register_diffusion_backend(Enum.CUSTOM)
    class Zero:
        get_name = staticmethod(lambda: "ZERO")
        get_impl_cls = staticmethod(lambda: ZeroImpl)

    class ZeroImpl(ditattn.AttentionImpl):
        def forward(self, query, key, value, attn_metadata=None):
            return torch.zeros_like(query)

    try:
        assert not attention(*inputs(kv_heads=4), backend="custom").any()
    finally:
        Enum.CUSTOM.clear_override()
    with pytest.raises(ValueError, match="must be registered"):
        attention(*inputs(kv_heads=4), backend="custom")


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@needs_cuda
def test_it_works_in_the_current_stream():
    query, key, value = inputs(batch=1, rows=2048, keys=2048, heads=8, kv_heads=8, size=64, dtype=torch.float16,
                               device="cuda")  # fmt: skip
    reference = attention(query, key, value)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(20):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(2_000_000)
            late = torch.zeros_like(query) + query
            out = attention(late, key, value)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(out, reference)


@needs_cuda
@pytest.mark.parametrize("kind", ["none", "padding", "rows", "added"])
def test_graphs_read_inputs_and_masks_at_each_replay(kind):
    query, key, value = inputs(dtype=torch.float16, device="cuda")
    mask = masks()[kind]
    mask = None if mask is None else mask.to("cuda", mask.dtype if mask.dtype == torch.bool else torch.float16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        attention(query, key, value, mask)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(query, key, value, mask)
    for seed in (5, 6):
        for tensor, fresh in zip((query, key, value), inputs(seed=seed)):
            tensor.copy_(fresh)
        if mask is not None:
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.rand(mask.shape, generator=generator)
            mask.copy_(drawn < 0.5 if mask.dtype == torch.bool else drawn)
            mask[..., 0] = 1
        graph.replay()
        assert_close(out, expected(query, key, value, mask)[0], 2e-3)


@needs_cuda
def test_reduce_overhead_mode():
    torch._dynamo.reset()
    function = torch.compile(lambda *t: attention(*t).relu(), fullgraph=True, mode="reduce-overhead")
    for seed in range(4):
        tensors = inputs(dtype=torch.float16, device="cuda", seed=seed)
        assert_close(function(*tensors).clone(), expected(*tensors)[0].relu(), 2e-3)


@needs_cuda
def test_running_out_of_memory_says_so():
    free, _ = torch.cuda.mem_get_info()
    query = torch.zeros(1, 1, 1, 64, device="cuda", dtype=torch.float16).expand(1, free // 64, 1, 64)
    key = torch.zeros(1, 1, 1, 64, device="cuda", dtype=torch.float16)
    with pytest.raises(MemoryError, match="There is no memory for a tensor of shape"):
        attention(query, key, key)
    assert attention(key, key, key).shape == key.shape
