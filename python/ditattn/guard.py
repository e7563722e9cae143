"""Watches the numbers of a running model: checks calls against float64 attention, and moves layers on request."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, Callable, NamedTuple

from . import _native
from .enum import DiffusionAttentionBackendEnum

_guard = _native.function("guard")


class GuardFinding(NamedTuple):
    """What a check of one call found."""

    layer: str
    role: str
    backend: str  #: which computed, also behind a platform's default
    problem: str
    call: int  #: of this layer, counted from 0
    error: float  #: of the worst row: ‖out − answer‖ / ‖answer‖; infinite by what the two counts below count
    bound: float
    row: tuple[int, int, int]  #: the worst: batch, head, query
    non_finite: int  #: elements of the rows compared that are finite in one of output and answer alone
    without_keys: int  #: elements that are not zero in rows that see no key
    action: str  #: what was done; empty for nothing
    text: str  #: all of it in one line


class GuardedLayer(NamedTuple):
    """What is known of one layer."""

    layer: str
    role: str
    backend: str  #: which computed the last call that was checked
    calls: int
    checks: int
    failures: int
    captured: int  #: calls that were due, but recorded into a CUDA graph
    not_checked: int  #: calls that were due, but could not be checked: `reason` says why
    reason: str
    last_error: float
    worst: GuardFinding | None  #: the check with the largest error / bound
    non_finite: int
    replaced_by: str  #: the safer back end, empty if there is none
    replaced_at: int  #: the call from which on it computes


class GuardReport(NamedTuple):
    """The layers, worst first; as a table (`print` it) and as a JSON object, in which infinite errors are null."""

    layers: list[GuardedLayer]
    text: str
    json: str

    @property
    def failures(self) -> int:
        """Failed checks of all layers."""
        return sum(layer.failures for layer in self.layers)

    def __str__(self) -> str:
        return self.text


def _finding(fields: Any) -> GuardFinding:
    plain = _native.plain(fields)
    return GuardFinding(**{**plain, "row": tuple(plain["row"])})


def _layer(fields: dict[str, Any]) -> GuardedLayer:
    return GuardedLayer(**{**fields, "worst": None if fields["worst"] is None else _finding(fields["worst"])})


def _patterns(given: str | Iterable[str] | None) -> list[str]:
    return [given] if isinstance(given, str) else list(given or ())


class guard:  # in lower case, as other contexts are
    """A context in which every `every`-th call of each layer is checked, the first included: of all threads.

    `rows` rows of the output are compared with float64 attention, and with `scan` all of it is looked through for NaN
    and infinities. `max_error` is what the worst row may differ, relative to its length; None: what rounding allows an
    exact back end. A failed check is in `report()` and, a layer's first, in the log. `on_failure`: "report" does no
    more; "raise" raises RuntimeError from the call, when its output has been written; "replace" computes the output
    again by a safer back end, `safer` or of the platform's the first that takes the problem, which then makes the later
    calls of the layer or, with `scope="role"`, of all layers of its role. `layers` and `roles`: patterns of what is
    watched ("blocks.*.attn"). `on_event` is told of each failed check; what it raises, the call raises.

    On a GPU a check waits for the stream; calls that a CUDA graph records are not checked. ValueError and ImportError at
    the beginning of the block for arguments that make no sense. May be used once; guards may run at the same time.
    """

    def __init__(
        self,
        *,
        every: int = 100,
        rows: int = 16,
        max_error: float | None = None,
        on_failure: str = "report",
        scope: str = "layer",
        safer: str | DiffusionAttentionBackendEnum | None = None,
        layers: str | Iterable[str] | None = None,
        roles: str | Iterable[str] | None = None,
        scan: bool = True,
        seed: int = 0,
        on_event: Callable[[GuardFinding], None] | None = None,
    ) -> None:
        self._options = {
            "every": every,
            "rows": rows,
            "max_error": None if max_error is None else float(max_error),
            "on_failure": on_failure,
            "scope": scope,
            "safer": safer.name if isinstance(safer, DiffusionAttentionBackendEnum) else safer or "",
            "layers": _patterns(layers),
            "roles": _patterns(roles),
            "scan": scan,
            "seed": seed,
        }
        self._on_event = on_event
        self._native: Any = None
        self._lock = threading.Lock()

    def __enter__(self) -> guard:
        with self._lock:
            if self._native is not None:
                raise RuntimeError("This guard was begun before: make another.")
            told = self._on_event
            event = None if told is None else _native.callback(lambda fields: told(_finding(fields)))
            self._native = _guard(self._options, event)
        return self

    def __exit__(self, *error: Any) -> None:
        self._native["end"]()

    def report(self) -> GuardReport:
        """What has been found so far, also after the block."""
        if self._native is None:
            return GuardReport([], "The guard has not begun.\n", '{"failures": 0, "layers": []}')
        found = _native.plain(self._native["report"]())
        return GuardReport([_layer(layer) for layer in found["layers"]], found["text"], found["json"])
