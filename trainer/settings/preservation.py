"""How much preservation a run has: its weight, and the number and size of its images and rows.

What preservation is: `trainer.learning.preservation`.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from families.tokens import mentions, name_subject
from inference.input_fields import check_length
from trainer.settings.inputs import INPUTS
from trainer.settings.subject_marks import NO_SUBJECT, TRIGGER_MARK, marks_in

if TYPE_CHECKING:
    from trainer.settings.fields import Settings

# What a LoRA changes at one size it changes at another, and a pass at 512 pixels costs a quarter
# of one at 1024.
MAX_RESOLUTION = 512  # pixels, edge of the square
MAX_STEPS = 12  # of an image; more cost time and add points that are alike
MOST_IMAGES = {True: 128, False: 64}  # of other prompts, by `Base.distilled`
MOST_REGULARIZATION = max(MOST_IMAGES.values()) // 2
SUBJECT_IMAGES = 3 / 8  # images of the subject, relative to those of other prompts
LEAST_IMAGES = 8  # of other prompts
EDITS = 1 / 2  # share of edits in a run on pairs, if the model also generates from text alone
ROWS = 1 / 2  # beside a batch, relative to it
SUBJECT_EVERY = 4  # one in so many rows is one of the subject
# The rows begin when the model has learned enough of the subject to generate images of it.
BEGINS = 0.2  # share of the steps
# Costs are relative to the transformer's passes in a step, which are nine tenths of it. The weights
# are frozen, so that a backward pass costs as much as a forward pass.
ROWS_SHARE = 0.5  # the most that the rows add to a step
SHARE = 0.6  # the most that rows and images add to a run, apart from the least number of images

MOST_PROMPTS = 1_000
MOST_LETTERS = 1_000  # of a prompt
MUST_BE = "it must be auto, off, or a number above 0 and at most 10"


@dataclass(frozen=True)
class Extent:
    """The images that a run generates for preservation, and its rows beside a batch."""

    side: int  # pixels; of an edit, edge of the square with as many
    images: int  # of other prompts, before the first step
    subject_images: int  # when the rows begin
    steps: int  # of each image
    rows: int
    every: int  # batches between two with rows; their weight is multiplied by it
    edits: int  # those of the images that are edits of the dataset's control images

    @property
    def edit_share(self) -> float:
        """The share of the images and rows that are edits."""
        return self.edits / self.images


def extent_of(settings: "Settings") -> Extent:
    """The extent of a run's preservation, if it is not off."""
    base, batch = settings.base, settings.batch_size
    side, size, edits = _side(settings), row_size(settings), _edit_share(settings)
    rows = max(1, round(batch * ROWS))
    every = 1 if rows * size <= ROWS_SHARE * batch else 2
    share = SHARE - (1 - BEGINS) * rows * size / (batch * every)
    steps = min(base.inference_steps, MAX_STEPS)
    trained = (settings.steps or base.training_steps.least) * batch * settings.gradient_accumulation
    affordable = int(share * 2 * trained / (size * steps * (1 + SUBJECT_IMAGES)))
    images = min(MOST_IMAGES[base.distilled], max(LEAST_IMAGES, affordable))
    of_subject = round(images * SUBJECT_IMAGES) if subject_words(settings) and not edits else 0
    own_others, own_subject = sort_prompts(settings.preserve_prompts, settings)
    if own_others:  # of pairs these are instructions, beside which the share of edits is the same
        images = min(images, int(len(own_others) / (edits or 1)))
    return Extent(
        side=side,
        images=images,
        subject_images=min(of_subject, len(own_subject) or of_subject),
        steps=steps,
        rows=rows,
        every=every,
        edits=math.ceil(images * edits),
    )


def row_size(settings: "Settings") -> float:
    """The cost of a row, relative to a training image, each with its control images."""
    pixels = sum(edge**2 for edge in settings.resolutions) / len(settings.resolutions)
    beside = settings.pairs * settings.base.reference_resolution**2
    return (_side(settings) ** 2 + _edit_share(settings) * beside) / (pixels + beside)


def _side(settings: "Settings") -> int:
    return min(max(settings.resolutions), MAX_RESOLUTION)


def _edit_share(settings: "Settings") -> float:
    if not settings.pairs:
        return 0.0
    return 1.0 if settings.base.needs_references else EDITS


def most_regularization(settings: "Settings") -> int:
    """The most regularization images that a run uses: instead of half of the generated ones."""
    used = settings.preserve and settings.regularization != "off"
    return extent_of(settings).images // 2 if used else 0


def first_step(settings: "Settings") -> int:
    """The number of steps before the first one with rows."""
    return int(BEGINS * settings.steps)


def weight_of(given: float | str | bool | None, auto: float) -> float:
    """Parses `preserve`; 0 is off. Raises ValueError."""
    text = "auto" if given is None else str(given).strip().lower()
    if text in ("off", "false"):  # YAML reads `off` as false
        return 0.0
    if text in ("", "auto"):
        return auto
    try:
        weight = float(text)
    except ValueError:
        raise ValueError(f"preserve is {str(given)[:80]!r}; {MUST_BE}") from None
    if fault := INPUTS["preserve"].fault("preserve", weight):
        raise ValueError(fault)
    return weight


def wrong_prompts(settings: "Settings") -> Iterator[str]:
    """One line for each of the user's own prompts that cannot be used."""
    prompts = settings.preserve_prompts
    if prompts and not settings.preserve:
        why = "preserve is off"
        if settings.given.preserve == "auto":
            why = "preserve is auto, which is off without a placeholder token or trigger_word"
        yield (
            f"preserve_prompts are given, but {why}; remove them, or set preserve to "
            f"{settings.base.preservation:g}"
        )
    if len(prompts) == 1 and " " not in prompts[0] and PurePath(prompts[0]).suffix:
        yield (
            f"preserve_prompts is {prompts[0][:80]!r}, which looks like a file; give the prompts "
            "themselves, one per line"
        )
    if len(prompts) > MOST_PROMPTS:
        yield (
            f"preserve_prompts has {len(prompts):,} prompts; at most {MOST_PROMPTS:,} are accepted"
        )
    for number, prompt in enumerate(prompts[:MOST_PROMPTS], start=1):
        name = f"preservation prompt {number}"
        try:
            check_length(name, prompt, MOST_LETTERS)
        except ValueError as error:
            yield str(error)
        if marks_in(prompt) and not subject_words(settings):
            yield f"{name} {prompt[:80]!r}: {NO_SUBJECT}"


def sort_prompts(prompts: Iterable[str], settings: "Settings") -> tuple[list[str], list[str]]:
    """The prompts without the subject, and those with it.

    TOK and [trigger] are replaced by the token or trigger word; of several subjects, each in turn.
    Without a token and trigger word, prompts with TOK are not used.
    """
    others: list[str] = []
    of_subject: list[str] = []
    words = subject_words(settings)
    for prompt in prompts:
        if marks_in(prompt):
            if words:
                name = words[len(of_subject) % max(1, len(settings.tokens))]
                of_subject.append(name_subject(prompt.replace(TRIGGER_MARK, name), name))
        elif any(mentions(prompt.lower(), word.lower()) for word in words):
            of_subject.append(prompt)
        else:
            others.append(prompt)
    return others, of_subject


def subject_words(settings: "Settings") -> list[str]:
    """The words that name the subject: tokens first, then the trigger word."""
    return [*settings.tokens, *([settings.trigger_word] if settings.trigger_word else [])]
