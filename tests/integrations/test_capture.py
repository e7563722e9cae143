"""`capture` of PyTorch models: calls of PyTorch's own attention and of ditattn, named by the module that made them."""

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import ditattn  # noqa: E402

SDPA = "torch.nn.functional.scaled_dot_product_attention"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "qkv.safetensors"


def texts_of(path, case):
    with safe_open(path, "pt") as file:
        texts = file.metadata()
    return {key.removeprefix(case + "."): text for key, text in texts.items() if key.rpartition(".")[0] == case}


def tensors_of(path, case):
    return {key.rpartition(".")[2]: x for key, x in load_file(path).items() if key.rpartition(".")[0] == case}


def assert_same(found, expected):
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def compare(path):
    command = [sys.executable, "-m", "ditattn", "compare", "--input", path, "--json", "--repeats", "1"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {case["case"]: case for case in json.loads(done.stdout)["cases"]}


class Attention(torch.nn.Module):
    """Grouped heads, and a mask of padding where one is given; remembers what it attended."""

    def __init__(self, width=32, heads=4, kv_heads=2, native=False):
        super().__init__()
        self.sizes = (heads, kv_heads, kv_heads)
        self.to_qkv = torch.nn.ModuleList(torch.nn.Linear(width, width // heads * h) for h in self.sizes)
        self.native = native
        self.attended = []

    def forward(self, x, context, mask=None):
        q, k, v = (
            layer(tokens).unflatten(-1, (heads, -1))
            for layer, tokens, heads in zip(self.to_qkv, (x, context, context), self.sizes)
        )
        self.attended.append((q, k, v))
        if self.native:
            return x + ditattn.attention(q, k, v, attn_mask=mask).flatten(2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mask = None if mask is None else mask[:, None, None, :]
        return x + F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2).flatten(2)


class Block(torch.nn.Module):
    def __init__(self, native):
        super().__init__()
        self.attn1 = Attention(native=native)
        self.attn2 = Attention(native=native)

    def forward(self, x, text, mask):
        return self.attn2(self.attn1(x, x), text, mask)


class Transformer(torch.nn.Module):
    def __init__(self, native=False, blocks=2):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(Block(native) for _ in range(blocks))

    def forward(self, x, text, mask):
        for block in self.blocks:
            x = block(x, text, mask)
        return x


X, TEXT, MASK = normal(2, 10, 32), normal(2, 7, 32, seed=1), torch.arange(7) < torch.tensor([[7], [3]])


@pytest.mark.parametrize("native", [False, True], ids=["of PyTorch", "of ditattn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_calls_are_named_by_their_modules(path, native, dtype):
    model = Transformer(native).to(dtype)
    x, text = X.to(dtype), TEXT.to(dtype)
    before = model(x, text, MASK)
    with ditattn.capture(path, model=model, every=2) as recording:
        for _ in range(4):
            assert torch.equal(model(x, text, MASK), before)
        F.scaled_dot_product_attention(*[normal(1, 1, 4, 8)] * 3)  # of no module: not the model's
    names = [f"blocks.{i}.attn{j}" for i in (0, 1) for j in (1, 2)]
    assert recording.cases == [f"step00000{step}/{name}" for step in (0, 2) for name in names]
    for case in recording.cases:
        module = model.get_submodule(case.partition("/")[2])
        expected = dict(zip(("query", "key", "value"), module.attended[1 + int(case[4:10])]))
        if case.endswith("attn2"):
            expected["attn_mask"] = MASK if native else MASK[:, None, None, :]
        assert_same(tensors_of(path, case), expected)
        said = texts_of(path, case)
        assert said["layer"] == case.partition("/")[2] and (said["backend"] == SDPA) != native
    found = compare(path)
    assert list(found) == [f"qkv/{case}" for case in recording.cases]
    for case in found.values():
        assert case["kv_heads"] == 2 and case["dtype"] == str(dtype).removeprefix("torch.")
        for entry in case["results"]:
            if entry["backend"] in ("FLASH_ATTN", "TORCH_SDPA"):
                assert entry["status"] == "ok" and entry["rel_l2"] <= case["error_bound"], (case["case"], entry)


@torch.no_grad()
def test_hooks_are_gone_after_the_block(path):
    model = Transformer()
    with pytest.raises(ZeroDivisionError):
        with ditattn.capture(path, model=model):
            model(X, TEXT, MASK)
            1 / 0
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert len(load_file(path)) == 14


@torch.no_grad()
def test_several_models_and_a_part_called_by_itself(path):
    """As pipelines do: the decoder of an autoencoder runs without the whole."""
    models = {"transformer": Transformer(blocks=1), "vae": Transformer()}
    with ditattn.capture(path, model=models, layers=["transformer.*", "*.attn1"]) as recording:
        for _ in range(2):
            models["transformer"](X, TEXT, MASK)
        models["vae"].blocks[1](X, TEXT, MASK)
        models["vae"].blocks[1](X, TEXT, MASK)
    assert recording.cases == [
        f"step00000{step}/{name}"
        for step in range(2)
        for name in ("transformer.blocks.0.attn1", "transformer.blocks.0.attn2", "vae.blocks.1.attn1")
    ]


@torch.no_grad()
def test_a_module_that_attends_twice_and_a_model_that_attends_itself(path):
    class Twice(torch.nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(F.scaled_dot_product_attention(x, x, x), x, x)

    x, model, another = normal(1, 2, 5, 8), Twice(), Twice()
    with ditattn.capture(path, model=model) as recording:
        another(x)
        model(x)
    assert recording.cases == ["step000000/Twice", "step000000/Twice#2"]
    second = F.scaled_dot_product_attention(x, x, x).transpose(1, 2)
    assert torch.equal(tensors_of(path, "step000000/Twice#2")["query"], second)


@torch.no_grad()
def test_steps_are_those_of_the_model_where_a_block_is_left_out(path):
    """As caches between steps of diffusion do."""
    model = Transformer()
    kept = model.blocks
    with ditattn.capture(path, model=model, layers="*.attn1") as recording:
        for step in range(3):
            model.blocks = kept[:1] if step == 1 else kept
            model(X, TEXT, MASK)
    assert recording.cases == [f"step00000{step}" for step in ("0/blocks.0.attn1", "0/blocks.1.attn1",
                               "1/blocks.0.attn1", "2/blocks.0.attn1", "2/blocks.1.attn1")]  # fmt: skip


@torch.no_grad()
def test_an_error_in_the_model_does_not_confuse_later_steps(path):
    model = Transformer(blocks=1)
    with ditattn.capture(path, model=model, every=2) as recording:
        with pytest.raises(RuntimeError):
            model(X, TEXT[..., :5], MASK)  # breaks in attn2, after attn1
        model(X, TEXT, MASK)
        model(X, TEXT, MASK)
    assert recording.cases == ["step000000/blocks.0.attn1", "step000002/blocks.0.attn1", "step000002/blocks.0.attn2"]


@pytest.mark.parametrize(
    "timestep, text",
    [
        (torch.tensor([750.5, 750.5]), "750.5"),
        (torch.tensor(3), "3.0"),
        (20, "20.0"),
        (torch.tensor([1.0, 2.0]), None),  # of several no one is the level
        (torch.tensor([]), None),
        (float("nan"), None),
        ("soon", None),
        (None, None),
    ],
)
@torch.no_grad()
def test_the_timestep_of_the_model_is_recorded(path, timestep, text):
    class Timed(Transformer):
        def forward(self, x, text, mask, timestep=None):
            return super().forward(x, text, mask)

    model = Timed()
    with ditattn.capture(path, model=model, layers="*.attn1") as recording:
        model(X, TEXT, MASK, timestep=timestep)
        model.blocks[0](X, TEXT, MASK)  # of no model that has one
    assert recording.cases[0] == "step000000/blocks.0.attn1" and len(recording.cases) == 3
    for case in recording.cases:
        by_itself = case == "step000000/blocks.0.attn1#2"
        assert texts_of(path, case).get("timestep") == (None if by_itself else text), case


@pytest.mark.parametrize("seed, mask", [(0, None), (1, "bool"), (2, "additive"), (3, "rows"), (4, "bfloat16")])
@torch.no_grad()
def test_arguments_of_pytorchs_attention_mean_the_same_to_ditattn(path, seed, mask):
    """What a file says, computed by ditattn's `run`, is what PyTorch computed."""
    dtype = torch.bfloat16 if mask == "bfloat16" else torch.float32
    sizes = enumerate([(4, 9), (2, 13), (2, 13)])
    query, key, value = (normal(2, heads, rows, 16, dtype=dtype, seed=seed + i) for i, (heads, rows) in sizes)
    masks = {
        "bool": normal(2, 1, 9, 13, seed=seed) > -1,
        "additive": normal(1, 4, 9, 13, seed=seed),
        "rows": normal(9, 13, seed=seed).expand(2, 4, 9, 13),
        "bfloat16": normal(9, 13, dtype=dtype, seed=seed),  # two dimensions: of queries and keys
    }
    options = {"attn_mask": masks.get(mask), "scale": 0.7, "enable_gqa": True}
    with ditattn.capture(path):
        expected = F.scaled_dot_product_attention(query, key, value, **options)
    found = tensors_of(path, "step000000/call")
    if mask == "rows":
        assert found["attn_mask"].shape == (1, 1, 9, 13)
    out = path.with_name("out")
    command = ["-m", "ditattn", "run", "--backend", "FLASH_ATTN", "--input", path, "--output", out]
    one_case = {key.rpartition(".")[2]: tensor for key, tensor in load_file(path).items()}
    save_file(one_case, path, texts_of(path, "step000000/call"))
    subprocess.run([sys.executable, *map(str, command)], check=True, timeout=300)
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(load_file(out)["out"].transpose(1, 2), expected, rtol=bound, atol=bound)


@torch.no_grad()
def test_views_are_recorded_as_what_they_show(path):
    query, key, value = normal(2, 6, 16, 9).mT[:, ::3], normal(9, 1, 16).swapdims(0, 1).expand(2, 2, 9, 16), normal(1)
    value = value.expand(2, 2, 9, 16)
    with ditattn.capture(path):
        F.scaled_dot_product_attention(query, key, value)
    expected = {name: x.swapdims(1, 2).contiguous() for name, x in zip(("query", "key", "value"), (query, key, value))}
    assert_same(tensors_of(path, "step000000/call"), expected)


@torch.no_grad()
def test_causality_of_pytorchs_attention(path):
    x = normal(1, 2, 6, 8)
    with ditattn.capture(path):
        F.scaled_dot_product_attention(x, x, x, is_causal=True)
        F.scaled_dot_product_attention(x, x, x)
    assert [texts_of(path, f"step00000{i}/call")["causal"] for i in (0, 1)] == ["true", "false"]
    assert texts_of(path, "step000000/call")["softmax_scale"] == repr(8**-0.5)


def test_tensors_that_require_gradients_are_recorded_and_train(path):
    query, key, value = (normal(1, 2, 5, 8, seed=i).requires_grad_() for i in range(3))
    with ditattn.capture(path):
        F.scaled_dot_product_attention(query, key, value).sum().backward()
    assert value.grad is not None
    assert torch.equal(tensors_of(path, "step000000/call")["query"], query.detach().transpose(1, 2))


@torch.no_grad()
def test_what_ditattn_cannot_be_asked_is_counted(path, caplog):
    q, wide, flat = normal(1, 2, 5, 8), normal(1, 2, 5, 16), normal(5, 8)
    with ditattn.capture(path) as recording:
        F.scaled_dot_product_attention(q, q, wide)
        F.scaled_dot_product_attention(flat, flat, flat)
        F.scaled_dot_product_attention(q, q, q)
        F.scaled_dot_product_attention(q.expand(3, 2, 5, 8), q, q)
        F.scaled_dot_product_attention(q[:, :1], q, q)
        F.scaled_dot_product_attention(q[:, :, :0], q, q)
        with pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(q, wide, wide)  # PyTorch's own error: no call
    assert recording.cases == ["step000002/call"] and recording.skipped == 5
    assert "left out 5 calls: 5 (" + SDPA + " took shapes that ditattn does not" in caplog.text


@torch.no_grad()
def test_sdpa_may_be_left_out_and_belongs_to_the_thread(path):
    q = normal(1, 2, 5, 8)
    with ditattn.capture(path, sdpa=False) as recording:
        F.scaled_dot_product_attention(q, q, q)
        ditattn.attention(q, q, q)
    assert len(recording.cases) == 1 and texts_of(path, "step000000/call")["backend"] != SDPA
    with ditattn.capture(path) as recording:
        thread = threading.Thread(target=lambda: F.scaled_dot_product_attention(q, q, q))
        thread.start()
        thread.join()
    assert recording.cases == []


@torch.no_grad()
def test_a_back_end_that_calls_pytorch_is_one_call(path):
    class SdpaImpl(ditattn.AttentionImpl):
        def forward(self, query, key, value, attn_metadata=None):
            q, k, v = (t.transpose(1, 2) for t in (query, key, value))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    class SdpaBackend(ditattn.AttentionBackend):
        @staticmethod
        def get_name():
            return "BY_PYTORCH"

        @staticmethod
        def get_impl_cls():
            return SdpaImpl

    q = normal(1, 5, 2, 8)
    with ditattn.capture(path) as recording:
        ditattn.attention(q, q, q, backend=SdpaBackend)
        ditattn.attention(q, q, q, backend="torch_sdpa")
    assert [texts_of(path, case)["backend"] for case in recording.cases] == ["BY_PYTORCH", "SDPA"]
    with ditattn.capture(path) as recording:  # used without ditattn's checks, it is PyTorch's call
        SdpaImpl(2, 8).forward(q, q, q)
    assert texts_of(path, "step000000/call")["backend"] == SDPA


@torch.no_grad()
def test_captures_within_each_other_record_each_on_their_own(tmp_path):
    model = Transformer(blocks=1)
    with ditattn.capture(tmp_path / "outer", model=model, layers="*.attn1") as outer:
        with ditattn.capture(tmp_path / "inner") as inner:
            model(X, TEXT, MASK)
        model(X, TEXT, MASK)
    assert outer.cases == ["step000000/blocks.0.attn1", "step000001/blocks.0.attn1"]
    assert inner.cases == ["step000000/call", "step000001/call"]


@pytest.mark.parametrize("in_place", [True, False])
@torch.no_grad()
def test_what_was_compiled_runs_as_it_was_written_while_recording(path, in_place):
    graphs = []

    def backend(graph, example_inputs):
        def run(*args):
            graphs.append(graph)
            return graph.forward(*args)

        return run

    torch.compiler.reset()
    model = Transformer(blocks=1)
    expected = model(X, TEXT, MASK)
    if in_place:
        model.compile(backend=backend)
    else:
        model = torch.compile(model, backend=backend)
    torch.testing.assert_close(model(X, TEXT, MASK), expected)
    assert graphs
    graphs.clear()
    with ditattn.capture(path, model=model) as recording:
        assert torch.equal(model(X, TEXT, MASK), expected)
    assert recording.cases == ["step000000/blocks.0.attn1", "step000000/blocks.0.attn2"] and not graphs
    model(X, TEXT, MASK)
    assert graphs


@torch.no_grad()
def test_a_transformer_of_diffusers(path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    image, text = normal(1, 12, 4), normal(1, 5, 32, seed=1)
    arguments = {
        "hidden_states": image, "encoder_hidden_states": text, "pooled_projections": normal(1, 32),
        "timestep": torch.tensor([0.5]), "img_ids": torch.zeros(12, 3), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip
    expected = model(**arguments).sample
    with ditattn.capture(path, model=model) as recording:
        assert torch.equal(model(**arguments).sample, expected)
    assert recording.cases == ["step000000/single_transformer_blocks.0.attn", "step000000/transformer_blocks.0.attn"]
    for case in compare(path).values():
        assert case["shape"] == [1, 2, 17, 17, 16]
        (entry,) = [entry for entry in case["results"] if entry["backend"] == "FLASH_ATTN"]
        assert entry["status"] == "ok" and entry["rel_l2"] <= case["error_bound"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@torch.no_grad()
def test_tensors_on_a_gpu_are_recorded_in_their_stream(path):
    """Also where work that fills them is still queued; not while a graph is being made."""
    x = torch.zeros(1, 2, 256, 64, device="cuda")
    with ditattn.capture(path) as recording, torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        filled = x + 1
        F.scaled_dot_product_attention(filled, filled.mT.contiguous().mT, filled, torch.ones(256, 256, device="cuda"))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            F.scaled_dot_product_attention(filled, filled, filled)
    found = tensors_of(path, "step000000/call")
    assert_same(found, {name: torch.ones(1, 256, 2, 64) for name in ("query", "key", "value")}
                | {"attn_mask": torch.ones(1, 1, 256, 256)})  # fmt: skip
    assert (recording.cases, recording.skipped) == (["step000000/call"], 1)


def test_the_example_of_the_docs_runs(tmp_path):
    page = Path(__file__).resolve().parents[2] / "docs" / "capture.md"
    example = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)[1]
    subprocess.run([sys.executable, "-c", example], cwd=tmp_path, check=True, timeout=300)
