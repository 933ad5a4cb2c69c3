"""The lock of a run's folder: one process writes into it at a time. Does not import PyTorch.

The lock is `flock` on `run.lock`. The system releases it when the process ends, also if it is
killed. The file's text names the holder, for messages only.

A parent process can take the lock and pass it to the run that it starts: it opens `run.lock`,
locks it, and starts the child with `pass_fds=[fd]` and `ZEROPRIOR_RUN_LOCK_FD=fd`. The lock belongs
to the open file, so it is always held, even if the parent is killed.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

NAME = "run.lock"
HANDED_DOWN = "ZEROPRIOR_RUN_LOCK_FD"
PATIENCE = 0.5  # seconds; a query of the lock's state holds it briefly
_NOT_SUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_handed_down: int | None = None


class FolderRefused(ValueError):
    """The run may not write into the folder. The message says why and what to do."""


def claim_handed_down() -> None:
    """Stores the lock passed by the parent process, and does not pass it on to children.

    Programs that may be started with a lock call it first; `Lock.take` calls it as well.
    """
    global _handed_down
    value = os.environ.pop(HANDED_DOWN, None)
    if value is None:
        return
    try:
        os.set_inheritable(int(value), False)
    except (ValueError, OverflowError, OSError) as error:
        raise FolderRefused(
            f"{HANDED_DOWN} is {value!r}, which is not an open file; start the run with "
            "pass_fds, or unset the variable"
        ) from error
    _handed_down = int(value)


class Lock:
    """The held lock of one folder."""

    def __init__(self, path: Path, fd: int, handed_down: bool) -> None:
        self.path, self.handed_down = path, handed_down
        self._fd = fd
        # Every holder writes its text, so an empty file is new.
        self.is_new = not handed_down and os.fstat(fd).st_size == 0

    @classmethod
    def take(cls, folder: Path, served: bool = False) -> "Lock":
        """Locks an existing folder. Raises `FolderRefused` while another process holds the lock."""
        global _handed_down
        claim_handed_down()
        path, fd = folder / NAME, _handed_down
        _handed_down = None
        if fd is not None:
            if not _is_at(fd, path):
                raise FolderRefused(
                    f"{HANDED_DOWN} is {fd}, which is not {path}; lock that file, or unset the "
                    "variable"
                )
            if not _try(fd):
                raise FolderRefused(_in_use(folder, fd))
            lock = cls(path, fd, True)
        else:
            lock = cls(path, _wait_for(path), False)
        try:
            lock._sign(served)
        except BaseException:
            lock.release()
            raise
        return lock

    @classmethod
    def take_free(cls, folder: Path) -> "Lock | None":
        """Takes an existing lock if it is free, else returns None. Writes nothing."""
        path = folder / NAME
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        if _try(fd) and _is_at(fd, path):
            return cls(path, fd, False)
        os.close(fd)
        return None

    @staticmethod
    def is_held(folder: Path) -> bool:
        """Whether a process holds the folder's lock now. Writes nothing.

        False if the file system does not support locks, and for a lock that the parent process
        has passed to this one.
        """
        try:
            fd = os.open(folder / NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        if _handed_down is not None and _is_at(_handed_down, folder / NAME):
            os.close(fd)
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            os.close(fd)
        return False

    @contextmanager
    def passed_down(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Within the context, a child is started, with the descriptor in `pass_fds` and these
        variables. From then on only the child holds the lock; after an error, nobody.
        """
        try:
            yield self._fd, {HANDED_DOWN: str(self._fd)}
        except BaseException:
            self.release()
            raise
        os.close(self._fd)  # `release` would unlock the child's lock as well

    def holder(self) -> dict[str, Any]:
        """The last holder: pid, host, start and served; empty if it is not written."""
        return _text(self._fd)

    def remove(self) -> None:
        """Removes the lock's file, while locked; `_wait_for` checks for this."""
        self.path.unlink(missing_ok=True)

    def release(self) -> None:
        """Releases the lock, also if forked children have the file open."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        finally:
            os.close(self._fd)

    def _sign(self, served: bool) -> None:
        if os.fstat(self._fd).st_size > 0 and not self.holder():
            raise FolderRefused(
                f"{self.path} was not created by zeroprior; move it away, or choose another "
                "output_dir"
            )
        start = datetime.now().astimezone().isoformat(timespec="seconds")
        facts = {"pid": os.getpid(), "host": socket.gethostname(), "start": start, "served": served}
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, (json.dumps(facts) + "\n").encode(), 0)
        except OSError as error:  # add the file's name
            raise OSError(error.errno, error.strerror, str(self.path)) from error


def _wait_for(path: Path) -> int:
    """Opens and locks the file. Raises `FolderRefused` after `PATIENCE`."""
    deadline = time.monotonic() + PATIENCE
    while True:
        fd = _open(path)
        try:
            locked = _try(fd)
            if locked and _is_at(fd, path):  # else its last holder has removed it
                return fd
            said = _in_use(path.parent, fd)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        if not locked and time.monotonic() > deadline:
            raise FolderRefused(said)
        time.sleep(0.02)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise FolderRefused(f"{path} is a link; remove it, or choose another output_dir") from error


def _try(fd: int) -> bool:
    """Locks an open file if it is free. Warns if the file system does not support locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        log.warning(
            "this file system cannot lock files (%s); make sure that no other run writes into "
            "the same folder",
            error.strerror,
        )
    return True


def _is_at(fd: int, path: Path) -> bool:
    """Whether the path still names the open file."""
    try:
        named = os.stat(path, follow_symlinks=False)
        return os.path.samestat(os.fstat(fd), named)
    except OSError:
        return False


def _text(fd: int) -> dict[str, Any]:
    try:
        facts = json.loads(os.pread(fd, 4096, 0))
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) and "pid" in facts else {}


def _in_use(folder: Path, fd: int) -> str:
    holder = _text(fd)
    who = "by another run"
    if holder:
        who += f" (process {holder['pid']} on {holder.get('host')}, since {holder.get('start')})"
    return f"{folder} is in use {who}; wait until it ends, or choose another output_dir"
