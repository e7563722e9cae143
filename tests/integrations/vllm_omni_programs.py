"""What processes do in the tests of vLLM-Omni's sequence parallelism with ditattn's classes (torch_jobs.py)."""

import contextlib
import types

import torch
from torch_jobs import serve
from vllm_omni.diffusion.attention import layer as layer_module
from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata
from vllm_omni.diffusion.config import set_current_diffusion_config
from vllm_omni.diffusion.data import build_attention_config
from vllm_omni.diffusion.distributed import parallel_state
from vllm_omni.diffusion.forward_context import set_forward_context

from ditattn.integrations import vllm_omni

TOKENS, HEADS, KV_HEADS, SIZE, TEXT = 40, 8, 4, 64, 6
#: (degrees, member) by the number of processes.
MESHES = {
    2: [({"ulysses_degree": 2}, "FLASH_ATTN"), ({"ulysses_degree": 2}, "SAGE_ATTN"), ({"ring_degree": 2}, "FLASH_ATTN"),
        ({"ring_degree": 2}, "SAGE_ATTN"), ({"ring_degree": 2}, None), ({"allgather_degree": 2}, "TORCH_SDPA")],
    4: [({"ulysses_degree": 2, "ring_degree": 2}, "TORCH_SDPA"), ({"ring_degree": 4}, "FLASH_ATTN"),
        ({"ulysses_degree": 4}, "FLASH_ATTN")],
}  # fmt: skip


def problem():
    """Query, key, value, and the text's."""
    made = torch.Generator().manual_seed(6)
    shapes = [(2, tokens, heads, SIZE) for tokens in (TOKENS, TEXT) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    tensors = [torch.randn(shape, generator=made) for shape in shapes]
    return tensors[:3], dict(zip(("joint_query", "joint_key", "joint_value"), tensors[3:]))


def text_of(strategy):
    return AttentionMetadata(**problem()[1], joint_strategy=strategy)


#: Metadata by case; "padded": some keys do not count.
CASES = {
    "plain": lambda: None,
    "front": lambda: text_of("front"),
    "rear": lambda: text_of("rear"),
    "padded": lambda: AttentionMetadata(extra={"valid_kv_length": TOKENS - 11}),
}


@contextlib.contextmanager
def spread(degrees, member):
    """vLLM-Omni's groups and configuration, as its workers make them."""
    all_degrees = {"ulysses_degree": 1, "ring_degree": 1, "allgather_degree": 1, **degrees}
    parallel_state.initialize_model_parallel(backend="gloo", **all_degrees)
    parallel = types.SimpleNamespace(sequence_parallel_size=2, ulysses_mode="strict", **all_degrees)
    config = types.SimpleNamespace(
        diffusion_attention_config=build_attention_config(member and {"default": member}), parallel_config=parallel
    )
    try:
        with set_current_diffusion_config(config), set_forward_context(omni_diffusion_config=config):
            yield
    finally:
        parallel_state.destroy_model_parallel()


def make_layer(causal=False):
    return layer_module.Attention(HEADS, SIZE, causal, SIZE**-0.5, num_kv_heads=KV_HEADS)


def prepare(rank, size):
    parallel_state.init_distributed_environment(size, rank, rank, backend="gloo")
    vllm_omni.install()


def layers(rank, size, folder):
    """{mesh, member and case: this process's rows, or the error}, by vLLM-Omni's own layer."""
    prepare(rank, size)
    found = {}
    for degrees, member in MESHES[size]:
        with torch.no_grad(), spread(degrees, member):
            layer = make_layer()
            for case, metadata in CASES.items():
                mine = [each.chunk(size, 1)[rank] for each in problem()[0]]
                try:
                    found[str((degrees, member, case))] = layer(*mine, metadata()), type(layer.ring_runner).__name__
                except Exception as error:
                    found[str((degrees, member, case))] = type(error).__name__, str(error)
    return found


def others(rank, size, folder):
    """Rings with masks, causal ones, and text that asks nothing; and what `uninstall` leaves."""
    prepare(rank, size)
    mine = [each.chunk(size, 1)[rank] for each in problem()[0]]
    found = {}
    with torch.no_grad(), spread({"ring_degree": size}, "FLASH_ATTN"):
        try:
            make_layer()(*mine, AttentionMetadata(attn_mask=torch.ones(2, TOKENS, dtype=torch.bool)))
        except Exception as error:
            found["mask"] = type(error).__name__, str(error)
        found["causal"] = make_layer(causal=True)(*mine)
        _, text = problem()
        only_keys = AttentionMetadata(joint_key=text["joint_key"], joint_value=text["joint_value"], joint_strategy="rear")
        found["only_keys"] = make_layer()(*mine, only_keys)
    vllm_omni.uninstall()
    found["restored"] = not hasattr(layer_module.Attention.__init__, "__wrapped__")
    return found


if __name__ == "__main__":
    serve(globals())
