"""Work in the background that the page shows: archives, images that are checked."""

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SHOWN_SECONDS = 60  # after the end


class Canceled(Exception):
    """Raised in a task whose server is ending."""


@dataclass
class Task:
    """One piece of work, and how far it is."""

    kind: str  # archive, images
    name: str
    id: str = field(default_factory=lambda: secrets.token_hex(6))
    state: str = "waiting"
    done: int = 0
    of: int = 0
    error: str | None = None
    ended: float | None = None
    stop: threading.Event = field(default_factory=threading.Event)

    def at(self, done: int, of: int) -> None:
        """Notes the progress. Raises `Canceled` if the task must end."""
        self.done, self.of = done, of
        if self.stop.is_set():
            raise Canceled

    def shown(self) -> dict[str, Any]:
        """The task as JSON."""
        names = ("id", "kind", "name", "state", "done", "of", "error")
        return {name: getattr(self, name) for name in names}


class Tasks:
    """Tasks in threads, one at a time for each kind."""

    def __init__(self) -> None:
        self._tasks: list[Task] = []
        self._turns: dict[str, threading.Lock] = {}

    def start(self, task: Task, work: Callable[[Task], None]) -> Task:
        """Runs `work` in a thread; an exception's message becomes the task's error."""
        turn = self._turns.setdefault(task.kind, threading.Lock())
        self._tasks.append(task)
        # A daemon, so that the server can end while a large archive is read; files that are not
        # complete are removed at the next start.
        thread = threading.Thread(target=self._run, args=(task, work, turn), daemon=True)
        thread.start()
        return task

    def running(self, kind: str, name: str) -> Task | None:
        """The unfinished task of this kind and name."""
        found = (t for t in self._tasks if (t.kind, t.name, t.ended) == (kind, name, None))
        return next(found, None)

    def shown(self) -> list[dict[str, Any]]:
        """All tasks that are running or ended less than a minute ago."""
        now = time.time()
        self._tasks[:] = [t for t in self._tasks if now - (t.ended or now) < SHOWN_SECONDS]
        return [task.shown() for task in self._tasks]

    def stop(self) -> None:
        """Ends all tasks at their next step."""
        for task in self._tasks:
            task.stop.set()

    @staticmethod
    def _run(task: Task, work: Callable[[Task], None], turn: threading.Lock) -> None:
        with turn:
            task.state = "running"
            try:
                work(task)
                task.state = "done"
            except Canceled:
                task.state = "canceled"
            except Exception as error:
                task.state, task.error = "failed", str(error) or type(error).__name__
            task.ended = time.time()
