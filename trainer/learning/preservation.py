"""Preservation: prompts without the subject keep the images that the base model makes of them.

A LoRA that learns a subject from images of nothing else changes every other prompt, too. So some
rows of every step ask it about something else: before the training, the model generates from
varied prompts, and its noisy latents and velocities on the way become targets. In the loop the
model with the LoRA has to answer them as it did without. `docs/preservation.md` compares this with
other ways.

Shapes: R rows, C latent channels, H and W latent rows and columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from families.family import Family
from families.transfer import onto
from trainer.learning.features import Captions
from trainer.learning.mapped_tensors import Tensors
from trainer.learning.randomness import generator

PROMPTS = Path(__file__).parent / "preservation_prompts"
# Pixels, edge of the square. What a LoRA changes at one size it changes at another, and a forward
# pass at 512 costs a quarter of one at 1024.
MAX_RESOLUTION = 512


@dataclass(frozen=True)
class Target:
    """The base's answer at one point of one image."""

    prompt: str
    sigma: float
    latents_CHW: Tensor  # noisy, float32, read from disk
    velocity_CHW: Tensor


def shipped_prompts(name: str) -> list[str]:
    """The varied prompts that come with a base model (`Base.preservation_prompts`)."""
    return (PROMPTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()


@torch.no_grad()
def base_targets(
    family: Family, captions: Captions, prompts: Sequence[str], resolution: int, rows: int
) -> list[Target]:
    """Generates from every prompt, unguided, and keeps each step; `rows` images at once.

    Called before the LoRA is there. The result lies on disk. Raises `NoRoom`.
    """
    side = min(resolution, MAX_RESOLUTION)
    side -= side % family.resolution_multiple
    sigmas = family.sigmas(min(family.base.inference_steps, MAX_STEPS), side, side)
    kept, points = Tensors[int]("images for preservation"), []
    with tqdm(total=len(prompts), desc="images for preservation", unit="image") as progress:
        for first in range(0, len(prompts), rows):
            batch = prompts[first : first + rows]
            text = captions.features(batch)
            latents_RCHW = family.initial_noise(
                [FIRST_SEED + first + row for row in range(len(batch))], side, side
            )
            for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
                sigma_R = sigma.expand(len(batch)).to(latents_RCHW)
                velocity_RCHW = family.velocity(latents_RCHW, sigma_R, text)
                for row, prompt in enumerate(batch):
                    kept.add(len(points), torch.stack([latents_RCHW[row], velocity_RCHW[row]]))
                    points.append((prompt, float(sigma)))
                latents_RCHW = latents_RCHW + (following - sigma).to(latents_RCHW) * velocity_RCHW
            progress.update(len(batch))
    tensors = kept.mapped()
    return [Target(*point, *tensors[number]) for number, point in enumerate(points)]


MAX_STEPS = 12  # of an image; more cost time and add points that are alike
FIRST_SEED = 900_000  # of the images' noise


class Preservation:
    """The rows that a step has beside its batch. Which ones depends on seed and counters alone."""

    def __init__(self, targets: Sequence[Target], weight: float, rows: int, seed: int) -> None:
        self.targets, self.weight, self.rows, self.seed = targets, weight, rows, seed

    def loss(self, family: Family, captions: Captions, number: int, first_row: int) -> Tensor:
        """The mean squared difference to the base's velocity in a batch's rows, float32."""
        random = generator(self.seed, "preservation", number, first_row)
        chosen = torch.randint(len(self.targets), (self.rows,), generator=random).tolist()
        targets = [self.targets[index] for index in chosen]
        made = (
            torch.stack([each.latents_CHW for each in targets]),
            torch.tensor([each.sigma for each in targets]),
            torch.stack([each.velocity_CHW for each in targets]),
        )
        latents_RCHW, sigma_R, wanted_RCHW = (onto(family.device, each) for each in made)
        text = captions.features([each.prompt for each in targets])
        return (family.velocity(latents_RCHW, sigma_R, text) - wanted_RCHW).square().mean()
