"""Regularization images in preservation: the base model's predictions on them stay as they are.

Their latents, with noise, and the base model's velocities there are targets like those of images
that it generates itself (`trainer.learning.preservation`), and take the place of some of these.

Shapes: C latent channels, H and W latent rows and columns.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from families.family import Family
from trainer.data import Bucket, Example, listed
from trainer.learning.features import fit
from trainer.settings import Settings, extent_of, sort_prompts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """An encoded regularization image."""

    prompt: str
    latents_CHW: Tensor  # the mean of the VAE's posterior, normalized, on the CPU


@torch.no_grad()
def encode_regularization(
    family: Family, examples: Sequence[Example], settings: Settings
) -> list[Kept]:
    """Encodes the images as squares of preservation's size; the VAE stays in memory.

    Those whose caption mentions the subject are not used, with a warning.
    """
    of_subject = [each.name for each in examples if not sort_prompts([each.caption], settings)[0]]
    if of_subject:
        log.warning(
            "regularization images whose captions mention the subject are not used: %s",
            listed(of_subject),
        )
    kept = []
    for each in examples:
        if each.name not in of_subject:
            side = side_of(family, extent_of(settings).side)
            pixels_1CPP = fit(each.image((2 * side, 2 * side)), Bucket(side, side))[None]
            mean_1CHW, _ = family.encode_images(pixels_1CPP)
            kept.append(Kept(each.caption or family.empty_prompt, mean_1CHW[0].cpu()))
    return kept


def side_of(family: Family, side: int) -> int:
    """The nearest side of an image, in pixels, that the model can have."""
    multiple = family.resolution_multiple
    return max(side - side % multiple, multiple)
