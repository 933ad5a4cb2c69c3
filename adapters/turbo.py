"""The turbo adapter: a LoRA that has already taken the distillation away.

Training on a model that was distilled to few steps undoes the distillation. On top of this
adapter it is undone already, so a new LoRA need not learn that; and pictures are drawn on the
pristine base, which is the merged base minus the adapter without its rounding.
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
    """A training adapter's file, read and checked."""

    name: str  # of the file
    sha256: str
    factors: Factors

    @classmethod
    def read(cls, path: Path) -> "TurboAdapter":
        """Reads rank and alpha from the file itself; raises `BrokenLora` with the reason."""
        tensors, metadata = read_tensors(path, path.name)
        return cls(path.name, content_hash(path), parse_lora(tensors, metadata, path.name))

    @torch.no_grad()
    def merge(self, transformer: nn.Module, base_name: str, weight: float = 1.0) -> float:
        """Adds weight * B @ A to every layer the adapter names, in float32, rounded once.

        A weight of -1 takes the adapter out of a transformer that was saved merged. Returns the
        norm of what changed over the norm of the touched weights. Nothing is kept to undo it: it
        costs no second copy of the transformer. Raises `LoraMismatch` where a layer does not
        exist, before any is touched, and `MergeFailed` where one did not change.
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
                f"{self.name}: merging changed nothing in {len(still)} of {len(self.factors)} "
                f"layers ({', '.join(still[:3])})"
            )
        return (changed / whole) ** 0.5
