"""Reads the files of a dataset, from an archive or a folder.

Archives are untrusted input: names in them are never used as paths, members are read one by one,
and the limits here and in `adapters.files.containers` bound time, memory and disk space.
"""

import os
import re
import tarfile
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath

from adapters.files.containers import (
    Limits,
    Member,
    Unusable,
    is_container,
    is_junk,
    open_container,
    printable,
    safe_parts,
    within,
)
from inference.image_decoding import format_of
from trainer.data.mapped_file import Content, MappedFile, NoSpace

IMAGE_SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp", ".mpo", ".png", ".apng", ".webp"),
    *(".heic", ".heif", ".hif", ".avif", ".tif", ".tiff", ".bmp", ".dib", ".gif"),
    *(".jp2", ".j2k", ".j2c", ".jpf", ".jpx", ".jpc"),
}
RAW_SUFFIXES = {
    *(".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".orf", ".raf"),
    *(".rw2", ".pef", ".srw", ".x3f", ".3fr", ".iiq"),
}
VIDEO_SUFFIXES = {
    *(".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".3gp"),
}
LAYERED_SUFFIXES = {".psd", ".psb", ".xcf", ".kra", ".clip", ".ai", ".svg", ".eps", ".pdf"}
UNREAD_IMAGE_SUFFIXES = (
    RAW_SUFFIXES
    | LAYERED_SUFFIXES
    | {
        *(".jxl", ".jxr", ".ico", ".tga", ".exr", ".hdr", ".dds", ".ppm", ".pgm", ".pbm", ".pnm"),
        *(".qoi", ".heics", ".avifs"),
    }
)
# Captions of one image, the first that it has is used; then .json, then tables of captions.
CAPTION_SUFFIXES = (".txt", ".caption", ".cap", ".wd", ".wdcaption", ".tags")
TABLE_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".json")
# Files with an image's name that are neither: caches of trainers, edits of cameras.
OTHER_SUFFIXES = {".npz", ".npy", ".pt", ".pth", ".safetensors", ".aae", ".xmp"}
ARCHIVE_SUFFIXES = {".zip", ".tar", ".gz", ".tgz", ".rar", ".7z", ".bz2", ".xz"}

# Limits. LoRA datasets have tens to hundreds of images. These limits are far above, but the worst
# archive within them takes only minutes and a few GB.
# Files and folders in the archive, skipped ones included: 10,000 images with their captions, each
# with one more file that macOS adds.
MAX_MEMBERS = 40_100
MAX_TOTAL_BYTES = 2 << 30  # unpacked, all members; images are kept on disk
LIMITS = Limits(MAX_MEMBERS, MAX_TOTAL_BYTES)
MAX_MEMBER_BYTES = 256 << 20  # unpacked, one image
MAX_CAPTION_BYTES = 64 << 10  # far above the limit of the text encoders
MAX_TABLE_BYTES = 8 << 20  # a caption of 800 bytes for each of 10,000 images
HEAD_BYTES = 64  # of a file that is neither an image nor a caption, to recognize its kind

Opener = Callable[[Path], AbstractContextManager[Iterator[Member]]]

# The kind of a file by its first bytes.
SIGNATURES = (
    (re.compile(rb"\xff\xd8\xff"), "a JPEG image"),
    (re.compile(rb"\x89PNG"), "a PNG image"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "a WebP image"),
    (re.compile(rb"GIF8"), "a GIF image"),
    (re.compile(rb"BM"), "a BMP image"),
    (re.compile(rb"II\*\x00|MM\x00\*"), "a TIFF image"),
    (re.compile(rb"....ftyp(hei|hev|mif|msf)", re.DOTALL), "a HEIC image"),
    (re.compile(rb"....ftypavi[fs]", re.DOTALL), "an AVIF image"),
    (re.compile(rb"....ftyp", re.DOTALL), "a video"),
    (re.compile(rb"PK\x03\x04|PK\x05\x06"), "a zip archive"),
    (re.compile(rb"\x1f\x8b"), "a gzip archive"),
    (re.compile(rb"Rar!"), "a RAR archive"),
    (re.compile(rb"7z\xbc\xaf"), "a 7-Zip archive"),
    (re.compile(rb"BZh|\xfd7zXZ"), "a bzip2 or xz archive"),
    (re.compile(rb"\s*<(!doctype|html)", re.IGNORECASE), "a web page, so its download failed"),
    (re.compile(rb"version https://git-lfs"), "a Git LFS pointer, not the file itself"),
    (re.compile(rb"\s*<(svg|\?xml)", re.IGNORECASE), "an SVG drawing or other XML"),
    (re.compile(rb"\xff\x0a|\x00\x00\x00\x0cJXL "), "a JPEG XL image"),
    (re.compile(rb"\xff\x4f\xff\x51|\x00\x00\x00\x0cjP  "), "a JPEG 2000 image"),
    (re.compile(rb"8BPS"), "a Photoshop file"),
    (re.compile(rb"%PDF"), "a PDF"),
    (re.compile(rb"\s*[{\[]\s*[\"{\[]"), "JSON text, such as a server's error message"),
)


def read_files(
    path: Path, problems: list[str], bad: list[str], opened: Opener | None = None
) -> dict[str, Content]:
    """The files of an archive or folder by printable names, without system files.

    opened: opens more kinds of datasets than `members_of` (`trainer.data.file_lists`).

    Problems are added to `problems`, one line each; those of single images to `bad`. Images,
    captions and tables have their content, texts with at most one byte more than the limit; other
    files their first bytes. Images are memory-mapped from disk. Raises `NoSpace` if the disk is
    full.
    """
    files: dict[str, Content] = {}
    images, file = dict[str, slice](), MappedFile("images")
    for name, data in read_members(path, problems, bad, opened):
        files[name] = data
        if is_image(name, data):
            images[name], files[name] = file.add(data), b""
    mapped = file.mapped()
    return files | {name: mapped[place] for name, place in images.items()}


def read_members(
    path: Path, problems: list[str], bad: list[str], opened: Opener | None = None
) -> Generator[tuple[str, bytes], None, None]:
    """Yields the files of `read_files` one at a time, each with its content."""
    seen = set()
    try:
        with (opened or members_of)(path) as members:
            for member in members:
                name = printable(member.name[:200])
                try:
                    parts = safe_parts(member.name)
                    if member.name.endswith("/") or is_junk(parts):
                        continue
                    name = printable("/".join(parts))
                    if name in seen:
                        raise Unusable("is in the archive twice; rename or remove one")
                except Unusable as error:
                    problems.append(f"{name}: {error}")
                    continue
                try:
                    data = _read(member, suffix_of(name))
                except Unusable as error:
                    lines = bad if suffix_of(name) in IMAGE_SUFFIXES else problems
                    lines.append(f"{name}: {error}")
                    continue
                seen.add(name)
                yield name, data
    except Unusable as error:
        problems.append(str(error))
    except NoSpace:
        raise
    except Exception as error:  # parsers may raise any exception on malformed files
        problems.append(f"is damaged or truncated ({error}); pack or upload it again")


def is_image(name: str, head: Content) -> bool:
    """Whether a file is read as an image: by its suffix, or by its first bytes if its suffix has no
    other meaning."""
    return suffix_of(name) in IMAGE_SUFFIXES or (
        can_be_image(name) and format_of(bytes(head[:HEAD_BYTES])) is not None
    )


def can_be_image(name: str) -> bool:
    """Whether a file is read as an image if its content is one."""
    return suffix_of(name) not in _NO_IMAGES


_NO_IMAGES = {
    *(UNREAD_IMAGE_SUFFIXES | VIDEO_SUFFIXES | OTHER_SUFFIXES | ARCHIVE_SUFFIXES),
    *(*CAPTION_SUFFIXES, *TABLE_SUFFIXES),
}


def _read(member: Member, suffix: str) -> bytes:
    if member.refusal:
        raise Unusable(member.refusal)
    if suffix in CAPTION_SUFFIXES:
        limit = MAX_CAPTION_BYTES + 1
    elif suffix in TABLE_SUFFIXES:
        limit = MAX_TABLE_BYTES + 1
    elif suffix in _NO_IMAGES:
        return _head(member)
    else:
        limit = MAX_MEMBER_BYTES
        known = suffix in IMAGE_SUFFIXES
        if not known and not is_image("", _head(member)):
            return _head(member)
        if member.size > limit:
            raise Unusable(f"has more than {limit:,} bytes; save a smaller version")
    data = bytearray()
    try:
        with member.open() as file:
            while chunk := file.read(min(1 << 20, limit - len(data))):
                data += chunk
    except Exception as error:
        raise Unusable(f"cannot be read ({error}); pack the archive again") from error
    if len(data) < min(member.size, limit):
        raise Unusable(f"is truncated ({len(data):,} of {member.size:,} bytes); pack it again")
    return bytes(data)


def _head(member: Member) -> bytes:
    """The first bytes of a file that is not used; empty if it cannot be read."""
    try:
        with member.open() as file:
            return file.read(HEAD_BYTES)
    except Exception:  # it is ignored anyway
        return b""


@contextmanager
def members_of(path: Path) -> Iterator[Iterator[Member]]:
    """The members of an archive or folder, within the limits. Raises `Unusable`."""
    if os.path.isdir(path):
        yield within(_folder_members(path), LIMITS)
        return
    if not os.path.exists(path):  # also a name that is too long for a file system
        raise Unusable("does not exist; pass the path of a zip or tar file, or of a folder")
    if not path.is_file():
        raise Unusable("is not a file; pass the path of a zip or tar file, or of a folder")
    with path.open("rb") as file:
        head = file.read(tarfile.BLOCKSIZE)
    if not is_container(head):
        raise Unusable(f"is not a zip or tar file ({what_is(head)}); pack the images into one")
    with open_container(path, LIMITS) as members:
        yield members


def _folder_members(folder: Path) -> Iterator[Member]:
    top = Path(os.path.realpath(folder))
    linked = {top}  # and folders elsewhere that links lead to: each is read once

    def is_read(path: Path) -> bool:
        if not path.is_symlink():
            return True
        target = Path(os.path.realpath(path))
        if target in linked or top in target.parents or target in top.parents:
            return False
        linked.add(target)
        return True

    for parent, subfolders, names in os.walk(folder, followlinks=True):
        inner = sorted(name for name in subfolders if not name.startswith("."))
        subfolders[:] = [name for name in inner if is_read(Path(parent, name))]
        for name in sorted(names):
            path = Path(parent, name)
            regular = path.is_file()
            yield Member(
                path.relative_to(folder).as_posix(),
                path.stat().st_size if regular else 0,
                None if regular else "is not a file, or is a broken link; remove it",
                lambda path=path: path.open("rb"),  # type: ignore[misc]
            )


@lru_cache(maxsize=1 << 16)  # asked for many times for each file of a dataset
def suffix_of(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


@lru_cache(maxsize=1 << 16)
def stem_of(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def kind_of(head: bytes) -> str | None:
    """The kind of a file by its first bytes; None if it is unknown. A text may begin with BM."""
    for signature, what in SIGNATURES:
        if signature.match(head) and (0 in head or not what.startswith("a BMP")):
            return what
    return None


def what_is(data: bytes) -> str:
    if not data:
        return "it is empty, 0 bytes"
    if (kind := kind_of(data)) is not None:
        return f"it begins like {kind}"
    if not data.strip(b"\0"):
        return "it contains only zeros, so its download or copy failed"
    head = data[:HEAD_BYTES]
    if head.isascii() and " ".join(head.decode().split()).isprintable():
        return "it begins like text"
    return "its content is unknown"


def listed(names: list[str], most: int = 20) -> str:
    """The first names, and the number of the others."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
