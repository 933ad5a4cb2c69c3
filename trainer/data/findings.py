"""What was found in a dataset, as data: the message, and the files that it is about."""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from inference.prompts import foreign_syntax
from trainer.data.caption_files import CaptionFile
from trainer.data.members import listed, stem_of
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

    captions: the caption file or folder of each image; empty for `default_caption`.
    """
    default = [name for name, file in captions.items() if not file]
    folder = sum(file.endswith("/") for file in captions.values())
    use = f"{default_caption!r}" if default_caption.strip() else "no caption"
    own = f"{len(captions) - len(default) - folder} with a caption file"
    own += f", {folder} with the name of their folder" if folder else ""
    names = f": {listed(default)}" if len(default) < len(captions) else ""
    rest = f", {len(default)} use {use}{names}" if default else ""
    images = f"{len(captions)} image{'s' * (len(captions) != 1)}"
    yield Finding(f"{images}: {own}{rest}", level=logging.INFO)
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


def foreign_findings(texts: Mapping[str, str]) -> Iterator[Finding]:
    """Warns of captions with syntax of other programs."""
    foreign = {
        name: found[0]
        for name, text in texts.items()
        # [trigger] is the subject, as TOK is.
        if (found := [part for part in foreign_syntax(text) if part != TRIGGER_MARK])
    }
    if foreign:
        beside = "captions contain syntax of other programs, which is read as plain text"
        shown = listed([f"{name} ({part})" for name, part in foreign.items()])
        yield Finding(f"{beside}: {shown}", tuple(foreign), beside, check="foreign-syntax")


def repeat_findings(repeats: Mapping[str, int]) -> Iterator[Finding]:
    """Says that images are not used equally often, by the names of their folders."""
    if len(set(repeats.values())) > 1:
        folders = {str(PurePosixPath(name).parent): n for name, n in repeats.items()}
        shown = [f"{folder} {n}" for folder, n in folders.items()]
        yield Finding(f"repeats by the names of folders: {listed(shown)}", check="repeats")


def description_findings(
    described: Sequence[str], captions: Mapping[str, str], files: Collection[str]
) -> Iterator[Finding]:
    """Says that there are descriptions in image files or in XMP files, which are not used.

    captions: the caption file of each image. A warning only if an image has none.
    """
    stems = {stem for name in captions for stem in (stem_of(name), name)}
    beside = [name for name in sorted(files) if name.lower().endswith(".xmp")]
    names = [*described, *(name for name in beside if stem_of(name) in stems)]
    if names:
        needed = not all(captions.get(name) for name in described)
        beside_it = "descriptions in image files and XMP are not used as captions"
        finding = Finding.of_all(beside_it, names)
        yield replace(finding, level=logging.WARNING if needed else logging.INFO)
