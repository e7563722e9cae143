"""PyTorch's scaled_dot_product_attention on (B, S, H, D) memory, its flash kernel."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from worker import Serving, padding_mask

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
VARIANTS = ("", "causal-", "padded-")


def make(configuration, query, key, value, threads):
    *variant, dtype = configuration.split("-")
    tensors = [torch.from_numpy(x).to(DTYPES[dtype]).transpose(1, 2) for x in (query, key, value)]
    mask = torch.from_numpy(padding_mask(key.shape[1])).repeat(key.shape[0], 1)[:, None, None]  # (B, 1, 1, Skv)
    options = {"is_causal": variant == ["causal"], "attn_mask": mask if variant == ["padded"] else None}

    @torch.inference_mode()
    def call():
        torch.set_num_threads(threads)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(*tensors, **options)

    return call


configurations = [variant + dtype for variant in VARIANTS for dtype in DTYPES]
Serving(configurations, make, lambda out: out.float().numpy()).serve()
