"""Latents and text features, encoded once and kept, so that the encoders can leave memory.

Shapes: B images, C latent channels, H and W latent rows and columns, L text tokens, D features.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from families.family import Family
from families.tokens import split_words
from trainer.buckets import fit, nearest_bucket, warn_upscaled
from trainer.dataset import Example
from trainer.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One picture at one resolution, as the loop sees it."""

    name: str
    caption: str
    mean_CHW: Tensor  # of the VAE's posterior, normalised, float32 on the CPU
    std_CHW: Tensor


@torch.no_grad()
def encode_pictures(
    family: Family, examples: Sequence[Example], settings: Settings
) -> list[Sample]:
    """Every picture at every resolution, in its bucket. The VAE is released afterwards."""
    multiple = family.resolution_multiple
    for resolution in settings.resolutions:
        warn_upscaled(examples, resolution, multiple)
    samples = []
    for example in tqdm(examples, desc="encoding pictures", unit="picture"):
        image = example.image()
        for resolution in settings.resolutions:
            bucket = nearest_bucket(example.width, example.height, resolution, multiple)
            mean_1CHW, std_1CHW = family.encode_images(fit(image, bucket)[None])
            sample = Sample(example.name, example.caption, mean_1CHW[0].cpu(), std_1CHW[0].cpu())
            samples.append(sample)
    family.release("vae")
    return samples


class Captions:
    """Text features of captions: kept where they are constant, made anew where they are trained.

    A caption that holds the placeholder changes with its rows, so the text encoder stays in
    memory for it; without such captions it is released.
    """

    def __init__(
        self, family: Family, captions: Sequence[str], vectors: dict[str, Tensor] | None = None
    ) -> None:
        self.family, self.vectors = family, vectors or {}
        distinct = sorted(set(captions))
        self.trained = {
            text for text in distinct if set(self.vectors) & set(split_words(text, self.vectors))
        }
        constant = [text for text in distinct if text not in self.trained]
        self._kept: dict[str, Tensor] = {}
        with torch.no_grad():
            for text in tqdm([family.empty_prompt, *constant], desc="encoding captions"):
                self._kept[text] = family.encode_prompts([text])[0]
        if not self.trained:
            family.release("text_encoder")

    def features(self, captions: Sequence[str]) -> list[Tensor]:
        """text_LD of each caption; gradients reach the placeholder in those that hold it."""
        trained = [text for text in captions if text in self.trained]
        if not trained:
            return [self._kept[text] for text in captions]
        made = iter(self.family.encode_prompts(trained, self.vectors))
        return [next(made) if text in self.trained else self._kept[text] for text in captions]
