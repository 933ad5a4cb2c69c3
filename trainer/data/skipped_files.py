"""Files of a dataset that are not trained on, with the reason: formats, videos, archives."""

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
    """A line for each reason why files are left out. `known` are files that others speak of."""
    names = [name for name in sorted(files) if name not in known]
    raw = [name for name in names if suffix_of(name) in RAW_SUFFIXES]
    others = [n for n in names if suffix_of(n) in UNREAD_IMAGE_SUFFIXES and n not in raw]
    if others:
        yield f"left out, because only JPEG, PNG and WebP are read: {listed(others)}"
    if raw:
        yield (
            f"left out, because raw files of cameras are not read: {listed(raw)}; export them as "
            "JPEG"
        )

    # A phone's live photo has a short video of the same name beside it.
    images = [n for n in names if suffix_of(n) in IMAGE_SUFFIXES | UNREAD_IMAGE_SUFFIXES]
    stems = {stem_of(name).casefold() for name in images}
    videos = [
        name
        for name in names
        if suffix_of(name) in VIDEO_SUFFIXES and stem_of(name).casefold() not in stems
    ]
    if videos:
        yield f"left out, because videos are not read: {listed(videos)}"
    archives = [name for name in names if suffix_of(name) in _ARCHIVES]
    if archives:
        yield f"left out, because archives in a dataset are not opened: {listed(archives)}"

    spoken_of = {*images, *videos, *archives}
    hidden = []
    for name in names:
        if name in spoken_of or suffix_of(name) == ".txt" or suffix_of(name) in VIDEO_SUFFIXES:
            continue
        head = bytes(files[name])
        what = next((what for signature, what in SIGNATURES if signature.match(head)), "")
        if "image" in what and not (what.startswith("a BMP") and head.isascii()):
            hidden.append(f"{name} ({what})")
    if hidden:
        yield (
            f"left out, because the suffix is not an image's: {listed(hidden)}; rename them to end "
            "in .jpg, .png or .webp"
        )
