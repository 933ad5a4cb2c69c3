"""Atomic writes."""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import IO

# Errors of a full disk, a quota or a limit on file sizes.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def temporary_space(what: str) -> Iterator[None]:
    """Adds the temporary folder, and how to choose another, to errors of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            reason = f"no space for {what} ({error.strerror}); free disk space, or set TMPDIR to a"
            reason += " folder with more"
            raise OSError(error.errno, reason, tempfile.gettempdir()) from error
        if error.errno == errno.ENOENT and error.filename is None:  # raised by `tempfile`
            reason = f"no temporary folder for {what}; set TMPDIR to a writable folder"
            raise OSError(error.errno, reason) from error
        raise


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file for writing that replaces `path` when the context ends without an error.

    In all cases, including a power failure, `path` has either the whole new content or the old one.
    Only a killed process leaves a partial file, a hidden `.part`. Raises OSError naming `path` if
    the disk is full.
    """
    with atomic_path(path) as part, part.open("wb") as file:
        yield file


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """As `atomic_file`, for libraries that write to a path: yields the path of an empty file."""
    _make_parent(path)
    part = None
    try:
        with naming_full_disk(path):
            handle, name = tempfile.mkstemp(
                dir=path.parent, prefix=f".{path.name}.", suffix=".part"
            )
            os.close(handle)
            part = Path(name)
            yield part
            with part.open("rb") as written:
                os.fsync(written.fileno())
            os.chmod(part, 0o644)
            os.replace(part, path)
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """The same for a folder: yields an empty one, which replaces `path` when the context ends.

    A folder at `path` is removed. Files and the folder are readable for all, as with `atomic_file`.
    """
    _make_parent(path)
    part = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    try:
        with naming_full_disk(path):
            yield part
            for each in part.rglob("*"):
                if each.is_file():
                    with each.open("rb") as written:
                        os.fsync(written.fileno())
                each.chmod(0o644 if each.is_file() else 0o755)
            part.chmod(0o755)
            replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        reason = f"cannot be written, since {error.filename} is not a folder; name another"
        raise NotADirectoryError(errno.ENOTDIR, reason, str(path)) from error


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Adds `path` and what to do to errors of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL or error.filename == str(path):
            raise
        reason = f"no space to write it ({error.strerror}); free some, or write to another disk"
        raise OSError(error.errno, reason, str(path)) from error


def check_space(path: Path, needed: int) -> None:
    """Raises OSError if the disk of a file or folder that does not exist yet has too little space.

    needed: bytes.
    """
    folder = next(each for each in path.absolute().parents if each.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        reason = f"{needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free"
        raise OSError(errno.ENOSPC, f"{reason}; free some, or write to another disk", str(path))


def replace(part: Path, path: Path) -> None:
    """Renames a file or folder, which takes the place of an earlier one.

    Of a folder these are two renames, so not atomic: a killed process can leave the earlier folder
    under a name of temporary files.
    """
    if not path.is_dir():
        part.replace(path)
        return
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    path.replace(old)  # an empty folder is replaced
    part.replace(path)
    shutil.rmtree(old)


def content_hash(path: str | PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
