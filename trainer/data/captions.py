"""Chooses the caption of each image from all places that may have one.

In this order: NAME.txt, NAME.caption and other text files, NAME.json, tables, default.txt of the
folder, the name of the folder (`10_TOK robot`), `default_caption`.
"""

import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from adapters.files.containers import Unusable
from families.redact import safe_name
from trainer.data.caption_files import (
    CaptionFile,
    Sidecars,
    folder_caption,
    one_line,
    read_caption,
)
from trainer.data.caption_tables import Names, NoCaptions, read_json, read_table
from trainer.data.findings import Finding
from trainer.data.mapped_file import Content
from trainer.data.members import (
    MAX_CAPTION_BYTES,
    TABLE_SUFFIXES,
    listed,
    printable,
    stem_of,
    suffix_of,
)

# Folders of kohya's scripts, `10_robot` or `1024px_10_robot`: repeats, and a caption. In `01_front`
# the number is for sorting.
_REPEATS = re.compile(r"(?:\d+px_)?([1-9]\d{0,2})_(.+)")


@dataclass(frozen=True)
class Caption:
    """The caption of an image as it is written."""

    text: str  # on one line; empty for `default_caption`
    file: str = ""  # that contains it; the folder's name with a slash; empty for `default_caption`
    others: tuple[str, ...] = ()  # further captions of the same image


@dataclass
class Captions:
    """The captions of a dataset, and what was found on the way."""

    of: dict[str, Caption] = field(default_factory=dict)  # by image
    read: dict[str, CaptionFile] = field(default_factory=dict)  # caption files that were read
    named: set[str] = field(default_factory=set)  # files that are named after an image
    problems: list[Finding] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)  # files that look like captions, and why
    differing: dict[str, tuple[str, ...]] = field(default_factory=dict)  # files, by image
    rows: dict[str, set[str]] = field(default_factory=dict)  # images with a row, by table
    lost_rows: dict[str, list[str]] = field(default_factory=dict)  # without an image, by table
    wordless: list[str] = field(default_factory=list)  # folders whose names have no subject

    def warnings(self) -> Iterator[Finding]:
        """What the user should know."""
        if self.differing:
            pairs = [" and ".join(files) for files in self.differing.values()]
            yield Finding(
                f"captions of the same image differ, and the first is used: {listed(pairs)}",
                tuple(self.differing),
                "its captions differ, and the first is used",
            )
        several = [name for name, each in self.of.items() if each.others]
        if several:
            count = f"{len(several)} images have" if len(several) > 1 else "1 image has"
            yield Finding.of_all(
                f"{count} several captions, which take turns",
                several,
                level=logging.INFO,
            )
        for table, rows in self.lost_rows.items():
            shown = [printable(safe_name(each)[:200]) for each in rows]  # may be URLs with tokens
            yield Finding(f"{table} has rows that match no image, or several: {listed(shown)}")
        for table, images in self.rows.items():
            folder = PurePosixPath(table).parent
            without = [
                name
                for name, each in self.of.items()
                if not each.file and folder in PurePosixPath(name).parents and name not in images
            ]
            if without and images:
                yield Finding(f"{table} has no row for {listed(without)}", tuple(without))
        if self.wordless:
            yield Finding(
                f"names of folders are not used as captions, because they do not contain TOK: "
                f"{listed(self.wordless)}"
            )


def repeats_of(image: str) -> int:
    """How often an image is used, by the name of its folder."""
    match = _REPEATS.fullmatch(PurePosixPath(image).parent.name)
    return int(match[1]) if match is not None else 1


def choose_captions(
    files: Mapping[str, Content],
    images: Sequence[str],
    others: Collection[str] = (),
    names_subject: Callable[[str], bool] | None = None,
    roots: Mapping[str, str] | None = None,
) -> Captions:
    """The captions of `images`.

    others: images that are not trained on, which may have captions, too.
    names_subject: whether a text mentions the subject, of runs with a placeholder token. Names of
        folders that don't are no captions.
    roots: as in `Sidecars`.
    """
    found, doubled = Captions(), list[str]()
    sidecars, stems = Sidecars(files, doubled, roots), {stem_of(name) for name in images}
    found.problems += map(Finding, doubled)
    found.named = {file for name in (*images, *others) for file in sidecars.of(name)}
    rows = _table_rows(files, [*images, *others], found)
    folders: dict[str, str] = {}
    for name in images:
        # Each source with its texts, those that count more first.
        own = [(file, texts) for file in sidecars.of(name) if (texts := _texts(found, files, file))]
        own += rows.get(name, [])
        texts_of = {file: tuple(map(one_line, texts)) for file, texts in own}
        if len({texts[0] for texts in texts_of.values()}) > 1:
            found.differing[name] = tuple(texts_of)
        if own:
            file, (text, *others) = next(iter(texts_of.items()))
            found.of[name] = Caption(text, file, tuple(others))
            continue
        default = folder_caption(files, name, stems)
        if default is not None and (texts := _texts(found, files, default)):
            found.of[name] = Caption(one_line(texts[0]), default)
            continue
        found.of[name] = Caption("")
        match = _REPEATS.fullmatch(PurePosixPath(name).parent.name)
        if match is not None:
            folder, text = str(PurePosixPath(name).parent), one_line(match[2])
            if names_subject is None or names_subject(text):
                found.of[name] = Caption(text, f"{folder}/")
            else:
                folders[folder] = text
    found.wordless = list(folders)
    return found


def _texts(found: Captions, files: Mapping[str, Content], name: str) -> list[str]:
    """The captions in a file of one image or folder; notes why there are none."""
    if name in found.unread:
        return []
    try:
        if suffix_of(name) == ".json":
            if len(files[name]) > MAX_CAPTION_BYTES:
                raise NoCaptions(f"it is longer than {MAX_CAPTION_BYTES:,} bytes")
            texts, guess = read_json(name, files[name])
            found.read.setdefault(name, CaptionFile(name, one_line(texts[0]), guess))
            return texts
        if name not in found.read:
            found.read[name] = read_caption(name, files[name])
    except NoCaptions as error:
        found.unread[name] = str(error)
        return []
    except Unusable as error:
        found.problems.append(Finding.of(name, error))  # of each image that has this file
        return []
    return [found.read[name].text] if found.read[name].text else []


def _table_rows(
    files: Mapping[str, Content], images: Sequence[str], found: Captions
) -> dict[str, list[tuple[str, list[str]]]]:
    """The captions in tables by image, each with the table's name."""
    rows: dict[str, list[tuple[str, list[str]]]] = {}
    names = Names(images)
    order = [
        name for suffix in TABLE_SUFFIXES for name in sorted(files) if suffix_of(name) == suffix
    ]
    for name in order:
        if name in found.named:
            continue
        try:
            table = read_table(name, files[name])
        except NoCaptions as error:
            found.unread[name] = str(error)
            continue
        except Unusable as error:
            found.problems.append(Finding.of(name, error))
            continue
        meant = {written: names.find(written, name) for written in table.rows}
        if not any(meant.values()):
            found.unread[name] = "it names no image of this dataset"
            continue
        if table.guess is not None:
            (first, *_), *_ = table.rows.values()
            found.read[name] = CaptionFile(name, one_line(first), table.guess)
        found.rows[name] = {image for found_images in meant.values() for image in found_images}
        lost = [written for written, found_images in meant.items() if not found_images]
        if lost:
            found.lost_rows[name] = lost
        for written, found_images in meant.items():
            for image in found_images:
                rows.setdefault(image, []).append((name, table.rows[written]))
    return rows
