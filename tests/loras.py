"""LoRAs of random numbers."""

from collections.abc import Sequence

import torch
from torch import nn

from adapters.formats.factors import Factors


def random_lora(
    transformer: nn.Module, targets: Sequence[str], rank: int, seed: int, size: float = 0.05
) -> Factors:
    """Factors over these layers, all of one rank; `size` is the deviation of the second's."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for target in targets:
        rows, columns = transformer.get_submodule(target).weight.shape
        down = torch.randn(rank, columns, generator=generator) / columns**0.5
        factors[target] = (down, torch.randn(rows, rank, generator=generator) * size)
    return factors
