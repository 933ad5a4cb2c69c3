"""Finds files in a dataset that are ignored, with the reason: formats, videos, archives."""

from collections.abc import Collection, Iterator, Mapping, Sequence

from inference.image_decoding import READABLE
from trainer.data.auxiliary_images import Group
from trainer.data.findings import Finding
from trainer.data.mapped_file import Content
from trainer.data.members import (
    ARCHIVE_SUFFIXES,
    CAPTION_SUFFIXES,
    HEAD_BYTES,
    LAYERED_SUFFIXES,
    OTHER_SUFFIXES,
    RAW_SUFFIXES,
    UNREAD_IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    kind_of,
    listed,
    stem_of,
    suffix_of,
)

# Kinds of images that are not read: a clause, the suffixes, and what to do.
_KINDS = (
    ("JPEG XL is not supported", {".jxl"}, "export them as JPEG or PNG"),
    ("raw files of cameras are not supported", RAW_SUFFIXES, "export them as JPEG"),
    ("files of image editors are not supported", LAYERED_SUFFIXES, "export them as PNG"),
    ("their format is not supported", UNREAD_IMAGE_SUFFIXES, "export them as JPEG or PNG"),
)


def left_out(files: Mapping[str, Content], images: Collection[str] = ()) -> Iterator[Finding]:
    """One line for each reason why files are ignored. `images` are read."""
    names = [name for name in sorted(files) if name not in images]
    rest = names
    for why, suffixes, what_to_do in _KINDS:
        found = [name for name in rest if suffix_of(name) in suffixes]
        rest = [name for name in rest if name not in found]
        if found:
            yield Finding(f"ignored, because {why}: {listed(found)}; {what_to_do}")

    # A live photo of a phone includes a short video of the same name, and its edits as a file.
    unread = [name for name in names if suffix_of(name) in UNREAD_IMAGE_SUFFIXES]
    stems = {stem_of(name).casefold() for name in (*images, *unread)}
    videos = [name for name in names if suffix_of(name) in VIDEO_SUFFIXES]
    live = [name for name in videos if stem_of(name).casefold() in stems]
    alone = [name for name in videos if name not in live]
    if alone:
        yield Finding(f"ignored, because videos are not supported: {listed(alone)}")
    phone = len(live) + sum(suffix_of(name) == ".aae" for name in names)
    if phone:
        yield Finding(f"{phone} files of Live Photos are ignored (.mov, .aae)", level=20)
    archives = [name for name in names if suffix_of(name) in ARCHIVE_SUFFIXES]
    if archives:
        yield Finding(f"ignored, because archives in a dataset are not opened: {listed(archives)}")

    reported = {*unread, *videos, *archives}
    hidden = []
    for name in names:
        if name in reported or suffix_of(name) in (*CAPTION_SUFFIXES, *OTHER_SUFFIXES):
            continue
        what = kind_of(bytes(files[name][:HEAD_BYTES])) or ""
        if "image" in what:
            hidden.append(f"{name} ({what})")
    if hidden:
        yield Finding(
            f"ignored, because their format is not supported: {listed(hidden)}; export them as "
            "JPEG or PNG"
        )


def why_empty(
    files: Mapping[str, Content], images: Collection[str], groups: Sequence[Group]
) -> list[Finding]:
    """The content of a dataset without training images, one line each."""
    left = [group for group in groups if not group.used]
    if any(name in images for group in left for name in group.names):
        text = "contains no training image; all images look like masks, samples or similar"
        return [Finding(text), *(Finding(str(group)) for group in left), *left_out(files, images)]
    shown = listed(sorted(files)) or "it is empty"
    text = f"contains no readable image ({shown}); add images: {READABLE}"
    return [Finding(text), *left_out(files, images)]


def is_beside(name: str, groups: Sequence[Group]) -> bool:
    """Whether a file belongs to ignored images."""
    return any(
        name in group.names or (group.folder and name.startswith(f"{group.folder}/"))
        for group in groups
        if not group.used
    )
