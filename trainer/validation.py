"""Validation: the loss on a fixed set of (picture, sigma, noise), so that two moments compare.

A step's own loss says little: it depends on the noise level and the noise it drew more than on
what was learned. Here both stay the same from the base to the end, at four noise levels which cut
the training's own distribution of sigma into equal parts.

Shapes: B items, C latent channels, H and W latent rows and columns.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from inference.acceleration import with_fallback
from trainer.features import Sample
from trainer.loop import Loop
from trainer.loss import draw, noisy
from trainer.noise_levels import NoiseLevels
from trainer.randomness import generator
from trainer.settings import Settings

log = logging.getLogger(__name__)

QUANTILES = (0.125, 0.375, 0.625, 0.875)  # of the training's sigma: the middles of its quarters
ITEMS = 4  # pictures at each sigma, all others than at the next where there are enough
MOMENTS = 10  # measurements in a run, besides the base's
ENOUGH = 20  # pictures from which on some can be spared
SHARE, MOST = 10, 8  # one picture in ten is held out, eight at the most


@dataclass(frozen=True)
class Curves:
    """The validation losses of a run."""

    sigmas: list[float]  # ascending
    held_out: list[str]  # pictures that are not trained on; none: the training's own are measured
    steps: list[int]  # of the measurements; 0 is the base without the adapter
    losses: list[list[float]]  # one list per measurement, one value per sigma

    @property
    def means(self) -> list[float]:
        """The mean over the sigmas, one per measurement."""
        return [sum(each) / len(each) for each in self.losses]

    def plain(self) -> dict[str, Any]:
        """The same in JSON's types."""
        return asdict(self)


def hold_out(samples: Sequence[Sample], settings: Settings) -> tuple[list[Sample], list[Sample]]:
    """The samples to train on, and those of the pictures that are held out.

    Below `ENOUGH` pictures none is: each is worth more to the LoRA than to its measurement.
    """
    names = sorted({sample.name for sample in samples})
    if settings.validation_every == 0 or len(names) < ENOUGH:
        return list(samples), []
    order = torch.randperm(len(names), generator=generator(settings.seed, "held out")).tolist()
    spared = {names[index] for index in order[: min(len(names) // SHARE, MOST)]}
    log.info("held out for validation, not trained on: %s", ", ".join(sorted(spared)))
    return (
        [sample for sample in samples if sample.name not in spared],
        [sample for sample in samples if sample.name in spared],
    )


class Validation:
    """Measures the loss of one training at fixed moments, without a gradient.

    On the samples that were held out; where there are none, on those of the training.
    """

    def __init__(self, loop: Loop, held_out: Sequence[Sample]) -> None:
        self.family, self.settings, self.captions = loop.family, loop.settings, loop.captions
        every, steps = self.settings.validation_every, self.settings.steps
        self.every = max(1, -(-steps // MOMENTS)) if every is None else every
        samples = held_out or loop.samples
        sigmas = _quantiles(loop.noise_levels, samples[0].mean_CHW.shape)
        pictures = list({sample.name: sample for sample in samples}.values())
        # Which picture is measured at which sigma: by turns, so that few measurements see many.
        self._items = [
            (level, pictures[(turn * len(sigmas) + level) % len(pictures)], turn)
            for level in range(len(sigmas))
            for turn in range(ITEMS)
        ]
        names = sorted({sample.name for sample in held_out})
        self.curves = Curves(sigmas, names, [], [])

    def begin(self, loop: Loop) -> None:
        """Measures the base; a resumed run goes on with the curves of its checkpoint."""
        if not self.every:
            return
        past = [row for row in loop.history.validation if len(row) == 1 + len(QUANTILES)]
        for step, *losses in past:
            self._note(int(step), losses)
        if not past:
            with torch.no_grad():
                trained = [(each, each.clone()) for each in loop.named.values()]
                for parameter, _ in trained:
                    parameter.zero_()
                try:
                    losses = self._measure()
                finally:
                    for parameter, value in trained:
                        parameter.copy_(value)
            self._note(0, losses)
            loop.history.validation.append([0, *losses])

    def after_step(self, loop: Loop) -> None:
        """Measures where it is time to, with the weights that would be shipped."""
        if self.every and (loop.done % self.every == 0 or loop.done == self.settings.steps):
            with loop.averaged():
                losses = self._measure()
            self._note(loop.done, losses)
            loop.history.validation.append([loop.done, *losses])

    def _note(self, step: int, losses: list[float]) -> None:
        self.curves.steps.append(step)
        self.curves.losses.append(losses)
        log.debug("validation at step %d: %s", step, losses)

    @torch.no_grad()
    def _measure(self) -> list[float]:
        """The mean loss at each sigma."""
        totals = [0.0] * len(self.curves.sigmas)
        for batch in self._batches():
            latents_BCHW = torch.stack([sample.mean_CHW for _, sample, _ in batch])
            noise_BCHW = torch.stack([self._noise(sample, turn) for _, sample, turn in batch])
            sigma_B = torch.tensor([self.curves.sigmas[level] for level, _, _ in batch])
            here = [each.to(self.family.device) for each in (latents_BCHW, noise_BCHW, sigma_B)]
            text = self.captions.features([sample.caption for _, sample, _ in batch])
            velocity_BCHW = with_fallback(
                self.family.transformer,
                partial(self.family.velocity, noisy(*here), here[2], text),
            )
            errors = (velocity_BCHW - (here[1] - here[0])).square().mean(dim=(1, 2, 3))
            for (level, _, _), error in zip(batch, errors.tolist(), strict=True):
                totals[level] += error / ITEMS
        return totals

    def _batches(self) -> list[list[tuple[int, Sample, int]]]:
        """The items in batches of one shape, no larger than the training's."""
        groups: dict[torch.Size, list[tuple[int, Sample, int]]] = {}
        for item in self._items:
            groups.setdefault(item[1].mean_CHW.shape, []).append(item)
        size = self.settings.batch_size
        return [
            group[start : start + size]
            for group in groups.values()
            for start in range(0, len(group), size)
        ]

    def _noise(self, sample: Sample, turn: int) -> Tensor:
        shape = sample.mean_CHW.shape
        return draw(shape, self.settings.seed, f"validation {sample.name}", turn, 0)


def _quantiles(levels: NoiseLevels, shape_CHW: torch.Size, draws: int = 999) -> list[float]:
    """Sigma at `QUANTILES`, from draws that are the same in every run."""
    random = generator(0, "quantiles")
    sigmas = sorted(levels.draw(shape_CHW, random) for _ in range(draws))
    return [sigmas[int(quantile * draws)] for quantile in QUANTILES]
