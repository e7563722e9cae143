"""One attention problem, for `explain`, `select_backend` and `tune`, and what was measured of it."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import tvm_ffi


@dataclasses.dataclass(frozen=True)
class Problem:
    """query (batch, seq_q, num_heads, head_size), key and value (batch, seq_kv, num_kv_heads, head_size)."""

    batch: int = 1
    num_heads: int = 1
    num_kv_heads: int = 1
    seq_q: int = 1
    seq_kv: int = 1
    head_size: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    #: "none", "padding", "bool" or "additive".
    mask: str = "none"
    causal: bool = False
    lse: bool = False
    packed: bool = False
    joint: bool = False
    spans: bool = False
    fp8_kv: bool = False
    #: Bytes, 16 at most, of which all tensors' starts and strides are multiples; 0: some stride is negative.
    alignment: int = 16

    def to_native(self) -> dict[str, Any]:
        """Fields as C++ takes them."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"device": tvm_ffi.device(self.device)}


class TunedResult(NamedTuple):
    """How one back end did on one problem."""

    backend: str
    class_path: str
    engine: str
    median_ms: float  #: of one call; 0: not timed
    error: float  #: ‖out − ref‖ / ‖ref‖ against float64 over sampled rows; NaN: NaN or infinity where there is none
    reason: str  #: why it cannot be chosen; empty otherwise
