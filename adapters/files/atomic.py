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
    path.parent.mkdir(parents=True, exist_ok=True)
    part = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
        part = Path(name)
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        os.chmod(part, 0o644)
        os.replace(part, path)
    except OSError as error:
        if error.errno not in FULL or error.filename == str(path):
            raise
        reason = f"no space to write it ({error.strerror}); free some, or write to another disk"
        raise OSError(error.errno, reason, str(path)) from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """As `atomic_path`, for a folder: yields a new one, which then replaces an earlier one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    try:
        yield part
        for file in filter(Path.is_file, part.rglob("*")):
            with file.open("rb") as written:
                os.fsync(written.fileno())
        os.chmod(part, 0o755)
        replace_folder(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def replace_folder(part: Path, path: Path) -> None:
    """Renames a folder, which takes the place of an earlier one: two renames, so not atomic."""
    if not path.is_dir() or path.is_symlink():
        os.replace(part, path)
        return
    earlier = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".earlier"))
    os.replace(path, earlier)
    os.replace(part, path)
    shutil.rmtree(earlier)


def content_hash(path: str | PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
