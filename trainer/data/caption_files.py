"""Reads caption files: `photo.txt` is the caption of `photo.jpg`.

`unread_captions` finds other files that look like captions, for a warning.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from adapters.files.containers import Unusable
from trainer.data.mapped_file import Content
from trainer.data.members import (
    IMAGE_SUFFIXES,
    MAX_CAPTION_BYTES,
    UNREAD_IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    listed,
    stem_of,
    suffix_of,
)
from trainer.encodings import decode

# Tables and lists of captions, with any name.
_TABLES = {
    *(".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".xml", ".yaml", ".yml"),
    *(".toml", ".xlsx", ".xls", ".ods"),
}
# Captions of one image, or of all.
_TEXTS = {
    *(".caption", ".captions", ".cap", ".wd", ".wdcaption", ".wd14cap", ".tag", ".tags", ".text"),
    *(".prompt", ".prompts", ".desc", ".description", ".docx", ".doc", ".rtf", ".odt", ".srt"),
}
# Files with an image's name that are never captions: caches of trainers, edits of cameras.
_NO_CAPTIONS = {".npz", ".npy", ".pt", ".pth", ".safetensors", ".aae", ".xmp", ".mask"}


@dataclass(frozen=True)
class CaptionFile:
    """A caption file: its text on one line, maybe empty."""

    name: str
    text: str
    guess: str | None  # the encoding, if it was guessed


def captions_by_stem(files: Mapping[str, Content], problems: list[str]) -> dict[str, str]:
    """Names of the caption files, by folder and name without the suffix."""
    captions: dict[str, str] = {}
    for name in sorted(files):
        if suffix_of(name) != ".txt":
            continue
        if stem_of(name) in captions:
            first = captions[stem_of(name)]
            problems.append(f"{name}: is a second caption in addition to {first}; remove one")
        captions[stem_of(name)] = name
    return captions


def read_caption(name: str, data: Content) -> CaptionFile:
    """Reads one caption file. Raises `Unusable`."""
    if len(data) > MAX_CAPTION_BYTES:
        raise Unusable(f"is longer than {MAX_CAPTION_BYTES:,} bytes; shorten this caption")
    text, guess = decode(bytes(data))
    return CaptionFile(name, one_line(text), guess)


def one_line(text: str) -> str:
    """The text's lines, joined by spaces."""
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def unread_captions(files: Mapping[str, Content], captions: Mapping[str, str]) -> Iterator[str]:
    """One line for each kind of file that looks like captions and is not read."""
    images = {n for n in files if suffix_of(n) in IMAGE_SUFFIXES | UNREAD_IMAGE_SUFFIXES}
    stems = {stem_of(name) for name in images}
    folded = {stem.casefold(): stem for stem in stems}

    # .txt files without an image of that name.
    orphans = sorted(name for stem, name in captions.items() if stem not in stems)
    doubled = [name for name in orphans if stem_of(name) in images]
    if doubled:
        yield (
            f"not read, because of the image's suffix in the name: {listed(doubled)}; rename "
            f"{doubled[0]} to {stem_of(stem_of(doubled[0]))}.txt"
        )
    cased = [name for name in orphans if stem_of(name).casefold() in folded and name not in doubled]
    if cased:
        right = folded[stem_of(cased[0]).casefold()]
        yield (
            f"not read, because upper and lower case differ from the image's name: "
            f"{listed(cased)}; rename {cased[0]} to {right}.txt"
        )
    others = [name for name in orphans if name not in {*doubled, *cased}]
    if others:
        yield (
            f"captions without an image of the same name, not read: {listed(others)}; a caption "
            "is NAME.txt next to NAME.jpg"
        )

    # Other files.
    unread = sorted(name for name in files if _looks_like_captions(name, files[name], stems))
    second = [name for name in unread if stem_of(name) in captions and stem_of(name) in stems]
    if second:
        used = captions[stem_of(second[0])]
        yield (
            f"captions are only read from .txt files ({used} instead of {second[0]}); not read: "
            f"{listed(second)}"
        )
    alone = [name for name in unread if name not in second]
    if alone:
        yield (
            f"these look like captions and are not read: {listed(alone)}; write each caption into "
            "NAME.txt next to NAME.jpg"
        )

    # Folders of kohya's scripts.
    parents = {PurePosixPath(name).parent for name in images}
    repeats = sorted({str(each) for each in parents if re.fullmatch(r"\d{1,3}_.+", each.name)})
    if repeats:
        yield (
            f"repeats and captions in the names of folders are not read: {listed(repeats)}; every "
            "image is used equally often"
        )


def _looks_like_captions(name: str, head: Content, stems: set[str]) -> bool:
    """Whether a file that is not read may contain captions."""
    suffix = suffix_of(name)
    images = IMAGE_SUFFIXES | UNREAD_IMAGE_SUFFIXES | VIDEO_SUFFIXES
    if suffix in images | _NO_CAPTIONS | {".txt"}:
        return False
    if suffix in _TABLES | _TEXTS:
        return True
    path = PurePosixPath(name)
    words = {"caption", "captions", "metadata", "prompts", "tags", "labels", "descriptions"}
    named = stem_of(name) in stems or stem_of(stem_of(name)) in stems
    return (named or path.stem.lower() in words) and bool(head) and _is_text(bytes(head))


def _is_text(head: bytes) -> bool:
    """Whether a file's first bytes are text in some encoding, without control characters."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return True
    return not any(each < 9 or 13 < each < 32 for each in head)
