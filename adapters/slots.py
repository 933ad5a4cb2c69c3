"""LoRA on a quantized layer: an unquantized side path of a fixed shape.

LoRAs are not merged into quantized weights: rounding W + dW to 8 bits loses most of a small dW. The
factors of all LoRAs are concatenated in two buffers of a fixed size, so a swap only copies values:
no new storage, no recompilation.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapters.formats import is_linear

log = logging.getLogger(__name__)

RANK = 64  # of an empty slot; doubled if LoRAs need more


def is_plain(weight: Any) -> bool:
    """Whether a weight can be merged into: an ordinary tensor of at least 16-bit floats."""
    return (
        type(weight) in (Tensor, nn.Parameter)
        and weight.is_floating_point()
        and weight.element_size() >= 2
    )


class SlotLinear(nn.Module):
    """A linear layer with a slot: y = base(x) + x A^T B^T. Empty: bit-identical to the base."""

    down: Tensor  # A [rank, in]
    up: Tensor  # B [out, rank]; zeros beyond the LoRAs' ranks

    def __init__(self, base: Any, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = base
        self.in_features: int = base.in_features
        self.out_features: int = base.out_features
        down, up = self._empty(RANK, device, dtype)
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)

    @property
    def weight(self) -> Any:
        """The base's weight; models read its dtype."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        flat = torch.addmm(result.flatten(0, -2), x.flatten(0, -2) @ down.T, up.T)
        return flat.view_as(result)

    @torch.no_grad()
    def fill(self, loras: Sequence[tuple[tuple[Tensor, Tensor], float]]) -> None:
        """Copies ((A, B), scale) pairs into the slot, in place of earlier ones."""
        rank = sum(len(down) for (down, _), _ in loras)
        if rank > len(self.down):
            larger = len(self.down)
            while larger < rank:
                larger *= 2
            log.warning("LoRAs of rank %d need larger slots; compiled blocks are recompiled", rank)
            self.down, self.up = self._empty(larger, self.down.device, self.down.dtype)
        self.up.zero_()
        start = 0
        for (down, up), scale in loras:
            stop = start + len(down)
            self.down[start:stop].copy_(down)
            self.up[:, start:stop].copy_(up * scale)
            start = stop

    def _empty(self, rank: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False):  # inference tensors could only be filled in that mode
            return (
                torch.zeros(rank, self.in_features, device=device, dtype=dtype),
                torch.zeros(self.out_features, rank, device=device, dtype=dtype),
            )


def put_slots(transformer: nn.Module) -> dict[str, SlotLinear]:
    """Wraps every quantized linear layer in a slot, unless it has one; returns all by name."""
    slots = {n: each for n, each in transformer.named_modules() if isinstance(each, SlotLinear)}
    quantized = {
        name: module
        for name, module in transformer.named_modules()
        if is_linear(module)
        and not is_plain(module.weight)
        and not isinstance(module, SlotLinear)
        and name.removesuffix(".base") not in slots
    }
    if quantized:
        plain = next((p for p in transformer.parameters() if is_plain(p)), None)
        dtype = torch.bfloat16 if plain is None else plain.dtype
        for name, module in quantized.items():
            # An offloaded layer has the attribute `device`, where it computes.
            device = getattr(module, "device", module.weight.device)
            slots[name] = SlotLinear(module, device, dtype)
            parent, _, child = name.rpartition(".")
            setattr(transformer.get_submodule(parent), child, slots[name])
    return slots
