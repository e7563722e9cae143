"""Transformers of diffusers under ditattn's names: exactness, scope, torch.compile, threads."""

import contextlib
import functools
import logging
import threading

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("names")

from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
    dispatch_attention_fn,
)
from diffusers.models.attention_processor import AttnProcessor, SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from small_models import MODELS, OTHERS, QUANTIZED, built, output, quantization_error
from torch.utils._python_dispatch import TorchDispatchMode

from ditattn.integrations.diffusers import install, use

# With masks that SAGE_ATTN and SAGE_ATTN_3 do not have, and the part without them.
MASKED = {
    "hunyuan_video": lambda model: model.transformer_blocks,
    "ltx": lambda model: torch.nn.ModuleList(block.attn1 for block in model.transformer_blocks),
    "pixart": lambda model: torch.nn.ModuleList(block.attn1 for block in model.transformer_blocks),
}
# Layers that call PyTorch's attention, not diffusers' dispatcher: HunyuanVideo's refiner of text is one.
CALL_DIRECTLY = {"sd3": 4, "pixart": 6, "hunyuan_video": 1}


class Calls(TorchDispatchMode):
    """Counts attention by ditattn and by PyTorch."""

    def __init__(self):
        super().__init__()
        self.ours = self.theirs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ours += func.namespace == "ditattn"
        self.theirs += "scaled_dot_product" in func.__name__
        return func(*args, **(kwargs or {}))


def calls(model, inputs):
    with Calls() as seen:
        output(model, inputs)
    return seen.ours, seen.theirs


def relative(a, b):
    return float((a - b).norm() / b.norm())


def processors(model):
    return [module.processor for module in model.modules() if hasattr(module, "processor")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["ditattn", "ditattn_flash", "ditattn_sdpa"])
@pytest.mark.parametrize("which", MODELS)
def test_an_exact_name_is_as_exact_as_native(which, name, dtype):
    model, inputs = built(which, dtype)
    wide = output(*built(which, torch.float64))
    native, (none, expected_calls) = output(model, inputs), calls(model, inputs)
    with use(model, name):
        out = output(model, inputs)
        ours, theirs = calls(model, inputs)
    # Both differ from float64 by roundings of the inputs' dtype in all layers; the order of a few is all that is ours.
    error, bound = relative(out, wide), 1.25 * relative(native, wide)
    print(f"{which} {name} {dtype}: {error:.2e}, bound {bound:.2e}, {ours} calls")
    assert error <= bound and (none, ours, theirs) == (0, expected_calls, 0) and expected_calls >= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("which", MODELS)
def test_every_call_of_a_quantized_name_has_its_documented_error(monkeypatch, which, name, dtype):
    member, record = AttentionBackendName(name), []
    function = _AttentionBackendRegistry._backends[member]

    def recorded(**arguments):
        record.append((arguments, function(**arguments)))
        return record[-1][1]

    monkeypatch.setitem(_AttentionBackendRegistry._backends, member, recorded)
    model, inputs = built(which, dtype)
    part = MASKED.get(which, lambda model: model)(model)
    with use(part, name):
        output(model, inputs)
    assert len(record) == len(processors(part)) or which == "wan"  # which attends to text and to an image in one layer
    for arguments, out in record:
        query, key, value = (arguments[name].double() for name in ("query", "key", "value"))
        mask = arguments["attn_mask"]
        attend = functools.partial(dispatch_attention_fn, query, key, attn_mask=mask, backend="native")
        error, bound = quantization_error(out, attend(value), value, attend, QUANTIZED[name])
        print(f"{which} {name} {dtype} {tuple(query.shape)}: {error:.2e}, bound {bound:.2e}")
        assert 0.05 * bound < error <= bound


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("which", MASKED)
def test_a_mask_that_a_back_end_does_not_have_reaches_the_caller(which, name):
    model, inputs = built(which)
    with use(model, name), pytest.raises(ValueError, match="does not support a mask of kind"):
        output(model, inputs)


@pytest.mark.parametrize("which", MODELS)
def test_the_context_manager_of_diffusers_reaches_what_goes_through_its_dispatcher(which):
    model, inputs = built(which)
    _, expected = calls(model, inputs)
    direct = CALL_DIRECTLY.get(which, 0)
    with attention_backend("ditattn_flash"):
        assert calls(model, inputs) == (expected - direct, direct)


@pytest.mark.parametrize("which", [*MODELS, *OTHERS])
def test_a_choice_ends_with_its_block_and_reaches_no_other_model(which):
    (model, inputs), (other, _) = built(which), built(which)
    _, expected = calls(model, inputs)
    before, active = processors(model), _AttentionBackendRegistry._active_backend
    with pytest.raises(KeyError), use(model, "ditattn_flash"):
        assert calls(model, inputs) == (expected, 0) and expected >= 3
        assert calls(other, inputs) == (0, expected)
        assert _AttentionBackendRegistry._active_backend is active
        raise KeyError
    assert all(a is b for a, b in zip(processors(model), before, strict=True))
    assert calls(model, inputs) == (0, expected)


@pytest.mark.parametrize("which", ["flux", "pixart"])
def test_processors_that_models_share_are_left_alone(which):
    (model, inputs), (other, _) = built(which), built(which)
    shared = processors(model)[0]
    for module in (*model.modules(), *other.modules()):
        if hasattr(module, "processor"):
            module.processor = shared
    _, expected = calls(model, inputs)
    use(model, "ditattn_flash")
    assert calls(model, inputs) == (expected, 0) and calls(other, inputs) == (0, expected)


@pytest.mark.parametrize("name", ["ditattn_flash", "ditattn_sdpa", "native"])
@pytest.mark.parametrize("mask", [(5, 7), (1, 7), (5, 5, 7), (5, 1, 5, 7)])
def test_processors_of_ones_own_that_call_pytorch_get_what_pytorch_gives(name, mask):
    class Own:
        def __call__(self, query, key, mask):
            return torch.nn.functional.scaled_dot_product_attention(query, key, key, mask, scale=0.3, enable_gqa=True)

    layer = torch.nn.Module()
    layer.processor = Own()
    generator = torch.Generator().manual_seed(6)
    query, key = (torch.randn(shape, generator=generator) for shape in ((5, 5, 5, 32), (5, 1, 7, 32)))
    mask = torch.randn(mask, generator=generator)
    plain = layer.processor(query, key, mask)
    with use(layer, name):
        torch.testing.assert_close(layer.processor(query, key, mask), plain)
        with Calls() as seen:
            layer.processor(query=query, key=key, mask=None)
    assert (seen.ours, seen.theirs) == ((0, 1) if name == "native" else (1, 0))


@pytest.mark.parametrize("which", ["flux", "sd3"])
def test_choices_nest_for_parts_and_may_stay(which):
    model, inputs = built(which)
    _, expected = calls(model, inputs)
    whole = use(model, "ditattn_flash")
    part = use(model.transformer_blocks[0], "native")
    own = len(processors(model.transformer_blocks[0]))
    assert calls(model, inputs) == (expected - own, own) and own >= 1
    part.restore()
    part.restore()
    assert calls(model, inputs) == (expected, 0)
    whole.restore()
    assert calls(model, inputs) == (0, expected)


@pytest.mark.parametrize("which", ["flux", "sd3"])
def test_processors_with_weights_keep_them(which):
    model, inputs = built(which)
    layer = model.transformer_blocks[0].attn
    if which == "flux":
        layer.set_processor(FluxIPAdapterAttnProcessor(hidden_size=128, cross_attention_dim=48))
        inputs["joint_attention_kwargs"] = {"ip_hidden_states": [torch.randn(2, 3, 48)]}
    else:
        layer.set_processor(SD3IPAdapterJointAttnProcessor2_0(128, 128, head_dim=4, timesteps_emb_dim=64))
    own, weights = layer.processor, dict(model.named_parameters())
    _, expected = calls(model, inputs)
    with use(model, "ditattn_flash"):
        assert layer.processor is not own and calls(model, inputs) == (expected, 0)
        assert all(weight is weights[name] for name, weight in model.named_parameters())
    assert layer.processor is own and dict(model.named_parameters()).keys() == weights.keys()


def test_what_others_set_meanwhile_stays():
    model, inputs = built("flux")
    _, expected = calls(model, inputs)
    own = type(processors(model)[0])()
    with use(model, "ditattn_flash"):
        model.transformer_blocks[0].attn.processor = own
        assert calls(model, inputs) == (expected - 1, 1)
    assert model.transformer_blocks[0].attn.processor is own


def test_the_methods_of_diffusers_work_within_a_block():
    for which in ("flux", "sd3"):
        model, inputs = built(which)
        _, expected = calls(model, inputs)
        with use(model, "ditattn_flash"):
            model.reset_attention_backend()
            assert calls(model, inputs) == (0, expected)


def test_models_that_cannot_follow_are_refused_or_named(caplog):
    with pytest.raises(ValueError, match="Linear has no attention .*none"):
        use(torch.nn.Linear(2, 2), "ditattn")
    model, _ = built("pixart")
    eager = AttnProcessor()  # softmax by hand
    for block in model.transformer_blocks:
        block.attn2.processor = eager
    with caplog.at_level(logging.WARNING, "ditattn"), use(model, "ditattn"):
        assert all(block.attn2.processor is eager for block in model.transformer_blocks)
    assert "PixArtTransformer2DModel: AttnProcessor do not follow 'ditattn'" in caplog.text
    for block in model.transformer_blocks:
        block.attn1.processor = eager
    with pytest.raises(ValueError, match="AttnProcessor"):
        use(model, "ditattn")


def test_what_is_no_model_or_no_name_is_refused():
    with pytest.raises(TypeError, match="pipeline.transformer .* got object"):
        use(object(), "ditattn")
    with pytest.raises(ValueError, match="'ditattn_fast' is not known to diffusers.*ditattn_flash"):
        use(built("flux")[0], "ditattn_fast")


def test_a_model_in_training_is_refused():
    for which in ("flux", "sd3"):
        model, inputs = built(which)
        with use(model, "ditattn_flash"), pytest.raises(NotImplementedError, match="forward only"):
            model(**inputs)


@pytest.mark.parametrize("which", ["flux", "sd3", "qwen_image", "wan", "ltx", "hunyuan_video"])
def test_a_compiled_model_is_one_graph_with_the_name_in_it(which):
    model, inputs = built(which)
    native = output(model, inputs)
    graphs = []

    def compiler(graph, example_inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    for name in ("ditattn_flash", "ditattn"):
        torch._dynamo.reset()
        with use(model, name):
            compiled = torch.compile(model, backend=compiler, fullgraph=True)
            assert relative(output(compiled, inputs), native) < 1e-5
        targets = graphs.pop()
        assert not graphs and sum("ditattn" in target for target in targets) == calls(model, inputs)[1]
        assert not any("scaled_dot_product" in target for target in targets)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_block_of_flux_gives_the_same(backend):
    model, inputs = built("flux")
    native = output(model, inputs)
    torch._dynamo.reset()
    with use(model, "ditattn_flash"):
        model.transformer_blocks[0] = torch.compile(model.transformer_blocks[0], backend=backend, fullgraph=True)
        assert relative(output(model, inputs), native) < 1e-5


@contextlib.contextmanager
def by_diffusers_method(model, name):
    try:
        yield model.set_attention_backend(name)
    finally:
        model.reset_attention_backend()
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


@pytest.mark.parametrize("which, use", [("flux", use), ("sd3", use), ("flux", by_diffusers_method)])
def test_a_compiled_model_follows_later_choices_and_options(which, use):
    model, inputs = built(which)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    seen = set()
    for name, smooth in [("native", True), ("ditattn_sage", True), ("ditattn_flash", True), ("ditattn_sage", False)]:
        install(options={"ditattn_sage": {"smooth_k": smooth}})
        with use(model, name):
            out = output(compiled, inputs)
            assert torch.equal(out, output(model, inputs))
        seen.add(tuple(out.tolist()))
    assert len(seen) == 4
    assert torch.equal(output(compiled, inputs), output(model, inputs))


@pytest.mark.parametrize("name", ["ditattn", "ditattn_flash", "ditattn_sage"])
def test_the_dispatcher_itself_is_compiled(name):
    def attend(query, mask):
        return dispatch_attention_fn(query, query, query, attn_mask=mask, attention_kwargs={"return_lse": True})

    query, mask = torch.randn(2, 9, 4, 32), torch.arange(9) < torch.tensor([[9], [4]])
    torch._dynamo.reset()
    with attention_backend(name):
        compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
        for got, wanted in zip(compiled(query, mask), attend(query, mask), strict=True):
            assert torch.equal(got, wanted)


def test_threads_with_a_model_each_keep_to_their_choices():
    names = ("ditattn_flash", "native", "ditattn_sage3")
    built_models = [built(which) for which in ("flux", "sd3", "sd3")]
    expected, failures = [], []
    for (model, inputs), name in zip(built_models, names):
        with use(model, name):
            expected.append((output(model, inputs), calls(model, inputs)))
    assert [min(seen) for _, seen in expected] == [0, 0, 0]
    start = threading.Barrier(len(names))

    def work(model, inputs, name, out, seen):
        with contextlib.suppress(threading.BrokenBarrierError):
            start.wait(60)
        for _ in range(5):
            with use(model, name):
                if not torch.equal(output(model, inputs), out) or calls(model, inputs) != seen:
                    failures.append(name)

    threads = [threading.Thread(target=work, args=(*pair, name, *wanted))
               for pair, name, wanted in zip(built_models, names, expected)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
