"""OpenVINO's ScaledDotProductAttention, transposes from and to (B, S, H, D) in the model as a transformer has them."""

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from worker import Serving

CORE = ov.Core()
PRECISIONS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


def make(configuration, query, key, value, threads):
    inputs = [ops.parameter(x.shape, ov.Type.f32) for x in (query, key, value)]
    order = np.array([0, 2, 1, 3])
    heads_first = [ops.transpose(x, order) for x in inputs]
    out = ops.scaled_dot_product_attention(*heads_first, causal=False)
    model = ov.Model([ops.transpose(out, order)], inputs)
    options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": PRECISIONS[configuration]}
    request = CORE.compile_model(model, "CPU", options).create_infer_request()
    for i, x in enumerate((query, key, value)):
        request.set_input_tensor(i, ov.Tensor(x, shared_memory=True))

    def call():
        request.infer()
        return request.get_output_tensor(0)

    return call


Serving(PRECISIONS, make, lambda out: out.data.astype(np.float32).transpose(0, 2, 1, 3)).serve()
