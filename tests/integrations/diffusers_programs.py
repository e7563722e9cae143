"""What processes do in the tests of diffusers' context parallelism (torch_jobs.py)."""

import small_models
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, logging
from diffusers.models.attention_dispatch import dispatch_attention_fn
from small_models import built, output, tensors
from torch_jobs import serve

from ditattn.integrations.diffusers import install, use

#: (model, name, configuration) by the number of processes.
CONFIGURATIONS = {
    2: [("flux", "ditattn_flash", {"ulysses_degree": 2}), ("flux", "ditattn", {"ring_degree": 2}),
        ("wan", "ditattn_sdpa", {"ulysses_degree": 2}), ("wan", "ditattn_flash", {"ring_degree": 2}),
        ("flux", "ditattn_sage", {"ulysses_degree": 2})],
    4: [("flux", "ditattn_flash", {"ulysses_degree": 2, "ring_degree": 2}), ("wan", "ditattn_flash", {"ulysses_degree": 4}),
        ("wan", "ditattn_sdpa", {"ulysses_degree": 2, "ring_degree": 2}), ("flux", "ditattn_flash", {"ring_degree": 4})],
}  # fmt: skip


TOKENS = 11  # of calls; no even share


def model_and_inputs(name):
    """As in small_models.py, with lengths that four divides."""
    model, inputs = built(name)
    made = torch.Generator().manual_seed(8)
    if name == "flux":
        inputs["hidden_states"] = torch.randn(2, 32, 16, generator=made)
        inputs["encoder_hidden_states"] = torch.randn(2, 12, 48, generator=made)
        inputs["img_ids"], inputs["txt_ids"] = inputs["img_ids"][:32], inputs["txt_ids"][:12]
    if name == "wan":
        inputs["hidden_states"] = torch.randn(2, 4, 2, 8, 8, generator=made)
    return model, inputs


def prepare():
    """ditattn's names, and what diffusers needs to spread a model where there is no accelerator."""
    install()
    logging.set_verbosity_error()
    torch.accelerator.device_count = lambda: 1  # it divides by that


def models(rank, size, folder):
    """{configuration: (alone, over all processes, the same once more)}."""
    prepare()
    found = {}
    for name, backend, config in CONFIGURATIONS[size]:
        model, inputs = model_and_inputs(name)
        use(model, backend)
        alone = output(model, inputs)
        model.enable_parallelism(config=ContextParallelConfig(**config))
        found[str((name, backend, config))] = alone, output(model, inputs), output(model, inputs)
    return found


def chosen_around(rank, size, folder):
    """A choice that begins before a model is spread and ends after it."""
    prepare()
    model, inputs = model_and_inputs("flux")
    alone = output(model, inputs)
    with use(model, "ditattn_flash"):
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=size))
        ours = output(model, inputs)
    config = model.transformer_blocks[0].attn.processor._parallel_config
    with use(model, "ditattn_sdpa"):
        return alone, ours, output(model, inputs), config is model._parallel_config


def ulysses_calls(rank, size, folder):
    return calls(ContextParallelConfig(ulysses_degree=size, ulysses_anything=True), rank, size)


def ring_calls(rank, size, folder):
    return calls(ContextParallelConfig(ring_degree=size, ring_anything=True), rank, size)


def calls(config, rank, size):
    """Calls of the dispatcher itself: what it returns for this process's tokens, or its error."""
    prepare()
    model, _ = model_and_inputs("flux")
    use(model, "ditattn_flash")
    model.enable_parallelism(config=config)
    query, key, value = tensors(seq_q=TOKENS, seq_kv=TOKENS)
    mine = [each.chunk(size, 1)[rank] for each in (query, key, value)]
    whole_mask = small_models.padding(TOKENS, 4, size=TOKENS)[:, None, None]
    own_mask = whole_mask.chunk(size, -1)[rank]

    def call(**options):
        try:
            return dispatch_attention_fn(*mine, backend="ditattn_flash", parallel_config=model._parallel_config, **options)
        except Exception as error:
            return type(error).__name__, str(error)

    found = {
        "own_mask": call(attn_mask=own_mask),
        "whole_mask": call(attn_mask=whole_mask),
        "added": call(attn_mask=torch.zeros(own_mask.shape).masked_fill(~own_mask, -torch.inf)),
        "causal": call(is_causal=True),
        "lse": call(attention_kwargs={"return_lse": True}),
        "rows": call(attn_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool)),
        "dropout": call(dropout_p=0.5),
    }
    with torch.autocast("cpu", torch.bfloat16):
        found["autocast"] = call()
    mine[0].requires_grad_()
    with torch.enable_grad():
        found["gradient"] = call()
    dist.barrier()
    return found


if __name__ == "__main__":
    serve(globals())
