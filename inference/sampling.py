"""The sampler: Euler steps along the velocity from noise to image."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from families.family import Family
from families.references import References
from inference.progress import Progress

# The share of guided steps with `go_fast`: guidance matters most in early steps (Castillo et al.
# 2023, arXiv 2312.12487, who stop at half; `cfg_truncation` in Z-Image's pipeline).
FAST_GUIDED_SHARE = 0.5


@dataclass(frozen=True)
class Kept:
    """The part of an image that is not generated (inpainting)."""

    clean_BCHW: Tensor  # the image's latents
    noise_BCHW: Tensor
    mask_11HW: Tensor  # 1 where latents are generated, 0 where they are kept

    def put(self, latents_BCHW: Tensor, sigma: Tensor) -> Tensor:
        """The latents with the kept ones in place, at this sigma."""
        kept_BCHW = add_noise(self.clean_BCHW, self.noise_BCHW, sigma)
        return torch.where(self.mask_11HW > 0, latents_BCHW, kept_BCHW)


def sample(
    family: Family,
    noise_BCHW: Tensor,
    sigmas: Tensor,
    text: Sequence[Tensor],
    negative_text: Sequence[Tensor] | None = None,
    guidance_scale: float = 1.0,
    guided_share: float = 1.0,
    kept: Kept | None = None,
    references: References | None = None,
    watch: Callable[[int, int, Tensor], None] | None = None,
) -> Tensor:
    """Samples latents BCHW float32, from `noise_BCHW` at sigmas[0] down to sigmas[-1].

    `text` and `negative_text` are one text_LD per image. The latter is used only if
    `guidance_scale` is above 1, in the first `guided_share` of the steps: two passes per step.
    `kept` is put back after each step, with the noise of the next sigma; after the last, without.
    `references` are an editing model's. `watch` gets the number of steps that are done and of all
    steps, and the clean latents that the last velocity predicts; an exception in it ends the
    sampling.
    """
    velocity = family.velocity
    if references is not None:
        velocity = partial(family.edit_velocity, references=references)
    latents_BCHW = noise_BCHW
    sigmas = sigmas.to(noise_BCHW)
    guided_steps = math.ceil((len(sigmas) - 1) * guided_share)
    for step in Progress(range(len(sigmas) - 1), desc="generating", unit="step"):
        # Velocity with guidance.
        sigma_B = sigmas[step].expand(len(latents_BCHW))
        velocity_BCHW = velocity(latents_BCHW, sigma_B, text)
        if guidance_scale > 1 and negative_text is not None and step < guided_steps:
            away_BCHW = velocity(latents_BCHW, sigma_B, negative_text)
            velocity_BCHW = family.guide(velocity_BCHW, away_BCHW, guidance_scale)
        # Euler step.
        latents_BCHW = latents_BCHW + (sigmas[step + 1] - sigmas[step]) * velocity_BCHW
        if kept is not None:
            latents_BCHW = kept.put(latents_BCHW, sigmas[step + 1])
        if watch is not None:
            predicted_BCHW = latents_BCHW - sigmas[step + 1] * velocity_BCHW
            watch(step + 1, len(sigmas) - 1, predicted_BCHW)
    return latents_BCHW


def add_noise(clean_BCHW: Tensor, noise_BCHW: Tensor, sigma: Tensor) -> Tensor:
    """x_sigma = (1 - sigma) x0 + sigma noise; at sigma 1, only noise."""
    return torch.lerp(clean_BCHW, noise_BCHW, sigma.to(noise_BCHW))
