"""Reads untrusted zip and tar files, member by member and within limits.

Names in the file are never used as paths: a member is only read as bytes. `Limits` bounds the time,
memory and disk space that a malicious file can take, before it takes them.
"""

import gzip
import io
import re
import stat
import tarfile
import tempfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

ZIP_STARTS = (b"PK\x03\x04", b"PK\x05\x06")
GZIP_START = b"\x1f\x8b"
JUNK_NAMES = {"__macosx", "thumbs.db", "desktop.ini"}

MAX_NAME_LENGTH = 1000  # characters
MAX_READ_BYTES = 8 << 20  # one read by a parser; the directory of a zip is the largest
MAX_PACKING_RATIO = 100  # unpacked / packed; neither photographs nor weights shrink like that
RATIO_FREE_BYTES = 1 << 20  # of one member; flat images or blank text may compress better
GZIP_FREE_BYTES = 32 << 20  # the same of a whole tar.gz, with the padding around its members


class Unusable(Exception):
    """A member or file that cannot be used. The message is the end of a sentence "FILE …"."""


@dataclass(frozen=True)
class Limits:
    """Limits of a file's content, checked before it is unpacked."""

    members: int  # files and folders, skipped ones included
    total_bytes: int  # unpacked, all members together


@dataclass(frozen=True)
class Member:
    """A file or folder in a container, as its header describes it. Unverified until it is read."""

    name: str  # in the container; a folder's ends with a slash
    size: int  # bytes, by the header
    refusal: str | None  # why it must not be read
    open: Callable[[], IO[bytes]]


def is_container(head: bytes) -> bool:
    """Whether a file with these first 512 bytes is a zip, a tar or a gzip, whatever its name."""
    return head.startswith((*ZIP_STARTS, GZIP_START)) or _is_tar_header(head)


@contextmanager
def open_container(path: Path, limits: Limits) -> Iterator[Iterator[Member]]:
    """The members of a zip, tar or tar.gz, which can be read within the context.

    Raises `Unusable` beyond the limits, and any exception of the standard library for a damaged
    file: catch `Exception`.
    """
    with path.open("rb", buffering=0) as raw:
        head = raw.read(tarfile.BLOCKSIZE)
        raw.seek(0)
        if head.startswith(ZIP_STARTS):
            with zipfile.ZipFile(_BoundedReader(raw, 2 * limits.total_bytes)) as zipped:
                yield within(_zip_members(zipped), limits)
            return
        most, reach = 2 * limits.total_bytes, None
        if head.startswith(GZIP_START):
            reach = GZIP_FREE_BYTES + MAX_PACKING_RATIO * path.stat().st_size
            # By type, GzipFile is a buffered reader; here it is used as a raw one.
            raw = cast(io.FileIO, gzip.GzipFile(fileobj=raw))
        file = _BoundedReader(raw, most)
        with tarfile.open(fileobj=file, mode="r:") as tarred:
            yield within(_tar_members(tarred, file, reach), limits)


def folder_members(folder: Path, limits: Limits) -> Iterator[Member]:
    """The files in a folder and in the folders in it, as members. Raises `Unusable`."""
    files = (each for pattern in ("*", "*/*") for each in sorted(folder.glob(pattern)))
    members = (
        Member(
            each.relative_to(folder).as_posix(),
            each.stat().st_size,
            None,
            lambda each=each: each.open("rb"),  # type: ignore[misc]
        )
        for each in files
        if each.is_file()
    )
    return within(members, limits)


class Unpacked(io.RawIOBase):
    """A seekable member, unpacked up to the last position that was read.

    The data is kept in an unnamed temporary file, which disappears with the process. Raises
    `Unusable` if the member is shorter than the container's header claims.
    """

    def __init__(self, packed: IO[bytes], size: int) -> None:
        self._packed, self._size = packed, size
        self._file = tempfile.TemporaryFile()
        self._got, self._at = 0, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(start + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._unpack(min(self._at + len(buffer), self._size))
        self._file.seek(self._at)
        read = self._file.readinto(buffer)  # type: ignore[attr-defined]
        self._at += read
        return int(read)

    def close(self) -> None:
        self._file.close()
        super().close()

    def _unpack(self, until: int) -> None:
        self._file.seek(self._got)
        while self._got < until:  # never beyond the size in the container's header
            block = self._packed.read(min(self._size - self._got, 1 << 20))
            if not block:
                raise Unusable(
                    f"is truncated ({self._got:,} of {self._size:,} bytes); pack it again"
                )
            self._file.write(block)
            self._got += len(block)
        self._file.flush()


def within(members: Iterable[Member], limits: Limits) -> Iterator[Member]:
    """Yields the members. Raises `Unusable` if their number or total size exceeds the limits."""
    total = 0
    for count, member in enumerate(members, start=1):
        total += max(member.size, 0)
        if count > limits.members:
            raise Unusable(f"contains more than {limits.members:,} files; remove some")
        if total > limits.total_bytes:
            raise Unusable(
                f"unpacks to more than {limits.total_bytes:,} bytes up to "
                f"{printable(member.name[:200])}; remove files or make them smaller"
            )
        yield member


def safe_parts(name: str) -> list[str]:
    """Folders and file name of a member. Raises `Unusable` for paths outside of the archive."""
    # Windows packs with backslashes; macOS writes é as two characters, others as one.
    name = unicodedata.normalize("NFC", name[: MAX_NAME_LENGTH + 1].replace("\\", "/"))
    if len(name) > MAX_NAME_LENGTH:
        raise Unusable(f"has a name of more than {MAX_NAME_LENGTH:,} characters; rename it")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or re.match("[A-Za-z]:/", name) or ".." in parts:
        raise Unusable("has a path outside of the archive; pack it with relative names")
    if not parts and not name.endswith("/"):
        raise Unusable("is a file without a name; pack the archive again")
    return parts


def is_junk(parts: list[str]) -> bool:
    """Whether a file was created by the operating system, such as Thumbs.db."""
    return any(part.startswith(".") or part.lower() in JUNK_NAMES for part in parts)


def printable(name: str) -> str:
    """The name with line breaks, terminal codes, direction marks and lone surrogates escaped."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def _zip_members(archive: zipfile.ZipFile) -> Iterator[Member]:
    for info in archive.infolist():
        yield Member(
            info.filename,
            info.file_size,
            None if info.filename.endswith("/") else _zip_refusal(info),
            lambda info=info: archive.open(info),  # type: ignore[misc]
        )


def _zip_refusal(info: zipfile.ZipInfo) -> str | None:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        return "is a link or device; pack the file itself"
    if info.flag_bits & 0x1:
        return "is encrypted; pack the archive without a password"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is packed in an unusual way; pack the archive again as an ordinary zip"
    packed = max(info.compress_size, 1)
    if info.file_size > max(RATIO_FREE_BYTES, MAX_PACKING_RATIO * packed):
        return (
            f"unpacks to {info.file_size:,} bytes from {packed:,}, which images and weights never "
            "do; remove it"
        )
    return None


def _tar_members(
    archive: tarfile.TarFile, file: "_BoundedReader", reach: int | None
) -> Iterator[Member]:
    """reach: the limit of unpacked bytes of a gzip, against bombs; None for a plain tar."""
    for info in archive:
        if info.size < 0:
            raise Unusable("is damaged (a negative size); pack or upload it again")
        if reach is not None and info.offset_data + info.size > reach:  # before it is unpacked
            raise Unusable(
                f"is compressed more than {MAX_PACKING_RATIO}:1 up to "
                f"{printable(info.name[:200])}, which images and weights never are; pack it again"
            )
        plain = info.isdir() or (info.isreg() and not info.issparse())
        yield Member(
            info.name + "/" if info.isdir() else info.name,
            info.size,
            None if plain else "is a link, device or sparse file; pack the file itself",
            lambda info=info: archive.extractfile(info),  # type: ignore[misc, arg-type]
        )
    # tarfile treats a broken header as the end. The real end is a block of zeros.
    file.seek(archive.offset)  # type: ignore[attr-defined]
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise Unusable("is damaged or truncated (no end mark); pack or upload it again")
    while file.read(MAX_READ_BYTES):  # so that gzip verifies its checksum
        if reach is not None and file.tell() > reach:
            raise Unusable("has too much data after its end mark; pack it again")


def _is_tar_header(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return len(head) == tarfile.BLOCKSIZE and not any(head)
    return True


class _BoundedReader(io.BufferedReader):
    """Limits each read and their sum, since parsers trust the sizes in headers."""

    def __init__(self, raw: io.RawIOBase, most: int) -> None:
        super().__init__(raw)
        self._left = most

    def read(self, size: int | None = -1, /) -> bytes:
        most = MAX_READ_BYTES + 1
        data = super().read(most if size is None or size < 0 else min(size, most))
        self._left -= len(data)
        if len(data) > MAX_READ_BYTES or self._left < 0:
            raise Unusable("has an oversized directory or header; pack it again")
        return data
