"""Reads the files of a dataset, from an archive or a folder, into memory.

Archives come from strangers: nothing is ever extracted to disk, members are read one by one, and
the limits below bound what a hostile one can cost.
"""

import gzip
import io
import os
import re
import stat
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp"}
JUNK_NAMES = {"__macosx", "thumbs.db", "desktop.ini"}

# Limits. LoRA datasets have tens to hundreds of pictures; these are far above, and small enough
# that the worst archive within them costs minutes and a few GB, not the machine.
MAX_MEMBERS = 10_000  # files and folders in the archive, skipped ones included
MAX_TOTAL_BYTES = 2 << 30  # unpacked, all members; pictures stay in memory until encoded
MAX_MEMBER_BYTES = 256 << 20  # unpacked, one picture
MAX_CAPTION_BYTES = 64 << 10  # many times what a text encoder reads
MAX_PACKING_RATIO = 100  # unpacked / packed; photographs hardly shrink at all
RATIO_FREE_BYTES = 1 << 20  # small members may be packed better: plain drawings, blank text
MAX_NAME_LENGTH = 1000  # characters
MAX_READ_BYTES = 4 << 20  # one read by a parser; a zip directory of MAX_MEMBERS needs half

# What a file with a misleading name turns out to be, from its first bytes.
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
)


class Unusable(Exception):
    """What is wrong with one member, and what to do; becomes one line of a DatasetError."""


@dataclass(frozen=True)
class _Member:
    name: str  # as it is written in the archive; a folder's ends with a slash
    size: int  # bytes, as the archive claims
    refusal: str | None  # why it must not be read
    open: Callable[[], IO[bytes]]


def read_files(path: Path, problems: list[str]) -> dict[str, bytes]:
    """The files of an archive or folder by their cleaned names, without junk.

    Pictures and texts come with their content, of which at most one byte more than allowed; other
    files, which are never opened, with none.
    """
    files: dict[str, bytes] = {}
    total = 0
    try:
        for count, member in enumerate(_members(path), start=1):
            total += max(member.size, 0)
            if count > MAX_MEMBERS:
                raise Unusable(f"holds more than {MAX_MEMBERS:,} files; use fewer pictures")
            if total > MAX_TOTAL_BYTES:
                raise Unusable(
                    f"unpacks to more than {MAX_TOTAL_BYTES:,} bytes; "
                    "use fewer or smaller pictures and leave other files out"
                )
            name = _printable(member.name[:200])
            try:
                parts = _safe_parts(member.name)
                if member.name.endswith("/"):
                    continue
                if any(part.startswith(".") or part.lower() in JUNK_NAMES for part in parts):
                    continue
                name = _printable("/".join(parts))
                if member.refusal:
                    raise Unusable(member.refusal)
                if name in files:
                    raise Unusable("is in the archive twice; rename or remove one")
                files[name] = _read(member, suffix_of(name))
            except Unusable as error:
                problems.append(f"{name}: {error}")
    except Unusable as error:
        problems.append(str(error))
    except Exception as error:  # hostile structures make the parsers raise whatever they trip over
        problems.append(f"is damaged or cut off ({error}); make or upload it again")
    return files


def _read(member: _Member, suffix: str) -> bytes:
    if suffix in IMAGE_SUFFIXES:
        limit = MAX_MEMBER_BYTES
        if member.size > limit:
            raise Unusable(f"has more than {limit:,} bytes; save it smaller")
    elif suffix == ".txt":
        limit = MAX_CAPTION_BYTES + 1
    else:
        return b""
    data = bytearray()
    try:
        with member.open() as file:
            while chunk := file.read(min(1 << 20, limit - len(data))):
                data += chunk
    except Exception as error:
        raise Unusable(f"cannot be read ({error}); pack the archive again") from error
    if len(data) < min(member.size, limit):
        raise Unusable(f"is cut off ({len(data):,} of {member.size:,} bytes); pack it again")
    return bytes(data)


def _members(path: Path) -> Iterator[_Member]:
    if path.is_dir():
        yield from _folder_members(path)
        return
    if not path.exists():
        raise Unusable("does not exist; give the path of a zip or tar file, or of a folder")
    if not path.is_file():
        raise Unusable("is not a file; give the path of a zip or tar file, or of a folder")

    with path.open("rb", buffering=0) as raw:
        head = raw.read(tarfile.BLOCKSIZE)
        raw.seek(0)
        if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            yield from _zip_members(_BoundedReader(raw))
        elif head.startswith(b"\x1f\x8b"):
            # GzipFile is a buffered reader by type, and raw enough to be read through another.
            unpacked = cast(io.RawIOBase, gzip.GzipFile(fileobj=raw))
            yield from _tar_members(_BoundedReader(unpacked))
        elif _is_tar_header(head):
            yield from _tar_members(_BoundedReader(raw))
        else:
            raise Unusable(f"is not a zip or tar file ({what_is(head)}); pack the pictures in one")


def _folder_members(folder: Path) -> Iterator[_Member]:
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            regular = path.is_file()
            yield _Member(
                path.relative_to(folder).as_posix(),
                path.stat().st_size if regular else 0,
                None if regular else "is not a file or leads nowhere; remove it",
                lambda path=path: path.open("rb"),  # type: ignore[misc]
            )


def _zip_members(file: "_BoundedReader") -> Iterator[_Member]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            yield _Member(
                info.filename,
                info.file_size,
                None if info.is_dir() else _zip_refusal(info),
                lambda info=info: archive.open(info),  # type: ignore[misc]
            )


def _zip_refusal(info: zipfile.ZipInfo) -> str | None:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        return "is a link or device; put the file itself in"
    if info.flag_bits & 0x1:
        return "is encrypted; pack the archive without a password"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is packed in an unusual way; pack the archive again as an ordinary zip"
    packed = max(info.compress_size, 1)
    if info.file_size > max(RATIO_FREE_BYTES, MAX_PACKING_RATIO * packed):
        return f"unpacks to {info.file_size:,} bytes from {packed:,}, as no picture does; remove it"
    return None


def _tar_members(file: "_BoundedReader") -> Iterator[_Member]:
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for info in archive:
            if info.size < 0:
                raise Unusable("is damaged (a negative size); make or upload it again")
            plain = info.isdir() or (info.isreg() and not info.issparse())
            yield _Member(
                info.name + "/" if info.isdir() else info.name,
                info.size,
                None if plain else "is a link, device or sparse file; put the file itself in",
                lambda info=info: archive.extractfile(info),  # type: ignore[misc, arg-type]
            )
        # tarfile takes a broken header for the end. The true end is a block of zeros.
        file.seek(archive.offset)  # type: ignore[attr-defined]
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise Unusable("is damaged or cut off (no end mark); make or upload it again")
        while file.read(MAX_READ_BYTES):  # lets gzip check its sum
            pass


def _is_tar_header(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return len(head) == tarfile.BLOCKSIZE and not any(head)
    return True


class _BoundedReader(io.BufferedReader):
    """Bounds each read and their sum, because parsers believe the sizes that headers claim."""

    def __init__(self, raw: io.RawIOBase) -> None:
        super().__init__(raw)
        self._taken = 0

    def read(self, size: int | None = -1, /) -> bytes:
        most = MAX_READ_BYTES + 1
        data = super().read(most if size is None or size < 0 else min(size, most))
        self._taken += len(data)
        if len(data) > MAX_READ_BYTES or self._taken > 2 * MAX_TOTAL_BYTES:
            raise Unusable("has an oversized directory or header; pack the pictures again")
        return data


def _safe_parts(name: str) -> list[str]:
    """Folders and file name of a member. Raises Unusable for names that lead elsewhere."""
    # Windows packs with backslashes; macOS writes é as two characters, others as one.
    name = unicodedata.normalize("NFC", name[: MAX_NAME_LENGTH + 1].replace("\\", "/"))
    if len(name) > MAX_NAME_LENGTH:
        raise Unusable("has an overlong name; rename it")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or re.match("[A-Za-z]:/", name) or ".." in parts:
        raise Unusable("has a path that leads out of the archive; pack it with plain names")
    return parts


def _printable(name: str) -> str:
    """Safe in logs and JSON: no line breaks, terminal codes, direction marks or half characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def suffix_of(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def stem_of(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def what_is(data: bytes) -> str:
    if not data:
        return "it is empty, 0 bytes"
    for signature, what in SIGNATURES:
        if signature.match(data):
            return f"it begins like {what}"
    return "its content is unknown"
