"""A small disk of its own, seen by this process alone, to find out what a full disk does.

A tmpfs in a mount namespace of the calling thread. Needs Linux and the right to mount.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NEW_NAMESPACE, _PRIVATE, _RECURSIVE, _DETACH = 0x00020000, 1 << 18, 1 << 14, 2


class NotAllowed(OSError):
    """This process may not mount anything."""


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise NotAllowed(number, f"{name}: {os.strerror(number)}")


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """Inside, `folder` is a disk of so many bytes. Raises `NotAllowed`.

    The calling thread, and those that it starts, stay in the namespace of their own afterwards,
    which is like the old one. Linux also gives them a working folder of their own: `os.chdir` no
    longer moves the process's other threads.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = os.fsencode(folder)
    _call("unshare", _NEW_NAMESPACE)
    _call("mount", b"none", b"/", None, _PRIVATE | _RECURSIVE, None)
    _call("mount", b"tmpfs", place, b"tmpfs", 0, f"size={size}".encode())
    try:
        yield
    finally:
        _call("umount2", place, _DETACH)


def fill(folder: Path, left: int = 0) -> Path:
    """Takes all space of the folder's disk but `left` bytes. Gives the file that takes it."""
    path = folder / "something-large"
    with path.open("ab") as file:
        status = os.statvfs(folder)
        free = status.f_bavail * status.f_frsize - left
        if free > 0:
            os.posix_fallocate(file.fileno(), file.tell(), free)
    return path
