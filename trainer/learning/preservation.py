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

In a run on pairs, the model edits the dataset's control images by other instructions. If it also
generates from prompts alone, so are some of the rows. There are none of the subject.

Everything depends only on settings, seeds, counters and the weights at that moment, which are in
the checkpoints, so a resumed run makes the same targets again. They are in temporary files, and are
not kept for other runs.

Shapes: R rows, C latent channels, H and W latent rows and columns.
"""

import logging
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from families.family import Family
from families.references import References
from families.transfer import onto
from inference.acceleration import with_fallback
from trainer.learning.control import Control
from trainer.learning.distributed import processes
from trainer.learning.features import Captions
from trainer.learning.preservation_targets import (
    FIRST_EDIT_SEED,
    FIRST_SEED,
    FIRST_SUBJECT_SEED,
    Advance,
    Target,
    generated,
    predicted,
)
from trainer.learning.randomness import generator
from trainer.learning.references import velocity
from trainer.learning.regularization import Kept
from trainer.learning.samples import Sample, references_of
from trainer.settings import (
    LEAST_IMAGES,
    SUBJECT_EVERY,
    Settings,
    extent_of,
    first_step,
    sort_prompts,
)

log = logging.getLogger(__name__)

PROMPTS = Path(__file__).parent / "preservation_prompts"
T = TypeVar("T")


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
    if len(instructions) < min(LEAST_IMAGES, extent.edits):
        log.warning(
            "preserve has little effect: %d of its instructions are neither captions of the "
            "dataset nor mention the subject; give preserve_prompts",
            len(instructions),
        )
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
        if not prompts:
            return []
        batch_size = 1 if beside else self.settings.batch_size
        parts = self.family, self.captions, prompts, self.extent, batch_size, first_seed, advance
        return with_fallback(self.family.transformer, lambda: generated(*parts, beside))
