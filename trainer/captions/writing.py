"""Writes the captions of a dataset: which images need one, the two passes, what is kept.

Pass 1 asks for the features that all images of a subject share. Pass 2 asks for a caption of each
image without these words. Code puts TOK in, checks each answer, and asks once more if it is wrong.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from families.captioners import Answer, Question
from inference.progress import Progress
from trainer.captions.checks import clean_part, faults, tidy, with_token
from trainer.captions.log import Log, Row, hash_of, hash_of_question, hash_of_set
from trainer.captions.questions import (
    SUBJECT_SET,
    Identity,
    caption_question,
    identity_question,
    read_identity,
)
from trainer.data import Example, stem_of

log = logging.getLogger(__name__)

MOST_THUMBNAILS = 8
THUMBNAIL_PIXELS = 256 * 256
IMAGE_PIXELS = 768 * 768


class Model(Protocol):
    """A loaded vision-language model."""

    def answer(self, questions: Sequence[Question]) -> Sequence[Answer]:
        """Answers questions about images."""


@dataclass(frozen=True)
class Wishes:
    """What the user asks for."""

    purpose: str = SUBJECT_SET  # or STYLE_SET
    kind: str = ""  # the user's word for the subject
    avoid: tuple[str, ...] = ()  # words that captions must not contain; empty: found by pass 1
    replace: bool = False  # also captions of this program that were made with another question
    overwrite: bool = False  # also all other captions


@dataclass(frozen=True)
class Captioned:
    """The result."""

    captions: dict[str, str]  # by image; only those that are to be saved
    kept: list[str]  # images whose caption was not changed
    marked: dict[str, tuple[str, ...]]  # images to look at, and what was wrong
    identity: Identity


class Writer:
    """Writes captions with a model that is loaded when it is first needed."""

    def __init__(
        self,
        log_file: Log,
        wishes: Wishes,
        model_name: str,
        load: Callable[[], tuple[Model, int]],
        progress: Callable[[int, int], None] = lambda *_: None,
    ) -> None:
        """load: returns the model and the number of questions that it takes at once.

        progress: is called with the number of captions written, and of all to write.
        """
        self._log, self._wishes, self._model_name = log_file, wishes, model_name
        self._load, self._progress = load, progress
        self._loaded: tuple[Model, int] | None = None

    def write(self, examples: Sequence[Example], save: Callable[[str, str], None]) -> Captioned:
        """Writes the captions that are missing; renews others as the wishes say.

        examples: with their own captions, empty if they have none.
        save: is called with the name of an image and its caption, as soon as it is known.
        """
        own = {each.name: each.caption for each in examples}
        wanted, kept, stems = list[Example](), list[str](), set[str]()
        for each in examples:
            ours = self._wishes.replace and self._is_ours(each)
            renewed = ours or self._wishes.overwrite
            if own[each.name] and not renewed:
                kept.append(each.name)
            elif stem_of(each.name) not in stems:  # a.jpg and a.png share a.txt
                stems.add(stem_of(each.name))
                wanted.append(each)
        identity = self._identity(examples) if wanted else Identity()
        question = caption_question(self._wishes.purpose, identity)
        rows: dict[str, Row] = {}
        waiting = []
        for each in wanted:
            row = self._log.rows.get(each.name)
            if row is not None and self._fits(row, each, question):
                rows[each.name] = row
                if row.caption and row.caption != own[each.name]:
                    save(each.name, row.caption)
            else:
                waiting.append(each)
        for row in self._asked(waiting, question, identity):
            self._log.write(row)  # first, so that a saved caption is known as ours
            rows[row.image] = row
            if row.caption:
                save(row.image, row.caption)
        captions = {name: row.caption for name, row in rows.items() if row.caption}
        marked = {name: row.faults for name, row in rows.items() if row.faults}
        _report(captions, kept, marked)
        return Captioned(captions, kept, marked, identity)

    def _asked(
        self, examples: Sequence[Example], question: str, identity: Identity
    ) -> Iterator[Row]:
        """The rows of examples, batch by batch."""
        if not examples:
            return
        count, size = len(examples), self._model()[1]
        self._progress(0, count)
        with Progress(total=count, desc="writing captions", unit="caption", lines=True) as bar:
            for start in range(0, count, size):
                for row in self._ask(examples[start : start + size], question, identity):
                    yield row
                    bar.update()
                self._progress(min(start + size, count), count)

    def _is_ours(self, example: Example) -> bool:
        row = self._log.rows.get(example.name)
        return row is not None and row.caption == example.caption

    def _fits(self, row: Row, example: Example, question: str) -> bool:
        """Whether asking again would give the same caption."""
        now = hash_of(example.data), self._model_name, hash_of_question(question)
        return (row.sha256, row.model, row.question) == now

    def _model(self) -> tuple[Model, int]:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def _identity(self, examples: Sequence[Example]) -> Identity:
        """What captions must not mention: the user's words, or those that pass 1 finds."""
        wishes = self._wishes
        if wishes.purpose != SUBJECT_SET or wishes.avoid:
            return Identity(wishes.kind, wishes.avoid)
        key = hash_of_set(examples), self._model_name, wishes.kind
        found = self._log.identity(*key)
        if found is None:
            found = self._find_identity(examples)
            self._log.write_identity(*key, found)
        log.info(
            "captions leave out: %s",
            ", ".join(found.avoid) or "nothing, since no constant features were found",
        )
        return found

    def _find_identity(self, examples: Sequence[Example]) -> Identity:
        step = max(1, len(examples) / MOST_THUMBNAILS)
        chosen = [examples[int(n * step)] for n in range(min(MOST_THUMBNAILS, len(examples)))]
        images = [each.image((512, 512)) for each in chosen]
        fault = ""
        for _ in range(2):
            text = identity_question(len(images), self._wishes.kind, fault)
            [answer] = self._model()[0].answer([Question(text, images, THUMBNAIL_PIXELS)])
            found = read_identity(answer.text, self._wishes.kind)
            if found is not None:
                return found
            fault = "it did not have these two lines"
        log.warning(
            "the features that all images share were not found (the answer was %r); captions may "
            "mention them. Give the words to avoid",
            answer.text[:200],
        )
        return Identity(self._wishes.kind)

    def _ask(self, batch: Sequence[Example], question: str, identity: Identity) -> list[Row]:
        """The rows of a batch: asked together, wrong answers once more."""
        purpose, images = self._wishes.purpose, [each.image((1024, 1024)) for each in batch]
        answers = self._answers(images, [question] * len(batch), identity)
        wrong = [number for number, (_, found, _) in enumerate(answers) if found]
        if wrong:
            texts = [caption_question(purpose, identity, answers[n][1]) for n in wrong]
            second = self._answers([images[number] for number in wrong], texts, identity)
            for number, answer in zip(wrong, second, strict=True):
                answers[number] = answer
        rows = []
        for number, (each, (text, found, finished)) in enumerate(zip(batch, answers, strict=True)):
            kept = clean_part(text, finished, purpose, identity) if found else text
            if kept:
                kept = with_token(kept, purpose, identity)
            elif found:
                found = [*found, "no part of it was usable"]
            facts = each.name, hash_of(each.data), self._model_name, hash_of_question(question)
            rows.append(Row(*facts, kept, tuple(found), 1 + (number in wrong)))
        return rows

    def _answers(
        self, images: Sequence[Image.Image], texts: Sequence[str], identity: Identity
    ) -> list[tuple[str, list[str], bool]]:
        """Tidy answers, their faults, and whether they are finished."""
        asked = [Question(t, [image], IMAGE_PIXELS) for t, image in zip(texts, images, strict=True)]
        found = []
        for answer in self._model()[0].answer(asked):
            text = tidy(answer.text)
            wrong = faults(text, answer.finished, self._wishes.purpose, identity)
            found.append((text, wrong, answer.finished))
        return found


def _report(
    captions: Mapping[str, str], kept: Sequence[str], marked: Mapping[str, Sequence[str]]
) -> None:
    log.info("%d captions written, %d left as they were", len(captions), len(kept))
    for name, found in marked.items():
        log.warning("%s: %s", name, doubt(found))


def doubt(faults: Sequence[str]) -> str:
    """What to do about a caption whose answer was wrong."""
    return f"look at its caption; the answer was wrong twice: {'; '.join(faults)}"
