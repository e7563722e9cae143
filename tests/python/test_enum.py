"""The contract's operations on DiffusionAttentionBackendEnum, row by row, and what makes it an enumeration."""

import copy
import pickle

import pytest
import tvm_ffi
from conftest import BUILT_IN

from ditattn import DiffusionAttentionBackendEnum as Enum

PREFIX = "vllm_omni.diffusion.attention.backends."
PATHS = {
    "FLASH_ATTN": PREFIX + "flash_attn.FlashAttentionBackend",
    "TORCH_SDPA": PREFIX + "sdpa.SDPABackend",
    "SAGE_ATTN": PREFIX + "sage_attn.SageAttentionBackend",
    "SAGE_ATTN_3": PREFIX + "sage_attn3.SageAttention3Backend",
    "CUDNN_ATTN": PREFIX + "cudnn_attn.CuDNNAttentionBackend",
    "FLASHINFER_ATTN": PREFIX + "flashinfer_attn.FlashInferAttentionBackend",
    "CUSTOM": "",
}


def test_look_up_by_name():
    for name in BUILT_IN:
        assert Enum[name] is getattr(Enum, name)
        assert Enum[name].name == name


@pytest.mark.parametrize("name", ["X", "flash_attn", "", "FLASH_ATTN ", 3, None, Enum.FLASH_ATTN])
def test_look_up_of_an_unknown_name(name):
    with pytest.raises(ValueError) as raised:
        Enum[name]
    options = ", ".join(member.name for member in Enum)
    assert type(raised.value) is ValueError
    assert str(raised.value) == f"Unknown diffusion attention backend: '{name}'. Valid options are: {options}"
    assert raised.value.__cause__ is None and raised.value.__context__ is None


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="NO_SUCH_ATTN"):
        Enum.NO_SUCH_ATTN
    assert not hasattr(Enum, "flash_attn")


def test_members():
    names = [member.name for member in Enum]
    assert names[: len(BUILT_IN)] == BUILT_IN
    assert list(Enum.__members__) == names and list(Enum.__members__.values()) == list(Enum)
    assert len(Enum) == len(names)
    assert list(reversed(Enum)) == list(Enum)[::-1]
    assert Enum.CUSTOM in Enum and PATHS["FLASH_ATTN"] in Enum and "no.such.Path" not in Enum and None not in Enum
    assert set(BUILT_IN) <= set(dir(Enum))


def test_members_are_equal_hashable_and_one_object_each():
    assert Enum.FLASH_ATTN is Enum["FLASH_ATTN"] is next(iter(Enum))
    assert Enum.FLASH_ATTN == Enum.FLASH_ATTN and Enum.FLASH_ATTN != Enum.TORCH_SDPA
    assert len({Enum[name] for name in BUILT_IN} | set(Enum)) == len(Enum)
    assert {Enum.SAGE_ATTN: 1}[Enum["SAGE_ATTN"]] == 1
    assert isinstance(Enum.FLASH_ATTN, Enum) and Enum.FLASH_ATTN != "FLASH_ATTN"


def test_call_looks_up_by_value():
    for name in BUILT_IN:
        assert Enum(PATHS[name]) is Enum[name] and Enum(Enum[name]) is Enum[name]
    with pytest.raises(ValueError) as raised:
        Enum("FLASH_ATTN")
    assert str(raised.value) == "'FLASH_ATTN' is not a valid DiffusionAttentionBackendEnum"


def test_formatting():
    assert str(Enum.CUSTOM) == f"{Enum.CUSTOM}" == "DiffusionAttentionBackendEnum.CUSTOM"
    assert repr(Enum.CUSTOM) == "<DiffusionAttentionBackendEnum.CUSTOM: ''>"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_and_copy_give_the_same_object(protocol):
    for member in Enum:
        assert pickle.loads(pickle.dumps(member, protocol)) is member
        assert copy.copy(member) is member and copy.deepcopy([member])[0] is member


def test_a_pickled_member_arrives_where_nobody_defined_it(run_python):
    data = pickle.dumps(Enum.define("FAR_ATTN", "far.away.Far"))
    show = f"member = pickle.loads({data!r}); print(member.name, member.value)"
    done = run_python("-c", f"import pickle; {show}")
    assert (done.stdout, done.stderr) == ("FAR_ATTN far.away.Far\n", "")
    define = "tvm_ffi.get_global_func('ditattn.define')('FAR_ATTN', 'near.by.Near')"
    done = run_python("-c", f"import pickle, tvm_ffi, ditattn; {define}; {show}")
    assert (done.stdout, done.stderr) == ("FAR_ATTN near.by.Near\n", "")


def test_default_value_is_never_the_override():
    from ditattn import register_diffusion_backend

    assert {member.name: member.value for member in Enum if member.name in PATHS} == PATHS
    register_diffusion_backend(Enum.FLASH_ATTN, "a.b.C")
    assert Enum.FLASH_ATTN.value == PATHS["FLASH_ATTN"]
    with pytest.raises(AttributeError):
        Enum.FLASH_ATTN.value = "a.b.C"


def test_get_path():
    from ditattn import register_diffusion_backend

    for name, path in PATHS.items():
        if path:
            assert Enum[name].get_path() == path
            assert Enum[name].get_path(include_classname=False) == path.rpartition(".")[0]
    register_diffusion_backend(Enum.CUSTOM, "a.b.C")
    assert (Enum.CUSTOM.get_path(), Enum.CUSTOM.get_path(False)) == ("a.b.C", "a.b")


@pytest.mark.parametrize("method", ["get_path", "get_class"])
def test_get_path_and_get_class_of_what_is_not_registered(method):
    with pytest.raises(ValueError) as raised:
        getattr(Enum.CUSTOM, method)()
    assert str(raised.value) == (
        "Backend CUSTOM must be registered before use. Use "
        "register_diffusion_backend(DiffusionAttentionBackendEnum.CUSTOM, 'your.module.YourClass')"
    )


@pytest.mark.parametrize("path", ["NoDot", "a..B", "a.1b.C", "a/b.C", "../a.B", "a.b.", "é.B"])
def test_get_class_of_a_malformed_path_is_a_value_error(path):
    from ditattn import register_diffusion_backend

    register_diffusion_backend(Enum.CUSTOM, path)  # unchecked
    with pytest.raises(ValueError, match="Class path"):
        Enum.CUSTOM.get_class()


def test_is_overridden_and_clear_override():
    from ditattn import register_diffusion_backend

    member = Enum.TORCH_SDPA
    assert member.is_overridden() is False
    member.clear_override()
    register_diffusion_backend(member, "a.b.C")
    assert member.is_overridden() is True
    member.clear_override()
    member.clear_override()
    assert member.is_overridden() is False and member.get_path() == PATHS["TORCH_SDPA"]


def test_define():
    member = Enum.define("PY_DEFINED_ATTN", "p.q.R")
    assert Enum["PY_DEFINED_ATTN"] is member is Enum.PY_DEFINED_ATTN and member in Enum
    assert [*Enum][-1] is member and member.value == "p.q.R"
    assert Enum.define("PY_DEFINED_ATTN", "p.q.R") is member
    with pytest.raises(ValueError, match="PY_DEFINED_ATTN is already defined with the path 'p.q.R'"):
        Enum.define("PY_DEFINED_ATTN")
    assert "PY_DEFINED_ATTN" in str(pytest.raises(ValueError, Enum.__getitem__, "X").value)


def test_members_that_others_define_are_seen():
    tvm_ffi.get_global_func("ditattn.define")("CPP_DEFINED_ATTN", "")
    member = Enum.CPP_DEFINED_ATTN
    assert member is Enum["CPP_DEFINED_ATTN"] and member in list(Enum) and "CPP_DEFINED_ATTN" in Enum.__members__
    with pytest.raises(ValueError, match="Backend CPP_DEFINED_ATTN must be registered before use"):
        member.get_class()


def test_members_cannot_be_replaced():
    with pytest.raises(AttributeError, match="cannot reassign member"):
        Enum.FLASH_ATTN = 3
    with pytest.raises(AttributeError, match="cannot delete member"):
        del Enum.FLASH_ATTN
    with pytest.raises(TypeError, match="cannot extend"):
        type(Enum)("Other", (Enum,), {})
