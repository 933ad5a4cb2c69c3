"""Generates many images at a time with a LoRA on a base model.

As `inference.engine`, but in the batches of `miniature.sampling`, which cost a third.

B batch, L caption tokens, D text width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from adapters.archive import Archive
from adapters.merging import LoraMerger
from adapters.turbo import TurboAdapter
from families.loading import load_family
from families.registry import BASES
from lab.experiments.prompts import Prompt
from miniature.device import bfloat16_products
from miniature.images import to_images
from miniature.sampling import CAPTION_MULTIPLE, Base, TextFeatures, noise_for, sample_latents
from miniature.vae import decode

BATCH = 32  # images


@dataclass(frozen=True)
class Way:
    """One way to generate."""

    name: str
    steps: int
    guidance: float = 0.0  # in the pipeline's scale, where 0 is off
    share: float = 1.0  # of the prompts, the first ones; for ways that take long
    scale: float = 1.0  # of the LoRA


class Drawer:
    """One base, with one LoRA at a time over it; `adapter` is merged into it for good."""

    def __init__(self, base: str, adapter: TurboAdapter | None = None) -> None:
        self.family = load_family(BASES[base], dtype=torch.float32)
        if adapter is not None:
            adapter.merge(self.family.transformer, base)
        self._overlay = LoraMerger(self.family.transformer)
        self._base = Base(
            transformer=self.family.transformer,
            text_encoder=self.family.text_encoder,
            tokenizer=self.family.prompts.tokenizer,
            vae=self.family.vae,
            shift=float(self.family.scheduler.config.shift),
        )

    @torch.no_grad()
    def draw(self, archive: Archive, prompts: Sequence[Prompt], way: Way) -> list[Image.Image]:
        """One image per prompt.

        With guidance, prompts have to be as long as the empty one once both are padded.
        """
        vectors = archive.vectors
        self._overlay.apply([(archive.deltas, way.scale)])
        with bfloat16_products():
            empty = _padded(self.family.encode_prompts([""]))
        pictures: dict[int, Image.Image] = {}
        for numbers in self._batches(prompts, vectors):
            chunk = [prompts[number] for number in numbers]
            noise_BCHW = noise_for([each.seed for each in chunk], self.family.latent_channels)
            with bfloat16_products():
                text = _padded(self.family.encode_prompts([each.text for each in chunk], vectors))
                latents_BCHW = sample_latents(
                    *(self._base, noise_BCHW.to(self.family.device), text, way.steps),
                    *(empty, way.guidance),
                )
            pictures |= zip(numbers, to_images(decode(self._base.vae, latents_BCHW)), strict=True)
        return [pictures[number] for number in range(len(prompts))]

    def _batches(
        self, prompts: Sequence[Prompt], vectors: dict[str, Tensor]
    ) -> Iterator[list[int]]:
        """Numbers of prompts of one padded length: padding is text to the model."""
        by_width: dict[int, list[int]] = {}
        for number, prompt in enumerate(prompts):
            width = _padded_length(len(self.family.tokenize(prompt.text, vectors).ids))
            by_width.setdefault(width, []).append(number)
        for numbers in by_width.values():
            for first in range(0, len(numbers), BATCH):
                yield numbers[first : first + BATCH]


def _padded_length(length: int) -> int:
    return -(-length // CAPTION_MULTIPLE) * CAPTION_MULTIPLE


def _padded(rows: Sequence[Tensor]) -> TextFeatures:
    """Features text_LD of prompts of one padded length, with the mask of what is not padding."""
    width = _padded_length(max(map(len, rows)))
    text_BLD = torch.stack([F.pad(row, (0, 0, 0, width - len(row))) for row in rows])
    lengths_B = torch.tensor([len(row) for row in rows])
    mask_BL = torch.arange(width)[None] < lengths_B[:, None]
    return TextFeatures(text_BLD, mask_BL.to(text_BLD.device))
