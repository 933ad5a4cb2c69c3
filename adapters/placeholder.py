"""The placeholder: a new word with an embedding of its own and no prior.

The word never enters the tokenizer or the embedding matrix. Its rows are one float32 parameter
that takes the place of the word's positions in `inputs_embeds` (`families.family`), so only they
can change, and there is nothing to undo.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Placeholder:
    """A new word and its embedding rows [vectors, hidden], float32."""

    token: str
    vectors: Tensor

    @classmethod
    def create(
        cls, token: str, width: int, std: float, seed: int, device: torch.device | None = None
    ) -> "Placeholder":
        """One trainable row, normal with `std` (0 gives exact zeros), drawn from `seed` alone."""
        start = torch.randn(1, width, generator=torch.Generator().manual_seed(seed)) * std
        return cls(token, nn.Parameter(start.to(device)))

    def norm(self) -> float:
        """Largest Euclidean norm among the rows."""
        return self.vectors.detach().norm(dim=1).max().item()

    def detached(self) -> "Placeholder":
        """A copy on the CPU that no training reaches."""
        return Placeholder(self.token, self.vectors.detach().float().cpu().clone())
