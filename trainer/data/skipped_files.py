"""Finds files in a dataset that are ignored, with the reason: formats, videos, archives."""

from collections.abc import Collection, Iterator, Mapping

from trainer.data.mapped_file import Content
from trainer.data.members import (
    IMAGE_SUFFIXES,
    RAW_SUFFIXES,
    SIGNATURES,
    UNREAD_IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    listed,
    stem_of,
    suffix_of,
)

_ARCHIVES = {".zip", ".tar", ".gz", ".tgz", ".rar", ".7z", ".bz2", ".xz"}


def left_out(files: Mapping[str, Content], known: Collection[str] = ()) -> Iterator[str]:
    """One line for each reason why files are ignored. `known` are files to skip."""
    names = [name for name in sorted(files) if name not in known]
    raw = [name for name in names if suffix_of(name) in RAW_SUFFIXES]
    others = [n for n in names if suffix_of(n) in UNREAD_IMAGE_SUFFIXES and n not in raw]
    if others:
        yield f"ignored, because only JPEG, PNG and WebP are supported: {listed(others)}"
    if raw:
        yield (
            f"ignored, because raw files of cameras are not supported: {listed(raw)}; export them "
            "as JPEG"
        )

    # A live photo of a phone includes a short video of the same name.
    images = [n for n in names if suffix_of(n) in IMAGE_SUFFIXES | UNREAD_IMAGE_SUFFIXES]
    stems = {stem_of(name).casefold() for name in images}
    videos = [
        name
        for name in names
        if suffix_of(name) in VIDEO_SUFFIXES and stem_of(name).casefold() not in stems
    ]
    if videos:
        yield f"ignored, because videos are not supported: {listed(videos)}"
    archives = [name for name in names if suffix_of(name) in _ARCHIVES]
    if archives:
        yield f"ignored, because archives in a dataset are not opened: {listed(archives)}"

    reported = {*images, *videos, *archives}
    hidden = []
    for name in names:
        if name in reported or suffix_of(name) == ".txt" or suffix_of(name) in VIDEO_SUFFIXES:
            continue
        head = bytes(files[name])
        what = next((what for signature, what in SIGNATURES if signature.match(head)), "")
        if "image" in what and not (what.startswith("a BMP") and head.isascii()):
            hidden.append(f"{name} ({what})")
    if hidden:
        yield (
            f"ignored, because the suffix is not that of an image: {listed(hidden)}; rename them "
            "to .jpg, .png or .webp"
        )
