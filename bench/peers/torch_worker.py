"""PyTorch's scaled_dot_product_attention on (B, S, H, D) memory, its flash kernel."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from worker import Serving

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def make(configuration, query, key, value, threads):
    tensors = [torch.from_numpy(x).to(DTYPES[configuration]).transpose(1, 2) for x in (query, key, value)]

    @torch.inference_mode()
    def call():
        torch.set_num_threads(threads)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(*tensors)

    return call


Serving(DTYPES, make, lambda out: out.float().numpy()).serve()
