"""Previews: the sample prompts, drawn while training from the adapter as it would be shipped.

Every prompt has one seed, so that only the training changes a picture. They are drawn by the code
of `inference`, from the averaged weights where there are such, rounded as the archive rounds them,
on the pristine base: the last preview is what a prediction with the archive draws.
"""

import logging
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from adapters.lora_file import as_written
from families.family import Family
from families.tokens import split_words
from inference.acceleration import with_fallback
from inference.drawing import draw
from inference.request import Drawing, Request, settle
from inference.text_cache import TextCache
from trainer.album import Album
from trainer.loop import Loop
from trainer.settings import Settings
from trainer.stage import Stage

log = logging.getLogger(__name__)


def sample_drawings(settings: Settings, family: Family) -> list[Drawing]:
    """What the sample prompts ask for; without a seed of its own it is the training's."""
    options = {"seed": settings.seed, **settings.sample_options}
    requests = [Request(prompt=prompt, **options) for prompt in settings.sample_prompts]
    return [settle(each, settings.base, family.resolution_multiple) for each in requests]


def sample_scale(settings: Settings) -> float:
    """The strength that the sample prompts are drawn at."""
    return float(settings.sample_options.get("lora_scale", 1.0))


@torch.no_grad()
def prompt_features(settings: Settings, family: Family) -> TextCache:
    """The text features of all sample prompts without the placeholder, which never change.

    They are made while the text encoder is there for the captions, so that it need not be loaded
    again for every preview. A quantized one is not what a prediction uses: it makes none.
    """
    texts, word = TextCache(), settings.subject
    if family.residence.quantize_text != "none":
        return texts
    for drawing in sample_drawings(settings, family) if settings.sample_prompts else ():
        prompts = [drawing.prompt]
        if drawing.guidance_scale > 1:
            prompts.append(drawing.negative_prompt or family.empty_prompt)
        for prompt in prompts:
            if word is None or word not in split_words(prompt, [word]):
                texts.encode(family, prompt, {})
    return texts


class Previews:
    """Draws the sample prompts of one training, before it, every `sample_every` steps, at its end.

    Where the GPU is too full for it, nothing is drawn; what the last step lacks, `trainer.judging`
    draws from the finished archive.
    """

    def __init__(
        self,
        family: Family,
        settings: Settings,
        stage: Stage,
        output: Path,
        texts: TextCache | None = None,
        enabled: bool = True,
    ) -> None:
        """`texts` are known features of the prompts; where not `enabled`, nothing is generated."""
        self.family, self.settings, self.stage = family, settings, stage
        self.texts, self.enabled = texts or TextCache(), enabled
        self.drawings = sample_drawings(settings, family)
        self.album = Album(output, self.drawings)

    @property
    def thumbnails(self) -> dict[int, list[Image.Image]]:
        """What was drawn at each step, small, one per prompt and seed."""
        return self.album.thumbnails

    @property
    def last(self) -> list[Image.Image]:
        """What was drawn the last time."""
        return self.album.last

    def begin(self, loop: Loop) -> None:
        """Makes room for the run's pictures, and draws what the base makes of the prompts."""
        if not self.drawings:
            return
        self.album.begin(loop.done)
        if self.settings.sample_every and not loop.done:
            self._draw(loop)

    def after_step(self, loop: Loop) -> None:
        """Draws where it is time to."""
        every, done = self.settings.sample_every, loop.done
        due = done == self.settings.steps or (every and done % every == 0)
        if due and self.drawings:
            self._draw(loop)

    def _draw(self, loop: Loop) -> None:
        if not self.enabled:
            return
        assert loop.lora is not None
        factors, placeholder = loop.shipped()
        vectors = {}
        if placeholder is not None:
            vectors = {placeholder.token: placeholder.vectors.to(self.family.device)}
        try:
            with self.stage.holding(loop.lora, as_written(factors), sample_scale(self.settings)):
                pictures = [
                    with_fallback(
                        self.family.transformer,
                        partial(draw, self.family, drawing, vectors, None, self.texts),
                    )
                    for drawing in self.drawings
                ]
        except torch.OutOfMemoryError as error:  # hours of training are worth more than a preview
            log.warning("no preview at step %d: out of memory (%s)", loop.done, error)
        else:
            self.album.add(loop.done, pictures)
