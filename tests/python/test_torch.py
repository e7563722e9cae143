"""PyTorch tensors in and out; back ends written with PyTorch."""

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import ditattn  # noqa: E402
from conftest import layer  # noqa: E402
from ditattn import AttentionBackend, AttentionImpl, AttentionMetadata, attention  # noqa: E402
from ditattn import DiffusionAttentionBackendEnum as Enum  # noqa: E402

functional = torch.nn.functional


def inputs(seq_q=7, seq_kv=9, heads=4, kv_heads=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, seq_q, heads, 16), *2 * [(2, seq_kv, kv_heads, 16)]]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def expected(query, key, value, **options):
    query, key, value = (tensor.double().transpose(1, 2) for tensor in (query, key, value))
    return functional.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options).transpose(1, 2)


def assert_close(out, reference, bound):
    assert ((out.double() - reference).norm() / reference.norm()).item() < bound


@pytest.mark.parametrize("name", ["FLASH_ATTN", "TORCH_SDPA"])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_forward(name, dtype, bound):
    query, key, value = inputs(dtype=dtype)
    out, lse = layer(name)(query, key, value, return_lse=True)
    assert type(out) is torch.Tensor and out.dtype == dtype and out.shape == query.shape
    assert type(lse) is torch.Tensor and lse.dtype == torch.float32 and lse.shape == (2, 4, 7)
    assert_close(out, expected(query, key, value), bound)
    given = torch.empty_like(query)
    assert layer(name)(query, key, value, out=given) is given
    assert torch.equal(given, layer(name)(query, key, value))  # the LSE may be another engine's


def test_masks_and_metadata():
    query, key, value = inputs()
    mask = torch.rand(2, 4, 7, 9, generator=torch.Generator().manual_seed(2)) < 0.7
    out = attention(query, key, value, attn_mask=mask)
    assert_close(out, expected(query, key, value, attn_mask=mask), 1e-6)
    metadata = AttentionMetadata(extra={"valid_kv_length": torch.tensor(5)})
    assert_close(attention(query, key, value, metadata=metadata), expected(query, key[:, :5], value[:, :5]), 1e-6)


def test_views_are_not_copied():
    fused = torch.randn(2, 7, 3, 4, 16)
    query, key, value = fused.unbind(2)
    assert_close(attention(query, key, value), expected(query, key, value), 1e-6)
    expanded = key[:, :, :1].expand(-1, -1, 4, -1)
    assert_close(attention(query, expanded, value), expected(query, expanded, value), 1e-6)


def test_gradients():
    query, key, value = inputs()
    reference = attention(query, key, value)
    key.requires_grad_()
    with pytest.raises(NotImplementedError, match="key cannot be taken over: it requires a gradient.*forward only"):
        attention(query, key, value)
    with torch.no_grad():
        assert torch.equal(attention(query, key, value), reference)
    with torch.inference_mode():
        assert torch.equal(attention(query, key, value), reference)
    assert torch.equal(attention(query, key.detach(), value), reference)


class SDPAImpl(AttentionImpl):
    """As vLLM-Omni's: the layer's permutation, and PyTorch."""

    kinds = []

    def forward_cpu(self, query, key, value, attn_metadata=None):
        SDPAImpl.kinds.append({type(query), type(key), type(value)})
        mask = None if attn_metadata is None else attn_metadata.attn_mask
        query, key, value = (tensor.permute(0, 2, 1, 3) for tensor in (query, key, value))
        if mask is not None and mask.ndim == 2:
            mask = mask[:, None, None]
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.softmax_scale,
                                                      enable_gqa=True)  # fmt: skip
        return out.permute(0, 2, 1, 3)


class SDPABackend(AttentionBackend):
    """PyTorch's own."""

    get_name = staticmethod(lambda: "SDPA")
    get_impl_cls = staticmethod(lambda: SDPAImpl)
    supports_attention_mask = classmethod(lambda cls, attention_spec=None: True)
    capabilities = staticmethod(lambda: {"gqa": True})


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_a_back_end_written_with_pytorch(dtype, bound):
    query, key, value = inputs(dtype=dtype)
    mask = torch.arange(9) < torch.tensor([[4], [9]])
    ditattn.register_diffusion_backend(Enum.CUSTOM)(SDPABackend)
    out = attention(query, key, value, backend="custom", attn_mask=mask)
    assert SDPAImpl.kinds[-1] == {torch.Tensor}
    assert_close(out, expected(query, key, value, attn_mask=mask[:, None, None]), bound)
    assert_close(SDPAImpl(4, 16).forward(query, key, value), expected(query, key, value), bound)


def test_a_result_with_a_gradient_is_taken_without():
    class Impl(SDPAImpl):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) * torch.ones(1, requires_grad=True)

    class Learns(SDPABackend):
        get_impl_cls = staticmethod(lambda: Impl)

    query, key, value = inputs()
    assert_close(attention(query, key, value, backend=Learns), expected(query, key, value), 1e-6)


def test_numpy_callers_get_numpy_from_a_pytorch_back_end():
    arrays = [tensor.numpy() for tensor in inputs()]
    out = attention(*arrays, backend=SDPABackend)
    assert type(out).__module__ == "numpy" and SDPAImpl.kinds[-1] == {torch.Tensor}


# PyTorch is in this process, so TORCH_SDPA is PyTorch's own.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_sdpa_is_pytorchs_own(dtype):
    assert Enum.TORCH_SDPA.get_class().capabilities()["engine"] == "aten " + torch.__version__.split("+")[0]
    query, key, value = inputs(dtype=dtype)
    transposed = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    some = torch.rand(2, 1, 7, 9, generator=torch.Generator().manual_seed(2)) < 0.7
    padding = torch.arange(9) < torch.tensor([[4], [7]])
    for mask, wide in [(None, None), (some, some), (padding, padding[:, None, None])]:
        own = functional.scaled_dot_product_attention(*transposed, attn_mask=wide, enable_gqa=True).transpose(1, 2)
        assert torch.equal(attention(query, key, value, backend="TORCH_SDPA", attn_mask=mask), own)
    causal = functional.scaled_dot_product_attention(*transposed, is_causal=True, enable_gqa=True).transpose(1, 2)
    assert torch.equal(attention(query, key, value, backend="TORCH_SDPA", causal=True), causal)


def test_torch_sdpas_native_engine():
    query, key, value = inputs()
    native = layer("TORCH_SDPA", backend_kwargs={"engine": "native"})
    out = native(query, key, value)
    assert_close(out, expected(query, key, value), 1e-6)
    assert torch.equal(layer("TORCH_SDPA")(query, key, value, return_lse=True)[0], out)
    with pytest.raises(NotImplementedError, match="PyTorch does not take this call as it lies"):
        layer("TORCH_SDPA", backend_kwargs={"engine": "aten"})(query, key, value, return_lse=True)
