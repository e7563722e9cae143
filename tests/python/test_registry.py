"""Registering classes, the uses the registry is made for, and class paths that lead to Python modules."""

import sys

import numpy as np
import numpy_backends
import pytest
import tensors
from conftest import inputs
from numpy_backends import NumpyBackend, Outer, PlainBackend

import ditattn
from ditattn import AttentionBackend, attention, register_diffusion_backend, resolve_class_path
from ditattn import DiffusionAttentionBackendEnum as Enum

MODULE = "import numpy_backends\nclass MyBackend(numpy_backends.NumpyBackend): pass\n"


def assert_attends(cls):
    """The class computes attention: used as it is, and through C++."""
    query, key, value = inputs()
    expected, magnitude, _ = tensors.attention(query, key, value)
    impl = cls.get_impl_cls()(num_heads=4, head_size=16, softmax_scale=0.25, num_kv_heads=2)
    for out in (impl.forward(query, key, value, None), attention(query, key, value, backend=cls)):
        assert tensors.relative_error(out, expected, magnitude) < 2e-6


# --- As users write it ------------------------------------------------------------------------------------------


def test_get_a_class_by_name():
    cls = Enum["FLASH_ATTN"].get_class()
    assert cls.get_name() == "FLASH_ATTN"
    assert_attends(cls)


def test_override_by_path(module):
    module("my_package.my_module", MODULE)
    identity = register_diffusion_backend(Enum.FLASH_ATTN, "my_package.my_module.MyBackend")
    assert identity(3) == 3
    assert Enum.FLASH_ATTN.is_overridden() and "my_package.my_module" not in sys.modules  # lazy
    cls = Enum.FLASH_ATTN.get_class()
    assert cls is sys.modules["my_package.my_module"].MyBackend
    assert_attends(cls)
    Enum.FLASH_ATTN.clear_override()
    assert Enum.FLASH_ATTN.get_class() is not cls


def test_override_as_a_decorator():
    @register_diffusion_backend(Enum.FLASH_ATTN)
    class Decorated(NumpyBackend):
        pass

    path = f"{__name__}.test_override_as_a_decorator.<locals>.Decorated"
    assert isinstance(Decorated, type) and Decorated.__qualname__.endswith(".Decorated")
    assert Enum.FLASH_ATTN.get_path() == path
    assert Enum.FLASH_ATTN.get_class() is Decorated is resolve_class_path(path)
    assert_attends(Decorated)


def test_register_a_class_by_call():
    assert register_diffusion_backend(Enum.SAGE_ATTN)(NumpyBackend) is NumpyBackend
    assert Enum.SAGE_ATTN.get_path() == "numpy_backends.NumpyBackend"
    assert Enum.SAGE_ATTN.get_class() is NumpyBackend


def test_nested_classes_are_found_again():
    register_diffusion_backend(Enum.SAGE_ATTN)(Outer.Inner)
    assert Enum.SAGE_ATTN.get_path() == "numpy_backends.Outer.Inner"
    assert Enum.SAGE_ATTN.get_class() is Outer.Inner
    assert_attends(Outer.Inner)


def test_nested_classes_are_found_by_importlib(module):
    module("with_nested", "class A:\n  class B:\n    from numpy_backends import NumpyBackend as C\n")
    register_diffusion_backend(Enum.CUSTOM, "with_nested.A.B.C")
    assert Enum.CUSTOM.get_class() is NumpyBackend


def test_define_a_member_and_register_its_class():
    member = Enum.define("ASCEND_ATTN")
    with pytest.raises(ValueError, match="Backend ASCEND_ATTN must be registered before use"):
        member.get_class()
    register_diffusion_backend(member)(NumpyBackend)
    assert Enum["ASCEND_ATTN"].get_class() is NumpyBackend


def test_custom_by_path():
    register_diffusion_backend(Enum.CUSTOM, "numpy_backends.PlainBackend")
    assert Enum.CUSTOM.get_class() is PlainBackend


def test_classes_of_main_are_found_again(run_python, tmp_path):
    (tmp_path / "program.py").write_text(
        "from ditattn import *\nfrom numpy_backends import NumpyBackend\n"
        "@register_diffusion_backend(DiffusionAttentionBackendEnum.CUSTOM)\nclass Mine(NumpyBackend): pass\n"
        "class Other(NumpyBackend): pass\n"
        "E = DiffusionAttentionBackendEnum\nprint(E.CUSTOM.get_path(), E.CUSTOM.get_class() is Mine)\n"
        "register_diffusion_backend(E.CUSTOM, '__main__.Other')\nprint(E.CUSTOM.get_class() is Other)\n"
    )
    done = run_python("program.py")
    assert (done.stdout, done.stderr) == ("__main__.Mine True\nTrue\n", "")


def test_the_last_registration_wins(module):
    module("my_module", MODULE)
    register_diffusion_backend(Enum.CUSTOM)(NumpyBackend)
    assert Enum.CUSTOM.get_class() is NumpyBackend
    register_diffusion_backend(Enum.CUSTOM, "my_module.MyBackend")
    assert Enum.CUSTOM.get_class() is sys.modules["my_module"].MyBackend


def test_a_class_made_again_replaces_the_first():
    def make():
        @register_diffusion_backend(Enum.CUSTOM)
        class Again(NumpyBackend):
            pass

        return Again

    first, second = make(), make()
    assert first is not second and Enum.CUSTOM.get_class() is second


@pytest.mark.parametrize("wrong", ["FLASH_ATTN", None, 3])
def test_register_wants_a_member(wrong):
    with pytest.raises(TypeError, match="Expected a member of DiffusionAttentionBackendEnum"):
        register_diffusion_backend(wrong, "a.b.C")


def test_the_decorator_wants_a_class():
    with pytest.raises(TypeError, match="decorates classes"):
        register_diffusion_backend(Enum.CUSTOM)(lambda: None)


# --- The last stage: importlib ----------------------------------------------------------------------------------


def import_error(path):
    """The text of get_class's error."""
    register_diffusion_backend(Enum.CUSTOM, path)
    with pytest.raises(ImportError) as raised:
        Enum.CUSTOM.get_class()
    assert type(raised.value) is ImportError
    assert str(raised.value).startswith(f"Cannot import '{path}': ")
    return str(raised.value)


@pytest.mark.parametrize("path", ["no_such.module.Class", "json.no_such.Class", "json.decoder.no_such.Class"])
def test_no_such_module(path):
    text = import_error(path)
    assert "no such module. Looked in:" in text and text.endswith("- importlib: no such module")
    for directory in ditattn.plugin_search_path():
        assert f"{directory}/{'/'.join(path.split('.')[:-1])}.so: no such file" in text


@pytest.mark.parametrize("path", ["numpy_backends.NoSuch", "json.decoder.NoSuch", "numpy_backends.Outer.NoSuch"])
def test_no_such_class(path):
    text = import_error(path)
    assert text.endswith(f"- importlib: module '{path.rpartition('.')[0]}' has no such class 'NoSuch'")


@pytest.mark.parametrize(
    "body, reason",
    [
        ("raise ValueError('out of cheese')", "ValueError: out of cheese"),
        ("import no_such_dependency", "ModuleNotFoundError: No module named 'no_such_dependency'"),
        ("def (", "SyntaxError: "),
        ("from json import no_such", "ImportError: cannot import name 'no_such' from 'json'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_module_that_fails_to_load(module, body, reason):
    module("package.broken", body)
    assert f"importlib: module 'package.broken' failed to load ({reason}" in import_error("package.broken.Class")


def test_what_is_no_class():
    assert "'numpy_backends.NOT_A_CLASS' is not a class but int" in import_error("numpy_backends.NOT_A_CLASS")


@pytest.mark.parametrize(
    "name, reason",
    [
        ("NoImplClass", "it has no get_impl_cls()"),
        ("NumpyImpl", "it has no get_name()"),
        ("NoForward", "of its get_impl_cls() has no forward()"),
    ],
)
def test_a_class_that_is_no_back_end(name, reason):
    text = import_error(f"numpy_backends.{name}")
    assert f"importlib: numpy_backends.{name} is not an attention back end: " in text and reason in text


def test_a_decorated_class_that_is_no_back_end():
    register_diffusion_backend(Enum.CUSTOM)(numpy_backends.NoImplClass)  # nothing is checked yet
    with pytest.raises(ImportError, match=r"numpy_backends.NoImplClass is not an attention back end: it has no get_im"):
        Enum.CUSTOM.get_class()
    assert Enum.FLASH_ATTN.get_class()


def test_a_circular_import_says_so(module):
    module("first", "import second\n" + MODULE)
    module("second", "from ditattn import DiffusionAttentionBackendEnum as E, register_diffusion_backend\n"
                     "register_diffusion_backend(E.CUSTOM, 'first.MyBackend')\nE.CUSTOM.get_class()\n")  # fmt: skip
    import_text = import_error("first.MyBackend")
    assert "module 'first' has no such class 'MyBackend' (it is still being imported: circular import)" in import_text


def test_a_circular_import_that_only_registers_works(module):
    module("first", "import second\n" + MODULE)
    module("second", "from ditattn import DiffusionAttentionBackendEnum as E, register_diffusion_backend\n"
                     "register_diffusion_backend(E.CUSTOM, 'first.MyBackend')\n")  # fmt: skip
    import first

    assert Enum.CUSTOM.get_class() is first.MyBackend


def test_a_decorator_runs_while_its_module_is_imported(module):
    """Nothing of the class is asked then: what it needs comes further down."""
    module("decorated", "from ditattn import DiffusionAttentionBackendEnum as E, register_diffusion_backend\n"
                        "@register_diffusion_backend(E.CUSTOM)\nclass Mine:\n"
                        "    get_name = staticmethod(lambda: NAME)\n"
                        "    get_impl_cls = staticmethod(lambda: Impl)\n"
                        "from numpy_backends import NumpyImpl as Impl\nNAME = 'MINE'\n")  # fmt: skip
    register_diffusion_backend(Enum.CUSTOM, "decorated.Mine")
    cls = Enum.CUSTOM.get_class()
    assert cls is sys.modules["decorated"].Mine and Enum.CUSTOM.get_path() == "decorated.Mine"


def test_a_failure_is_remembered_until_a_registration_changes(module):
    register_diffusion_backend(Enum.CUSTOM, "later.MyBackend")
    for _ in range(2):
        with pytest.raises(ImportError, match="no such module"):
            Enum.CUSTOM.get_class()
        module("later", MODULE)
    Enum.CUSTOM.clear_override()
    register_diffusion_backend(Enum.CUSTOM, "later.MyBackend")
    assert Enum.CUSTOM.get_class().__name__ == "MyBackend"


def test_a_missing_back_end_leaves_the_others_alone(not_built):
    with pytest.raises(ImportError, match="^Cannot import 'left_out.LeftOutBackend': not built: there was no compiler"):
        not_built.get_class()
    assert Enum.TORCH_SDPA.get_class().get_name() == "SDPA"


def test_what_a_build_left_out_is_not_imported_from_elsewhere(not_built, module):
    """As the classes of vLLM-Omni, which have the same paths, where that is installed."""
    module("left_out", MODULE.replace("MyBackend", "LeftOutBackend"))
    with pytest.raises(ImportError, match="not built: there was no compiler") as caught:
        not_built.get_class()
    assert "importlib" not in str(caught.value)


# --- Classes over C++ -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["FLASH_ATTN", "TORCH_SDPA"])
def test_a_class_over_cpp(name):
    cls = Enum[name].get_class()
    assert cls is Enum[name].get_class() is resolve_class_path(Enum[name].value)
    assert issubclass(cls, AttentionBackend) and cls.__name__ == Enum[name].value.rpartition(".")[2]
    assert cls.get_impl_cls() is cls.get_impl_cls() and issubclass(cls.get_impl_cls(), ditattn.AttentionImpl)
    assert cls.get_metadata_cls() is ditattn.AttentionMetadata and cls.accept_output_buffer is True
    assert cls.get_supported_head_sizes() == [] and cls.supports_head_size(5) is True
    assert cls.supports_attention_mask() is True is cls.supports_attention_mask(attention_spec=None)
    assert cls.supports_piecewise_spans() is True and cls.validate_available() is None
    can = cls.capabilities()
    assert can["engine"] and can["devices"][0] == "cpu" and can["dtypes"] == ["float32", "float16", "bfloat16"]
    assert can["masks"] == ["padding", "bool", "additive", "spans"] and can["head_sizes"] is None and can["lse"] is True
    assert can["causal_top_left"] is (name == "TORCH_SDPA")
    with pytest.raises(TypeError, match="get_impl_cls"):
        cls()


def test_explain():
    cls = Enum.FLASH_ATTN.get_class()
    assert cls.explain(head_size=40, mask="additive", causal=True) == []
    (reason,) = cls.explain(ditattn.Problem(dtype="float64"), device="cpu")
    assert "FLASH_ATTN" in reason and "float64" in reason
    assert "cuda" in cls.explain(device="cuda:0")[0]
    assert cls.kernel_name(head_size=40) == "", "on CPUs the engine says all"
    with pytest.raises(ValueError, match="mask is 'odd'. Valid values are: none, padding, bool, additive"):
        cls.explain(mask="odd")
    with pytest.raises(TypeError):
        cls.explain(head_sise=3)


def test_numpy_results_are_ordinary_arrays():
    query, key, value = inputs()
    out = attention(query, key, value)
    assert type(out) is np.ndarray and out.flags.writeable and out.dtype == np.float32
    out += 1
