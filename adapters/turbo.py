"""The training adapter: a LoRA that removes the distillation.

Training a distilled model destroys the distillation. So this adapter, which removes it, is merged
into the model during training, and the new LoRA does not learn the removal. Images are generated
with the original weights, without the adapter.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

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

    @torch.no_grad()
    def merge(self, transformer: nn.Module, base_name: str, weight: float = 1.0) -> float:
        """Adds weight * B @ A to every layer of the adapter, in float32, rounded once.

        A weight of -1 removes the adapter from a transformer that was saved with it. Returns the
        norm of the change relative to the norm of the changed weights. Keeps no copy of the
        original weights. Raises `LoraMismatch` if a layer does not exist, before any is changed,
        and `MergeFailed` if one did not change.
        """
        check_fits(self.factors, transformer, self.name, base_name)
        layers = dict(transformer.named_modules())
        changed, whole, still = 0.0, 0.0, []
        for name, (down, up) in self.factors.items():
            target = layers[name].weight
            before = target.to(torch.float32, copy=True)
            target.copy_(torch.addmm(before, up.to(before), down.to(before), alpha=weight))
            moved = (target.float() - before).norm().item()
            changed, whole = changed + moved**2, whole + before.norm().item() ** 2
            if not moved > 0:
                still.append(name)
        if still:
            raise MergeFailed(
                f"{self.name}: merging did not change {len(still)} of {len(self.factors)} "
                f"layers ({', '.join(still[:3])})"
            )
        return (changed / whole) ** 0.5
