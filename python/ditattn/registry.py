"""Class paths of members."""

from __future__ import annotations

from typing import Any, Callable, TypeVar

from . import _native
from .backend import AttentionBackend, class_for
from .enum import DiffusionAttentionBackendEnum
from .python_backend import adapted, class_path_of

_override_path = _native.function("override_path")
_register_backend_class = _native.function("register_backend_class")
_resolve_class_path = _native.function("resolve_class_path")
_plugin_search_path = _native.function("plugin_search_path")

T = TypeVar("T")


def register_diffusion_backend(
    backend: DiffusionAttentionBackendEnum, class_path: str | None = None
) -> Callable[[T], T]:
    """Overrides the class path of a member; the last call wins.

    With a path: records it, without importing or checking anything, and returns the identity. Without: a decorator
    that registers the class it is given, under module + "." + qualified name, and returns it unchanged.
    """
    if not isinstance(backend, DiffusionAttentionBackendEnum):
        raise TypeError(f"Expected a member of DiffusionAttentionBackendEnum, got {backend!r}.")
    if class_path is not None:
        _override_path(backend.name, class_path)
        return lambda cls: cls

    def register(cls: Any) -> Any:
        if not isinstance(cls, type):
            raise TypeError(f"register_diffusion_backend decorates classes, got {cls!r}.")
        path = class_path_of(cls)
        _register_backend_class(path, adapted(cls))
        _override_path(backend.name, path)
        return cls

    return register


def resolve_class_path(class_path: str) -> type[AttentionBackend]:
    """Resolves a class path as `get_class` does, for paths that belong to no member."""
    return class_for(_resolve_class_path(class_path), lambda: class_path)


def plugin_search_path() -> list[str]:
    """Directories searched for plug-in files, in order."""
    return [str(directory) for directory in _plugin_search_path()]
