"""The training adapter: a LoRA that removes the distillation.

Training a distilled model destroys the distillation. So this adapter, which removes it, is merged
into the model during training, and the new LoRA does not learn the removal. Images are generated
with the original weights, without the adapter.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from adapters.files.atomic import content_hash
from adapters.formats import Factors, check_fits, parse_lora, read_tensors


class MergeFailed(RuntimeError):
    """A merge that left weights unchanged."""


@dataclass(frozen=True)
class TurboAdapter:
    """A training adapter, loaded from its file and checked."""

    name: str  # of the file
    sha256: str
    factors: Factors

    @classmethod
    def read(cls, path: Path) -> "TurboAdapter":
        """Reads the file, rank and alpha included. Raises `BrokenLora` with the reason."""
        tensors, metadata = read_tensors(path, path.name)
        return cls(path.name, content_hash(path), parse_lora(tensors, metadata, path.name))

    def merge(self, transformer: nn.Module, base_name: str, weight: float = 1.0) -> float:
        """Adds weight * B @ A to every layer of the adapter, in float32, rounded once.

        A weight of -1 removes the adapter from a transformer that was saved with it. Returns the
        norm of the change relative to the norm of the changed weights. Keeps no copy of the
        original weights. Raises `LoraMismatch` if a layer does not exist, before any is changed,
        and `MergeFailed` if one did not change.
        """
        merging = self.merging(transformer, base_name, weight)
        layers = dict(transformer.named_modules())
        with torch.no_grad():
            for name in self.factors:
                target = layers[name].weight
                target.copy_(merging(f"{name}.weight", target))
        return merging.share()

    def merging(self, transformer: nn.Module, base_name: str, weight: float = 1.0) -> "Merging":
        """The same for one weight at a time; the transformer may be on the meta device.

        Raises `LoraMismatch` if a layer does not exist.
        """
        check_fits(self.factors, transformer, self.name, base_name)
        return Merging(self, weight)


class Merging:
    """A merge that gets the weights one at a time, and counts how much they change."""

    def __init__(self, adapter: TurboAdapter, weight: float) -> None:
        self._adapter, self._weight = adapter, weight
        self._changed, self._whole = 0.0, 0.0  # squared norms
        self._left = dict.fromkeys(adapter.factors)  # layers that have not changed yet

    @torch.no_grad()
    def __call__(self, name: str, weight: Tensor) -> Tensor:
        """The merged weight by the parameter's name; a parameter without a change as it is."""
        layer = name.removesuffix(".weight")
        pair = None if layer == name else self._adapter.factors.get(layer)
        if pair is None:
            return weight
        before = weight.to(torch.float32, copy=True)
        down, up = (each.to(before) for each in pair)
        merged = torch.addmm(before, up, down, alpha=self._weight).to(weight.dtype)
        moved = (merged.float() - before).norm().item()
        self._changed += moved**2
        self._whole += before.norm().item() ** 2
        if moved > 0:
            self._left.pop(layer, None)
        return merged

    def share(self) -> float:
        """The norm of the change relative to that of the changed weights.

        Raises `MergeFailed` if a layer of the adapter did not change.
        """
        if self._left:
            raise MergeFailed(
                f"{self._adapter.name}: merging did not change {len(self._left)} of "
                f"{len(self._adapter.factors)} layers ({', '.join([*self._left][:3])})"
            )
        return (self._changed / self._whole) ** 0.5
