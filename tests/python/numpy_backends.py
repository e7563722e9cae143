"""Back ends written in Python with NumPy, as users write them."""

import numpy as np
from tensors import attention

from ditattn import AttentionBackend, AttentionImpl


class NumpyImpl(AttentionImpl):
    """Whole softmax in float64; `seen` keeps what each call got."""

    seen = []

    def forward(self, query, key, value, attn_metadata=None, return_lse=False):
        NumpyImpl.seen.append((query, key, value, attn_metadata, vars(self)))
        mask = None if attn_metadata is None else attn_metadata.attn_mask
        causal = "bottom-right" if self.causal else None
        out, _, lse = attention(query, key, value, mask=mask, causal=causal, scale=self.softmax_scale)
        out = out.astype(query.dtype)
        return (out, lse.astype(np.float32)) if return_lse else out


class NumpyBackend(AttentionBackend):
    """Says all it can do."""

    @staticmethod
    def get_name():
        return "NUMPY_ATTN"

    @staticmethod
    def get_impl_cls():
        return NumpyImpl

    @staticmethod
    def get_supported_head_sizes():
        return [16, 32, 64]

    @classmethod
    def supports_attention_mask(cls, attention_spec=None):
        return True

    @classmethod
    def capabilities(cls):
        return {"engine": "NumPy, float64", "tensors": "numpy", "gqa": True, "causal": True, "lse": True}


class Outer:
    """Holds a class, as some packages do."""

    class Inner(NumpyBackend):
        """Found through its outer class."""


class PlainImpl:
    """No base class, no more arguments than the oldest vLLM-Omni gives."""

    def __init__(self, num_heads, head_size, softmax_scale, causal, num_kv_heads, prefix):
        self.scale = softmax_scale

    def forward(self, query, key, value, attn_metadata):
        query, key, value = map(np.asarray, (query, key, value))  # it may get PyTorch's
        return attention(query, key, value, scale=self.scale)[0].astype(query.dtype)


class PlainBackend:
    """No base class, nothing but what is needed."""

    @staticmethod
    def get_name():
        return "PLAIN"

    @staticmethod
    def get_impl_cls():
        return PlainImpl


class NoImplClass:
    """Lacks get_impl_cls."""

    @staticmethod
    def get_name():
        return "HALF"


class NoForward(PlainBackend):
    """Its implementation has no forward."""

    @staticmethod
    def get_impl_cls():
        return object


NOT_A_CLASS = 3
