"""events.jsonl: the events of a run, one JSON object per line. Does not import PyTorch.

Each line has `n`, a counter from 1, `t`, the time in seconds since 1970, and `type`:

    started     pid, its start time, boot id, host, device, versions, base model, steps
    phase       writing captions, loading, encoding images or captions, training, checking,
                writing; done and of
    plan        the memory mode and the expected peak in bytes
    steps       from (the first of these steps), loss (one per step, null: not finite),
                rate and norm of the last one, seconds since the last such event
    validation  step, loss at each sigma, mean, kind
    best        step and mean loss of the best weights so far, with keep_best
    preview     step, number and text of the prompt, seed, file
    generated   step, id of the command, prompt, seed, size, steps, scales, file: an image that was
                asked for
    checkpoint  step, file, bytes: for resuming
    saved       step, file, bytes: usable weights
    command     id, do, accepted, why (trainer.inbox)
    pausing, paused, resumed, stopping, stopped      step; paused: kept or freed memory;
                                                     stopping: keep, and why with early_stopping
    warning, error                                   text, where; an error ends the run as failed
    check, done                                      a check's result; files, seconds, peak memory,
                                                     seconds by phase, why it ended early,
                                                     shipped step

After `resumed`, earlier events of later steps are void. Only the process that has the run's lock
writes. State events are synced to disk before `emit` returns; others may be lost in a power cut.
"""

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.run_files import EVENTS

log = logging.getLogger(__name__)

STATE_EVENTS = frozenset(
    ("started", "pausing", "paused", "resumed", "stopping", "stopped", "error", "done")
)
SECONDS = 0.5  # between two `steps` events, and between two counts of a phase


class Events:
    """Appends to a run's events.jsonl. Without a folder it writes nothing.

    A full disk must not end a run: events that cannot be written are dropped with one warning.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.step = 0  # the last one in an event
        self._path = folder / EVENTS if folder is not None else None
        self._file: int | None = None
        self._number, self._whole, self._failed = 0, True, False
        self._phase, self._phase_time = "", 0.0
        self._seconds: dict[str, float] = {}  # by phase
        self._since = time.monotonic()  # the phase began, or was interrupted

    def emit(self, kind: str, /, **facts: Any) -> None:
        """Appends one event."""
        if kind == "steps":
            self.step = facts["from"] + len(facts["loss"]) - 1
        self.step = facts.get("step", self.step)
        if self._path is None:
            return
        try:
            if self._file is None:
                self._open(self._path)
            event = {"n": self._number + 1, "t": round(time.time(), 3), "type": kind, **facts}
            line = json.dumps(as_json(event), ensure_ascii=False, separators=(",", ":"))
            # End a line that an interrupted write has left, so that this one is valid.
            text = ("" if self._whole else "\n") + line + "\n"
            data = text.encode(errors="backslashreplace")
            assert self._file is not None
            self._whole = False
            if os.write(self._file, data) == len(data):
                self._whole = True
                self._number += 1
            if kind in STATE_EVENTS:
                os.fsync(self._file)
        except OSError as error:
            if not self._failed:
                self._failed = True
                log.warning("%s cannot be written: %s", self._path, error)

    def phase(self, name: str, done: int | None = None, of: int | None = None) -> None:
        """Emits the current phase; counts within a phase at most every `SECONDS`."""
        now = time.monotonic()
        if name != self._phase:
            self._count(self._phase)
        if name == self._phase and done != of and now - self._phase_time < SECONDS:
            return
        self._phase, self._phase_time = name, now
        counted = {} if done is None else {"done": done, "of": of}
        self.emit("phase", name=name, **counted)

    @contextmanager
    def within_phase(self, name: str) -> Iterator[None]:
        """Counts the time of the context as a phase of its own, without an event."""
        self._count(self._phase)
        try:
            yield
        finally:
            self._count(name)

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase so far, in the order in which they began."""
        self._count(self._phase)
        return {name: round(each, 2) for name, each in self._seconds.items()}

    def _count(self, phase: str) -> None:
        """Adds the time since the last call to a phase."""
        now = time.monotonic()
        phase = phase or "starting"
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._since
        self._since = now

    def close(self) -> None:
        """Closes the file; a later event opens it again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _open(self, path: Path) -> None:
        """Opens the file and continues from the number of its last event.

        A complete last line without a line feed counts: the line feed is written next.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._file = os.open(path, flags, 0o644)
        with path.open("rb") as file:
            for line in file:
                event = event_in(line.removesuffix(b"\n") + b"\n")
                self._number = event["n"] if event is not None else self._number
                self._whole = line.endswith(b"\n")


def read_events(folder: Path) -> Iterator[dict[str, Any]]:
    """The events of a run, oldest first; none if there is no file.

    Skips invalid lines, and a last line without a line feed, which is being written.
    """
    try:
        with (folder / EVENTS).open("rb") as file:
            for line in file:
                event = event_in(line)
                if event is not None:
                    yield event
    except (FileNotFoundError, NotADirectoryError):
        return


def event_in(line: bytes) -> dict[str, Any] | None:
    """The event of a complete line; None if it is invalid or has no line feed yet."""
    if not line.endswith(b"\n"):
        return None
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    right = isinstance(event, dict) and isinstance(event.get("type"), str)
    return event if right and type(event.get("n")) is int else None


def as_json(value: Any) -> Any:
    """The value in JSON types: paths as text, NaN and infinity as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): as_json(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(each) for each in value]
    return value if value is None or isinstance(value, str | int) else str(value)
