"""Counts bytes of live tensors and FLOPs of the operations within a context."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Meter(TorchDispatchMode):
    """Counts the bytes of live tensors and the FLOPs of matrix products within its context.

    `live` and `peak` exclude tensors that existed before (`known`). Allocations within kernels are
    not counted.
    """

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self.early: int | None = None  # the peak before the mark
        self.in_blocks = 0  # what forward passes of blocks that can be compiled left
        # `live` and `in_blocks` before each block of the trunk, and after the last one
        self.passed: list[tuple[int, int]] = []
        self._storages: dict[int, Any] = {_storage(tensor)._cdata: None for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result, flops = _called(func, args, kwargs or {})
        self.flops += flops
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._count(_storage(tensor))
        return result

    def mark(self) -> None:
        """Starts a second peak, at the first call."""
        if self.early is None:
            self.early, self.peak = self.peak, self.live

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._storages:
            self._storages[key] = weakref.finalize(storage, self._release, key, size)
            self.live += size
            self.peak = max(self.peak, self.live)

    def _release(self, key: int, size: int) -> None:
        self.live -= size
        del self._storages[key]


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()


# The shapes of new results, and the FLOPs, of operations on tensors without values. Blocks repeat
# the same ones, and PyTorch's own way to these shapes takes a hundred times as long.
_KNOWN: dict[Any, tuple[Any, int]] = {}
_MOST_KNOWN = 50_000


def _called(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, int]:
    """The result of an operation, and its FLOPs."""
    key = _key((func, args, kwargs)) if _is_new(func) else None
    if key is not None and key in _KNOWN:
        made, flops = _KNOWN[key]
        return tree_map(lambda each: each(), made), flops
    result = func(*args, **kwargs)
    flops = _flops(func._overloadpacket, args, kwargs, result)
    tensors = [each for each in tree_iter(result) if isinstance(each, Tensor)]
    if key is not None and all(each.is_meta for each in tensors):
        if len(_KNOWN) >= _MOST_KNOWN:
            _KNOWN.clear()
        _KNOWN[key] = tree_map(_maker, result), flops
    return result, flops


@cache
def _is_new(func: Any) -> bool:
    """Whether an operation changes no tensor, and its results are new tensors."""
    return not func._schema.is_mutable and all(
        each.alias_info is None and isinstance(each.type, torch.TensorType)
        for each in func._schema.returns
    )


def _key(value: Any) -> Any:
    """What the shape of a result depends on."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device, value.is_conj()
    if isinstance(value, dict):
        return tuple((name, _key(each)) for name, each in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    return type(value), value


def _maker(value: Any) -> Callable[[], Any]:
    """Makes a tensor like this one again; None where a gradient is not needed."""
    if not isinstance(value, Tensor):
        return lambda: value
    shape, strides, dtype = value.shape, value.stride(), value.dtype
    return lambda: torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def _flops(operation: Any, args: Any, kwargs: dict[str, Any], result: Any) -> int:
    """FLOPs of one operation (a multiply-add is two); 0 unless it is a matrix product."""
    if operation is _ATTENTION:
        return sdpa_flop_count(*(each.shape for each in args[:3]))
    if operation is _ATTENTION_BACKWARD:
        return sdpa_backward_flop_count(*(each.shape for each in args[:4]))
    count = flop_registry.get(operation)
    return int(count(*args, **kwargs, out_val=result)) if count is not None else 0


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention that saves q, k, v, its result and one number per row, as GPU kernels do."""
    return _ATTENTION(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


@contextmanager
def fused_attention() -> Iterator[None]:
    """Uses fused attention within the context; the meta device would use the unfused one."""
    plain = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _fused  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain
