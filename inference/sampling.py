"""The whole story of sampling: Euler steps along the velocity from noise to picture."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from families.family import Family
from inference.progress import Progress

# The share of the steps that `go_fast` guides: what guidance decides is decided early (Castillo et
# al. 2023, arXiv 2312.12487, who stop half way; Z-Image's own pipeline calls it `cfg_truncation`).
FAST_GUIDED_SHARE = 0.5


def sample(
    family: Family,
    noise_BCHW: Tensor,
    sigmas: Tensor,
    text: Sequence[Tensor],
    negative_text: Sequence[Tensor] | None = None,
    guidance_scale: float = 1.0,
    guided_share: float = 1.0,
) -> Tensor:
    """Latents BCHW float32 of pictures, from `noise_BCHW` at sigmas[0] down to sigmas[-1].

    `text` and `negative_text` hold one text_LD per picture; the latter is read only where
    `guidance_scale` is above 1 and in the first `guided_share` of the steps, at the price of a
    second pass through the transformer.
    """
    latents_BCHW = noise_BCHW
    sigmas = sigmas.to(noise_BCHW)
    guided_steps = math.ceil((len(sigmas) - 1) * guided_share)
    for step in Progress(range(len(sigmas) - 1), desc="generating", unit="step"):
        # Velocity of the picture, and away from the negative prompt.
        sigma_B = sigmas[step].expand(len(latents_BCHW))
        velocity_BCHW = family.velocity(latents_BCHW, sigma_B, text)
        if guidance_scale > 1 and negative_text is not None and step < guided_steps:
            away_BCHW = family.velocity(latents_BCHW, sigma_B, negative_text)
            velocity_BCHW = family.guide(velocity_BCHW, away_BCHW, guidance_scale)
        # Euler step.
        latents_BCHW = latents_BCHW + (sigmas[step + 1] - sigmas[step]) * velocity_BCHW
    return latents_BCHW


def add_noise(clean_BCHW: Tensor, noise_BCHW: Tensor, sigma: Tensor) -> Tensor:
    """x_sigma = (1 - sigma) x0 + sigma noise; at sigma 1 nothing is left of the picture."""
    return torch.lerp(clean_BCHW, noise_BCHW, sigma.to(noise_BCHW))
