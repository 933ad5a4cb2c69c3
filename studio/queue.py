"""The queue of runs: which one starts next. queue.json has its order, and whether it is held.

One run at a time; a run that someone started elsewhere counts. A run is removed from the order
before its process is started, and a queued run that is not in the order is put at its end, so a
server that is killed at any moment neither loses a run nor starts it twice.

A run that was paused for images is in queue.json too, until it is in the order again: whatever ends
the images, this or a later server resumes it.
"""

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapters.files.atomic import atomic_file
from studio import gpu
from studio.folder import Studio
from studio.processes import Processes
from studio.replies import Problem
from studio.summaries import LIVE, Runs, boot_id, write_facts

log = logging.getLogger(__name__)

FILE = "queue.json"


class Queue:
    """The order of the runs that wait. Used by the event loop's thread alone."""

    def __init__(self, studio: Studio, runs: Runs, processes: Processes) -> None:
        self._studio, self._runs, self._processes = studio, runs, processes
        self._path = studio.folder / FILE
        content = _content(self._path)
        self._order = [str(each) for each in content.get("order") or ()]
        self._now = [str(each) for each in content.get("now") or ()]
        self._lent = runs.lent
        lent = content.get("lent")
        self._lent.update(lent if isinstance(lent, dict) else {})
        self._failure = ""  # the last one in the log
        self.held, self._looked = bool(content.get("held")), False
        # After a restart of the machine nothing starts by itself.
        waiting = bool(self._order or self._lent)
        self.restarted = waiting and content.get("boot", boot_id()) != boot_id()
        if self.restarted:
            self.held, self._now = True, []

    def order(self, summaries: Sequence[dict[str, Any]] | None = None) -> list[str]:
        """The runs that wait, first to last. `summaries`: of all runs, if they are known."""
        known = self._runs.all() if summaries is None else summaries
        states = {each["id"]: each["state"] for each in known}
        waiting = ("queued", "stopped", "failed", "paused")
        order = [each for each in self._order if states.get(each) in waiting]
        queued = [name for name, state in states.items() if state == "queued"]
        order += [each for each in reversed(queued) if each not in order]
        order = [each for each in order if not self._runs.is_held(each)]
        if order != self._order:
            self._order = order
            self._write()
        return list(order)

    def set(self, order: Any, held: Any) -> None:
        """Changes order and hold; runs that the order does not name keep their place at the end."""
        known = self.order()
        if order is not None:
            if not isinstance(order, list) or not all(isinstance(each, str) for each in order):
                raise Problem(400, "order must be a list of runs")
            wanted = [each for each in dict.fromkeys(order) if each in known]
            states = {each: self._runs.summary(each)["state"] for each in known}
            rest = [each for each in known if each not in wanted and states[each] == "queued"]
            self._order = wanted + rest  # one to be resumed is removed by leaving it out
        if held is not None:
            self.held = bool(held)
        self._write()

    def add(self, identity: str, now: bool = False) -> None:
        """Puts a run at the end, or with `now` first, also if the queue is held."""
        self._order = [each for each in self._order if each != identity]
        self._lent.pop(identity, None)
        if now:
            self._order.insert(0, identity)
            self._now.append(identity)
        else:
            self._order.append(identity)
        self._write()

    def remove(self, identity: str) -> None:
        """Removes a run that must not be started."""
        if identity in self._order or identity in self._now or identity in self._lent:
            self._order = [each for each in self._order if each != identity]
            self._now = [each for each in self._now if each != identity]
            self._lent.pop(identity, None)
            self._write()

    def lend(self, identity: str, key: str) -> None:
        """Notes that a run is paused for images, before the command with this key is sent."""
        self._lent[identity] = key
        self._write()

    def take_back(self) -> None:
        """Puts the runs that were paused for images at the front; those images are done.

        A run that has ended, was stopped, or was resumed by someone else is left as it is.
        """
        for identity, key in list(self._lent.items()):
            held = self._runs.is_held(identity)  # first: see `Runs.summary`
            try:
                summary = self._runs.summary(identity)
                answer = self._runs.history(identity).answers.get(key)
            except Problem:  # its folder was removed
                self.remove(identity)
                continue
            ours = answer is not None and bool(answer.get("accepted"))
            paused = summary["state"] in ("pausing", "paused")
            if held and (answer is None or (ours and paused)):
                continue  # it has not ended yet
            if ours and paused and summary["freed"]:
                log.info("%s: resumed after the images", identity)
                self.add(identity, now=not self.restarted)
            else:
                self.remove(identity)

    def waits(self, identity: str) -> bool:
        """Whether the run is in the order."""
        return identity in self._order

    def next(self) -> str | None:
        """The run that would start now.

        None while another one runs, or is paused for images, or if the queue is held.
        """
        if self._lent or (self._looked and not self._order):  # so an idle server does nothing
            return None
        self._looked = True  # for runs that were queued before the server was ended
        summaries = self._runs.all()
        order = self.order(summaries)
        first = next((each for each in order if not self.held or each in self._now), None)
        busy = any(each["state"] in LIVE and self._runs.is_held(each["id"]) for each in summaries)
        return None if busy else first

    def advance(self) -> str | None:
        """Starts the next run, if it can start; returns it."""
        identity = self.next()
        if identity is None or not gpu.is_free():
            return None
        now = identity in self._now
        self.remove(identity)
        try:
            self.start(identity)
        except (Problem, OSError) as error:
            if not self._runs.is_held(identity):
                self.add(identity)  # as the last one, so that others are tried before
                if now:
                    self._now.append(identity)
                    self._write()
            if self._failure != (said := f"{identity} cannot be started: {error}"):
                self._failure = said
                log.warning("%s; it stays in the queue", said)
            return None
        return identity

    def start(self, identity: str) -> None:
        """Starts a run's process."""
        folder = self._studio.outputs / identity
        self._processes.start(folder)
        # After the process, which holds the lock: a run with this time and no events has failed.
        write_facts(folder, started=time.time())
        log.info("%s: started", identity)

    def _write(self) -> None:
        self._now = [each for each in self._now if each in self._order]
        content: dict[str, Any] = {"order": self._order, "held": self.held, "now": self._now}
        content |= {"lent": self._lent, "boot": boot_id()}
        with atomic_file(self._path) as file:
            file.write(json.dumps(content).encode())


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
