"""What a forward call knows beside query, key and value: masks, joint text tokens, packed sequences, spans."""

from __future__ import annotations

import dataclasses
import functools
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tvm_ffi

from . import _native
from .tensors import as_tensor, for_python, optional_tensor

_make = _native.function("make_metadata")
_fields = _native.function("metadata_fields")

# Keys of `extra` that C++ knows.
_TENSOR_KEYS = ("cu_seqlens_q", "cu_seqlens_k")
_KNOWN_KEYS = (
    *_TENSOR_KEYS, "max_seqlen_q", "max_seqlen_k", "valid_kv_length", "kv_cache_dtype", "attention_mask_mode"
)  # fmt: skip
_ORIGIN_KEY = "ditattn.origin"


class QueryRange(NamedTuple):
    """Local query rows [local_start, local_end) stand at global positions from `global_start` on."""

    local_start: int
    local_end: int
    global_start: int


class _Origin:
    """Goes through C++ with the tensors and leads back to the caller's metadata, without keeping that alive."""

    def __init__(self, metadata: AttentionMetadata) -> None:
        self.metadata = weakref.ref(metadata)


@dataclasses.dataclass(eq=False)
class AttentionMetadata:
    """vLLM-Omni's fields, with the caller's own objects in them.

    What C++ makes of them (what a mask hides, which keys a row sees) is kept, so build it once per model step and give
    it to every layer. Assigning a field, or changing a known key of `extra`, makes that anew; tensors and lists must
    not be changed in place once they were used.
    """

    #: (B, Skv) padding, or broadcastable to (B, H, Sq, Skv); bool (True = attend) or added to the logits.
    attn_mask: Any = None
    #: Like `attn_mask`, for the text's keys.
    joint_attn_mask: Any = None
    #: Text tokens, attended together with the image's: all three or none.
    joint_query: Any = None
    joint_key: Any = None
    joint_value: Any = None
    #: Text before ("front") or after ("rear") the image.
    joint_strategy: str = "front"
    #: cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, valid_kv_length, kv_cache_dtype; others are ignored.
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    #: Per sample, sorted spans [start, end) of full attention. None: unrestricted.
    full_attn_spans: Sequence[Sequence[Sequence[int]]] | None = None
    #: Where a sharded query's rows stand.
    query_ranges: Sequence[QueryRange] | None = None

    _converted = None  # (the C++ object, the known options it was made from)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        object.__setattr__(self, "_converted", None)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def to_native(self) -> Any:
        """The C++ object, made on first use."""
        extra = self.extra or {}
        known = [extra[key] for key in _KNOWN_KEYS if key in extra]
        if self._converted is not None:
            made, seen = self._converted
            if len(seen) == len(known) and all(a is b for a, b in zip(seen, known)):
                return made
        made = self._convert(extra)
        object.__setattr__(self, "_converted", (made, known))
        return made

    def _convert(self, extra: dict[str, Any]) -> Any:
        given: dict[str, Any] = {key: extra[key] for key in _KNOWN_KEYS if key in extra}
        for key in _TENSOR_KEYS:
            if given.get(key) is not None:
                given[key] = as_tensor(given[key], f"extra['{key}']")
        for key in ("max_seqlen_q", "max_seqlen_k", "valid_kv_length"):
            if hasattr(given.get(key), "__index__"):
                given[key] = given[key].__index__()  # NumPy's integers, and PyTorch's scalars
        given[_ORIGIN_KEY] = _Origin(self)
        spans = self.full_attn_spans
        return _make(
            optional_tensor(self.attn_mask, "attn_mask"),
            optional_tensor(self.joint_attn_mask, "joint_attn_mask"),
            optional_tensor(self.joint_query, "joint_query"),
            optional_tensor(self.joint_key, "joint_key"),
            optional_tensor(self.joint_value, "joint_value"),
            self.joint_strategy,
            None if spans is None else [[_integers(span) for span in sample] for sample in spans],
            [_integers(_as_tuple(entry)) for entry in self.query_ranges or ()],
            given,
        )


_FIELD_NAMES = tuple(field.name for field in dataclasses.fields(AttentionMetadata))


def _integers(numbers: Sequence[int]) -> list[int]:
    return [number.__index__() for number in numbers]


def _as_tuple(entry: Any) -> Sequence[int]:
    """A QueryRange, vLLM-Omni's own, or a plain sequence."""
    return entry if isinstance(entry, Sequence) else [getattr(entry, name) for name in QueryRange._fields]


class Conversion:
    """AttentionMetadata of objects of other classes: made once for an object, and anew where a field changed.

    `make` gets the named fields that an object has and that are not None. A field, or a known key of `extra`, has
    changed when it is another object: tensors and lists must not be changed in place.
    """

    def __init__(self, make: Callable[..., AttentionMetadata], names: Sequence[str]) -> None:
        self._make = make
        self._names = names
        # By id, since dataclasses that compare by value cannot be hashed; an entry goes when its object does.
        self._kept: dict[int, tuple[weakref.ref[Any], list[Any], AttentionMetadata]] = {}

    def __call__(self, metadata: Any) -> AttentionMetadata:
        values = [getattr(metadata, name, None) for name in self._names]
        extra = getattr(metadata, "extra", None) or {}
        values += [extra.get(key) for key in _KNOWN_KEYS]
        kept = self._kept.get(id(metadata))
        if kept is not None and kept[0]() is metadata and all(map(operator.is_, kept[1], values)):
            return kept[2]
        if not any(hasattr(metadata, name) for name in self._names):
            raise TypeError(f"attn_metadata must be an AttentionMetadata or None, got {type(metadata).__name__}.")
        made = self._make(**{name: value for name, value in zip(self._names, values) if value is not None})
        try:
            reference = weakref.ref(metadata, functools.partial(self._forget, id(metadata)))
        except TypeError:  # some classes leave no room for one
            return made
        self._kept[id(metadata)] = (reference, values, made)
        return made

    def _forget(self, key: int, _: weakref.ref[Any]) -> None:
        self._kept.pop(key, None)


_convert_all = Conversion(AttentionMetadata, _FIELD_NAMES)


def native_metadata(metadata: Any) -> Any:
    """The C++ object of metadata: an AttentionMetadata, or anything with fields of that kind."""
    if metadata is None:
        return None
    if not isinstance(metadata, AttentionMetadata):
        metadata = _convert_all(metadata)
    return metadata.to_native()


def metadata_for_python(native: Any, library: str | None = None) -> AttentionMetadata | None:
    """Metadata of C++ as back ends written in Python get it. Options C++ does not know come from the caller's."""
    if native is None:
        return None
    fields = dict(_fields(native).items())
    extra = {str(key): value for key, value in fields.pop("extra").items()}
    origin = extra.pop(_ORIGIN_KEY, None)
    for key, value in extra.items():
        extra[key] = for_python(value, library) if isinstance(value, tvm_ffi.Tensor) else _native.plain(value)
    caller = origin.metadata() if isinstance(origin, _Origin) else None
    if caller is not None:
        extra = {**(caller.extra or {}), **extra}
    spans = fields.pop("full_attn_spans", None)
    ranges = fields.pop("query_ranges")
    converted = {
        name: for_python(value, library) if isinstance(value, tvm_ffi.Tensor) else value
        for name, value in fields.items()
    }
    converted["joint_strategy"] = str(converted["joint_strategy"])
    return AttentionMetadata(
        extra=extra,
        full_attn_spans=None if spans is None else [[tuple(span) for span in sample] for sample in spans],
        query_ranges=tuple(QueryRange(*entry) for entry in ranges) or None,
        **converted,
    )
