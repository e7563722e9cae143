"""Errors cross the border with type and text, both ways, and right through C++."""

import builtins

import numpy as np
import pytest
import tvm_ffi
from conftest import inputs
from numpy_backends import NumpyBackend, NumpyImpl

import ditattn
from ditattn import _native, attention, register_diffusion_backend
from ditattn import DiffusionAttentionBackendEnum as Enum


def from_one_text(kind):
    try:
        return isinstance(kind, type) and issubclass(kind, BaseException) and kind("text") is not None
    except TypeError:
        return False


KINDS = sorted({kind for kind in vars(builtins).values() if from_one_text(kind)}, key=lambda kind: kind.__name__)


class BoomError(LookupError):
    """A user's own."""


def backend_that_raises(error):
    class Impl(NumpyImpl):
        def forward(self, *args, **kwargs):
            raise error

    class Raises(NumpyBackend):
        get_impl_cls = staticmethod(lambda: Impl)

    return Raises


def test_the_kinds_are_many():
    assert len(KINDS) > 50 and {ImportError, NotImplementedError, OSError, MemoryError, KeyboardInterrupt} <= set(KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_from_cpp_to_python(kind):
    """An error that tvm_ffi makes of a kind's name alone, as C++ does."""
    with pytest.raises(BaseException) as raised:
        raise tvm_ffi.core.Error(kind.__name__, "the text", "").py_error()
    assert type(raised.value) is kind and raised.value.args == ("the text",)


def through_ffi(error):
    """What tvm_ffi's own caller gets of an error in a callback of ours."""

    def body():
        raise error

    with pytest.raises(BaseException) as raised:
        tvm_ffi.convert(_native.callback(body))()
    return raised.value


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_from_python_to_cpp(kind):
    arrived = through_ffi(kind("the text"))
    assert type(arrived) is kind and arrived.args == ("the text",)


def test_what_cpp_gets_of_errors_with_more_than_a_text():
    arrived = through_ffi(FileNotFoundError(2, "No such file", "weights"))
    assert type(arrived) is FileNotFoundError and str(arrived) == "[Errno 2] No such file: 'weights'"
    arrived = through_ffi(UnicodeDecodeError("ascii", b"\xff", 0, 1, "why"))
    assert type(arrived) is UnicodeError and str(arrived).startswith("UnicodeDecodeError: 'ascii' codec can't decode")
    arrived = through_ffi(BoomError("boom"))
    assert type(arrived) is LookupError and str(arrived) == "BoomError: boom"


@pytest.mark.parametrize("kind", [*KINDS, BoomError], ids=lambda kind: kind.__name__)
def test_from_python_through_cpp_to_python(kind):
    """A back end written in Python raises; C++ is between it and the caller, who gets the very error."""
    query, key, value = inputs()
    error = kind("the text")
    with pytest.raises(BaseException) as raised:
        attention(query, key, value, backend=backend_that_raises(error))
    assert raised.value is error and type(error) is kind and error.args == ("the text",)


def test_an_error_that_cpp_kept_to_itself_does_not_come_later():
    ditattn.set_log_handler(lambda level, message: 1 / 0)
    try:
        attention(*inputs(), backend="flash_attn", backend_kwargs={"odd": [1]})
    finally:
        ditattn.set_log_handler()
    with pytest.raises(ValueError, match="Unknown diffusion attention backend"):
        Enum["X"]
    register_diffusion_backend(Enum.CUSTOM, "json.NoSuch")
    with pytest.raises(ImportError, match="^Cannot import 'json.NoSuch': module 'json' has no such class"):
        Enum.CUSTOM.get_class()  # C++ has put the importer's error into one of its own


def test_the_traceback_leads_to_the_line_in_python():
    query, key, value = inputs()
    with pytest.raises(ValueError) as raised:
        attention(query, key, value, backend=backend_that_raises(ValueError("here")))
    assert any(entry.name == "forward" and "test_errors" in str(entry.path) for entry in raised.traceback)


@pytest.mark.parametrize(
    "call, kind, text",
    [
        (lambda: Enum["X"], ValueError, "Unknown diffusion attention backend"),
        (lambda: ditattn.resolve_class_path("left_out.LeftOutBackend"), ImportError, "no such module"),
        (lambda: _native.function("parse_config")("/no/such/file", True), OSError, "/no/such/file"),
        (lambda: attention(*[np.zeros((1, 2, 1, 4), "int32")] * 3), ValueError, "int32"),
        (lambda: _native.function("define")(3, ""), TypeError, "argument #0"),
    ],
)
def test_errors_of_the_library(call, kind, text):
    with pytest.raises(kind, match=text) as raised:
        call()
    assert type(raised.value) is kind


def test_errors_in_what_a_class_says_of_itself():
    class Broken(NumpyBackend):
        @staticmethod
        def get_name():
            raise PermissionError("not for you")

    register_diffusion_backend(Enum.CUSTOM)(Broken)
    with pytest.raises(PermissionError, match="^not for you$"):
        Enum.CUSTOM.get_class()
