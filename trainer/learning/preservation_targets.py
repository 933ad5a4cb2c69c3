"""The targets of preservation: what the model answers at the steps of images.

Of images that it generates, of prompts or as edits of a dataset's control images, and of
regularization images. Shapes: R rows, C latent channels, H and W latent rows and columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from families.family import Family
from families.references import References, size_near
from inference.progress import Progress
from trainer.learning.features import Captions
from trainer.learning.loss import noisy
from trainer.learning.mapped_tensors import Tensors
from trainer.learning.references import velocity
from trainer.learning.regularization import Kept, side_of
from trainer.settings import Extent

# Seeds of images' noise.
FIRST_SEED, FIRST_EDIT_SEED, FIRST_SUBJECT_SEED = 900_000, 920_000, 950_000
FIRST_KEPT_SEED = 970_000
WHAT, WHAT_EDITS = "images for preservation", "edits for preservation"
Advance = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Target:
    """The model's answer at one step of one image."""

    prompt: str
    sigma: float
    references: References | None  # of an edit
    latents_CHW: Tensor  # noisy, float32, memory-mapped
    velocity_CHW: Tensor

    @property
    def shapes(self) -> tuple[torch.Size, bool]:
        """Equal for targets that can be stacked."""
        return self.latents_CHW.shape, self.references is None


@torch.no_grad()
def generated(
    family: Family,
    captions: Captions,
    prompts: Sequence[str],
    extent: Extent,
    batch_size: int,
    first_seed: int = FIRST_SEED,
    advance: Advance = lambda *_: None,
    references: Sequence[References] = (),
) -> list[Target]:
    """Generates an image of every prompt with the model as it is; returns all of their steps.

    They are in the order of the images: which of them a row uses does not depend on the batch size.
    `advance` is called with the phase, the number of images generated and their total.
    `references`, of each prompt, are what it edits, if these are instructions; such an image has
    the aspect ratio of the last one, and the batch size must be 1.
    """
    what = WHAT_EDITS if references else WHAT
    tensors, points = Tensors[int](what), dict[int, tuple[str, float, References | None]]()
    with Progress(total=len(prompts), desc=what, unit="image") as progress:
        for first in range(0, len(prompts), batch_size):
            batch = prompts[first : first + batch_size]
            beside = references[first : first + batch_size]
            size = size_beside(family, extent.side, beside)
            sigmas = family.sigmas(extent.steps, *size)
            text = captions.features(batch, beside)
            seeds = range(first_seed + first, first_seed + first + len(batch))
            latents_RCHW = family.initial_noise(seeds, *size)
            for step, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
                sigma_R = sigma.expand(len(batch)).to(latents_RCHW)
                velocity_RCHW = velocity(family, latents_RCHW, sigma_R, text, beside)
                for row, prompt in enumerate(batch):
                    place = (first + row) * extent.steps + step
                    tensors.add(place, torch.stack([latents_RCHW[row], velocity_RCHW[row]]))
                    points[place] = prompt, float(sigma), beside[row] if beside else None
                latents_RCHW = latents_RCHW + (following - sigma).to(latents_RCHW) * velocity_RCHW
            progress.update(len(batch))
            advance(what, first + len(batch), len(prompts))
    mapped = tensors.mapped()
    return [Target(*points[place], *mapped[place]) for place in sorted(points)]


def size_beside(family: Family, side: int, batch: Sequence[References]) -> tuple[int, int]:
    """Width and height of an image of side x side pixels, in the aspect ratio of what it edits."""
    if not batch:
        return side_of(family, side), side_of(family, side)
    rows, columns = batch[0].latents[-1].shape[-2:]
    return size_near(side**2, (columns, rows), family.resolution_multiple)


@torch.no_grad()
def predicted(
    family: Family, captions: Captions, kept: Sequence[Kept], extent: Extent, batch_size: int
) -> list[Target]:
    """The model's answers on regularization images, with new noise at each step of generation."""
    side = side_of(family, extent.side)
    sigmas = family.sigmas(extent.steps, side, side)[:-1].tolist()
    points = [(each, sigma) for each in kept for sigma in sigmas]
    tensors = Tensors[int]("regularization images")
    for first in range(0, len(points), batch_size):
        images, levels = zip(*points[first : first + batch_size], strict=True)
        seeds = range(FIRST_KEPT_SEED + first, FIRST_KEPT_SEED + first + len(images))
        noise_RCHW = family.initial_noise(seeds, side, side)
        clean_RCHW = torch.stack([each.latents_CHW for each in images]).to(noise_RCHW)
        sigma_R = torch.tensor(levels).to(noise_RCHW)
        latents_RCHW = noisy(clean_RCHW, noise_RCHW, sigma_R)
        text = captions.features([each.prompt for each in images])
        velocity_RCHW = family.velocity(latents_RCHW, sigma_R, text)
        for row in range(len(images)):
            tensors.add(first + row, torch.stack([latents_RCHW[row], velocity_RCHW[row]]))
    mapped = tensors.mapped()
    return [Target(k.prompt, sigma, None, *mapped[n]) for n, (k, sigma) in enumerate(points)]
