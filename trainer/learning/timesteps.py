"""Which noise levels a training draws, and how often."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.settings import SCHEDULED

if TYPE_CHECKING:
    from families.family import Family

# Densities of sigma before it is shifted. Two trainers' words stand for one density.
DENSITIES: dict[str, Callable[[torch.Generator], Tensor]] = {
    "uniform": lambda random: torch.rand((), generator=random),
    "sigmoid": lambda random: torch.randn((), generator=random).sigmoid(),  # ai-toolkit, musubi
    "logit_normal": lambda random: torch.randn((), generator=random).sigmoid(),  # arXiv 2403.03206
}


class NoiseLevels:
    """Draws sigma: from a density shifted towards noise, or from the base's inference schedule.

    The shift is sigma' = shift sigma / (1 + (shift - 1) sigma) (Esser et al. 2024, arXiv
    2403.03206, eq. 23). The schedule is the family's own at its finest (1000 levels), for the
    picture's size where the base's shift depends on it.
    """

    def __init__(self, family: "Family", sampling: str, shift: float) -> None:
        self._family, self._sampling, self._shift = family, sampling, shift
        self._scheduled = cache(self._levels)

    def draw(self, shape_CHW: Sequence[int], random: torch.Generator) -> float:
        """One noise level for latents of this shape."""
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
