"""The whole story of sampling: Euler steps along the velocity from noise to picture."""

from collections.abc import Sequence

from torch import Tensor
from tqdm import tqdm

from families.family import Family


def sample(
    family: Family,
    noise_BCHW: Tensor,
    sigmas: Tensor,
    text: Sequence[Tensor],
    negative_text: Sequence[Tensor] | None = None,
    guidance_scale: float = 1.0,
) -> Tensor:
    """Latents BCHW float32 of pictures, from noise at sigmas[0] down to sigmas[-1].

    `text` and `negative_text` hold one text_LD per picture; the latter is read only where
    `guidance_scale` is above 1, at the price of a second pass through the transformer.
    """
    latents_BCHW = noise_BCHW
    sigmas = sigmas.to(noise_BCHW)
    steps = tqdm(range(len(sigmas) - 1), desc="drawing", unit="step")
    for step in steps:
        # Velocity of the picture, and away from the negative prompt.
        sigma_B = sigmas[step].expand(len(latents_BCHW))
        velocity_BCHW = family.velocity(latents_BCHW, sigma_B, text)
        if guidance_scale > 1 and negative_text is not None:
            away_BCHW = family.velocity(latents_BCHW, sigma_B, negative_text)
            velocity_BCHW = family.guide(velocity_BCHW, away_BCHW, guidance_scale)
        # Euler step.
        latents_BCHW = latents_BCHW + (sigmas[step + 1] - sigmas[step]) * velocity_BCHW
    return latents_BCHW
