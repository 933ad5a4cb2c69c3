"""Merges LoRAs into a transformer and restores the original weights exactly.

Every changed weight is recomputed from its original value, W = W0 + sum of scale * dW, in float32
and rounded once; on a GPU in one product (`adapters.fused_merge`). So scales and LoRAs can change
in any order without drift, the forward pass costs nothing more, and no storage moves. Quantized
layers get a side path instead (`adapters.slots`).
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor, nn

from adapters.formats import BIAS, Delta, Deltas, LoraMismatch, as_delta, shown
from adapters.fused_merge import Merge, fuses, merge_all
from adapters.original_weights import OriginalWeights
from adapters.slots import put_slots

FEW = 0.05  # share of a layer's entries
SAMPLED = 16  # layers

Parts = list[tuple[Delta | tuple[Tensor, Tensor], float]]  # (change, scale) of one layer


class LoraMerger:
    """Applies LoRAs to one transformer.

    `original` has the original weights, by layer, of layers that something else was merged into;
    they may be in CPU memory. `checkpoint` is the file or folder of the transformer: original
    weights are read from it if there is no memory for copies. Quantized layers get their slots
    here, so create it before compilation.
    """

    def __init__(
        self,
        transformer: nn.Module,
        original: Mapping[str, Tensor] | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        self._slots = put_slots(transformer)
        self._layers = dict(transformer.named_modules())
        self._original = OriginalWeights(original, checkpoint)
        # The changes applied to each layer that may differ from its original weight now.
        self._applied: dict[str, Parts] = {name: [] for name in original or {}}
        self._state: list[tuple[Deltas, float]] | None = None

    @torch.no_grad()
    def apply(self, loras: Sequence[tuple[Deltas, float]]) -> int:
        """Applies (deltas, scale) pairs to the original weights, in place of earlier ones.

        The deltas have the model's layer names and shapes (`Layout.fit`, or `factors.check_fits`
        for plain pairs) and must not be changed later: the same objects at the same scales are not
        merged again. Returns the number of changed layers. On an error, the original weights are
        restored before it is raised. Raises `LoraMismatch`, before any weight is changed, for
        anything but plain LoRA on a quantized layer.
        """
        loras = [(deltas, scale) for deltas, scale in loras if scale != 0]
        if self._state is not None and _same(self._state, loras):
            return len(self._applied)
        wanted: dict[str, Parts] = {}
        for deltas, scale in loras:
            if not math.isfinite(scale):
                raise ValueError(f"LoRA scale {scale} is not a finite number")
            for name, delta in deltas.items():
                wanted.setdefault(name, []).append((delta, scale))
        self._check_slots(wanted)
        self._state = None
        try:
            for name in self._applied.keys() - wanted.keys():
                self._restore(name)
            merges = []
            for name, parts in wanted.items():
                applied = self._applied.get(name)
                if applied is not None and _same(applied, parts):
                    continue
                if merge := self._in_one_product(name, parts):
                    self._applied[name] = parts
                    merges.append(merge)
                else:
                    self._apply(name, parts)
            merge_all(merges)
        except BaseException:
            self.restore()
            raise
        self._state = loras
        return len(wanted)

    @torch.no_grad()
    def lost(self, deltas: Deltas, scale: float) -> list[str]:
        """Layers in which rounding to the weights' dtype has undone nearly all of a change.

        Call it while only `deltas` is applied, at `scale`. Checks a few layers, and all of them if
        the change is lost in half of those.
        """
        merged = [name for name in deltas if name not in self._slots]
        some = merged[:: max(1, len(merged) // SAMPLED)]
        found = [name for name in some if self._is_lost(name, as_delta(deltas[name]), scale)]
        if len(found) * 2 < len(some) or not found:
            return []
        rest = [name for name in merged if name not in some]
        return found + [n for n in rest if self._is_lost(n, as_delta(deltas[n]), scale)]

    def _is_lost(self, name: str, delta: Delta, scale: float) -> bool:
        """Whether most entries that should have changed did not."""
        weight = self._weight(name)
        original = self._original.get(name, weight)
        moved = (weight != original).sum().item()
        if moved >= FEW * weight.numel():
            return False
        wanted = torch.zeros_like(weight, dtype=torch.float32)
        delta.add_to(wanted, original, scale)
        return moved < FEW * (wanted != 0).sum().item()

    @torch.no_grad()
    def restore(self) -> None:
        """Restores all original weights, bit-identical."""
        self._state = None
        for name in list(self._applied):
            self._restore(name)

    def _apply(self, name: str, parts: Parts) -> None:
        if name in self._slots:
            self._applied[name] = parts
            self._slots[name].fill([(pair, scale) for pair, scale in parts if _is_pair(pair)])
            return
        weight = self._weight(name)
        self._remember(name, weight)
        original = self._original.get(name, weight)
        self._applied[name] = parts
        in_place = weight.dtype == torch.float32
        merged = weight.copy_(original) if in_place else original.to(torch.float32, copy=True)
        for delta, scale in parts:
            as_delta(delta).add_to(merged, original, scale)
        if not in_place:
            weight.copy_(merged)

    def _in_one_product(self, name: str, parts: Parts) -> Merge | None:
        """A layer's merge for `fused_merge`, if it can be done there."""
        if name in self._slots:
            return None
        weight = self._weight(name)
        pairs = [(pair, scale) for pair, scale in parts if _is_pair(pair)]
        if not fuses(weight) or len(pairs) < len(parts):
            return None
        self._remember(name, weight)
        return Merge(weight, partial(self._original.copy_to, name, weight), pairs)

    def _remember(self, name: str, weight: Tensor) -> None:
        """Saves a layer's original weight before its first change."""
        key = name if name.endswith(BIAS) else f"{name}.weight"
        self._original.remember(name, key, weight)

    def _restore(self, name: str) -> None:
        if name in self._slots:
            self._slots[name].fill([])
        else:
            self._original.copy_to(name, self._weight(name))
        del self._applied[name]

    def _weight(self, name: str) -> Tensor:
        if name.endswith(BIAS):
            return self._layers[name.removesuffix(BIAS)].bias
        return self._layers[name].weight

    def _check_slots(self, wanted: Mapping[str, Parts]) -> None:
        other = [
            name
            for name in self._slots.keys() & wanted.keys()
            if not all(_is_pair(delta) for delta, _ in wanted[name])
        ]
        if other:
            raise LoraMismatch(
                f"{len(other)} layers are quantized and support only plain LoRA: "
                f"{shown(sorted(other))}; use the unquantized base model"
            )


def _is_pair(delta: object) -> TypeGuard[tuple[Tensor, Tensor]]:
    """Whether a change is plain LoRA."""
    return isinstance(delta, tuple)


def _same(ones: Sequence[tuple[object, float]], others: Sequence[tuple[object, float]]) -> bool:
    return len(ones) == len(others) and all(
        one[0] is other[0] and one[1] == other[1] for one, other in zip(ones, others, strict=True)
    )
