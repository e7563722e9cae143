"""Processes of a PyTorch process group as ranks: Gloo as a transport, and how NCCL's ranks find each other."""

from __future__ import annotations

import contextlib
import datetime
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from . import _native

_python_communicator = _native.function("python_communicator")

_groups: Counter[str] = Counter()  # communicators made, by the name of the process group
_lock = threading.Lock()
_SPLIT = 7  # beside C++'s operations, which are fewer
_OPERATIONS = 8


def communicator(process_group: Any, device: Any, timeout: float) -> tuple[Any, str]:
    """C++'s communicator of the processes of `process_group`, and where their tensors are.

    Errors are those of `ditattn.parallel.group`.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("There is no process group. Call torch.distributed.init_process_group first.")
    if not 0 < timeout < 365 * 86400:
        raise ValueError(f"A timeout of {timeout} s: it must be more than 0 s and less than a year.")
    process_group = dist.group.WORLD if process_group is None else process_group
    rank, size = dist.get_rank(process_group), dist.get_world_size(process_group)
    if rank < 0:
        raise ValueError(f"This process, rank {dist.get_rank()} of all, is not in the process group.")
    name = dist.distributed_c10d._get_process_group_name(process_group)
    with _lock:  # all ranks make the same groups in the same order, so they agree on the number
        number = _groups[name]
        _groups[name] += 1
    store = dist.PrefixStore(f"ditattn/{name}/{number}", dist.distributed_c10d._get_default_store())
    device = _device(process_group, device)
    if device.type == "cpu":
        if not dist.is_gloo_available():
            raise ImportError("Processes exchange host memory by Gloo, which this PyTorch was built without.")
        return _Ranks(_Gloo(store, rank, size, timeout), range(size), rank, 0).to_native(), "cpu"
    return _nccl(store, rank, size, device, timeout), str(device)


def _device(process_group: Any, device: Any) -> torch.device:
    if device is None:
        device = "cuda" if dist.get_backend(process_group) == "nccl" else "cpu"
    device = torch.device(device)
    if device.type == "cuda":
        return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    if device.type != "cpu":
        raise ValueError(f"device is {device}. Valid values are: cpu, cuda, cuda:N.")
    return device


def _nccl(store: Any, rank: int, size: int, device: torch.device, timeout: float) -> Any:
    """Rank 0's id goes to the others through the store."""
    join = _native.function_of("nccl", "nccl_communicator")
    if rank == 0:
        store.set("id", bytes(_native.function_of("nccl", "nccl_id")()))
    try:
        store.wait(["id"], datetime.timedelta(seconds=timeout))  # not set_timeout, which is the program's store's too
        found = store.get("id")
    except RuntimeError as error:
        raise TimeoutError(f"parallel: rank 0 did not give NCCL's id within {timeout:g} s: {error}") from error
    return join(found, rank, size, device.index, timeout)


class _Gloo:
    """A Gloo group of its own, which a rank that fails closes, so that nobody waits for it.

    Not `torch.distributed.new_group`: its names, and with them its keys in the store, come again once a group is gone.
    It closes when nothing refers to it, so no error may: errors keep the variables of the functions they went through.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: float) -> None:
        self.store = store
        self.timeout = datetime.timedelta(seconds=timeout)
        self.next_channel = 1
        try:
            self.group = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, self.timeout)
        except RuntimeError as error:
            if "timeout" not in str(error).lower():
                raise
            raise TimeoutError(
                f"parallel: not all {size} ranks came within {timeout:g} s (rank {rank} waits for them): {error}"
            ) from error

    def fail(self, reason: str) -> str:
        """Ends the group; the first reason of all ranks, which it returns, stays."""
        with contextlib.suppress(RuntimeError):  # the store may be gone with its rank
            reason = self.store.compare_set("failure", "", reason).decode()
        self.group = None
        return reason


class _Ranks:
    """Some ranks of a `_Gloo` as one of ditattn's communicators. Messages of two of them differ by their channel."""

    def __init__(self, gloo: _Gloo, members: Sequence[int], rank: int, channel: int) -> None:
        self.gloo, self.members, self.rank, self.channel = gloo, members, rank, channel

    def to_native(self) -> Any:
        """C++'s object, which keeps this one."""
        hooks = [_native.callback(hook) for hook in (self.start, self.split, self.abort)]
        return _python_communicator(self.rank, len(self.members), self.gloo.timeout.total_seconds(), *hooks)

    def start(self, operation: int, name: str, sends: Any, receives: Any) -> Callable[[], None]:
        if self.gloo.group is None:
            raise RuntimeError(f"parallel: {self.gloo.fail('an operation failed before')}.")
        under_way: list[tuple[int, Any, Any]] = []
        tag = _OPERATIONS * self.channel + operation
        for method, blocks in (("recv", receives), ("send", sends)):
            for peer, memory in blocks:
                tensor = torch.from_dlpack(memory)
                try:
                    work = getattr(self.gloo.group, method)([tensor], self.members[peer], tag)
                except RuntimeError as error:
                    failure = str(error)
                else:
                    under_way.append((peer, work, tensor))
                    continue
                under_way.clear()
                raise self._lost(peer, name, failure)
        return _native.callback(lambda: self._wait(name, under_way))

    def _wait(self, name: str, under_way: list[tuple[int, Any, Any]]) -> None:
        while under_way:
            peer, begin = under_way[0][0], time.monotonic()
            try:
                under_way[0][1].wait(self.gloo.timeout)
            except RuntimeError as error:
                failure = str(error)
            else:
                del under_way[0]
                continue
            under_way.clear()
            if time.monotonic() - begin < self.gloo.timeout.total_seconds():
                raise self._lost(peer, name, failure)
            text = (
                f"rank {self.members[peer]} did not come within {self.gloo.timeout.total_seconds():g} s: it is lost or "
                f"late (rank {self.members[self.rank]} waits in {name})"
            )
            self.gloo.fail(text)
            raise TimeoutError(f"parallel: {text}.")

    def _lost(self, peer: int, name: str, failure: str) -> RuntimeError:
        lost, here = self.members[peer], self.members[self.rank]
        text = f"rank {lost} is lost (rank {here} waits in {name}): {failure.splitlines()[0]}"
        return RuntimeError(f"parallel: {self.gloo.fail(text)}.")

    def split(self, colour: int, key: int) -> Any:
        mine = torch.tensor([colour, key, self.gloo.next_channel], device="cpu")
        everyone = [torch.empty_like(mine) for _ in self.members]
        everyone[self.rank].copy_(mine)
        peers = [peer for peer in range(len(self.members)) if peer != self.rank]
        sends = [(peer, mine.view(torch.uint8)) for peer in peers]
        self.start(_SPLIT, "split", sends, [(peer, everyone[peer].view(torch.uint8)) for peer in peers])()
        table = [row.tolist() for row in everyone]
        colours = sorted({row[0] for row in table})
        first = max(row[2] for row in table)  # above all that any two of these ranks have in common
        self.gloo.next_channel = first + len(colours)
        chosen = sorted((row[1], peer) for peer, row in enumerate(table) if row[0] == colour)
        places = [peer for _, peer in chosen]
        members = [self.members[peer] for peer in places]
        return _Ranks(self.gloo, members, places.index(self.rank), first + colours.index(colour)).to_native()

    def abort(self, reason: str) -> None:
        self.gloo.fail(f"rank {self.members[self.rank]} failed: {reason}")
