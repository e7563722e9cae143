"""ditattn's back ends in vLLM-Omni: classes that its registry loads by path, and `install`, which registers them.

    from ditattn.integrations import vllm_omni

    vllm_omni.install()  # or: vllm_omni.install("FLASH_ATTN", "SAGE_ATTN")

The classes have vLLM-Omni's names and derive from its `AttentionBackend` and `AttentionImpl`. A class asks for its
plug-in when it is first used, not when this module is imported. What a back end cannot do is its error.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

try:
    from vllm_omni.diffusion.attention.backends.abstract import AttentionBackend, AttentionImpl, AttentionMetadata
    from vllm_omni.diffusion.attention.backends.registry import (
        _DIFFUSION_ATTN_OVERRIDES,
        DiffusionAttentionBackendEnum,
        register_diffusion_backend,
    )
    from vllm_omni.platforms import current_omni_platform
    from vllm_omni.platforms.interface import UnspecifiedOmniPlatform
except ModuleNotFoundError as error:
    raise ImportError(f"ditattn.integrations.vllm_omni needs vLLM-Omni: {error}") from error

import torch

import ditattn
from ditattn.backend import class_for
from ditattn.integrations import vllm_omni_ring
from ditattn.metadata import Conversion
from ditattn.python_backend import adapted

_LOGGER = logging.getLogger("ditattn")

#: vLLM-Omni's members, and what the names of their classes begin with.
_CLASSES = {
    "FLASH_ATTN": "FlashAttention",
    "TORCH_SDPA": "SDPA",
    "SAGE_ATTN": "SageAttention",
    "SAGE_ATTN_3": "SageAttention3",
    "CUDNN_ATTN": "CuDNNAttention",
    "FLASHINFER_ATTN": "FlashInferAttention",
}
_AUTO = "AutoAttention"  # the choice of ditattn's own selector
_AUTO_PATH = f"{__name__}.{_AUTO}Backend"


def _device() -> str:
    """ditattn's name of the device that vLLM-Omni's platform computes on."""
    return "rocm" if current_omni_platform.is_rocm() else current_omni_platform.device_type


def _own_class(member: str | None) -> type[ditattn.AttentionBackend]:
    """ditattn's class, whatever it is written in; None: its selector's choice. ImportError where it cannot be had."""
    if member is None:
        return ditattn.get_attn_backend_for_role(device=_device())[0]
    found = ditattn.DiffusionAttentionBackendEnum[member].get_class()
    return class_for(adapted(found), lambda: found.__qualname__)


def _make_metadata(**fields: Any) -> ditattn.AttentionMetadata:
    """ditattn's metadata of vLLM-Omni's fields."""
    mask, extra = fields.get("attn_mask"), dict(fields.get("extra", {}))
    if mask is not None and mask.ndim == 2:
        fields["attn_mask"] = mask.to(torch.bool)  # not zero keeps, in any dtype
    if extra.get("kv_cache_dtype") == "float":
        del extra["kv_cache_dtype"]
    if "cu_seqlens_k" in extra:
        extra.pop("valid_kv_length", None)  # the padding is a document of its own then, and may not be cut off
    if "full_attn_spans" not in fields:
        fields.pop("query_ranges", None)  # its all-gather says where rows stand, whether somebody asks or not
    return ditattn.AttentionMetadata(**{**fields, "extra": extra})


# joint_* are for vLLM-Omni's parallel strategies: where there is one it has joined them to query, key, value and the
# mask before a back end is called, and left the fields as they were.
_converted = Conversion(_make_metadata, ("attn_mask", "extra", "full_attn_spans", "query_ranges"))


def _metadata(given: AttentionMetadata, query: torch.Tensor, key: torch.Tensor) -> ditattn.AttentionMetadata:
    metadata = _converted(given)
    first = key.shape[1] - query.shape[1]
    if first and metadata.full_attn_spans is not None and metadata.query_ranges is None:
        # Rows are the last ones in vLLM-Omni, the first ones in ditattn.
        return dataclasses.replace(metadata, query_ranges=[ditattn.QueryRange(0, query.shape[1], first)])
    return metadata


def _as_json(options: Mapping[str, Any]) -> str | None:
    """As PyTorch's operator takes them; None for what is no JSON."""
    try:
        return json.dumps(options) if options else ""
    except (TypeError, ValueError):
        return None


def _is_mask_at_most(given: AttentionMetadata | None) -> bool:
    return given is None or (not given.extra and given.full_attn_spans is None and given.query_ranges is None)


class _ClassAnswer:
    """A yes or no of a class: its attribute, or its method where vLLM-Omni's base class has a method of that name.

    Which one it is changes between vLLM-Omni's versions.
    """

    def __init__(self, answer: Callable[[type[ditattn.AttentionBackend]], bool]) -> None:
        self._answer = answer

    def __set_name__(self, owner: type, name: str) -> None:
        self._is_method = callable(getattr(AttentionBackend, name, None))

    def __get__(self, instance: Any, cls: type[_Backend]) -> Any:
        def ask() -> bool:
            return self._answer(_own_class(cls.member))

        return ask if self._is_method else ask()


class _Backend(AttentionBackend):
    """One of ditattn's back ends as vLLM-Omni's; nothing of it is asked before a method is called."""

    member: ClassVar[str | None]
    _impl_cls: ClassVar[type[_Impl]]

    accept_output_buffer = True
    supports_piecewise_spans = _ClassAnswer(lambda own: own.supports_piecewise_spans())
    # cu_seqlens are block-diagonal attention, whatever else hides keys, and valid_kv_length is taken by all.
    supports_packed_mask_free = _ClassAnswer(lambda own: own.capabilities()["packed"])
    supports_multi_doc_packed_varlen = _ClassAnswer(lambda own: own.capabilities()["packed"])
    supports_prefix_kv_slicing = _ClassAnswer(lambda own: True)

    @classmethod
    def get_name(cls) -> str:
        return _own_class(cls.member).get_name()

    @classmethod
    def get_impl_cls(cls) -> type[AttentionImpl]:
        return cls._impl_cls

    @staticmethod
    def get_metadata_cls() -> type[AttentionMetadata]:
        return AttentionMetadata

    @staticmethod
    def get_builder_cls() -> type:
        return ditattn.AttentionBackend.get_builder_cls()

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return _own_class(cls.member).get_supported_head_sizes()

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return _own_class(cls.member).supports_head_size(head_size)

    @classmethod
    def supports_attention_mask(cls, attention_spec: object | None = None) -> bool:
        return _own_class(cls.member).supports_attention_mask()

    @classmethod
    def validate_available(cls) -> None:
        """ImportError with the reason where ditattn has no such back end for vLLM-Omni's platform."""
        own = _own_class(cls.member)
        own.validate_available()
        devices = own.capabilities()["devices"]
        if _device() not in devices:
            raise ImportError(
                f"ditattn's {own.get_name()} computes on {', '.join(devices)} only as it was built, and vLLM-Omni's "
                f"platform is {_device()}. 'python -m ditattn doctor' tells what to do."
            )


class _Impl(AttentionImpl):
    """One attention layer; `forward` computes on the tensors' device, whatever vLLM-Omni's platform is."""

    member: ClassVar[str | None]

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float | None = None,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        qkv_layout: str | None = None,
        backend_kwargs: Mapping[str, Any] | None = None,
        role: str = "self",
        **extra_impl_args: Any,
    ) -> None:
        """`qkv_layout` is ignored: tensors are (batch, tokens, heads, head size) whatever it hints at.

        ValueError for what is out of range or not supported; ImportError where the back end cannot be had.
        """
        self.num_heads = num_heads
        self.head_size = head_size
        self.causal = causal
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.prefix = prefix
        self.qkv_layout = qkv_layout
        self.backend_kwargs = dict(backend_kwargs or {})
        self._options = _as_json(self.backend_kwargs)
        self.role = role
        self.softmax_scale = softmax_scale
        self._layers: dict[tuple[int, int], ditattn.AttentionImpl] = {}
        self.softmax_scale = self._layer(self.num_heads, self.num_kv_heads).softmax_scale

    def _layer(self, num_heads: int, num_kv_heads: int) -> ditattn.AttentionImpl:
        """For heads as the tensors have them: sequence parallelism gives each process a part of the layer's."""
        layer = self._layers.get((num_heads, num_kv_heads))
        if layer is None:
            layer = self._layers[num_heads, num_kv_heads] = _own_class(self.member).get_impl_cls()(
                num_heads,
                self.head_size,
                self.softmax_scale,
                self.causal,
                num_kv_heads,
                self.prefix,
                backend_kwargs=self.backend_kwargs,
                role=self.role,
            )
        return layer

    @classmethod
    def own_class(cls) -> type[ditattn.AttentionBackend]:
        """ditattn's class."""
        return _own_class(cls.member)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layers": {}}  # they hold C++ objects, and are made anew

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: AttentionMetadata | None = None,
    ) -> torch.Tensor:
        """Attention of (batch, tokens, heads, head size), forward only.

        torch.compile sees one operator where the metadata has nothing but a mask; with more its graph breaks here.
        """
        if torch.compiler.is_compiling() and _is_mask_at_most(attn_metadata) and self._options is not None:
            return self._operator(query, key, value, None if attn_metadata is None else attn_metadata.attn_mask)
        return self._forward(query, key, value, attn_metadata)

    def _operator(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        if mask is not None and mask.ndim == 2:
            mask = mask.to(torch.bool)  # as _make_metadata has it
        options = (self.member or "auto", self.softmax_scale, self.causal, self._options)
        return torch.ops.ditattn.attention.masked(query, key, value, mask, *options)

    @torch.compiler.disable
    def _forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_metadata: AttentionMetadata | None
    ) -> torch.Tensor:
        if query.ndim != 4 or key.ndim != 4:
            return self._layer(self.num_heads, self.num_kv_heads).forward(query, key, value)  # it says what is wrong
        metadata = None if attn_metadata is None else _metadata(attn_metadata, query, key)
        return self._layer(query.shape[2], key.shape[2]).forward(query, key, value, metadata)

    forward_cuda = forward  # HIP and MUSA go there too

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None, platform_key: str) -> bool:
        """Of the quantized ones, "fp8" where the back end has it."""
        if kv_cache_dtype == "fp8":
            return _own_class(cls.member).capabilities()["fp8_kv"]
        return kv_cache_dtype in (None, "auto", "float")


def _make_classes(member: str | None, name: str) -> None:
    fields = {"__module__": __name__, "member": member, "__doc__": f"ditattn's {member or 'own choice'}."}
    impl = type(f"{name}Impl", (_Impl,), fields)
    backend = type(f"{name}Backend", (_Backend,), {**fields, "_impl_cls": impl})
    globals().update({impl.__name__: impl, backend.__name__: backend})


for _member, _name in [*_CLASSES.items(), (None, _AUTO)]:
    _make_classes(_member, _name)


def install(*members: str) -> list[str]:
    """Registers ditattn's classes for members of vLLM-Omni's enumeration, and returns these members' names.

    Without names: for all that can be had here; the others stay vLLM-Omni's own. With names: for those, or ImportError
    with the reason and nothing is changed. ValueError for unknown names. A platform for which vLLM-Omni has no back
    ends ("unspecified", the CPU) can choose among the registered ones then; its default is the choice of ditattn's
    selector. In a ring, layers of ditattn's classes are computed by `ditattn.parallel`. Layers that were made before
    are not changed.
    """
    chosen = []
    for member in _known(members):
        try:
            globals()[f"{_CLASSES[member]}Backend"].validate_available()
        except ImportError as error:
            if members:
                raise
            _LOGGER.info("%s stays vLLM-Omni's own: %s", member, error)
        else:
            chosen.append(member)
    for member in chosen:
        path = f"{__name__}.{_CLASSES[member]}Backend"
        register_diffusion_backend(DiffusionAttentionBackendEnum[member], path)
    if "get_diffusion_attn_backend_cls" not in vars(UnspecifiedOmniPlatform):
        UnspecifiedOmniPlatform.get_diffusion_attn_backend_cls = classmethod(_backend_path)
    vllm_omni_ring.install(_Impl)
    _forget_resolutions()
    return chosen


def uninstall(*members: str) -> None:
    """Gives vLLM-Omni's own classes back: for these members, or for all. Other people's registrations stay."""
    for member in _known(members):
        entry = DiffusionAttentionBackendEnum[member]
        if _DIFFUSION_ATTN_OVERRIDES.get(entry, "").startswith(f"{__name__}."):  # get_path() is an error for some
            entry.clear_override()
    answer = vars(UnspecifiedOmniPlatform).get("get_diffusion_attn_backend_cls")
    if not members and getattr(answer, "__func__", None) is _backend_path:
        del UnspecifiedOmniPlatform.get_diffusion_attn_backend_cls
    if not members:
        vllm_omni_ring.uninstall()
    _forget_resolutions()


def _known(members: tuple[str, ...]) -> tuple[str, ...]:
    for member in members:
        if member not in _CLASSES:
            raise ValueError(f"ditattn has no class for {member!r} of vLLM-Omni. It has: {', '.join(_CLASSES)}.")
    return members or tuple(_CLASSES)


def _backend_path(
    cls: type[UnspecifiedOmniPlatform], selected_backend: str | None, head_size: int, allow_trtllm_default: bool = False
) -> str:
    """What platforms answer vLLM-Omni's selector: a class path. An explicit choice is checked, as elsewhere."""
    if selected_backend is None:
        return _AUTO_PATH
    cls.validate_diffusion_attn_backend(selected_backend)
    member = DiffusionAttentionBackendEnum[selected_backend.upper()]
    backend = member.get_class()
    if head_size > 0 and not backend.supports_head_size(head_size):
        raise ValueError(
            f"{member.name} was explicitly selected but head_size={head_size} is unsupported. "
            f"Supported head sizes: {backend.get_supported_head_sizes()}."
        )
    return member.get_path()


def _forget_resolutions() -> None:
    """vLLM-Omni's selector remembers classes by name, and asks its registry once for each."""
    from vllm_omni.diffusion.attention import selector

    selector._cached_get_backend_cls.cache_clear()
