"""The placeholder token: a new token whose embedding starts near zero.

The token is never added to the tokenizer or the embedding matrix. Its vectors are one float32
parameter that replaces the token's positions in `inputs_embeds` (`families.family`), so the text
encoder is never changed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Placeholder:
    """A new token and its embedding vectors [vectors, hidden], float32."""

    token: str
    vectors: Tensor

    @classmethod
    def create(
        cls, token: str, width: int, std: float, seed: int, device: torch.device | None = None
    ) -> "Placeholder":
        """One trainable vector, normally distributed with `std` (0: exact zeros), by `seed`."""
        start = torch.randn(1, width, generator=torch.Generator().manual_seed(seed)) * std
        return cls(token, nn.Parameter(start.to(device)))

    def norm(self) -> float:
        """Largest Euclidean norm of the vectors. Waits for the device."""
        return self.norm_on_device().item()

    def norm_on_device(self) -> Tensor:
        """The same as a tensor."""
        return self.vectors.detach().norm(dim=1).max()

    def detached(self) -> "Placeholder":
        """A detached float32 copy on the CPU."""
        return Placeholder(self.token, self.vectors.detach().float().cpu().clone())
