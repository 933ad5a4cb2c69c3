"""The flow-matching loss of one batch.

Shapes: B images, C latent channels, H and W latent rows and columns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from families.family import Family
from families.references import References
from trainer.data import OUTSIDE
from trainer.learning.randomness import generator
from trainer.learning.references import velocity


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
    weights_B1HW: Tensor | None = None,
    references: Sequence[References] = (),
) -> Tensor:
    """Mean squared error between the predicted velocity and noise - x0, float32.

    references: of each row, of an editing model. They have no noise and no part in the error.
    """
    noisy_BCHW = noisy(latents_BCHW, noise_BCHW, sigma_B)
    velocity_BCHW = velocity(family, noisy_BCHW, sigma_B, text, references)
    errors_BCHW = (velocity_BCHW - (noise_BCHW - latents_BCHW)).square()
    return weighted(errors_BCHW, weights_B1HW).mean()


def loss_weights(mask_1HW: Tensor) -> Tensor:
    """The weights of an image's squared errors, with a mean of 1.

    mask_1HW: in [0, 1], not black everywhere. What is black has `OUTSIDE` of the weight that it has
    without a mask; what that leaves is spread over the mask. So an image's share of the loss and of
    the gradient depends neither on the size of its subject nor on the other images of its batch.
    """
    return OUTSIDE + (1 - OUTSIDE) * mask_1HW / mask_1HW.mean()


def weighted(errors_BCHW: Tensor, weights_B1HW: Tensor | None) -> Tensor:
    """The errors times their weights; None leaves them as they are."""
    return errors_BCHW if weights_B1HW is None else errors_BCHW * weights_B1HW


def draw_noise(shape: torch.Size, seed: int, purpose: str, step: int, row: int) -> Tensor:
    """Samples standard normal noise of one sample in one step, on the CPU."""
    return torch.randn(shape, generator=generator(seed, purpose, step, row))
