"""Preservation: prompts without the subject keep the images that the base model makes of them.

A LoRA that learns a subject from images of nothing else changes every other prompt, too. So before
the LoRA is added, the model generates images, without guidance, of varied prompts that do not
contain the subject. Its noisy latents and velocities at each step become targets. In the loop, some
rows beside each batch ask the model with the LoRA to predict the same velocities. On a distilled
base, the training adapter is merged in both.

Everything depends only on settings, seeds and counters, so a resumed run makes the same targets
again. They are in a temporary file, and are not kept for other runs.

Shapes: R rows, C latent channels, H and W latent rows and columns.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from families.family import Family
from families.transfer import onto
from inference.progress import Progress
from trainer.learning.features import Captions
from trainer.learning.mapped_tensors import Tensors
from trainer.learning.randomness import generator
from trainer.settings import LEAST_IMAGES, Extent, Settings, extent_of, subjects_in

log = logging.getLogger(__name__)

PROMPTS = Path(__file__).parent / "preservation_prompts"
FIRST_SEED = 900_000  # of the images' noise
WHAT = "images for preservation"


@dataclass(frozen=True)
class Target:
    """The base model's answer at one step of one image."""

    prompt: str
    sigma: float
    latents_CHW: Tensor  # noisy, float32, memory-mapped
    velocity_CHW: Tensor


def shipped_prompts(name: str) -> list[str]:
    """The varied prompts that come with a base model (`Base.preservation_prompts`)."""
    return (PROMPTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def preservation_prompts(settings: Settings) -> list[str]:
    """The prompt of each image that the run generates for preservation; none if it is off.

    The user's own, else those of the base model without the ones that contain the subject. If there
    are more than images, those are used that spread evenly over the list.
    """
    if not settings.preserve:
        return []
    shipped = shipped_prompts(settings.base.preservation_prompts)
    usable = [each for each in shipped if not subjects_in(each, settings)]
    prompts = settings.preserve_prompts or usable
    if len(usable) < LEAST_IMAGES and not settings.preserve_prompts:
        log.warning(
            "preserve has little effect: %d of the %d prompts of %s do not contain %s; give "
            "preserve_prompts",
            *(len(usable), len(shipped), settings.base.name),
            " or ".join(settings.tokens) or settings.trigger_word,
        )
    count = min(extent_of(settings).images, len(prompts))
    return [prompts[number * len(prompts) // count] for number in range(count)]


class Preservation:
    """The targets of a run, and the rows beside each batch that ask for them."""

    def __init__(
        self,
        family: Family,
        settings: Settings,
        captions: Captions,
        prompts: Sequence[str],
        advance: Callable[[str, int, int], None] = lambda *_: None,
    ) -> None:
        """Generates the images. The LoRA must not have been added to the transformer.

        `captions` has the features of `prompts`. `advance` is called with the phase, the number of
        images generated and their total. Raises `NoSpace` if the disk is full.
        """
        self.family, self.captions, self.settings = family, captions, settings
        self.extent = extent_of(settings)
        self.targets = base_targets(
            family, captions, prompts, self.extent, settings.batch_size, advance
        )
        self.last: Tensor | None = None  # the loss of the last rows

    @property
    def last_loss(self) -> float | None:
        """The loss of the last rows; None if there were none. Waits for the device."""
        return None if self.last is None else float(self.last)

    def add_gradients(self, number: int, first_row: int, batches: int) -> None:
        """Adds the gradients of the rows beside batch `number`, if it has any.

        `first_row` is the process's first row in the batch, so that processes use different
        targets. The loss is divided by `batches`, the number of batches in the step.
        """
        if number % self.extent.every:
            return
        loss = self.loss(number, first_row)
        (loss * (self.settings.preserve * self.extent.every / batches)).backward()
        self.last = loss.detach()

    def loss(self, number: int, first_row: int = 0) -> Tensor:
        """Mean squared difference to the base model's velocity in the rows of a batch, float32."""
        family, seed = self.family, self.settings.seed
        random = generator(seed, "preservation", number, first_row)
        chosen = torch.randint(len(self.targets), (self.extent.rows,), generator=random)
        targets = [self.targets[index] for index in chosen.tolist()]
        stacked = (
            torch.stack([each.latents_CHW for each in targets]),
            torch.tensor([each.sigma for each in targets]),
            torch.stack([each.velocity_CHW for each in targets]),
        )
        latents_RCHW, sigma_R, wanted_RCHW = (onto(family.device, each) for each in stacked)
        text = self.captions.features([each.prompt for each in targets])
        return (family.velocity(latents_RCHW, sigma_R, text) - wanted_RCHW).square().mean()


@torch.no_grad()
def base_targets(
    family: Family,
    captions: Captions,
    prompts: Sequence[str],
    extent: Extent,
    batch_size: int,
    advance: Callable[[str, int, int], None] = lambda *_: None,
) -> list[Target]:
    """Generates an image of every prompt with the model as it is; returns all of their steps."""
    side = max(extent.side - extent.side % family.resolution_multiple, family.resolution_multiple)
    sigmas = family.sigmas(extent.steps, side, side)
    tensors, points = Tensors[int](WHAT), list[tuple[str, float]]()
    with Progress(total=len(prompts), desc=WHAT, unit="image") as progress:
        for first in range(0, len(prompts), batch_size):
            batch = prompts[first : first + batch_size]
            text = captions.features(batch)
            seeds = range(FIRST_SEED + first, FIRST_SEED + first + len(batch))
            latents_RCHW = family.initial_noise(seeds, side, side)
            for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
                sigma_R = sigma.expand(len(batch)).to(latents_RCHW)
                velocity_RCHW = family.velocity(latents_RCHW, sigma_R, text)
                for row, prompt in enumerate(batch):
                    tensors.add(len(points), torch.stack([latents_RCHW[row], velocity_RCHW[row]]))
                    points.append((prompt, float(sigma)))
                latents_RCHW = latents_RCHW + (following - sigma).to(latents_RCHW) * velocity_RCHW
            progress.update(len(batch))
            advance(WHAT, first + len(batch), len(prompts))
    mapped = tensors.mapped()
    return [Target(*point, *mapped[number]) for number, point in enumerate(points)]
