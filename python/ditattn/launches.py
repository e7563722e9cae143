"""Which back end really computed, and how often."""

from __future__ import annotations

from typing import NamedTuple

from . import _native

_launch_counts = _native.function("launch_counts")
_reset_launch_counts = _native.function("reset_launch_counts")


class LaunchCount(NamedTuple):
    """Calls that computed something, for one role by one back end."""

    role: str  #: empty where none was given
    backend: str  #: its `get_name()`: of the one that ran, also behind a platform's default
    calls: int


def launch_counts() -> list[LaunchCount]:
    """Counts of all threads since the process began or `reset_launch_counts`, those above zero.

    A back end written in Python is counted where C++ calls it: by `attention`, not where its own class is used directly.
    """
    return [LaunchCount(**entry) for entry in _native.plain(_launch_counts())]


def reset_launch_counts() -> None:
    """Sets all counts to zero."""
    _reset_launch_counts()
