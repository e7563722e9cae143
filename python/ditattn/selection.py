"""Which back end, where code does not name one: configuration by role, environment, platform default."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from . import _native
from .backend import AttentionBackend, class_for
from .enum import DiffusionAttentionBackendEnum
from .problem import Problem, TunedResult

_parse_config = _native.function("parse_config")
_get_attn_backend_for_role = _native.function("get_attn_backend_for_role")
_select_backend = _native.function("select_backend")
_explain_choice = _native.function("explain_choice")
_platform_candidates = _native.function("platform_candidates")
_define_platform = _native.function("define_platform")

HEAD_SIZE_UNKNOWN = -1


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """One choice: a member's name and options for `AttentionImpl`'s backend_kwargs, or what "auto" must keep to."""

    backend: str = "AUTO"
    backend_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    #: Where the back end cannot be had or refuses: "error" (None: for one that is named), or the next one, with a
    #: warning ("warn") or information ("allow", None: for "auto").
    on_unusable: str | None = None
    #: Whom a named back end may be replaced by (none: the platform's order), or "auto" may choose (none: all).
    allowed: Sequence[str] = ()
    #: "auto": the largest measured error (`TunedResult.error`) of what is chosen; None: exact ones only.
    max_error: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "allowed", tuple(self.allowed))


def _as_json(value: Any) -> Any:
    if isinstance(value, AttentionSpec):
        options = {
            "backend_kwargs": dict(value.backend_kwargs),
            "on_unusable": value.on_unusable,
            "allowed": list(value.allowed),
            "max_error": value.max_error,
        }
        return {"backend": value.backend, **{key: option for key, option in options.items() if option not in ({}, [], None)}}
    if isinstance(value, Mapping):
        return {key: _as_json(entry) for key, entry in value.items()}
    return value


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Back ends by role. What is given is checked, and brought into this form: nested roles joined by dots, "auto" left
    out, names upper-cased. Whether the names exist is checked when they are used."""

    default: AttentionSpec | None = None
    per_role: Mapping[str, AttentionSpec] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        given = {"default": _as_json(self.default), "per_role": _as_json(self.per_role)}
        self._set(_parse_config(json.dumps(given), False))

    def _set(self, parsed: Any) -> None:
        plain = _native.plain(parsed)
        default = plain["default"]
        object.__setattr__(self, "default", default and AttentionSpec(**default))
        object.__setattr__(self, "per_role", {role: AttentionSpec(**spec) for role, spec in plain["per_role"].items()})

    @classmethod
    def _from(cls, text: str, may_be_file: bool) -> AttentionConfig:
        config = cls()
        config._set(_parse_config(text, may_be_file))
        return config

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> AttentionConfig:
        """{"default": "FLASH_ATTN" | {"backend": …}, "per_role": {"self": …, "ltx2": {"audio_to_video": …}}}"""
        return cls._from(json.dumps(_as_json(fields)), False)

    @classmethod
    def from_json(cls, text: str) -> AttentionConfig:
        """`from_dict` of a JSON text."""
        return cls._from(text, False)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> AttentionConfig:
        """`from_json` of a file; OSError where it cannot be read."""
        return cls._from(os.path.abspath(path), True)

    def to_native(self) -> dict[str, Any]:
        """Fields as C++ takes them."""
        return {
            "default": _as_json(self.default),
            "per_role": {role: _as_json(spec) for role, spec in self.per_role.items()},
        }


class Selection(NamedTuple):
    """Which back end was chosen, and why."""

    member: DiffusionAttentionBackendEnum  #: for a platform's default: its first candidate
    backend: type[AttentionBackend]
    spec: AttentionSpec | None  #: what named it, or bounds the automatic choice; else None
    source: str  #: "attention_config.per_role['self']", …, "platform default"
    is_explicit: bool


def native_config(config: AttentionConfig | Mapping[str, Any] | None) -> dict[str, Any]:
    """A configuration's fields as C++ takes them; none for None."""
    if config is None:
        return {}
    return (config if isinstance(config, AttentionConfig) else AttentionConfig.from_dict(config)).to_native()


def _selection(found: Any) -> Selection:
    member: DiffusionAttentionBackendEnum = DiffusionAttentionBackendEnum[str(found["member"])]
    member.get_class()  # so that its class has its own name
    spec = found["spec"]
    return Selection(
        member=member,
        backend=class_for(found["backend"], lambda: "platform.DefaultBackend"),
        spec=None if spec is None else AttentionSpec(**_native.plain(spec)),
        source=str(found["source"]),
        is_explicit=found["is_explicit"],
    )


def resolve_role(
    role: str | None = None,
    head_size: int = HEAD_SIZE_UNKNOWN,
    config: AttentionConfig | Mapping[str, Any] | None = None,
    role_category: str | None = None,
    device: str = "cpu",
) -> Selection:
    """`get_attn_backend_for_role` with everything that is known about the choice."""
    return _selection(
        _get_attn_backend_for_role(role or "", head_size, native_config(config), role_category or "", device)
    )


def get_attn_backend_for_role(
    role: str | None = None,
    head_size: int = HEAD_SIZE_UNKNOWN,
    config: AttentionConfig | Mapping[str, Any] | None = None,
    role_category: str | None = None,
    device: str = "cpu",
    *,
    attention_config: AttentionConfig | Mapping[str, Any] | None = None,
) -> tuple[type[AttentionBackend], AttentionSpec | None]:
    """The back end class of a layer's role, and the specification that named it (None: the platform's default).

    In this order: ``per_role[role]``, ``per_role[role_category]``, ``default``, which DIFFUSION_ATTENTION_BACKEND fills
    where the configuration does not, and the platform's default. One that is named is explicit: an error where it cannot
    run here, never another back end, unless its `on_unusable` says so. `attention_config` is vLLM-Omni's name of `config`.
    """
    if config is not None and attention_config is not None:
        raise ValueError("config and attention_config are two names of one argument: give one.")
    selection = resolve_role(role, head_size, attention_config if config is None else config, role_category, device)
    return selection.backend, selection.spec


def select_backend(
    problem: Problem | None = None,
    *,
    role: str | None = None,
    config: AttentionConfig | Mapping[str, Any] | None = None,
    role_category: str | None = None,
    **fields: Any,
) -> Selection:
    """As `get_attn_backend_for_role`, for a problem that is known, given whole or by its fields."""
    problem = dataclasses.replace(problem or Problem(), **fields)
    return _selection(_select_backend(problem.to_native(), role or "", native_config(config), role_category or ""))


class MemberVerdict(NamedTuple):
    """One member's answer to a problem."""

    member: DiffusionAttentionBackendEnum
    is_candidate: bool  #: would be tried; the others only tell what they would say
    reasons: tuple[str, ...]  #: against it; empty: it takes the problem
    engine: str  #: empty where the class cannot be had
    kernel: str  #: which would compute, where it takes the problem and its engine tells
    tuned: TunedResult | None  #: "auto": what was measured of it for this problem


class Explanation(NamedTuple):
    """What `select_backend` would choose, and why not something else."""

    source: str  #: as `Selection.source`
    is_explicit: bool
    members: tuple[MemberVerdict, ...]  #: candidates in the order in which they are tried, then all others
    chosen: DiffusionAttentionBackendEnum | None  #: None where every candidate refuses
    why: str  #: "auto": whether by measurement or by the platform's order, and why


def explain(
    problem: Problem | None = None,
    *,
    role: str | None = None,
    config: AttentionConfig | Mapping[str, Any] | None = None,
    role_category: str | None = None,
    **fields: Any,
) -> Explanation:
    """`select_backend` explained before anything runs: every candidate, accepted or refused, with every reason.

    An error only for a configuration or device that does not exist, never because a back end is broken or refuses.
    """
    problem = dataclasses.replace(problem or Problem(), **fields)
    found = _native.plain(
        _explain_choice(problem.to_native(), role or "", native_config(config), role_category or "")
    )
    members = tuple(
        MemberVerdict(
            member=DiffusionAttentionBackendEnum[entry["member"]],
            is_candidate=entry["is_candidate"],
            reasons=tuple(entry["reasons"]),
            engine=entry["engine"],
            kernel=entry["kernel"],
            tuned=entry["tuned"] and TunedResult(**entry["tuned"]),
        )
        for entry in found["members"]
    )
    chosen = found["chosen"]
    return Explanation(
        source=found["source"],
        is_explicit=found["is_explicit"],
        members=members,
        chosen=None if chosen is None else DiffusionAttentionBackendEnum[chosen],
        why=found["why"],
    )


def platform_candidates(device: str = "cpu") -> list[DiffusionAttentionBackendEnum]:
    """Members in the order a platform's default tries them."""
    return [DiffusionAttentionBackendEnum[str(name)] for name in _platform_candidates(device)]


def define_platform(device: str, candidates: list[DiffusionAttentionBackendEnum]) -> None:
    """Sets the candidates of a device."""
    _define_platform(device, [member.name for member in candidates])
