"""Files that appear all at once."""

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import IO

# What a disk, a quota or a limit on file sizes answers when there is no more room.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def temporary_space(what: str) -> Iterator[None]:
    """Names the temporary folder and how to choose another where a block finds no room in it."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            said = f"no room for {what} ({error.strerror}); free some, or set TMPDIR to a folder"
            said += " that has more"
            raise OSError(error.errno, said, tempfile.gettempdir()) from error
        if error.errno == errno.ENOENT and error.filename is None:  # what `tempfile` itself raises
            said = f"no temporary folder for {what}; set TMPDIR to one that can be written to"
            raise OSError(error.errno, said) from error
        raise


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to that takes the place of `path` when the block ends well.

    Whatever happens on the way, power failure included, `path` holds the whole new content or
    what it held before. Nothing is left beside it unless the process is killed; that is a hidden
    `.part`. Raises OSError naming `path` where there is no room for it.
    """
    with atomic_path(path) as part, part.open("wb") as file:
        yield file


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """The same as `atomic_file` for libraries that write to a path: that of an empty file."""
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
        said = f"no room to write it ({error.strerror}); free some, or write to another disk"
        raise OSError(error.errno, said, str(path)) from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def content_hash(path: str | PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
