"""Timestep sampling: the distribution of sigmas in training."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.settings import SCHEDULED

if TYPE_CHECKING:
    from families.family import Family

# Distributions of sigma before the shift. Two names of trainers have the same distribution.
DENSITIES: dict[str, Callable[[torch.Generator], Tensor]] = {
    "uniform": lambda random: torch.rand((), generator=random),
    "sigmoid": lambda random: torch.randn((), generator=random).sigmoid(),  # ai-toolkit, musubi
    "logit_normal": lambda random: torch.randn((), generator=random).sigmoid(),  # arXiv 2403.03206
}


class NoiseLevels:
    """Samples sigma from a shifted distribution, or from the base's inference schedule.

    The shift is sigma' = shift sigma / (1 + (shift - 1) sigma) (Esser et al. 2024, arXiv
    2403.03206, eq. 23). The schedule is the family's with 1000 steps, for the image's size if the
    base's shift depends on it.
    """

    def __init__(self, family: "Family", sampling: str, shift: float) -> None:
        self._family, self._sampling, self._shift = family, sampling, shift
        self._scheduled = cache(self._levels)

    def draw(self, shape_CHW: Sequence[int], random: torch.Generator) -> float:
        """One sigma for latents of this shape."""
        if self._sampling == SCHEDULED:
            levels = self._scheduled(*shape_CHW[-2:])
            return levels[int(torch.randint(len(levels), (), generator=random))]
        sigma = DENSITIES[self._sampling](random).item()
        return self._shift * sigma / (1 + (self._shift - 1) * sigma)

    def _levels(self, rows: int, columns: int) -> list[float]:
        family = self._family
        count = family.scheduler.config.num_train_timesteps
        factor = family.vae_factor
        return family.sigmas(count, columns * factor, rows * factor)[:-1].tolist()
