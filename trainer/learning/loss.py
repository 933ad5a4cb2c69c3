"""The flow-matching loss of one batch.

Shapes: B images, C latent channels, H and W latent rows and columns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from families.family import Family
from trainer.learning.randomness import generator


def noisy(latents_BCHW: Tensor, noise_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """x_sigma = (1 - sigma) x0 + sigma noise (Lipman et al. 2022, arXiv 2210.02747)."""
    sigma_B111 = sigma_B.view(-1, 1, 1, 1)
    return (1 - sigma_B111) * latents_BCHW + sigma_B111 * noise_BCHW


def flow_loss(
    family: Family,
    latents_BCHW: Tensor,
    noise_BCHW: Tensor,
    sigma_B: Tensor,
    text: Sequence[Tensor],
) -> Tensor:
    """Mean squared error between the predicted velocity and noise - x0, float32."""
    velocity_BCHW = family.velocity(noisy(latents_BCHW, noise_BCHW, sigma_B), sigma_B, text)
    return (velocity_BCHW - (noise_BCHW - latents_BCHW)).square().mean()


def draw_noise(shape: torch.Size, seed: int, purpose: str, step: int, row: int) -> Tensor:
    """Samples standard normal noise of one sample in one step, on the CPU."""
    return torch.randn(shape, generator=generator(seed, purpose, step, row))
