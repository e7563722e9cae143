"""Back ends written in Python, for callers in C++: the table of functions of docs/plugins.md over a Python class."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
import threading
from collections.abc import Mapping
from typing import Any, Callable

from . import _native
from .backend import ClassHolder, native_of, supported_head_sizes
from .metadata import metadata_for_python
from .tensors import LIBRARIES, copy_into, for_python, torch

_python_backend = _native.function("python_backend")
_INTERFACE_VERSION = _native.function("interface_version")()

# What `capabilities()` may say. Values are what a class is taken for that says nothing.
_FLAGS = ("gqa", "causal", "causal_top_left", "lse", "packed", "joint", "fp8_kv", "graph_safe", "masked_nan_propagates")
_KEYS = ("engine", "devices", "dtypes", "head_sizes", "masks", "backend_kwargs", "tensors", "alignment", *_FLAGS)


def class_path_of(cls: type) -> str:
    """module + "." + qualified name."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _dtypes() -> list[str]:
    return ["float32", "float16"] + (["bfloat16"] if torch() is not None else [])


def _masks(cls: type) -> list[str]:
    takes_masks = getattr(cls, "supports_attention_mask", bool)()
    takes_spans = getattr(cls, "supports_piecewise_spans", False)  # a method, or as in vLLM-Omni 0.30 an attribute
    takes_spans = takes_spans() if callable(takes_spans) else takes_spans
    return (["padding", "bool", "additive"] if takes_masks else []) + (["spans"] if takes_spans else [])


def _declared(cls: type) -> dict[str, Any]:
    declared = dict(getattr(cls, "capabilities", dict)() or {})
    unknown = [key for key in declared if key not in _KEYS]
    if unknown:
        raise ImportError(
            f"{class_path_of(cls)}.capabilities() has the unknown keys {unknown}. Valid keys are: {', '.join(_KEYS)}"
        )
    if declared.get("tensors") not in (None, *LIBRARIES):
        raise ImportError(
            f"{class_path_of(cls)}.capabilities() has tensors={declared['tensors']!r}. "
            f"Valid values are: {', '.join(LIBRARIES)}"
        )
    return declared


def _head_sizes(declared: dict[str, Any], cls: type) -> dict[str, Any]:
    sizes = declared.get("head_sizes", supported_head_sizes(cls))
    if isinstance(sizes, Mapping):
        return {f"head_size_{key}": sizes[key] or 0 for key in ("min", "max", "multiple") if key in sizes}
    return {"head_sizes": list(sizes or ())}


def _capabilities(cls: type, declared: dict[str, Any]) -> dict[str, Any]:
    return {
        "engine": declared.get("engine", f"Python: {class_path_of(cls)}"),
        "devices": list(declared.get("devices", ["cpu"])),
        "dtypes": list(declared.get("dtypes", _dtypes())),
        "masks": list(declared["masks"] if "masks" in declared else _masks(cls)),
        **_head_sizes(declared, cls),
        "alignment": int(declared.get("alignment", 1)),
        **{flag: bool(declared.get(flag, False)) for flag in _FLAGS},
    }


def _accepts(function: Callable[..., Any], name: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some are written in C
        return True
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _make_impl(cls: Any, num_heads: int, head_size: int, scale: float | None, causal: bool, num_kv_heads: int | None,
               prefix: str, backend_kwargs: Any) -> Any:  # fmt: skip
    impl_cls = cls.get_impl_cls()
    arguments = {
        "num_heads": num_heads,
        "head_size": head_size,
        "softmax_scale": 1 / math.sqrt(head_size) if scale is None else scale,
        "causal": causal,
        "num_kv_heads": num_heads if num_kv_heads is None else num_kv_heads,
        "prefix": str(prefix),
        "backend_kwargs": _native.plain(backend_kwargs),
    }
    return impl_cls(**{name: value for name, value in arguments.items() if _accepts(impl_cls, name)})


def _forward_of(name: str, impl: Any, library: str | None) -> Callable[..., None]:

    def forward(query: Any, key: Any, value: Any, out: Any, lse: Any, metadata: Any) -> None:
        options = {} if lse is None else {"return_lse": True}
        tensors = [for_python(tensor, library) for tensor in (query, key, value)]
        result = impl.forward(*tensors, metadata_for_python(metadata, library), **options)
        if lse is not None:
            if not isinstance(result, (tuple, list)) or len(result) != 2:
                raise TypeError(
                    f"{name} declares lse: forward(…, return_lse=True) must return (out, lse), "
                    f"got {type(result).__name__}."
                )
            result, found = result
            copy_into(lse, found, f"{name}: the LSE that forward returned")
        copy_into(out, result, f"{name}: what forward returned")

    return _native.callback(forward)


def _describe(cls: Any) -> dict[str, Any]:
    path = class_path_of(cls)
    for method in ("get_name", "get_impl_cls"):
        if not callable(getattr(cls, method, None)):
            raise ImportError(f"{path} is not an attention back end: it has no {method}()")
    impl_cls = cls.get_impl_cls()
    if not callable(impl_cls) or not callable(getattr(impl_cls, "forward", None)):
        raise ImportError(f"{path} is not an attention back end: {impl_cls!r} of its get_impl_cls() has no forward()")
    name = cls.get_name()
    if not isinstance(name, str):
        raise ImportError(f"{path} is not an attention back end: its get_name() returned {name!r}, not a string")
    declared = _declared(cls)
    known = declared.get("backend_kwargs", ["*"] if _accepts(impl_cls, "backend_kwargs") else [])

    def create(*arguments: Any) -> Callable[..., None]:
        return _forward_of(name, _make_impl(cls, *arguments), declared.get("tensors"))

    functions = {
        "get_name": lambda: name,
        "capabilities": lambda: _capabilities(cls, declared),
        "validate_available": lambda: getattr(cls, "validate_available", lambda: None)(),
        "known_kwargs": lambda: ["*"],  # those of `backend_kwargs` below are checked
        "explain": lambda *problem: None,  # C++ compares problems with the capabilities
        "create": create,
    }
    table: dict[str, Any] = {key: _native.callback(body) for key, body in functions.items()}
    return table | {"interface_version": _INTERFACE_VERSION, "backend_kwargs": list(known)}


# Kept for ever: C++ may drop its reference under a lock, and must not run a Python destructor then.
_adapted: dict[type, Any] = {}
_adapted_lock = threading.Lock()


def adapted(cls: type) -> Any:
    """The C++ back end over a class, asked nothing yet."""
    native = native_of(cls)
    if native is not None:
        return native
    with _adapted_lock:
        if cls not in _adapted:
            describe = _native.callback(lambda: _describe(cls))
            _adapted[cls] = _python_backend(class_path_of(cls), ClassHolder(cls), describe)
        return _adapted[cls]


def _import_module(name: str) -> Any:
    """The module, or None where there is none of that name; ImportError with the reason where it fails to load."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            return None
        raise ImportError(f"module '{name}' failed to load ({type(error).__name__}: {error})") from error
    except Exception as error:
        raise ImportError(f"module '{name}' failed to load ({type(error).__name__}: {error})") from error


def _find(class_path: str) -> Any:
    """What the path leads to, through classes in classes too; None where there is no such module."""
    parts = class_path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:length])
        found = _import_module(name)
        if found is None:
            continue
        for depth, attribute in enumerate(parts[length:]):
            if not hasattr(found, attribute):
                if depth + length < len(parts) - 1:
                    return None  # package.module.attribute.Class: package.module.attribute is no module
                raise ImportError(f"module '{'.'.join(parts[:-1])}' has no such class '{attribute}'{_hint(name)}")
            found = getattr(found, attribute)
        return found
    return None


def _hint(module: str) -> str:
    spec = getattr(sys.modules.get(module), "__spec__", None)
    return " (it is still being imported: circular import)" if getattr(spec, "_initializing", False) else ""


def import_class(class_path: str) -> Any:
    """The last stage of class-path resolution."""
    found = _find(str(class_path))
    if found is None:
        return None
    if not isinstance(found, type):
        raise ImportError(f"'{class_path}' is not a class but {type(found).__name__}")
    return adapted(found)


_native.set_importer(_native.callback(import_class))
