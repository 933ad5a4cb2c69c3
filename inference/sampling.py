"""The sampler: Euler steps along the velocity from noise to image."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from families.family import Family
from inference.progress import Progress

# The share of guided steps with `go_fast`: guidance matters most in early steps (Castillo et al.
# 2023, arXiv 2312.12487, who stop at half; `cfg_truncation` in Z-Image's pipeline).
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
    """Samples latents BCHW float32, from `noise_BCHW` at sigmas[0] down to sigmas[-1].

    `text` and `negative_text` are one text_LD per image. The latter is used only if
    `guidance_scale` is above 1, in the first `guided_share` of the steps: two passes per step.
    """
    latents_BCHW = noise_BCHW
    sigmas = sigmas.to(noise_BCHW)
    guided_steps = math.ceil((len(sigmas) - 1) * guided_share)
    for step in Progress(range(len(sigmas) - 1), desc="generating", unit="step"):
        # Velocity with guidance.
        sigma_B = sigmas[step].expand(len(latents_BCHW))
        velocity_BCHW = family.velocity(latents_BCHW, sigma_B, text)
        if guidance_scale > 1 and negative_text is not None and step < guided_steps:
            away_BCHW = family.velocity(latents_BCHW, sigma_B, negative_text)
            velocity_BCHW = family.guide(velocity_BCHW, away_BCHW, guidance_scale)
        # Euler step.
        latents_BCHW = latents_BCHW + (sigmas[step + 1] - sigmas[step]) * velocity_BCHW
    return latents_BCHW


def add_noise(clean_BCHW: Tensor, noise_BCHW: Tensor, sigma: Tensor) -> Tensor:
    """x_sigma = (1 - sigma) x0 + sigma noise; at sigma 1, only noise."""
    return torch.lerp(clean_BCHW, noise_BCHW, sigma.to(noise_BCHW))
