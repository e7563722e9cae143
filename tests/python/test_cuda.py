"""PyTorch's CUDA tensors, on PyTorch's current stream."""

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
if not torch.cuda.is_available():
    pytest.skip("skipped: no CUDA device", allow_module_level=True)

from ditattn import AttentionMetadata, Problem, attention  # noqa: E402
from ditattn import DiffusionAttentionBackendEnum as Enum  # noqa: E402

functional = torch.nn.functional


def names():
    found = []
    for member in Enum:
        try:
            backend = member.get_class()
            backend.validate_available()
        except (ImportError, ValueError):
            continue
        if "cuda" in backend.capabilities()["devices"]:
            found.append(member.name)
    return found


pytestmark = pytest.mark.skipif(not names(), reason="skipped: this build has no back end for CUDA")


def inputs(rows=130, keys=300, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, rows, 4, 64), *2 * [(2, keys, 2, 64)]]
    return [torch.randn(shape, generator=generator).to("cuda", dtype) for shape in shapes]


def expected(query, key, value, **options):
    query, key, value = (tensor.double().transpose(1, 2) for tensor in (query, key, value))
    return functional.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options).transpose(1, 2)


QUANTIZED = {"SAGE_ATTN": 6e-2, "SAGE_ATTN_3": 0.25}  # of standard normals


def bound(name):
    return QUANTIZED.get(name, 1e-2)


def error(out, reference):
    return ((out.double() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("name", names())
def test_results_are_torch_tensors_on_the_device(name):
    query, key, value = inputs()
    out, lse = attention(query, key, value, backend=name, return_lse=True)
    assert type(out) is torch.Tensor and out.device == query.device and out.dtype == query.dtype
    assert type(lse) is torch.Tensor and lse.device == query.device and lse.shape == (2, 4, 130)
    assert error(out, expected(query, key, value)) < bound(name)
    given = torch.empty_like(query)
    assert attention(query, key, value, backend=name, out=given) is given
    assert torch.equal(given, attention(query, key, value, backend=name))  # the LSE may be another engine's


@pytest.mark.parametrize("name", names())
def test_masks_on_the_device(name):
    query, key, value = inputs()
    mask = torch.arange(300, device="cuda")[None] < torch.tensor([[250], [17]], device="cuda")
    out = attention(query, key, value, backend=name, metadata=AttentionMetadata(attn_mask=mask))
    assert error(out, expected(query, key, value, attn_mask=mask[:, None, None])) < bound(name)


@pytest.mark.parametrize("name", names())
def test_the_current_stream_is_used(name):
    """The inputs are written late in a side stream: only work in that stream sees them."""
    query, key, value = inputs()
    reference = expected(query, key, value)
    attention(query, key, value, backend=name)
    late = torch.zeros_like(query)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(query)
        out = attention(late, key, value, backend=name)
    assert not stream.query(), "the call waited"
    stream.synchronize()
    assert error(out, reference) < bound(name)


@pytest.mark.parametrize("name", names())
def test_cuda_graph(name):
    if not Enum[name].get_class().capabilities()["graph_safe"]:
        pytest.skip(f"{name} cannot be captured")
    query, key, value = inputs()
    out = torch.empty_like(query)
    eager = attention(query, key, value, backend=name).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(50):
            attention(query, key, value, backend=name, out=out)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, eager)


@pytest.mark.skipif("CUDNN_ATTN" not in names(), reason="skipped: no cuDNN")
def test_cudnn_times_its_candidates_at_the_first_call():
    query, key, value = inputs()
    impl = Enum.CUDNN_ATTN.get_class().get_impl_cls()
    layer = impl(4, 64, None, False, num_kv_heads=2, backend_kwargs={"autotune": True})
    first = layer.forward(query, key, value)
    assert error(first, expected(query, key, value)) < 1e-2
    assert torch.equal(first, layer.forward(query, key, value))


def test_the_kernel_is_named():
    cls = Enum.FLASH_ATTN.get_class()
    sizes = {"num_heads": 4, "num_kv_heads": 2, "seq_q": 130, "seq_kv": 300, "head_size": 64}
    problem = Problem(**sizes, dtype="bfloat16", device="cuda:0")
    assert cls.kernel_name(problem).startswith(("flash_sm90, blocks of ", "flash_sm80, blocks of "))
    assert "not multiples of 16 bytes" in cls.kernel_name(problem, alignment=4)
    assert cls.kernel_name(problem, alignment=0).startswith("flash_sm80"), "a negative stride"


def test_auto_takes_a_backend_of_the_device():
    query, key, value = inputs()
    assert error(attention(query, key, value), expected(query, key, value)) < 1e-2
