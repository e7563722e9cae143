"""Arrays of any library as tvm_ffi tensors over the same memory, and back."""

from __future__ import annotations

import functools
import sys
from typing import Any

import tvm_ffi

from . import _native

numpy: Any
try:
    import numpy
except ImportError:  # not needed
    numpy = None

_reinterpret = _native.function("reinterpret")
_copy_result = _native.function("copy_result")

# Dtypes NumPy has no word for in DLPack (ml_dtypes has them), and those of the same size that it has.
_AS_BITS = {"bfloat16": "uint16"}
_DLPACK_VERSION = (1, 0)  # the first that can say "read-only"
_NUMPY_KNOWS_IT = numpy is not None and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 1)


def torch() -> Any:
    """The module, if the process has it."""
    return sys.modules.get("torch")


def is_torch(value: Any) -> bool:
    """Whether `value` is a PyTorch tensor."""
    module = torch()
    return module is not None and isinstance(value, getattr(module, "Tensor", ()))


@functools.lru_cache(maxsize=None)
def _cuda_device(index: int) -> Any:
    return tvm_ffi.device(f"cuda:{index}")


def torch_stream(tensor: Any) -> Any:
    """A context in which C++ works in PyTorch's current stream of a CUDA tensor's device."""
    index = tensor.device.index
    # As TorchInductor's code asks; torch.cuda.current_stream makes an object, which takes 5 µs.
    return tvm_ffi.use_raw_stream(_cuda_device(index), torch()._C._cuda_getCurrentRawStream(index))


def _from_numpy(array: Any) -> tvm_ffi.Tensor:
    if array.dtype.kind == "V":  # not NumPy's own; asking each dtype's name would take longer than all the rest
        bits = _AS_BITS.get(array.dtype.name)
        if bits is not None:
            words: tvm_ffi.Tensor = _reinterpret(_from_numpy(array.view(bits)), tvm_ffi.dtype(array.dtype.name))
            return words
    if array.flags.writeable:
        return tvm_ffi.from_dlpack(array)
    if _NUMPY_KNOWS_IT:
        return tvm_ffi.from_dlpack(array.__dlpack__(max_version=_DLPACK_VERSION))
    return tvm_ffi.from_dlpack(array.copy())


FORWARD_ONLY = str(_native.function("forward_only")())


def _from_torch(tensor: Any) -> tvm_ffi.Tensor:
    if tensor.requires_grad:
        if torch().is_grad_enabled():
            raise NotImplementedError(FORWARD_ONLY)
        tensor = tensor.detach()
    return tvm_ffi.from_dlpack(tensor)


@functools.lru_cache(maxsize=1)
def _read_directly(module: Any) -> tuple[Any, Any]:
    """PyTorch's tensor class where tvm_ffi reads it itself, else None; and the layout it reads."""
    cls = getattr(module, "Tensor", None)
    return (cls if hasattr(cls, "__dlpack_c_exchange_api__") else None), getattr(module, "strided", None)


def is_taken_directly(value: Any) -> bool:
    """Whether tvm_ffi reads `value` itself, as an argument: a plain PyTorch tensor, through PyTorch's table of C functions.

    That takes a tenth of `from_dlpack`'s time, and C++ works in PyTorch's current stream then. The table knows nothing
    of gradients, sparse layouts, tensors without memory and lazy negation.
    """
    cls, strided = _read_directly(sys.modules.get("torch"))
    return (
        type(value) is cls
        and not value.requires_grad
        and (value.is_cuda or value.is_cpu)
        and value.layout is strided
        and not value.is_neg()
    )


def as_argument(value: Any, what: str) -> Any:
    """`value` for a C++ function that takes a tensor: itself where that is read directly, else as `as_tensor` has it."""
    return value if is_taken_directly(value) else as_tensor(value, what)


def as_tensor(value: Any, what: str) -> tvm_ffi.Tensor:
    """`value`, anything with ``__dlpack__``, as a tensor over its memory. Errors name `what`."""
    if isinstance(value, tvm_ffi.Tensor):
        return value
    try:
        if numpy is not None and isinstance(value, numpy.ndarray):
            return _from_numpy(value)
        if is_torch(value):
            return _from_torch(value)
        if hasattr(value, "__dlpack__"):
            return tvm_ffi.from_dlpack(value)
    except (BufferError, RuntimeError, ValueError) as error:  # NotImplementedError is a RuntimeError
        kind = NotImplementedError if isinstance(error, NotImplementedError) else ValueError
        raise kind(f"{what} cannot be taken over: {error}") from error
    raise TypeError(
        f"{what} must be a tensor with __dlpack__ (NumPy, PyTorch, tvm_ffi, …), got {type(value).__name__}."
    )


def optional_tensor(value: Any, what: str) -> tvm_ffi.Tensor | None:
    """`as_tensor`, but None stays None."""
    return None if value is None else as_tensor(value, what)


class _Memory:
    """A tensor's memory for NumPy before 2.1, whose from_dlpack makes all arrays read-only."""

    def __init__(self, tensor: tvm_ffi.Tensor) -> None:
        dtype = numpy.dtype(str(tensor.dtype))
        self.tensor = tensor
        self.__array_interface__ = {
            "version": 3,
            "shape": tensor.shape,
            "strides": tuple(stride * dtype.itemsize for stride in tensor.strides),
            "typestr": dtype.str,
            "data": (tensor.data_ptr(), False),
        }


def _to_numpy(tensor: tvm_ffi.Tensor) -> Any:
    name = str(tensor.dtype)
    bits = _AS_BITS.get(name)
    if bits is None:
        return numpy.from_dlpack(tensor) if _NUMPY_KNOWS_IT else numpy.asarray(_Memory(tensor))
    import ml_dtypes

    return _to_numpy(_reinterpret(tensor, tvm_ffi.dtype(bits))).view(getattr(ml_dtypes, name))


def like(tensor: tvm_ffi.Tensor, model: Any) -> Any:
    """`tensor` as an array of the library that `model` is of, over the same memory."""
    if isinstance(model, tvm_ffi.Tensor) or is_torch(tensor):  # tvm_ffi gives PyTorch's where it took one
        return tensor
    if numpy is not None and isinstance(model, numpy.ndarray):
        return _to_numpy(tensor)
    if is_torch(model):
        return torch().from_dlpack(tensor)
    namespace = getattr(model, "__array_namespace__", None)  # of the array API standard: JAX, CuPy and others
    library = sys.modules.get(type(model).__module__.partition(".")[0]) if namespace is None else namespace()
    from_dlpack = getattr(library, "from_dlpack", None)
    return tensor if from_dlpack is None else from_dlpack(tensor)


LIBRARIES = ("torch", "numpy", "tvm_ffi")


def for_python(tensor: tvm_ffi.Tensor, library: str | None = None) -> Any:
    """A tensor of C++ as back ends written in Python get it: as an array of `library`.

    None: PyTorch's if the process has PyTorch; else NumPy's, read-only, where it has the dtype; else tvm_ffi's.
    """
    if library == "torch" or (library is None and torch() is not None):
        return torch().from_dlpack(tensor)
    known = str(tensor.dtype) not in _AS_BITS or "ml_dtypes" in sys.modules
    if library == "tvm_ffi" or (library is None and (numpy is None or not known)):
        return tensor
    array = _to_numpy(tensor)
    array.flags.writeable = False
    return array


def copy_into(out: tvm_ffi.Tensor, result: Any, what: str) -> None:
    """Copies what a back end returned to where C++ wants it. ValueError unless shape, dtype and device are right."""
    if result is out:
        return
    if is_torch(result) and result.is_cuda:
        target = torch().from_dlpack(out)
        if (target.shape, target.dtype, target.device) == (result.shape, result.dtype, result.device):
            target.copy_(result)
            return
    if is_torch(result):
        result = result.detach()  # what was computed is wanted, not how
    _copy_result(as_tensor(result, what), out, what)
