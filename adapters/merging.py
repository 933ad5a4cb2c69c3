"""LoRAs laid over a transformer by merging, and taken off without a trace.

Every touched weight is recomputed from its pristine value, W = W0 + sum of scale * dW, in float32
and rounded once; so scales and LoRAs can change in any order without drift, nothing is added to
the forward pass, and no storage moves. Over quantised layers a side path does the same
(`adapters.slots`).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor, nn

from adapters.formats import BIAS, Delta, Deltas, LoraMismatch, as_delta, shown
from adapters.original_weights import OriginalWeights
from adapters.slots import put_slots

FEW = 0.05  # share of a layer's entries
SAMPLED = 16  # layers

Parts = list[tuple[Delta | tuple[Tensor, Tensor], float]]  # what lies over one layer


class LoraMerger:
    """The LoRAs that lie over one transformer.

    Weights that are not pristine any more, because something else was merged into them, are given
    as they were in `pristine`, by layer; they may lie in host memory. `checkpoint` is the file or
    folder the transformer was loaded from: where no memory is left for copies, pristine weights
    are read from it again. Quantised layers get their slots here, so before any compilation.
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
        # What lies over each layer that may differ from its pristine weight now.
        self._laid: dict[str, Parts] = {name: [] for name in original or {}}
        self._state: list[tuple[Deltas, float]] | None = None

    @torch.no_grad()
    def apply(self, loras: Sequence[tuple[Deltas, float]]) -> int:
        """Lays (deltas, scale) pairs over the pristine weights, in place of what lay there.

        The deltas bear the model's names and fit it (`Layout.fit`, or `factors.check_fits` for
        plain pairs), and are not changed afterwards: the same objects at the same scales as last
        time cost nothing. Returns the number of changed layers. If anything fails on the way, the
        pristine weights are back before the error goes on. Raises `LoraMismatch`, before any
        weight is touched, where anything but plain LoRA is meant for a quantised layer.
        """
        loras = [(deltas, scale) for deltas, scale in loras if scale != 0]
        if self._state is not None and _same(self._state, loras):
            return len(self._laid)
        wanted: dict[str, Parts] = {}
        for deltas, scale in loras:
            if not math.isfinite(scale):
                raise ValueError(f"a LoRA's scale of {scale} is not a number to multiply by")
            for name, delta in deltas.items():
                wanted.setdefault(name, []).append((delta, scale))
        self._check_slots(wanted)
        self._state = None
        try:
            for name in self._laid.keys() - wanted.keys():
                self._restore(name)
            for name, parts in wanted.items():
                applied = self._laid.get(name)
                if applied is None or not _same(applied, parts):
                    self._lay(name, parts)
        except BaseException:
            self.restore()
            raise
        self._state = loras
        return len(wanted)

    @torch.no_grad()
    def lost(self, deltas: Deltas, scale: float) -> list[str]:
        """Layers in which the rounding of the weights' type has undone nearly all of a change.

        To be asked while `deltas` is applied alone, at `scale`. Looks at a few layers, and at all
        of them if half of those are lost.
        """
        merged = [name for name in deltas if name not in self._slots]
        some = merged[:: max(1, len(merged) // SAMPLED)]
        found = [name for name in some if self._is_lost(name, as_delta(deltas[name]), scale)]
        if len(found) * 2 < len(some) or not found:
            return []
        rest = [name for name in merged if name not in some]
        return found + [n for n in rest if self._is_lost(n, as_delta(deltas[n]), scale)]

    def _is_lost(self, name: str, delta: Delta, scale: float) -> bool:
        """Whether most entries that the change would move are where they were."""
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
        """Brings back every pristine weight, bit for bit."""
        self._state = None
        for name in list(self._laid):
            self._restore(name)

    def _lay(self, name: str, parts: Parts) -> None:
        if name in self._slots:
            self._laid[name] = parts
            self._slots[name].fill([(pair, scale) for pair, scale in parts if _is_pair(pair)])
            return
        weight = self._weight(name)
        if name not in self._original:
            key = name if name.endswith(BIAS) else f"{name}.weight"
            self._original.remember(name, key, weight)
        original = self._original.get(name, weight)
        self._laid[name] = parts
        in_place = weight.dtype == torch.float32
        merged = weight.copy_(original) if in_place else original.to(torch.float32, copy=True)
        for delta, scale in parts:
            as_delta(delta).add_to(merged, original, scale)
        if not in_place:
            weight.copy_(merged)

    def _restore(self, name: str) -> None:
        if name in self._slots:
            self._slots[name].fill([])
        else:
            weight = self._weight(name)
            weight.copy_(self._original.get(name, weight))
        del self._laid[name]

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
                f"{len(other)} layers are quantised, and only plain LoRA can lie beside them: "
                f"{shown(sorted(other))}; draw with the unquantised base"
            )


def _is_pair(delta: object) -> TypeGuard[tuple[Tensor, Tensor]]:
    """Whether it is plain LoRA."""
    return isinstance(delta, tuple)


def _same(ones: Sequence[tuple[object, float]], others: Sequence[tuple[object, float]]) -> bool:
    return len(ones) == len(others) and all(
        one[0] is other[0] and one[1] == other[1] for one, other in zip(ones, others, strict=True)
    )
