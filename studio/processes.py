"""The trainers' processes: starts them, sees how they end, and ends them as a group.

A trainer is a session of its own and outlives the server. It is found again by its run's lock, and
its processes by `ZEROPRIOR_STUDIO_RUN` in their environment, which children inherit.
"""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from studio.replies import Problem
from trainer.inbox import Command
from trainer.lock import NAME, Lock

ROOT = Path(__file__).parent.parent  # of the program
MARK = "ZEROPRIOR_STUDIO_RUN"
CONSOLE = "console.txt"
TRAINER: Sequence[str] = ("-m", "trainer", "resume")
TERM_SECONDS = 10.0  # between SIGTERM and SIGKILL


class Processes:
    """What this server knows about processes; all of it may be lost with the server."""

    def __init__(self) -> None:
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self.exits: dict[str, int] = {}  # of processes that this server started, by run
        # Commands by run and key, that have not been answered, and their times.
        self.sent: dict[str, dict[str, tuple[Command, float]]] = {}
        self.waiting: dict[str, Command] = {}  # for processes that have not begun, by run
        self.ending: set[str] = set()  # runs whose processes are being ended

    def start(self, folder: Path) -> None:
        """Starts the trainer of a run; it holds the run's lock from the first moment.

        Raises `Problem` 409 while another process holds it.
        """
        os.close(os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
        lock = Lock.take_free(folder)
        if lock is None:
            raise Problem(409, f"{folder.name} is in use by another process", allowed=[])
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        with (
            lock.passed_down() as (descriptor, variables),
            open(os.open(folder / CONSOLE, flags, 0o644), "wb") as console,
        ):
            self.exits.pop(folder.name, None)
            self._children[folder.name] = subprocess.Popen(
                [sys.executable, *TRAINER, str(folder)],
                cwd=folder.parent.parent,
                env=environment() | variables | {MARK: str(folder)},
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                pass_fds=[descriptor],
                start_new_session=True,
            )

    def collect(self) -> None:
        """Notes which of the started processes have ended."""
        for name, child in list(self._children.items()):
            code = child.poll()
            if code is not None:
                self.exits[name] = code
                del self._children[name]

    async def end(self, folder: Path, started: dict[str, Any]) -> None:
        """Ends a run's processes: SIGTERM, and after 10 seconds SIGKILL to all of them.

        started: the run's last `started` event, for a run that this program did not start.
        """
        if folder.name in self.ending:
            return
        self.ending.add(folder.name)
        try:
            if Lock.is_held(folder):
                with _opened(_leaders(folder, started)) as leaders:
                    if Lock.is_held(folder):  # still: these are its processes, not later ones
                        for each in leaders:
                            _send(each, signal.SIGTERM)
                until = time.monotonic() + TERM_SECONDS
                while Lock.is_held(folder) and time.monotonic() < until:
                    await asyncio.sleep(0.1)
            self.kill(folder, started)
        finally:
            self.ending.discard(folder.name)
        self.collect()

    def kill(self, folder: Path, started: dict[str, Any]) -> None:
        """Kills what is left of a run's processes."""
        left = members().get(str(folder), [])
        if Lock.is_held(folder):
            left = [*left, *_leaders(folder, started)]
        with _opened(left) as found:
            for each in found:
                _send(each, signal.SIGKILL)


def environment() -> dict[str, str]:
    """The environment of our processes: they import this program, and nothing from their folder."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}


def members() -> dict[str, list[int]]:
    """The pids of all processes that were started for a run, by its folder. Only on Linux."""
    found: dict[str, list[int]] = {}
    mark = f"{MARK}=".encode()
    for entry in os.scandir("/proc") if os.path.isdir("/proc/self") else ():
        if not entry.name.isdecimal():
            continue
        try:
            variables = Path(entry.path, "environ").read_bytes().split(b"\0")
        except OSError:  # of another user, or gone
            continue
        for each in variables:
            if each.startswith(mark):
                name = os.fsdecode(each[len(mark) :])
                found.setdefault(name, []).append(int(entry.name))
    return found


def is_child(pid: int) -> bool:
    """Whether a process's parent belongs to the same group."""
    try:
        return os.getpgid(pid) != pid
    except ProcessLookupError:
        return True


def _leaders(folder: Path, started: dict[str, Any]) -> list[int]:
    """The main process of a run: the leader of its group, or that of its `started` event."""
    ours = [each for each in members().get(str(folder), []) if not is_child(each)]
    if ours or not _is_running(started):
        return ours
    return [int(started["pid"])]


def _is_running(started: dict[str, Any]) -> bool:
    """Whether the process of a `started` event is still the one with its pid."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        text = Path(f"/proc/{int(started['pid'])}/stat").read_text()
        ticks = int(text.rpartition(")")[2].split()[19])
        return bool(boot == started["boot"] and ticks == started["start"])
    except (OSError, KeyError, ValueError, IndexError, TypeError):
        return False


@contextmanager
def _opened(pids: Sequence[int]) -> Iterator[list[int]]:
    """Handles of processes, which never mean a later process with the same pid."""
    handles = []
    try:
        for pid in dict.fromkeys(pids):
            with suppress(OSError):
                handles.append(os.pidfd_open(pid))
        yield handles
    finally:
        for each in handles:
            os.close(each)


def _send(handle: int, number: int) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(handle, number)
