"""Flow matching: initial noise and the sigma schedule of inference, for every family.

x_sigma = (1 - sigma) x0 + sigma noise; sigma is 1 for noise and 0 for an image.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def noise(shape: Sequence[int], seeds: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Noise at sigma 1, one tensor of `shape` per seed, stacked.

    Sampled on the CPU, so that a seed gives the same noise on every device.
    """
    samples = [
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        for seed in seeds
    ]
    return torch.stack(samples)


def shifted_sigmas(steps: int, shift: float) -> Tensor:
    """steps + 1 sigmas from 1 to 0, shifted: s -> shift s / (1 + (shift - 1) s).

    Esser et al. 2024, arXiv 2403.03206, equation 23; without a terminal shift.
    """
    even = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64)
    shifted = shift * even / (1 - even + shift * even)  # finite for any shift above 0
    return torch.cat([shifted, torch.zeros(1)]).float()


def resampled_sigmas(fixed: Sequence[float], steps: int) -> Tensor:
    """steps + 1 sigmas from a model's fixed schedule to 0, exactly that one for its own steps.

    For others it is interpolated linearly by the share of the steps.
    """
    known = torch.tensor([*fixed, 0.0], dtype=torch.float64)
    places = torch.arange(steps + 1, dtype=torch.float64) * len(fixed) / steps
    before = places.floor().long().clamp(max=len(fixed) - 1)
    return torch.lerp(known[before], known[before + 1], places - before).float()


def scheduled_sigmas(scheduler: Any, steps: int, tokens: int) -> Tensor:
    """steps + 1 sigmas from 1 to 0: the pipelines' schedule, by a base's scheduler.

    `tokens` is the number of image tokens, which dynamic shifting depends on.
    """
    if steps == 1:
        return torch.tensor([1.0, 0.0])  # a terminal shift would divide by zero
    config = scheduler.config
    base_tokens = config.get("base_image_seq_len", 256)
    max_tokens = config.get("max_image_seq_len", 4096)
    base_shift, max_shift = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    mu = base_shift + slope * (tokens - base_tokens)
    grid = torch.linspace(1.0, 1 / steps, steps).tolist()
    scheduler.set_timesteps(sigmas=grid, mu=mu)
    return scheduler.sigmas
