"""ditattn's classes in vLLM-Omni, by its own package: registry, selector, layers."""

import pickle
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

layer_module = pytest.importorskip(
    "vllm_omni.diffusion.attention.layer",
    reason="vLLM-Omni is not installed: requirements-vllm-omni.txt",
    exc_type=ImportError,
)

import torch
from vllm_omni.diffusion.attention.backends import abstract, sdpa
from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata
from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum as Theirs
from vllm_omni.diffusion.attention.backends.registry import register_diffusion_backend
from vllm_omni.diffusion.config import set_current_diffusion_config
from vllm_omni.diffusion.data import build_attention_config
from vllm_omni.platforms.interface import UnspecifiedOmniPlatform
from vllm_omni_reference import CLASSES, HERE, NOT_HERE, assert_close, backend, expected, impl, inputs

import ditattn
from ditattn.integrations import vllm_omni

PATH = "ditattn.integrations.vllm_omni."
DOCS = Path(__file__).resolve().parents[2] / "docs" / "vllm-omni.md"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="written for vLLM-Omni's platform without a device")


@pytest.fixture(autouse=True)
def as_installed(monkeypatch):
    """Every test ends with both registries as they are after import, and runs without gradients, as vLLM-Omni does."""
    monkeypatch.delenv("DIFFUSION_ATTENTION_BACKEND", raising=False)
    with torch.no_grad():
        yield
    vllm_omni.uninstall()
    for member in [*Theirs, *ditattn.DiffusionAttentionBackendEnum]:
        member.clear_override()


def layer(config=None, *, heads=4, kv_heads=2, head_size=64, diffusion=None, **kwargs):
    """vLLM-Omni's own layer, made under a configuration as its engine makes models."""
    parallel = types.SimpleNamespace(ring_degree=1, ulysses_degree=1, allgather_degree=1)
    made = types.SimpleNamespace(
        diffusion_attention_config=build_attention_config(config), parallel_config=parallel, **(diffusion or {})
    )
    with set_current_diffusion_config(made):
        return layer_module.Attention(
            heads, head_size, kwargs.pop("causal", False), head_size**-0.5, num_kv_heads=kv_heads, **kwargs
        )


def run_python(text, **kwargs):
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120, **kwargs)


# --- Classes


@pytest.mark.parametrize("member", CLASSES)
def test_every_class_loads_through_vllm_omnis_registry(member):
    """Under the names that vLLM-Omni's own have."""
    register_diffusion_backend(Theirs[member], PATH + Theirs[member].value.rpartition(".")[2])
    cls = Theirs[member].get_class()
    assert cls is backend(member) and issubclass(cls, abstract.AttentionBackend)
    assert issubclass(cls.get_impl_cls(), abstract.AttentionImpl)
    assert cls.get_impl_cls().__name__ == f"{CLASSES[member]}Impl"
    assert cls.get_metadata_cls() is AttentionMetadata
    assert (cls.supported_platforms, cls.supports_paged_kv, cls.accept_output_buffer) == (None, False, True)
    assert cls.indexes_kv_by_block_stride() is False
    with pytest.raises(NotImplementedError, match="There is no metadata builder"):
        cls.get_builder_cls()
    for each in (cls, cls.get_impl_cls()):
        assert pickle.loads(pickle.dumps(each)) is each


@pytest.mark.parametrize("member", HERE)
def test_a_class_answers_as_ditattns_does(member):
    cls, own = backend(member), ditattn.DiffusionAttentionBackendEnum[member].get_class()
    assert cls.get_name() == own.get_name()
    assert cls.get_supported_head_sizes() == own.get_supported_head_sizes()
    assert [cls.supports_head_size(size) for size in (0, 1, 64, 300)] == [
        own.supports_head_size(s) for s in (0, 1, 64, 300)
    ]
    assert cls.supports_attention_mask() is cls.supports_attention_mask(object()) is own.supports_attention_mask()
    assert cls.supports_piecewise_spans is own.supports_piecewise_spans()
    assert (
        cls.supports_packed_mask_free()
        is cls.supports_multi_doc_packed_varlen()
        is own.capabilities()["packed"]
        is True
    )
    assert cls.supports_prefix_kv_slicing is True
    assert cls.validate_available() is None


def test_answers_are_methods_where_the_base_class_has_methods(monkeypatch):
    """supports_piecewise_spans is an attribute in vLLM-Omni 0.30, and a method in others."""
    monkeypatch.setattr(abstract.AttentionBackend, "supports_piecewise_spans", classmethod(lambda cls: False))

    class Mine(abstract.AttentionBackend):
        member = "FLASH_ATTN"
        supports_piecewise_spans = vllm_omni._ClassAnswer(lambda own: own.supports_piecewise_spans())

    assert Mine.supports_piecewise_spans() is True


@pytest.mark.parametrize("member", NOT_HERE)
def test_what_was_not_built_says_so_and_vllm_omnis_own_is_not_taken_for_it(member):
    """ditattn's class paths are vLLM-Omni's, whose package would be found there."""
    for ask in (backend(member).validate_available, backend(member).get_name, lambda: impl(member)):
        with pytest.raises(ImportError, match="not built: ditattn was configured without DITATTN_CUDA"):
            ask()


def test_importing_the_module_loads_no_back_end():
    """Nor does using one load vLLM-Omni's of the same path."""
    done = run_python(
        "import sys\n"
        "from pathlib import Path\n"
        "from ditattn.integrations import vllm_omni\n"
        "def loaded():\n"
        "    mapped = Path('/proc/self/maps').read_text().splitlines()\n"
        "    files = [line.rpartition('/')[2] for line in mapped if line.endswith('_attn.so')]\n"
        "    ours = 'vllm_omni.diffusion.attention.backends.'\n"
        "    return sorted(set(files)), sorted(m for m in sys.modules if m.startswith(ours) and m.endswith('attn'))\n"
        "print(loaded())\n"
        "vllm_omni.FlashAttentionBackend.get_name()\n"
        "print(loaded())\n"
    )
    assert done.stdout.splitlines()[-2:] == ["([], [])", "(['flash_attn.so'], [])"], done.stderr


def test_without_vllm_omni_the_import_says_what_is_missing():
    done = run_python("import sys; sys.modules['vllm_omni'] = None; import ditattn.integrations.vllm_omni")
    assert "ImportError: ditattn.integrations.vllm_omni needs vLLM-Omni: " in done.stderr


def test_a_class_of_ones_own_in_ditattns_registry_is_used():
    """Also one that derives from vLLM-Omni's, whose supports_piecewise_spans is no method."""

    class MyImpl(abstract.AttentionImpl):
        def __init__(self, num_heads, head_size, softmax_scale, **_):
            self.scale = softmax_scale

        def forward(self, query, key, value, attn_metadata=None):
            return expected(query, key, value, scale=self.scale).float()

    @ditattn.register_diffusion_backend(ditattn.DiffusionAttentionBackendEnum.FLASH_ATTN)
    class MyBackend(sdpa.SDPABackend):
        get_impl_cls = staticmethod(lambda: MyImpl)

    query, key, value = inputs(kv_heads=4)
    assert vllm_omni.FlashAttentionBackend.get_name() == "SDPA"
    assert vllm_omni.FlashAttentionBackend.supports_piecewise_spans is False
    assert_close(impl(kv_heads=4).forward(query, key, value), expected(query, key, value))


# --- install


def test_install_registers_what_can_be_had_here():
    assert vllm_omni.install() == HERE
    for member in CLASSES:
        assert Theirs[member].is_overridden() is (member in HERE)
    assert [Theirs[member].get_class() for member in HERE] == [backend(member) for member in HERE]
    vllm_omni.uninstall()
    assert not any(member.is_overridden() for member in Theirs)
    assert Theirs.FLASH_ATTN.get_class().__module__.startswith("vllm_omni.")


def test_install_of_named_members_is_all_or_nothing():
    assert vllm_omni.install("SAGE_ATTN") == ["SAGE_ATTN"]
    with pytest.raises(ImportError, match="not built: ditattn was configured without DITATTN_CUDA"):
        vllm_omni.install("FLASH_ATTN", "CUDNN_ATTN")
    assert [member.name for member in Theirs if member.is_overridden()] == ["SAGE_ATTN"]
    with pytest.raises(
        ValueError, match="^ditattn has no class for 'TRTLLM_ATTN' of vLLM-Omni. It has: FLASH_ATTN, TORCH_"
    ):
        vllm_omni.install("TRTLLM_ATTN")


def test_uninstall_leaves_the_registrations_of_others():
    vllm_omni.install("FLASH_ATTN", "SAGE_ATTN")
    register_diffusion_backend(Theirs.TORCH_SDPA, "a.b.C")
    register_diffusion_backend(Theirs.SAGE_ATTN, "a.b.D")
    vllm_omni.uninstall("FLASH_ATTN", "SAGE_ATTN", "TORCH_SDPA")
    assert [member.name for member in Theirs if member.is_overridden()] == ["TORCH_SDPA", "SAGE_ATTN"]


def test_a_platform_that_the_build_is_not_for(monkeypatch):
    monkeypatch.setattr(UnspecifiedOmniPlatform, "device_type", "cuda")
    with pytest.raises(
        ImportError, match="^ditattn's FLASH_ATTN computes on cpu only as it was built, .* platform is cuda."
    ):
        vllm_omni.install("FLASH_ATTN")
    assert vllm_omni.install() == []


def test_install_holds_for_names_that_were_resolved_before():
    """vLLM-Omni's selector remembers a class by the name that was asked for."""
    vllm_omni.install("SAGE_ATTN")
    assert layer({"default": "SAGE_ATTN"}).attn_backend is vllm_omni.SageAttentionBackend
    register_diffusion_backend(Theirs.SAGE_ATTN, PATH + "FlashAttentionBackend")
    vllm_omni.install("FLASH_ATTN")
    assert layer({"default": "SAGE_ATTN"}).attn_backend is vllm_omni.FlashAttentionBackend


# --- Selector and layer


def test_the_cpu_has_no_back_end_before():
    with pytest.raises(NotImplementedError):
        layer()


def test_the_default_on_the_cpu_is_the_choice_of_ditattns_selector():
    vllm_omni.install()
    made = layer()
    assert made.attn_backend is vllm_omni.AutoAttentionBackend
    assert isinstance(made.attention, vllm_omni.AutoAttentionImpl) and not made.backend_explicit
    query, key, value = inputs()
    assert_close(made(query, key, value), expected(query, key, value))


@pytest.mark.parametrize("member", HERE)
def test_vllm_omnis_layer_computes_with_an_explicit_choice(member):
    vllm_omni.install()
    made = layer({"default": "SDPA" if member == "none" else member.lower()})
    assert made.attn_backend is backend(member) and made.backend_explicit
    query, key, value = inputs(seq_q=33, seq_kv=65)
    keep = torch.arange(65) < torch.tensor([[40], [65]])
    out = made(query, key, value, AttentionMetadata(attn_mask=keep))
    assert_close(out, expected(query, key, value, keep[:, None, None]), member)


def test_roles_and_the_environment_choose_as_ever(monkeypatch):
    vllm_omni.install()
    config = {"default": "FLASH_ATTN", "per_role": {"cross": "SAGE_ATTN"}}
    assert layer(config, role="self").attn_backend is vllm_omni.FlashAttentionBackend
    assert layer(config, role="x", role_category="cross").attn_backend is vllm_omni.SageAttentionBackend
    monkeypatch.setenv("DIFFUSION_ATTENTION_BACKEND", "TORCH_SDPA")
    assert layer().attn_backend is vllm_omni.SDPABackend


def test_an_explicit_choice_that_cannot_be_had_is_an_error():
    vllm_omni.install()
    with pytest.raises(
        ValueError, match="^Unknown diffusion attention backend: 'NOPE'. Valid options are: FLASH_ATTN, TORCH_"
    ):
        layer({"default": "nope"})
    with pytest.raises(
        ValueError, match="^SAGE_ATTN was explicitly selected but head_size=300 is unsupported. Supported head"
    ):
        layer({"default": "SAGE_ATTN"}, head_size=300)
    register_diffusion_backend(Theirs.CUDNN_ATTN, PATH + "CuDNNAttentionBackend")
    with pytest.raises(ImportError, match="not built: ditattn was configured without DITATTN_CUDA"):
        layer({"default": "CUDNN_ATTN"})


def test_a_models_own_implementation_may_derive_from_ours():
    vllm_omni.install()
    mine = type("Mine", (vllm_omni.FlashAttentionImpl,), {})
    made = layer({"default": "FLASH_ATTN"}, impl_overrides={"FLASH_ATTN": mine})
    assert type(made.attention) is mine
    assert_close(made(*inputs()), expected(*inputs()))
    with pytest.raises(TypeError, match="must subclass the selected implementation"):
        layer({"default": "FLASH_ATTN"}, impl_overrides={"FLASH_ATTN": sdpa.SDPAImpl})


@pytest.mark.parametrize("member", HERE)
def test_quantized_kv_is_refused_where_the_layer_is_made(member):
    vllm_omni.install()
    cls = backend(member).get_impl_cls()
    assert [cls.supports_kv_cache_dtype(dtype, "cpu") for dtype in (None, "auto", "float")] == [True] * 3
    assert [cls.supports_kv_cache_dtype(dtype, "cpu") for dtype in ("fp8", "mxfp4")] == [False] * 2
    with pytest.raises(ValueError, match=f"{backend(member).get_name()} does not support kv_cache_dtype='fp8'"):
        layer({"default": member}, diffusion={"diffusion_kv_cache_dtype": "fp8"})
    made = layer({"default": member}, diffusion={"diffusion_kv_cache_dtype": "float"})
    assert_close(made(*inputs()), expected(*inputs()), member)


def test_the_layer_refuses_a_mask_for_a_back_end_without_masks(monkeypatch):
    vllm_omni.install()
    made = layer({"default": "SAGE_ATTN"})
    query, key, value = inputs()
    dense = torch.rand(2, 1, 7, 9) < 0.5
    with pytest.raises(
        ValueError, match="^SAGE_ATTN does not support a mask of kind bool. Supported kinds: padding, spans."
    ):
        made(query, key, value, AttentionMetadata(attn_mask=dense))


# --- Documentation


def test_the_snippets_of_the_page(tmp_path):
    section = DOCS.read_text().split("\n## ")[1]
    assert section.startswith("Use it inside vLLM-Omni")
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        (tmp_path / "example.py").write_text(block)
        done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr


def test_the_entry_point_of_the_page_installs_in_every_process(tmp_path):
    """vLLM-Omni's worker processes load such plug-ins, too."""
    (line,) = re.findall(r"^ditattn = .*$", DOCS.read_text(), re.MULTILINE)
    (group,) = re.findall(r'^\[project.entry-points."(.*)"\]$', DOCS.read_text(), re.MULTILINE)
    info = tmp_path / "mine-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{line.replace(chr(34), '')}\n")
    done = run_python(
        f"import sys; sys.path.append({str(tmp_path)!r})\n"
        "from vllm_omni.plugins import load_omni_general_plugins\n"
        "from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum\n"
        "load_omni_general_plugins()\n"
        "print(DiffusionAttentionBackendEnum.FLASH_ATTN.get_path())\n"
    )
    assert done.stdout.splitlines()[-1:] == [PATH + "FlashAttentionBackend"], done.stderr
