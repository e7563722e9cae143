"""Attention whose tokens are spread over ranks: threads, MPI's processes, or those of a PyTorch process group.

    from ditattn import parallel

    torch.distributed.init_process_group("gloo")
    group = parallel.group(ulysses=2, ring=2)  # of 4 processes
    layer = parallel.ParallelAttention("FLASH_ATTN", num_heads=24, head_size=128, group=group)
    out = layer.forward(my_query, my_key, my_value)  # this rank's tokens in, this rank's rows out

What ranks share and what they may differ in, docs/parallel.md tells.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from . import _native
from .backend import AttentionBackend, call_native
from .enum import DiffusionAttentionBackendEnum
from .metadata import AttentionMetadata, native_metadata
from .python_backend import adapted
from .selection import get_attn_backend_for_role

_thread_ranks = _native.function("thread_ranks")
_rank = _native.function("communicator_rank")
_size = _native.function("communicator_size")
_timeout = _native.function("communicator_timeout")
_barrier = _native.function("barrier")
_raise_if_failed = _native.function("raise_if_failed")
_abort = _native.function("abort")
_parallel_group = _native.function("parallel_group")
_parallel_layer = _native.function("parallel_layer")
_forward = _native.function("parallel_forward")
_refuse = _native.function("parallel_refuse")
_mesh_name = _native.function("mesh_name")
_parse_mesh = _native.function("parse_mesh")
_balanced_lengths = _native.function("balanced_lengths")
_mpi = functools.partial(_native.function_of, "mpi")

T = TypeVar("T")

#: Seconds that an operation waits for a peer, where nothing else is said.
DEFAULT_TIMEOUT = 300.0


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How ranks share the work: their number is the product of the degrees, of which `ring` or `allgather` is 1.

    Rank r has place r mod `ulysses` on the first axis and r div `ulysses` on the second.
    """

    #: Heads are shared out: all-to-all before and after.
    ulysses: int = 1
    #: Keys and values go round, step by step; results are merged by their LSE.
    ring: int = 1
    #: Keys and values are gathered at once: more memory, one step.
    allgather: int = 1

    def __str__(self) -> str:
        return str(_mesh_name(self.ulysses, self.ring, self.allgather))

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """Of "ulysses=2, ring=2". ValueError names what is allowed."""
        return cls(*_parse_mesh(text))


def balanced_lengths(tokens: int, ranks: int) -> list[int]:
    """Tokens for each rank, as even as can be: the first ones have one more."""
    return [int(length) for length in _balanced_lengths(tokens, ranks)]


class Communicator:
    """One rank's end of a group of ranks, whose bytes go by threads, MPI, PyTorch or NCCL. Made by functions here.

    All ranks call the same in the same order, one thread of a rank at a time. After a TimeoutError or a RuntimeError
    (a rank failed, or is lost) it is of no more use.
    """

    def __init__(self, native: Any) -> None:
        self._native = native

    @property
    def rank(self) -> int:
        """This end's number, from 0."""
        return int(_rank(self._native))

    @property
    def size(self) -> int:
        """The number of ranks."""
        return int(_size(self._native))

    @property
    def timeout(self) -> float:
        """Seconds that an operation waits for a peer."""
        return float(_timeout(self._native))

    def barrier(self) -> None:
        """Returns when all ranks have come."""
        _barrier(self._native)

    def raise_if_failed(self) -> None:
        """Raises what has failed among operations on a GPU, for which Python does not wait.

        After waiting for the GPU it tells whether results are what they should be. Thread-safe.
        """
        _raise_if_failed(self._native)

    def abort(self, reason: str) -> None:
        """For a rank that cannot go on: the others' operations, present and future, are a RuntimeError with `reason`.

        Where a transport cannot tell them (MPI), they end with this rank's program, or by their timeout.
        """
        _abort(self._native, reason)


def run_ranks(size: int, body: Callable[[Communicator], T], timeout: float = DEFAULT_TIMEOUT) -> list[T]:
    """Calls `body` as `size` ranks, each in a thread of its own, and returns what they returned, by rank.

    Where one raises, the others' operations fail at once, and what was raised first is raised here.
    """
    ends = [Communicator(end) for end in _thread_ranks(size, timeout)]
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(end: Communicator) -> None:
        try:
            results[end.rank] = body(end)
        except BaseException as error:
            errors.append(error)
            end.abort(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=run, args=(end,), name=f"rank {end.rank}") for end in ends]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as error:  # Control-C; those that were started must end
        ends[0].abort(f"{type(error).__name__}: {error}")
        raise
    if errors:  # what the others get of an error is a RuntimeError, which may come first
        raise next((error for error in errors if type(error) is not RuntimeError), errors[0])
    return [results[rank] for rank in range(size)]


class ParallelGroup:
    """A communicator cut to a mesh, and the memory that calls reuse. Layers share it. Used by one thread at a time."""

    def __init__(self, communicator: Communicator, mesh: Mesh, device: str = "cpu") -> None:
        """Called by all ranks of `communicator`. `device`, where tensors will be, is what "auto" chooses for.

        ValueError, on all of them, where degrees do not make their number (with those that do) or ranks differ.
        """
        self.communicator = communicator
        self.mesh = mesh
        self.device = device
        self._native = _parallel_group(communicator._native, mesh.ulysses, mesh.ring, mesh.allgather)


class ParallelAttention:
    """An attention layer over all ranks of a group."""

    def __init__(
        self,
        backend: str | DiffusionAttentionBackendEnum | type,
        num_heads: int,
        head_size: int,
        softmax_scale: float | None = None,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        backend_kwargs: Mapping[str, Any] | None = None,
        *,
        group: ParallelGroup,
        role: str = "",
    ) -> None:
        """The whole layer's numbers, the same on all ranks; nothing is exchanged.

        `backend` is a member, its name in any case, a class, or "auto": the selector's choice. Errors are those of the
        class's own layers.
        """
        self.group = group
        config = {
            "num_heads": num_heads,
            "head_size": head_size,
            "softmax_scale": softmax_scale,
            "causal": causal,
            "num_kv_heads": num_kv_heads,
            "prefix": prefix,
            "role": role,
            "backend_kwargs": dict(backend_kwargs or {}),
        }
        self._native = _parallel_layer(adapted(_class_of(backend, group.device)), config, group._native)

    def forward(
        self,
        query: Any,
        key: Any,
        value: Any,
        attn_metadata: AttentionMetadata | None = None,
        out: Any = None,
        lse: Any = None,
        return_lse: bool = False,
    ) -> Any:
        """Attention of all ranks' tokens; called by all ranks. Arguments and result are those of a layer's `forward`.

        query (B, Sq of this rank, H, D), key and value (B, Skv of this rank, Hkv, D): successive tokens of the whole,
        rank after rank, any numbers of them, none too. `attn_metadata` is the whole problem's, the same on every rank:
        masks have all keys and, where they have rows, all rows; joint text is whole. The result is (B, Sq of this rank
        + text rows, H, D), the LSE (B, H, the same rows), which is wanted by all ranks or by none.

        Ranks agree before any tensor moves. What one rank refuses is its own error there, and a RuntimeError with the
        reason on the others; what differs between ranks is a ValueError on all. TimeoutError names a rank that did not
        come. Runs without Python's lock.
        """
        entered = False

        def call(query: Any, key: Any, value: Any, out: Any, lse: Any) -> Any:
            nonlocal entered
            entered = True
            return _forward(self._native, query, key, value, metadata, out, lse, return_lse)

        try:
            metadata = native_metadata(attn_metadata)
            return call_native(call, query, key, value, out, lse, return_lse)
        except Exception as error:
            if not entered:  # the others wait for this rank's word
                _refuse(self._native, f"{type(error).__name__}: {error}", self.group.device == "cpu")
            raise

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)


def _class_of(backend: str | DiffusionAttentionBackendEnum | type, device: str) -> type[AttentionBackend]:
    if isinstance(backend, str):
        if backend.lower() == "auto":
            return get_attn_backend_for_role(device=device)[0]
        backend = DiffusionAttentionBackendEnum[backend.upper()]
    if isinstance(backend, DiffusionAttentionBackendEnum):
        return backend.get_class()
    if isinstance(backend, type):
        return backend
    raise TypeError(f"backend must be a name, a member or a class, got {backend!r}.")


# --- Processes ----------------------------------------------------------------------------------------------------


def group(
    process_group: Any = None,
    *,
    ulysses: int = 1,
    ring: int = 1,
    allgather: int = 1,
    device: Any = None,
    timeout: float = DEFAULT_TIMEOUT,
) -> ParallelGroup:
    """The processes of a PyTorch process group, by default all, as ranks. Called by all of them.

    `device` is where tensors are: "cpu", or this process's GPU, each process having one of its own. None: the current
    GPU where `process_group` is NCCL's alone, else the CPU. Bytes go by Gloo or NCCL, in connections of ditattn's own.
    ImportError where PyTorch, or ditattn's part for NCCL, is not there; RuntimeError before `init_process_group`;
    ValueError for wrong degrees, with those that work; TimeoutError where a process does not come.
    """
    try:
        from .torch_ranks import communicator
    except ModuleNotFoundError as error:
        raise ImportError(f"ditattn.parallel.group needs PyTorch: {error}") from error
    native, place = communicator(process_group, device, timeout)
    return ParallelGroup(Communicator(native), Mesh(ulysses, ring, allgather), place)


@contextlib.contextmanager
def mpi_session(timeout: float = DEFAULT_TIMEOUT) -> Iterator[Communicator]:
    """MPI for a ``with`` block, in one thread; its value are all processes of the job, which all call this.

        with parallel.mpi_session() as world:
            group = parallel.ParallelGroup(world, parallel.Mesh(ulysses=2, ring=2))

    An error that leaves the block is printed, and the whole job ends there and then with status 1, because the other
    processes would wait for this one. ImportError where ditattn was built without MPI.
    """
    session = _mpi("mpi_begin")(timeout)
    world = Communicator(_mpi("mpi_world")(session))
    try:
        yield world
    except BaseException as error:
        if not isinstance(error, SystemExit) or error.code:
            traceback.print_exception(error)
            world.abort(f"{type(error).__name__}: {error}")
        raise
    finally:
        _mpi("mpi_end")(session)


def mpi_communicator(fortran_handle: int, timeout: float = DEFAULT_TIMEOUT) -> Communicator:
    """The processes of a communicator that the program has: ``comm.py2f()`` of mpi4py. Called by all of them."""
    return Communicator(_mpi("mpi_communicator")(fortran_handle, timeout))


def nccl_communicator(over: Communicator, device: int) -> Communicator:
    """The ranks of `over` (threads, MPI), each with a GPU of its own, this one with `device`. Called by all of them.

    ImportError where ditattn was built without CUDA, or there is no NCCL.
    """
    return Communicator(_native.function_of("nccl", "nccl_over")(over._native, device))
