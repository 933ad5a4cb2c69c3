"""The loss on fixed images, sigmas and noise, comparable between steps.

The loss of a training step depends more on its sigma and noise than on what was learned. Here both
are fixed, at four quantiles of the run's distribution of sigma.

On held-out images this is the validation loss. Without them it is measured on training images and
called "fit": it shows how well the LoRA fits them, and validates nothing.

Shapes: B items, C latent channels, H and W latent rows and columns.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from families.tokens import mentions
from families.transfer import onto
from inference.acceleration import with_fallback
from trainer.data import Example
from trainer.learning import (
    Loop,
    NoiseLevels,
    Sample,
    by_main,
    draw_noise,
    generator,
    keep_best,
    noisy,
    references_of,
    velocity,
    weighted,
    weights_of,
    why_ended,
)
from trainer.settings import Settings, SettingsError

log = logging.getLogger(__name__)

QUANTILES = (0.125, 0.375, 0.625, 0.875)  # of the training's sigma: the middles of its quarters
ITEMS = 4  # images per sigma, different for each sigma if there are enough
PHASE = "validation"  # in the times of a run
MEASUREMENTS = 10  # in a run, besides the base model's
# `validation_images: auto` holds out none below ENOUGH images, else one in SHARE, at most MOST.
ENOUGH, SHARE, MOST = 20, 10, 8

Batch = list[tuple[int, Sample, int]]  # number of the sigma, image, turn


@dataclass(frozen=True)
class Curves:
    """The losses of a run on fixed images and noise."""

    sigmas: list[float]  # ascending
    held_out: list[str]  # images not trained on; empty: measured on training images
    steps: list[int]  # of the measurements; 0 is the base without the adapter
    losses: list[list[float]]  # one list per measurement, one value per sigma
    shipped: int | None = None  # with keep_best: the step of the weights in weights.zip

    @property
    def means(self) -> list[float]:
        """The mean over the sigmas, by measurement."""
        return [sum(each) / len(each) for each in self.losses]

    @property
    def result(self) -> float:
        """The mean loss of the weights in weights.zip."""
        return self.means[-1 if self.shipped is None else self.steps.index(self.shipped)]

    @property
    def kind(self) -> str:
        """`validation` on held-out images, `fit` on training images."""
        return "validation" if self.held_out else "fit"

    def plain(self) -> dict[str, Any]:
        """The curves as JSON types."""
        facts = asdict(self)
        del facts["shipped"]  # `shipped_step` in meta.json
        return facts


def count_held_out(images: int, settings: Settings) -> int:
    """The number of held-out images of a dataset with `images` images.

    Raises `SettingsError` if fewer than half of them, or none, would be left to train on, or if a
    setting needs some and there are none.
    """
    wanted = settings.validation_images
    if wanted is None:
        measured = settings.validation_every != 0 and images >= ENOUGH
        if not measured and settings.by_validation:
            raise SettingsError(
                f"{settings.by_validation[0]} needs held-out images, and validation_images: auto "
                f"holds out none of {images} (it does from {ENOUGH} on); set validation_images, "
                f"for example to {max(1, images // 8)}, or add images"
            )
        return min(images // SHARE, MOST) if measured else 0
    if wanted > images // 2:
        most = f"at most {images // 2} can be" if images > 1 else "none can be"
        raise SettingsError(
            f"validation_images is {wanted}, but the dataset has {images} images, of which {most} "
            "held out; lower validation_images"
        )
    return wanted


def hold_out(images: Sequence[Example | Sample], settings: Settings) -> frozenset[str]:
    """Chooses the names of the held-out images.

    Raises `SettingsError` as `count_held_out` does, and if a setting needs some but several
    subjects need all images to train on.
    """
    names = sorted({image.name for image in images})
    count = count_held_out(len(names), settings)
    if not count:
        if settings.validation_every != 0:
            why = "validation_images is 0"
            if settings.validation_images is None:
                why = f"validation_images: auto holds out one in {SHARE} from {ENOUGH} images on"
            log.info("no image is held out (%s); the loss is measured on training images: fit", why)
        return frozenset()
    order = torch.randperm(len(names), generator=generator(settings.seed, "held out")).tolist()
    spare = _spare(images, [names[index] for index in order], settings.tokens)
    held_out = frozenset(spare[:count])
    if len(held_out) < count:
        why = (
            f"{len(held_out)} of {count} images for validation can be held out: each of "
            f"{', '.join(settings.tokens)} needs an image to train on"
        )
        if not held_out and settings.by_validation:
            raise SettingsError(f"{' and '.join(settings.by_validation)}: {why}; add images")
        log.warning("%s", why)
    log.info(
        "%d of %d images are held out for validation and not trained on: %s",
        *(len(held_out), len(names), ", ".join(sorted(held_out))),
    )
    return held_out


def split(samples: Sequence[Sample], held_out: frozenset[str]) -> tuple[list[Sample], list[Sample]]:
    """The samples to train on, and those of held-out images."""
    kept = [sample for sample in samples if sample.name not in held_out]
    return kept, [sample for sample in samples if sample.name in held_out]


def _spare(
    images: Sequence[Example | Sample], names: Sequence[str], tokens: Sequence[str]
) -> list[str]:
    """The names without those whose removal, in order, leaves one of several tokens no image."""
    if len(tokens) < 2:
        return list(names)
    of = {each.name: {t for t in tokens if mentions(each.caption, t)} for each in images}
    left = {token: sum(token in found for found in of.values()) for token in tokens}
    spare = []
    for name in names:
        if all(left[token] > 1 for token in of[name]):
            spare.append(name)
            left |= {token: left[token] - 1 for token in of[name]}
    return spare


class Validation:
    """Measures the loss of one run at regular intervals, without a gradient.

    Uses the held-out samples or, if there are none, training samples.
    """

    def __init__(self, loop: Loop, held_out: Sequence[Sample]) -> None:
        self.family, self.settings, self.captions = loop.family, loop.settings, loop.captions
        every, steps = self.settings.validation_every, self.settings.steps
        self.every = max(1, -(-steps // MEASUREMENTS)) if every is None else every
        samples = held_out or loop.samples
        sigmas = _quantiles(loop.noise_levels, samples[0].mean_CHW.shape)
        plain = [each for each in samples if not (each.mirrored or each.shift)]
        images = list({each.name: each for each in plain}.values())
        # Images alternate between the sigmas, so that few measurements use many images.
        self._items: Batch = [
            (level, images[(turn * len(sigmas) + level) % len(images)], turn)
            for level in range(len(sigmas))
            for turn in range(ITEMS)
        ]
        names = sorted({sample.name for sample in held_out})
        self.curves = Curves(sigmas, names, [], [])

    def begin(self, loop: Loop) -> None:
        """Measures the base model; a resumed run reads the curves of its checkpoint.

        It also measures what was due when the run was stopped.
        """
        if not self.every:
            return
        past = [row for row in loop.history.validation if len(row) == 1 + len(QUANTILES)]
        for step, *losses in past:
            self._note(int(step), losses)
        if not past:
            with untrained(loop), loop.events.within_phase(PHASE):
                losses = by_main(self.measure)
            self._measured(loop, 0, losses)
        if loop.done and self.curves.steps[-1] != loop.done:
            self.after_step(loop)
        else:
            self._end_early(loop)

    def after_step(self, loop: Loop) -> None:
        """Measures if it is due, with the weights that would be saved (EMA, if enabled).

        Keeps the best weights and ends the run, as the settings say.
        """
        if self.every and (loop.done % self.every == 0 or loop.done == loop.settings.steps):
            with loop.averaged(), loop.events.within_phase(PHASE):
                losses = by_main(self.measure)
                if self.settings.keep_best:
                    keep_best(loop, sum(losses) / len(losses))
            self._measured(loop, loop.done, losses)
            self._end_early(loop)

    def _end_early(self, loop: Loop) -> None:
        curves = self.curves
        why = why_ended(curves.steps, curves.means, loop.settings)
        if why and curves.steps[-1] == loop.done:
            loop.control.end_early(loop, why)

    def _measured(self, loop: Loop, step: int, losses: list[float]) -> None:
        self._note(step, losses)
        loop.history.validation.append([step, *losses])
        sigmas, mean, kind = self.curves.sigmas, self.curves.means[-1], self.curves.kind
        loop.events.emit("validation", step=step, kind=kind, sigmas=sigmas, loss=losses, mean=mean)

    def _note(self, step: int, losses: list[float]) -> None:
        self.curves.steps.append(step)
        self.curves.losses.append(losses)
        log.debug("%s at step %d: %s", self.curves.kind, step, losses)

    @torch.no_grad()
    def measure(self) -> list[float]:
        """The mean loss at each sigma."""
        measured: list[tuple[Batch, Tensor]] = []
        for batch in self._batches():
            latents_BCHW = torch.stack([sample.mean_CHW for _, sample, _ in batch])
            noise_BCHW = torch.stack([self._noise(sample, turn) for _, sample, turn in batch])
            sigma_B = torch.tensor([self.curves.sigmas[level] for level, _, _ in batch])
            here = [onto(self.family.device, each) for each in (latents_BCHW, noise_BCHW, sigma_B)]
            samples = [sample for _, sample, _ in batch]
            references = references_of(samples)
            text = self.captions.features([sample.caption for sample in samples], references)
            velocity_BCHW = with_fallback(
                self.family.transformer,
                partial(velocity, self.family, noisy(*here), here[2], text, references),
            )
            weights_B1HW = weights_of(samples, self.family.device)
            errors_BCHW = weighted((velocity_BCHW - (here[1] - here[0])).square(), weights_B1HW)
            errors = errors_BCHW.mean(dim=(1, 2, 3))
            measured.append((batch, errors))
        totals = [0.0] * len(self.curves.sigmas)
        for batch, errors in measured:  # now: reading waits for the device
            for (level, _, _), error in zip(batch, errors.tolist(), strict=True):
                totals[level] += error / ITEMS
        return totals

    def _batches(self) -> list[Batch]:
        """Batches of items with one shape, at most as large as the training's."""
        groups: dict[torch.Size, Batch] = {}
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
        return draw_noise(shape, self.settings.seed, f"validation {sample.name}", turn, 0)


def measure_fit(loop: Loop) -> Curves:
    """The losses on training images of the base model, and of the weights that are saved."""
    fit = Validation(loop, [])
    with untrained(loop):
        fit._note(0, fit.measure())
    with loop.averaged():
        fit._note(loop.done, fit.measure())
    return fit.curves


@contextmanager
def untrained(loop: Loop) -> Iterator[None]:
    """Context in which the model is the base: the LoRA changes nothing, tokens are zero.

    A full training's parameters have the base model's values, and are in CPU memory meanwhile.
    """
    own = [] if loop.full is None else loop.full.parameters()
    with torch.no_grad():
        trained = [(each, each.to("cpu", copy=True)) for each in own]
        trained += [(each, each.clone()) for each in loop.parameters[len(own) :]]
        if loop.full is not None:
            for parameter, original in zip(own, loop.full.originals(), strict=True):
                parameter.copy_(original)
        if loop.lora is not None:
            loop.lora.undo()
        for row in loop.rows:
            row.zero_()
        try:
            yield
        finally:
            for parameter, value in trained:
                parameter.copy_(value)


def _quantiles(levels: NoiseLevels, shape_CHW: torch.Size, draws: int = 999) -> list[float]:
    """Sigma at `QUANTILES`, from samples that are the same in every run."""
    random = generator(0, "quantiles")
    sigmas = sorted(levels.draw(shape_CHW, random) for _ in range(draws))
    return [sigmas[int(quantile * draws)] for quantile in QUANTILES]
