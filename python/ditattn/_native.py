"""The binding: loads ``_ditattn.so`` into the process that tvm_ffi's own library is in, and its functions with it."""

from __future__ import annotations

import atexit
import builtins
import ctypes
import functools
import logging
import threading
import time
from pathlib import Path
from typing import Any, Callable

# First: libditattn then finds tvm_ffi's library already there, under the same SONAME, and shares it.
try:
    import tvm_ffi
except ModuleNotFoundError as error:
    raise ImportError("ditattn needs the package apache-tvm-ffi: pip install apache-tvm-ffi") from error

_LOGGER = logging.getLogger("ditattn")
_LEVELS = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR)


def _register_errors() -> None:
    """Every built-in exception that is made from one text crosses the border by its name.

    tvm_ffi itself knows eight; anything else would arrive as a RuntimeError.
    """
    for name, kind in vars(builtins).items():
        if not (isinstance(kind, type) and issubclass(kind, BaseException) and kind.__name__ == name):
            continue  # the last: EnvironmentError and IOError are other names of OSError
        try:
            kind("text")
        except TypeError:
            continue  # UnicodeDecodeError and the exception groups take more
        tvm_ffi.register_error(name, kind)


def _load() -> None:
    library = Path(__file__).with_name("_ditattn.so")
    if not library.is_file():
        raise ImportError(f"{library} is missing. Build it: cmake --build BUILD --target ditattn_python")
    ctypes.CDLL(str(library))  # its initialisers register the functions; never closed


# Parts of the binding that need more than the rest, and how to get them.
_PARTS = {
    "mpi": "MPI: install it (Debian: libopenmpi-dev, openmpi-bin), and build and install ditattn with CMake; wheels have none",
    "nccl": "GPU ranks: build ditattn with nvcc, -DDITATTN_CUDA=ON",
}


@functools.lru_cache(maxsize=None)
def _load_part(part: str) -> None:
    library = Path(__file__).with_name(f"_ditattn_{part}.so")
    if not library.is_file():
        raise ImportError(f"{library} is missing: ditattn was built without {_PARTS[part]}.")
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        raise ImportError(f"{library} cannot be loaded: {error}") from error


_register_errors()
_load()


class _Passing(threading.local):
    """Of this thread: the last error of Python code that went into C++, and how deep C++ has called Python."""

    error: BaseException | None = None
    depth = 0


_passing = _Passing()
_ATTACHED = "__tvm_ffi_error__"  # tvm_ffi's own error, on the exception that it becomes
_MAX_DEPTH = 32  # tvm_ffi crashes where Python's own limit is met while an error is converted
_running: list[None] = []  # one entry per call into C++ that has not returned; appending and popping are atomic
_ending = False


def function(name: str) -> Callable[..., Any]:
    """The C++ function ``ditattn.<name>``, which runs without Python's lock, whatever the process's default is.

    Locks of the library are waited for then without holding Python's: a thread that has one may need the other. An
    error that went through C++ unchanged comes out as the object it was, with its traceback: C++ knows text and kind.
    """
    found = tvm_ffi.get_global_func("ditattn." + name)
    found.release_gil = True

    def call(*args: Any) -> Any:
        if _ending and threading.current_thread().daemon:
            threading.Event().wait()  # for ever: see _end
        _running.append(None)
        try:
            return found(*args)
        except BaseException as error:
            original = _passing.error
            if original is None or str(error) != str(getattr(original, _ATTACHED).py_error()):
                raise
        finally:
            _running.pop()
            if _passing.error is not None:
                _passing.error = None
        raise original

    return call


@functools.lru_cache(maxsize=None)
def function_of(part: str, name: str) -> Callable[..., Any]:
    """`function` of a part that is loaded when it is first asked for; ImportError, with what to do, without it."""
    _load_part(part)
    return function(name)


def callback(body: Callable[..., Any]) -> Callable[..., Any]:
    """`body` for C++ to call: its errors keep type and text.

    tvm_ffi goes by the exact class and by ``str(error)``. So a subclass that C++ does not know becomes its nearest
    known base, with its own name in the text, and KeyError's text loses the quotes that ``str`` puts around it.
    """
    names = tvm_ffi.core.ERROR_TYPE_TO_NAME

    @functools.wraps(body)
    def call(*args: Any) -> Any:
        _passing.depth += 1
        try:
            if _passing.depth > _MAX_DEPTH:
                raise RecursionError(
                    f"C++ called Python {_MAX_DEPTH} times within itself: does a back end call itself?"
                )
            return body(*args)
        except BaseException as error:
            if not hasattr(error, _ATTACHED):
                known = next(kind for kind in type(error).__mro__ if kind in names)
                text = str(error.args[0]) if isinstance(error, KeyError) and len(error.args) == 1 else str(error)
                if known is not type(error):
                    text = f"{type(error).__name__}: {text}"
                setattr(error, _ATTACHED, tvm_ffi.core.Error(names[known], text, ""))
            _passing.error = error
            raise
        finally:
            _passing.depth -= 1

    return call


def depth() -> int:
    """How many calls of C++ into Python this thread is in."""
    return _passing.depth


def _log(level: int, message: str) -> None:
    _LOGGER.log(_LEVELS[level], "%s", message)


_set_log_handler = function("set_log_handler")
set_importer = function("set_importer")


def set_log_handler(handler: Callable[[int, str], None] | None = _log) -> None:
    """Sets where the library's messages go: `handler(level, message)`, None for nowhere.

    The level is 0 debug, 1 info, 2 warning or 3 error. By default: the logger "ditattn" of `logging`.
    """
    _set_log_handler(None if handler is None else callback(handler))


set_log_handler()


@atexit.register
def _end() -> None:
    """C++ outlives Python: it must call nothing of Python's when that has ended.

    Nor may a daemon thread return from C++ then: Python ends such threads where they ask for its lock, and unwinding
    C++ from there aborts the process. So those that run are waited for, and others do not begin.
    """
    global _ending
    _ending = True
    for _ in range(10_000):
        if not _running:
            break
        time.sleep(0.001)
    set_importer(None)
    set_log_handler(None)


def folder_of_library() -> Path:
    """The folder that libditattn.so was loaded from."""
    return Path(function("folder_of_library")())


def plain(value: Any) -> Any:
    """A tvm_ffi container as dict and list, through and through."""
    if isinstance(value, tvm_ffi.Map):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, tvm_ffi.Array):
        return [plain(entry) for entry in value]
    return str(value) if isinstance(value, str) else value
