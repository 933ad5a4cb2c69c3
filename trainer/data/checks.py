"""All checks of a dataset before a run: warnings and suggestions, never errors.

`check_dataset` reads a dataset; `check_examples` checks one that has been read, for a run and for
the web page.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from families.registry import family_of
from families.tokens import name_subject
from trainer.data.buckets import cover, crop, nearest_bucket
from trainer.data.caption_checks import caption_checks
from trainer.data.caption_files import one_line
from trainer.data.dataset import DatasetError, Example, Findings, examine
from trainer.data.file_lists import opener
from trainer.data.findings import Finding
from trainer.data.image_checks import image_checks
from trainer.data.members import read_files, stem_of
from trainer.data.pairs import NO_INSTRUCTION, pair_checks
from trainer.data.trigger import name_trigger
from trainer.dataset_names import dataset_name
from trainer.settings import PRESETS, Preset, Settings

log = logging.getLogger(__name__)

# Checks of captions that should differ, of images that should be described.
DESCRIPTIONS = ("equal-captions", "names-the-subject", "class-word")
LOGGED = 5  # findings of one check in a run's log, such as groups of near-duplicates


@dataclass(frozen=True)
class Purpose:
    """What the images are for, as far as the checks depend on it."""

    words: tuple[str, ...] = ()  # tokens or trigger word of the subject; empty: none
    resolution: int | None = None  # pixels, the largest; None: not known, sizes are not checked
    multiple: int = 16  # `Base.size_multiple`
    images: tuple[int, int] | None = None  # usual numbers, least and most
    prefix: str = ""  # of every caption
    suffix: str = ""
    token_limit: int | None = None  # of the text encoder; None: counted elsewhere
    mirrored: bool = False  # images are trained on as mirror images, too
    # Whether transparency is trained on; None: the base has no alpha channel, or it is a mask.
    transparency: bool | None = None

    @classmethod
    def of(cls, settings: Settings, token_limit: int | None = None) -> "Purpose":
        """The purpose of a run."""
        preset = PRESETS.get(settings.preset or "", Preset(purpose=""))
        subjects = max(1, len(settings.tokens))
        word = settings.trigger_word
        return cls(
            words=settings.tokens or ((word,) if word else ()),
            resolution=max(settings.resolutions),
            multiple=settings.base.size_multiple,
            images=(preset.images[0] * subjects, preset.images[1] * subjects),
            prefix=settings.caption_prefix,
            suffix=settings.caption_suffix,
            token_limit=token_limit,
            mirrored=settings.horizontal_flip,
            transparency=(
                settings.keep_transparency
                if settings.base.alpha_channel and settings.masks != "alpha"
                else None
            ),
        )


def check_examples(examples: Sequence[Example], purpose: Purpose) -> list[Finding]:
    """Warnings about the examples of a dataset that has been read; suggestions have level INFO."""
    own = {each.name: _own_text(each.caption, purpose) for each in examples if each.caption_file}
    of_captions = list(caption_checks(own, purpose.words, purpose.token_limit))
    if any(each.controls for each in examples):  # an instruction may be the same for all pairs
        of_captions = [each for each in of_captions if each.check not in DESCRIPTIONS]
    return [
        *_number(len(examples), purpose),
        *image_checks(examples, purpose.resolution, purpose.multiple),
        *pair_checks(examples),
        *of_captions,
        *(_mirrored(examples) if purpose.mirrored else ()),
        *_transparent(examples, purpose.transparency),
    ]


def log_checks(examples: Sequence[Example], settings: Settings) -> None:
    """Logs what the checks find, at the start of a run. Long captions are counted elsewhere."""
    name, count = dataset_name(settings.dataset), Counter[str]()
    for each in check_examples(examples, Purpose.of(settings)):
        count[each.check] += 1
        if count[each.check] <= LOGGED:
            log.log(each.level, "%s: %s", name, each.text)
    more = sum(max(0, each - LOGGED) for each in count.values())
    if more:
        log.warning("%s: %d more findings like these; zeroprior check lists all", name, more)


def _own_text(caption: str, purpose: Purpose) -> str:
    """A caption without what is put before and after every one."""
    prefix, suffix = (
        one_line(name_subject(text, purpose.words[0]) if purpose.words else text)
        for text in (purpose.prefix, purpose.suffix)
    )
    return caption.removeprefix(prefix).removesuffix(suffix).strip()


def _number(count: int, purpose: Purpose) -> Iterator[Finding]:
    least, most = purpose.images or (count, count)
    if 0 < count < least:  # none at all is a problem of its own
        yield Finding(
            f"{count} image{'s' * (count != 1)}, fewer than the usual {least} to {most}, so the "
            "images themselves may be memorized; add some",
            check="few-images",
        )
    elif count > most:
        yield Finding(
            f"{count} images, more than the usual {least} to {most}, so each is seen rarely; keep "
            "the best, or set more steps",
            check="many-images",
            level=logging.INFO,
        )


_SIDES = re.compile(r"\b(?:left|right)\b", re.IGNORECASE)


def _mirrored(examples: Sequence[Example]) -> Iterator[Finding]:
    yield Finding(
        "horizontal_flip also trains on mirror images: text is then learned as mirror writing, and "
        "both sides of a face or a logo are mixed",
        check="mirrored",
    )
    sided = [each.name for each in examples if _SIDES.search(each.caption)]
    if sided:
        text = "captions with left or right, which are wrong for their mirror images"
        yield Finding.of_all(text, sided, check="mirrored")


def _transparent(examples: Sequence[Example], kept: bool | None) -> Iterator[Finding]:
    names = [each.name for each in examples if each.transparent]
    about = partial(Finding.of_all, names=names, check="transparency", level=logging.INFO)
    if kept and not names:
        yield Finding(
            "keep_transparency is on, but no image is transparent; switch it off, or use PNG or "
            "WebP files with an alpha channel",
            check="transparency",
        )
    elif kept:
        yield about("transparent images, which are trained on as they are")
    elif names and kept is not None:
        yield about(
            "transparent images become white there; keep_transparency trains on their transparency"
        )


@dataclass(frozen=True)
class DatasetCheck:
    """What `check_dataset` has found."""

    settings: Settings
    findings: Findings  # of reading the files, and of the checks

    @property
    def problems(self) -> list[Finding]:
        """Why the dataset cannot be used."""
        return self.findings.problems

    @property
    def warnings(self) -> list[Finding]:
        """Warnings, worst first."""
        return [each for each in self.findings.warnings if each.level >= logging.WARNING]

    @property
    def suggestions(self) -> list[Finding]:
        """Findings that may be as they should."""
        suggested = (each for each in self.findings.warnings if each.level < logging.WARNING)
        return [each for each in suggested if each.check]

    def about(self, finding: Finding) -> list[str]:
        """The images that a finding is about, also by their caption files."""
        by_file: dict[str, list[str]] = {}
        for each in self.findings.examples:
            by_file.setdefault(each.name, []).append(each.name)
            file = each.caption_file or f"{stem_of(each.name)}.txt"
            by_file.setdefault(file, []).append(each.name)
        names = (name for file in finding.names for name in by_file.get(file, ()))
        return list(dict.fromkeys(names))

    def data(self) -> dict[str, Any]:
        """Everything in JSON types."""
        examples = self.findings.examples
        kinds = {
            "problem": self.problems,
            "warning": self.warnings,
            "suggestion": self.suggestions,
        }
        return {
            "dataset": str(self.settings.dataset),
            "base_model": self.settings.base.name,
            "resolution": max(self.settings.resolutions),
            "token": self.settings.subject,
            "usable": not self.problems,
            "captions": {
                "own": sum(bool(each.caption_file) for each in examples),
                "default": sum(not each.caption_file for each in examples),
            },
            "findings": [
                {
                    "kind": kind,
                    "check": each.check or None,
                    "text": each.text,
                    "images": self.about(each),
                }
                for kind, found in kinds.items()
                for each in found
            ],
            "images": [self.image_data(each) for each in examples],
        }

    def image_data(self, example: Example) -> dict[str, Any]:
        """An image's sizes in pixels, crop and measures."""
        settings, measures = self.settings, example.measures
        size = example.width, example.height
        bucket = nearest_bucket(*size, max(settings.resolutions), settings.base.size_multiple)
        left, top, right, bottom = box = crop(*size, bucket)
        return {
            "name": example.name,
            "caption": example.caption,
            "caption_file": example.caption_file or None,
            "mask": example.mask_file or None,
            "controls": [each.name for each in example.controls],
            "width": example.width,
            "height": example.height,
            "bucket": [bucket.width, bucket.height],
            "crop": [round(each) for each in box],
            "kept": round((right - left) * (bottom - top) / (example.width * example.height), 4),
            "upscaled": round(max(1.0, cover(*size, bucket)), 3),
            "sharpness": measures.sharpness if measures else None,
            "lost_db": measures.lost_db if measures else None,
            "fineness": measures.fineness if measures else None,
        }


def check_dataset(settings: Settings) -> DatasetCheck:
    """Reads the dataset of a run's settings and checks it; problems do not raise.

    Images are decoded once, in threads. Raises `NoSpace` if the disk for temporary files is full.
    """
    path = Path(os.path.abspath(settings.dataset))
    problems: list[str] = []
    bad: list[str] = [] if settings.skip_bad_images else problems
    files = read_files(path, problems, bad, opener(settings.control_folders))
    found = examine(
        files,
        *settings.caption_rules,
        problems=[Finding(each) for each in problems],
        bad=[Finding(each) for each in bad] if settings.skip_bad_images else [],
    )
    faults, examples = list(dict.fromkeys(found.problems)), found.examples
    if settings.subject is None:
        # Without those that need an instruction instead of default_caption.
        mute = {name for each in faults if each.check == NO_INSTRUCTION for name in each.names}
        told = [each for each in examples if each.name not in mute]
        try:
            word, foreign = settings.trigger_word, settings.foreign_captions
            named = {each.name: each for each in name_trigger(told, word, foreign)}
            examples = [named.get(each.name, each) for each in examples]
        except DatasetError as error:
            faults.append(Finding(str(error)))
    limit = family_of(settings.base).max_text_tokens
    warnings = [*found.warnings, *check_examples(examples, Purpose.of(settings, limit))]
    found = replace(found, examples=examples, problems=faults, warnings=warnings)
    return DatasetCheck(settings, found)


def by_image(check: DatasetCheck) -> Mapping[str, list[tuple[str, Finding]]]:
    """The findings about each image with their kind: problem, warning, suggestion."""
    found: dict[str, list[tuple[str, Finding]]] = {}
    for kind, those in (
        ("problem", check.problems),
        ("warning", check.warnings),
        ("suggestion", check.suggestions),
    ):
        for each in those:
            for name in check.about(each):
                found.setdefault(name, []).append((kind, each))
    return found
