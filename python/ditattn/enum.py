"""``DiffusionAttentionBackendEnum``: the members of the C++ registry, which may grow, as an enumeration."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from . import _native

if TYPE_CHECKING:
    from .backend import AttentionBackend

_members = _native.function("members")
_from_name = _native.function("from_name")
_value = _native.function("value")
_get_path = _native.function("get_path")
_get_class = _native.function("get_class")
_is_overridden = _native.function("is_overridden")
_clear_override = _native.function("clear_override")
_define = _native.function("define")


class _EnumMeta(type):
    """What ``enum.EnumMeta`` gives an enumeration, over members that C++ may add at any time.

    Not ``enum.Enum`` itself: its members are fixed when its body ends.
    """

    def __getitem__(cls, name: str) -> DiffusionAttentionBackendEnum:
        try:
            return _known[name]
        except (KeyError, TypeError):  # TypeError: not hashable
            pass
        return _member(str(_from_name(str(name))))

    def __getattr__(cls, name: str) -> DiffusionAttentionBackendEnum:
        if not name.startswith("_") and name in _members():
            return _member(name)
        raise AttributeError(f"type object '{cls.__name__}' has no attribute '{name}'")

    def __setattr__(cls, name: str, value: Any) -> None:
        if name in _members():
            raise AttributeError(f"cannot reassign member {name!r}")
        super().__setattr__(name, value)

    def __delattr__(cls, name: str) -> None:
        if name in _members():
            raise AttributeError(f"{cls.__name__!r} cannot delete member {name!r}.")
        super().__delattr__(name)

    def __call__(cls, value: Any) -> DiffusionAttentionBackendEnum:
        if isinstance(value, cls):
            return value
        for member in cls:
            if member.value == value:
                return member
        raise ValueError(f"{value!r} is not a valid {cls.__name__}")

    def __iter__(cls) -> Iterator[DiffusionAttentionBackendEnum]:
        return iter([_member(str(name)) for name in _members()])

    def __reversed__(cls) -> Iterator[DiffusionAttentionBackendEnum]:
        return reversed(list(cls))

    def __len__(cls) -> int:
        return len(_members())

    def __bool__(cls) -> bool:
        return True

    def __contains__(cls, value: Any) -> bool:
        """A member, or a member's value."""
        return isinstance(value, cls) or any(member.value == value for member in cls)

    @property
    def __members__(cls) -> Mapping[str, DiffusionAttentionBackendEnum]:
        """Names and members, in definition order."""
        return MappingProxyType({member.name: member for member in cls})

    def __dir__(cls) -> list[str]:
        return [*super().__dir__(), *map(str, _members())]

    def __repr__(cls) -> str:
        return f"<enum {cls.__name__!r}>"


class DiffusionAttentionBackendEnum(metaclass=_EnumMeta):
    """Enumeration of all supported diffusion attention backends.

    The value is the default class path; it can be overridden at run time with `register_diffusion_backend`.
    """

    __slots__ = ("_name_", "_value_")
    _name_: str
    _value_: str

    @property
    def name(self) -> str:
        """The member's name."""
        return self._name_

    @property
    def value(self) -> str:
        """The default class path, never the override."""
        return self._value_

    @staticmethod
    def define(name: str, default_path: str = "") -> DiffusionAttentionBackendEnum:
        """Adds a member. Again with the same path: the member; with another one: ValueError."""
        _define(name, default_path)
        return _member(name)

    def get_path(self, include_classname: bool = True) -> str:
        """The override, else the default; without the class name: the part before the last dot.

        ValueError where both are empty.
        """
        return str(_get_path(self._name_, include_classname))

    def get_class(self) -> type[AttentionBackend]:
        """The class that `get_path` leads to: the Python class itself, or a class over the C++ one, always the same.

        Loads what has to be loaded. ImportError names the class path, every place looked in and the reason. The
        outcome is remembered until a registration changes.
        """
        from .backend import class_for

        return class_for(_get_class(self._name_), lambda: self.get_path())

    def is_overridden(self) -> bool:
        """Whether `register_diffusion_backend` has given this member another class path."""
        return bool(_is_overridden(self._name_))

    def clear_override(self) -> None:
        """Goes back to the default class path; nothing happens without an override."""
        _clear_override(self._name_)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        raise TypeError("<enum 'DiffusionAttentionBackendEnum'> cannot extend itself; use define()")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"<enum 'DiffusionAttentionBackendEnum'> cannot set attribute {name!r}")

    def __repr__(self) -> str:
        return f"<{type(self).__name__}.{self._name_}: {self._value_!r}>"

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self._name_}"

    def __hash__(self) -> int:
        return hash(self._name_)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __copy__(self) -> DiffusionAttentionBackendEnum:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> DiffusionAttentionBackendEnum:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (self._name_, self._value_)


_known: dict[str, DiffusionAttentionBackendEnum] = {}
_known_lock = threading.Lock()


def _member(name: str) -> DiffusionAttentionBackendEnum:
    """The one object of a member that exists."""
    member = _known.get(name)
    if member is None:
        value = str(_value(name))
        with _known_lock:
            member = _known.get(name)
            if member is None:
                member = object.__new__(DiffusionAttentionBackendEnum)
                object.__setattr__(member, "_name_", name)
                object.__setattr__(member, "_value_", value)
                _known[name] = member
    return member


def _unpickle(name: str, value: str) -> DiffusionAttentionBackendEnum:
    """A worker process may not have defined the member yet."""
    return _member(name) if name in _members() else DiffusionAttentionBackendEnum.define(name, value)


for _name in _members():
    _member(str(_name))
