"""LoRAs laid over a transformer by merging, and taken off without a trace.

Every touched weight is recomputed from a pristine copy, W = W0 + sum of scale * B @ A, in float32
and rounded once; so scales and LoRAs can change in any order without drift, nothing is added to
the forward pass, and no storage moves.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adapters.factors import Factors


class Overlay:
    """The LoRAs that lie over one transformer."""

    def __init__(self, transformer: nn.Module) -> None:
        self._layers = dict(transformer.named_modules())
        self._pristine: dict[str, Tensor] = {}  # every weight that was ever touched
        self._merged: set[str] = set()  # the layers that differ from their pristine weight now

    @torch.no_grad()
    def apply(self, loras: Sequence[tuple[Factors, float]]) -> int:
        """Lays (factors, scale) pairs over the pristine weights, in place of what lay there.

        Returns the number of merged layers. The factors must fit (`factors.check_fits`). If
        anything fails on the way, the pristine weights are back before the error goes on.
        """
        wanted: dict[str, list[tuple[Tensor, Tensor, float]]] = {}
        for factors, scale in loras:
            if scale != 0:
                for name, (down, up) in factors.items():
                    wanted.setdefault(name, []).append((down, up, scale))
        try:
            for name in self._merged - set(wanted):
                self._restore(name)
            for name, parts in wanted.items():
                weight = self._layers[name].weight
                if name not in self._pristine:
                    self._pristine[name] = self._copy(weight)
                merged = self._pristine[name].to(weight.device, torch.float32, copy=True)
                for down, up, scale in parts:
                    merged.addmm_(up.to(merged), down.to(merged), alpha=scale)
                self._merged.add(name)
                weight.copy_(merged)
        except BaseException:
            self.restore()
            raise
        return len(wanted)

    @torch.no_grad()
    def restore(self) -> None:
        """Brings back every pristine weight, bit for bit."""
        for name in list(self._merged):
            self._restore(name)

    def _restore(self, name: str) -> None:
        self._layers[name].weight.copy_(self._pristine[name])
        self._merged.discard(name)

    @staticmethod
    def _copy(weight: Tensor) -> Tensor:
        """A copy beside the weight, or in host memory where the GPU is too full for it."""
        if weight.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(weight.device)
            if free < total // 5:  # leave room for the activations of a picture
                return weight.detach().to("cpu", copy=True)
        return weight.detach().clone()
