"""Finds files that look like captions and are not read, with the reason."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import PurePosixPath

from trainer.data.captions import Captions
from trainer.data.mapped_file import Content
from trainer.data.members import (
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    OTHER_SUFFIXES,
    TABLE_SUFFIXES,
    UNREAD_IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    listed,
    stem_of,
    suffix_of,
)

# Tables, and captions of one image or of all, in formats that are not read.
_SUFFIXES = {
    *(".parquet", ".arrow", ".xml", ".yaml", ".yml", ".toml", ".xlsx", ".xls", ".ods"),
    *(".captions", ".wd14cap", ".tag", ".text", ".prompt", ".prompts", ".desc", ".description"),
    *(".docx", ".doc", ".rtf", ".odt", ".srt"),
}


def unread_captions(
    files: Mapping[str, Content], images: Collection[str], found: Captions
) -> Iterator[str]:
    """One line for each reason why files are not read. `images` are all images among the files."""
    others = {name for name in files if suffix_of(name) in UNREAD_IMAGE_SUFFIXES}
    stems = {stem_of(name) for name in (*images, *others)}
    folders = {PurePosixPath(name).parent for name in images}
    orphans = [
        name
        for name in sorted(files)
        if suffix_of(name) in CAPTION_SUFFIXES
        and name not in found.named
        and stem_of(name) not in stems
        and not (name.endswith("default.txt") and PurePosixPath(name).parent in folders)
    ]
    folded = {stem.casefold(): stem for stem in stems}
    cased = [name for name in orphans if stem_of(name).casefold() in folded]
    if cased:
        right = folded[stem_of(cased[0]).casefold()]
        yield (
            f"not read, because upper and lower case differ from the image's name: "
            f"{listed(cased)}; rename {cased[0]} to {right}{suffix_of(cased[0])}"
        )
    lone = [name for name in orphans if name not in cased]
    if lone:
        yield (
            f"captions without an image of the same name, not read: {listed(lone)}; a caption "
            "is NAME.txt next to NAME.jpg"
        )
    for reason in dict.fromkeys(found.unread.values()):
        names = [name for name in sorted(found.unread) if found.unread[name] == reason]
        yield f"these look like captions and are not read, because {reason}: {listed(names)}"
    unread = [name for name in sorted(files) if _looks_like_captions(name, files[name], stems)]
    if unread:
        yield (
            f"these look like captions and are not read: {listed(unread)}; write each caption into "
            "NAME.txt next to NAME.jpg"
        )


def _looks_like_captions(name: str, head: Content, stems: set[str]) -> bool:
    """Whether a file in an unknown format may contain captions."""
    suffix = suffix_of(name)
    known = IMAGE_SUFFIXES | UNREAD_IMAGE_SUFFIXES | VIDEO_SUFFIXES | OTHER_SUFFIXES
    if suffix in known or suffix in (*CAPTION_SUFFIXES, *TABLE_SUFFIXES, ".mask"):
        return False
    if suffix in _SUFFIXES:
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
