"""Preservation: other prompts keep the images that the base model makes of them.

A LoRA that learns a subject from images of nothing else changes every other prompt, too. So before
the LoRA is added, the model generates images, without guidance, of varied prompts that do not
contain the subject. Its noisy latents and velocities at each step become targets. In the loop, some
rows beside each batch ask the model with the LoRA to predict the same velocities. On a distilled
base, the training adapter is merged in both.

Such rows alone also cost the subject in colours and places that its images do not show. So they
begin only when the model has learned some of it, and then it also generates images of the subject
in such places. Some of the rows hold the model to these, as it makes them at that moment.

Regularization images of a dataset take the place of up to half of the images of other prompts.

Everything depends only on settings, seeds, counters and the weights at that moment, which are in
the checkpoints, so a resumed run makes the same targets again. They are in temporary files, and are
not kept for other runs.

Shapes: R rows, C latent channels, H and W latent rows and columns.
"""

import logging
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from families.family import Family
from families.references import References, size_near
from families.transfer import onto
from inference.acceleration import with_fallback
from inference.progress import Progress
from trainer.learning.control import Control
from trainer.learning.distributed import processes
from trainer.learning.features import Captions
from trainer.learning.loss import noisy
from trainer.learning.mapped_tensors import Tensors
from trainer.learning.randomness import generator
from trainer.learning.references import velocity
from trainer.learning.regularization import Kept, side_of
from trainer.learning.samples import Sample, references_of
from trainer.settings import (
    LEAST_IMAGES,
    SUBJECT_EVERY,
    Extent,
    Settings,
    extent_of,
    first_step,
    sort_prompts,
)

log = logging.getLogger(__name__)

PROMPTS = Path(__file__).parent / "preservation_prompts"
# Seeds of images' noise.
FIRST_SEED, FIRST_SUBJECT_SEED, FIRST_KEPT_SEED, FIRST_EDIT_SEED = (
    900_000,
    950_000,
    970_000,
    920_000,
)
WHAT, WHAT_EDITS = "images for preservation", "edits for preservation"
T = TypeVar("T")
Advance = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Prompts:
    """The prompt of each image that a run generates for preservation; none if it is off."""

    others: tuple[str, ...] = ()
    subject: tuple[str, ...] = ()
    kept: tuple[Kept, ...] = ()  # regularization images, whose prompts generate none
    edits: tuple[tuple[str, References], ...] = ()  # instructions and what they edit

    def __bool__(self) -> bool:
        return bool(self.others or self.edits)

    @property
    def all(self) -> tuple[str, ...]:
        """Those of all kinds, without the instructions of edits."""
        return (*self.others, *self.subject, *(each.prompt for each in self.kept))


@dataclass(frozen=True)
class Target:
    """The model's answer at one step of one image."""

    prompt: str
    sigma: float
    latents_CHW: Tensor  # noisy, float32, memory-mapped
    velocity_CHW: Tensor
    references: References | None = None  # of an edit

    @property
    def shapes(self) -> tuple[torch.Size, bool]:
        """Equal for targets that can be stacked."""
        return self.latents_CHW.shape, self.references is None


def shipped_prompts(name: str) -> list[str]:
    """The varied prompts that come with a base model (`Base.preservation_prompts`).

    Those of the subject contain TOK.
    """
    return (PROMPTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def preservation_prompts(
    settings: Settings, kept: Sequence[Kept] = (), samples: Sequence[Sample] = ()
) -> Prompts:
    """The user's own prompts, else those of the base model, with and without the subject.

    If there are more than images, those are used that spread evenly over the list. `kept` are the
    regularization images, each in place of a generated one; `samples` are those of a run on pairs.
    """
    if not settings.preserve:
        return Prompts()
    if settings.pairs:
        return _beside_pairs(settings, samples)
    own_others, own_subject = sort_prompts(settings.preserve_prompts, settings)
    shipped = shipped_prompts(settings.base.preservation_prompts)
    others, of_subject = sort_prompts(shipped, settings)
    if len(others) < LEAST_IMAGES and not own_others:
        log.warning(
            "preserve has little effect: %d prompts of %s do not contain %s; give preserve_prompts",
            *(len(others), settings.base.name),
            " or ".join(settings.tokens) or settings.trigger_word,
        )
    extent = extent_of(settings)
    return Prompts(
        _spread(own_others or others, extent.images - len(kept)),
        _spread(own_subject or of_subject, extent.subject_images),
        tuple(kept),
    )


def _beside_pairs(settings: Settings, samples: Sequence[Sample]) -> Prompts:
    """Other instructions, each for the control images of a pair in turn, and prompts without any,
    if the model generates from them, too."""
    extent, name = extent_of(settings), settings.base.preservation_prompts
    learned = {text.lower() for each in samples for text in each.captions}
    own, _ = sort_prompts(settings.preserve_prompts, settings)
    instructions, _ = sort_prompts(own or shipped_prompts(f"{name}_edits"), settings)
    instructions = [each for each in instructions if each.lower() not in learned]
    prompts, _ = sort_prompts(shipped_prompts(name), settings)
    different = {each.digest: each for each in references_of(samples)}
    chosen = _spread(instructions, extent.edits)
    beside = _spread([*different.values()], len(chosen))
    edits = [(text, beside[k % len(beside)]) for k, text in enumerate(chosen)]
    return Prompts(_spread(prompts, extent.images - extent.edits), edits=tuple(edits))


def _spread(items: Sequence[T], most: int) -> tuple[T, ...]:
    """At most so many of the items, evenly over the list."""
    count = min(most, len(items))
    return tuple(items[number * len(items) // count] for number in range(count))


class Preservation:
    """The targets of a run, and the rows beside each batch that ask for them."""

    def __init__(
        self,
        family: Family,
        settings: Settings,
        captions: Captions,
        prompts: Prompts,
        control: Control | None = None,
    ) -> None:
        """Generates the images of other prompts. The LoRA must not be in the transformer yet.

        `captions` has the features of `prompts`. `control` gets the phases. Raises `NoSpace` if the
        disk is full.
        """
        self.family, self.captions, self.settings = family, captions, settings
        self.prompts, self.extent = prompts, extent_of(settings)
        self.control = control or Control()
        self.first_batch = first_step(settings) * settings.gradient_accumulation
        self.others = self._targets(prompts.others, FIRST_SEED, self.control.phase)
        instructions, beside = [text for text, _ in prompts.edits], [k for _, k in prompts.edits]
        self.others += self._targets(instructions, FIRST_EDIT_SEED, self.control.phase, beside)
        if prompts.kept:
            parts = captions, prompts.kept, self.extent, settings.batch_size
            self.others += with_fallback(family.transformer, lambda: predicted(family, *parts))
        self.subject: list[Target] = []
        # That generated the images of the subject, by name, on the CPU; empty before.
        self.subject_weights: dict[str, Tensor] = {}
        self.last: Tensor | None = None  # the loss of the last rows

    @property
    def last_loss(self) -> float | None:
        """The loss of the last rows; None if there were none. Waits for the device."""
        return None if self.last is None else float(self.last)

    def tokens_in(self, numbers: Iterable[int]) -> set[str]:
        """The tokens in the rows beside these batches, of all processes."""
        with_rows = (each for each in numbers if each % self.extent.every == 0)
        rows = (row for each in with_rows for row in self._rows(each)) if self.subject else ()
        return self.captions.tokens_in(row.prompt for row in rows)

    def generate_subject(self, weights: Mapping[str, Tensor]) -> None:
        """Generates the images of the subject with the model as it is: with these weights.

        Raises `NoSpace` if the disk is full.
        """
        self.subject_weights = {k: each.detach().cpu().clone() for k, each in weights.items()}
        events = self.control.events  # without commands: these wait for the end of the step
        self.subject = self._targets(self.prompts.subject, FIRST_SUBJECT_SEED, events.phase)
        events.phase("training")

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> None:
        """Generates the images of the subject with the weights of a checkpoint, if it has them.

        They are loaded into the `trained` parameters, whose values are lost.
        """
        if weights:
            for name, parameter in trained.items():
                parameter.copy_(weights[name])
            self.generate_subject(trained)

    def add_gradients(self, number: int, batches: int, weights: Mapping[str, Tensor]) -> None:
        """Adds the gradients of the rows beside batch `number`, if it has any."""
        loss = self.weighted_loss(number, batches, weights)
        if loss is not None:
            loss.backward()

    def weighted_loss(
        self, number: int, batches: int, weights: Mapping[str, Tensor]
    ) -> Tensor | None:
        """The loss of the rows beside batch `number`, times its weight; None if it has no rows.

        The loss is divided by `batches`, the number of batches in the step. `weights` are the
        trained ones.
        """
        if number < self.first_batch:
            return None
        if self.prompts.subject and not self.subject:
            self.generate_subject(weights)
        if number % self.extent.every:
            return None
        loss = self.loss(number)
        self.last = loss.detach()
        return loss * (self.settings.preserve * self.extent.every / batches)

    def loss(self, number: int) -> Tensor:
        """Mean squared difference to the wanted velocities in the rows of a batch, float32.

        Of several processes, each has its part of the rows.
        """
        rows, alike = self._rows(number), dict[Hashable, list[Target]]()
        first = self.extent.rows * processes().process_index
        for row, each in enumerate(rows[first : first + self.extent.rows]):
            # All processes must call a sharded model equally often.
            alone = self.settings.pairs and self.family.storage.shard
            alike.setdefault(row if alone else each.shapes, []).append(each)
        of_all = [each.prompt for each in rows]
        return torch.cat([self._errors(each, of_all) for each in alike.values()]).mean()

    def _errors(self, targets: Sequence[Target], of_all: Sequence[str]) -> Tensor:
        """The mean squared difference of each of these targets, which have the same shapes."""
        stacked = (
            torch.stack([each.latents_CHW for each in targets]),
            torch.tensor([each.sigma for each in targets]),
            torch.stack([each.velocity_CHW for each in targets]),
        )
        latents_RCHW, sigma_R, wanted_RCHW = (onto(self.family.device, each) for each in stacked)
        texts = [each.prompt for each in targets]
        beside = [each.references for each in targets if each.references is not None]
        text = self.captions.features(texts, beside, of_all)
        found_RCHW = velocity(self.family, latents_RCHW, sigma_R, text, beside)
        return (found_RCHW - wanted_RCHW).square().mean((1, 2, 3))

    def _rows(self, number: int) -> list[Target]:
        """The targets beside a batch, of all processes."""
        random = generator(self.settings.seed, "preservation", number, 0)
        count, found = self.extent.rows * processes().num_processes, []
        for row in range(count):
            place = number // self.extent.every * count + row
            of = self.subject if self.subject and place % SUBJECT_EVERY == 0 else self.others
            found.append(of[int(torch.randint(len(of), (), generator=random))])
        return found

    def _targets(
        self,
        prompts: Sequence[str],
        first_seed: int,
        advance: Advance,
        beside: Sequence[References] = (),
    ) -> list[Target]:
        batch_size = 1 if beside else self.settings.batch_size
        parts = self.family, self.captions, prompts, self.extent, batch_size, first_seed, advance
        return with_fallback(self.family.transformer, lambda: generated(*parts, beside))


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
    tensors, points = Tensors[int](what), dict[int, tuple[str, float]]()
    with Progress(total=len(prompts), desc=what, unit="image") as progress:
        for first in range(0, len(prompts), batch_size):
            batch, beside = (x[first : first + batch_size] for x in (prompts, references))
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
                    points[place] = prompt, float(sigma)
                latents_RCHW = latents_RCHW + (following - sigma).to(latents_RCHW) * velocity_RCHW
            progress.update(len(batch))
            advance(what, first + len(batch), len(prompts))
    mapped = tensors.mapped()
    edited = [references[place // extent.steps] if references else None for place in sorted(points)]
    return [
        Target(*points[place], *mapped[place], each)
        for place, each in zip(sorted(points), edited, strict=True)
    ]


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
    return [Target(k.prompt, sigma, *mapped[n]) for n, (k, sigma) in enumerate(points)]
