"""What was found in a dataset, as data: the message, and the files that it is about."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inference.prompts import foreign_syntax
from trainer.data.caption_files import CaptionFile
from trainer.data.members import listed
from trainer.settings import TRIGGER_MARK


@dataclass(frozen=True)
class Finding:
    """A problem or a warning. A dataset with a problem cannot be used."""

    text: str  # a line of the message, without the dataset's name
    names: tuple[str, ...] = ()  # images or caption files; empty: the whole dataset
    beside: str = ""  # the same beside one of the files, if `text` lists them
    level: int = logging.WARNING  # of the log, if it is not a problem; INFO is a suggestion
    check: str = ""  # the check that found it, for programs and the sheet: near-duplicates

    @classmethod
    def of(cls, name: str, reason: object) -> "Finding":
        """About one file."""
        return cls(f"{name}: {reason}", (name,), str(reason))

    @classmethod
    def of_all(cls, beside: str, names: Sequence[str], after: str = "", **more: Any) -> "Finding":
        """About several files, which the message lists."""
        text = f"{beside}: {listed(list(names))}{after}"
        return cls(text, tuple(names), f"{beside}{after}", **more)


def caption_findings(
    captions: Mapping[str, str], read: Mapping[str, CaptionFile], default_caption: str
) -> Iterator[Finding]:
    """The number of images with a caption file, and warnings about caption files.

    captions: the caption file of each image; empty for `default_caption`.
    """
    default = [name for name, file in captions.items() if not file]
    use = f"{default_caption!r}" if default_caption.strip() else "no caption"
    own = f"{len(captions) - len(default)} with a caption file"
    names = f": {listed(default)}" if len(default) < len(captions) else ""
    rest = f", {len(default)} use {use}{names}" if default else ""
    yield Finding(f"{len(captions)} images: {own}{rest}", level=logging.INFO)
    empty = sorted(name for name, each in read.items() if not each.text)
    if empty:
        text = f"empty caption files, {use} is used instead"
        yield Finding.of_all(text, empty, check="empty-captions")
    guessed = sorted(name for name, each in read.items() if each.guess and each.text)
    if guessed:
        shown = listed([f"{name} ({read[name].text[:80]!r})" for name in guessed])
        text = f"not UTF-8, read as {read[guessed[0]].guess}; if these texts are wrong, save them"
        beside = f"{text} as UTF-8"
        yield Finding(f"{beside}: {shown}", tuple(guessed), beside, check="encoding")


def foreign_findings(texts: Mapping[str, str], subject: bool) -> Iterator[Finding]:
    """Warns of captions with syntax of other programs."""
    foreign = {
        name: found[0]
        for name, text in texts.items()
        # [trigger] has a meaning with a trigger word (`trainer.data.trigger`).
        if (found := [part for part in foreign_syntax(text) if subject or part != TRIGGER_MARK])
    }
    if foreign:
        beside = "captions contain syntax of other programs, which is read as plain text"
        shown = listed([f"{name} ({part})" for name, part in foreign.items()])
        yield Finding(f"{beside}: {shown}", tuple(foreign), beside, check="foreign-syntax")
