"""Safetensors files written and read byte by byte, and float64 attention in NumPy: nothing of the code under test."""

import json
import struct

import numpy as np

TYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bool": "BOOL", "int32": "I32", "int64": "I64"}


class BFloat16:
    """bfloat16 numbers as their bits; made from floats by rounding to nearest even."""

    def __init__(self, numbers=None, bits=None):
        if bits is None:
            raw = np.ascontiguousarray(numbers, np.float32).view(np.uint32).astype(np.uint64)
            bits = ((raw + 0x7FFF + ((raw >> 16) & 1)) >> 16).astype(np.uint16)
        self.bits = bits
        self.shape = bits.shape

    def numbers(self):
        return (self.bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def rounded(numbers, dtype):
    """`numbers` stored in a dtype, for `save`."""
    return BFloat16(numbers) if dtype == "bfloat16" else np.asarray(numbers, dtype)


def as_float64(tensor):
    return tensor.numbers() if isinstance(tensor, BFloat16) else np.asarray(tensor, np.float64)


def encode(header, data, length=None):
    """A file's bytes from a header (dict or raw bytes), data, and a header length that may lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def save(path, tensors, metadata=None):
    header, data = {"__metadata__": metadata} if metadata else {}, b""
    for name, tensor in tensors.items():
        is_bf16 = isinstance(tensor, BFloat16)
        raw = (tensor.bits if is_bf16 else tensor).tobytes()
        header[name] = {
            "dtype": "BF16" if is_bf16 else TYPES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    path.write_bytes(encode(header, data))
    return path


def header_of(path):
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def load(path):
    """Name → (dtype as the file calls it, float64 numbers)."""
    header, data = header_of(path)
    header.pop("__metadata__", None)
    result = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        raw = data[begin:end]
        if entry["dtype"] == "BF16":
            numbers = BFloat16(bits=np.frombuffer(raw, np.uint16)).numbers()
        else:
            numpy_type = next(t for t, s in TYPES.items() if s == entry["dtype"])
            numbers = np.frombuffer(raw, numpy_type).astype(np.float64)
        result[name] = (entry["dtype"], numbers.reshape(entry["shape"]))
    return result


def normal(rng, *shapes):
    return [rng.standard_normal(shape) for shape in shapes]


def attention(query, key, value, mask=None, causal=None, scale=None):
    """Softmax attention in float64 → out (B, Sq, H, D), Σ P·|V| of that shape, LSE (B, H, Sq).

    `mask` as users give it; `causal` is None, "top-left" or "bottom-right".
    """
    q, k, v = (np.moveaxis(as_float64(t), 2, 1) for t in (query, key, value))
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    logits = q @ np.swapaxes(k, 2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    seq_q, seq_kv = logits.shape[2:]
    if mask is not None:
        full = mask[:, None, None, :] if np.ndim(mask) == 2 else mask
        logits = np.where(full, logits, -np.inf) if full.dtype == bool else logits + full
    if causal is not None:
        offset = seq_kv - seq_q if causal == "bottom-right" else 0
        logits = np.where(np.tri(seq_q, seq_kv, offset, dtype=bool), logits, -np.inf)
    top = logits.max(-1, keepdims=True)
    weights = np.exp(logits - np.where(np.isfinite(top), top, 0))
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + np.where(np.isfinite(top), top, 0))[..., 0]
    weights = weights / np.where(total == 0, 1, total)
    seen = np.where(weights > 0, 1, 0).max(2)[..., None] > 0  # keys nobody sees may hold anything
    v = np.where(seen, v, 0)
    return np.moveaxis(weights @ v, 1, 2), np.moveaxis(weights @ np.abs(v), 1, 2), lse


def relative_error(out, expected, magnitude):
    return np.linalg.norm(out - expected) / np.linalg.norm(magnitude)


def error_bound(dtype, query, key, scale=None):
    """What the project demands of a backend, from 1,000 output elements on or below."""
    q, k = as_float64(query), as_float64(key)
    if dtype == "float32":
        norms = [np.linalg.norm(x, axis=-1).max() for x in (q, k)]
        return 2e-6 * max(1, norms[0] * norms[1] * (q.shape[3] ** -0.5 if scale is None else abs(scale)) / 32)
    return {"bfloat16": (4e-3, 2.5e-3), "float16": (6e-4, 3.5e-4)}[dtype][q.size >= 1000]
