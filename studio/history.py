"""What happened in a run, as columns, read from its events.jsonl.

A `History` reads on where it ended, so a run that is trained costs little to follow.
"""

import math
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.events import STATE_EVENTS, event_in, read_events
from trainer.run_files import EVENTS

CHUNK = 1 << 20  # bytes that are read at once
SMOOTHING = 0.98  # of the loss that a summary shows
RECENT = 20  # steps whose mean time is that of a step
SPARK = 60  # points of a small curve

Facts = dict[str, Any]


class History:
    """The columns of one run's events."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / EVENTS
        self._clear()

    def _clear(self) -> None:
        self.offset = 0  # behind the last complete line that was read
        self._inode = 0
        self.steps, self.loss = array("l"), array("d")  # one each per step; NaN: not finite
        self.rate, self.norm, self.seconds = array("d"), array("d"), array("d")
        self.step, self.phase = 0, Facts()
        self.last: Facts | None = None  # the last state event
        self.started = Facts()
        self.begun: float | None = None  # time of the first event
        self.sign: float | None = None  # time of the last event
        self.plan: Facts | None = None
        self.error: Facts | None = None
        self.done: Facts | None = None
        self.validation: list[Facts] = []
        self.checkpoints: list[Facts] = []
        self.saved: list[Facts] = []
        self.previews: list[Facts] = []
        self.generated: list[Facts] = []
        self.checks: list[Facts] = []
        self.warnings: list[Facts] = []
        self.answers: dict[str, Facts] = {}  # `command` events by key
        self.resumed: list[int] = []
        self.void: list[dict[str, list[Any]]] = []

    def read(self) -> "History":
        """Reads the new events."""
        try:
            file = self.path.open("rb")
        except OSError:
            self._clear()
            return self
        with file:
            status = os.fstat(file.fileno())
            if status.st_size < self.offset or status.st_ino != self._inode:
                self._clear()
                self._inode = status.st_ino
            file.seek(self.offset)
            rest = b""
            while chunk := file.read(CHUNK):
                lines = (rest + chunk).split(b"\n")
                rest = lines.pop()
                for line in lines:
                    self.offset += len(line) + 1
                    event = event_in(line + b"\n")
                    if event is not None:
                        self._add(event)
        return self

    def first_time(self) -> float | None:
        """The time of the first event, without reading the others."""
        return next((each.get("t") for each in read_events(self.path.parent)), None)

    def _add(self, event: Facts) -> None:
        """Adds one event; one of an unknown shape is skipped."""
        kind, at = event["type"], event.get("t")
        try:
            if kind == "steps":
                self._add_steps(event)
            elif "step" in event:
                self.step = int(event["step"])
            self._sort(kind, event)
        except (KeyError, TypeError, ValueError, OverflowError):
            return
        if isinstance(at, int | float):
            self.sign = at
            self.begun = at if self.begun is None else self.begun

    def _sort(self, kind: str, event: Facts) -> None:
        if kind in STATE_EVENTS:
            self.last = event
        if kind == "started":
            self.started, self.error, self.done, self.phase = event, None, None, {}
            self.checks = []
        elif kind == "resumed":
            self._resume(int(event["step"]))
        elif kind == "command":
            self.answers[str(event["id"])] = event
        elif kind in ("phase", "plan", "error", "done"):
            setattr(self, kind, event)
        elif kind in ("validation", "saved", "generated"):
            getattr(self, kind).append(event)
        elif kind in ("checkpoint", "preview", "check", "warning"):
            getattr(self, f"{kind}s").append(event)

    def _add_steps(self, event: Facts) -> None:
        losses, first = event["loss"], int(event["from"])
        each = float(event.get("seconds") or 0) / max(1, len(losses))
        rate, norm = (_first(event.get(name)) for name in ("rate", "norm"))
        for number, loss in enumerate(losses):
            self.steps.append(first + number)
            self.loss.append(math.nan if loss is None else float(loss))
            self.rate.append(rate)
            self.norm.append(norm)
            self.seconds.append(each)
        self.step = first + len(losses) - 1

    def _resume(self, step: int) -> None:
        """Earlier events of later steps are void."""
        self.resumed.append(step)
        kept = len(self.steps)
        while kept and self.steps[kept - 1] > step:
            kept -= 1
        if kept < len(self.steps):
            self.void.append({"steps": list(self.steps[kept:]), "loss": _finite(self.loss[kept:])})
        for column in (self.steps, self.loss, self.rate, self.norm, self.seconds):
            del column[kept:]
        for listed in (self.validation, self.checkpoints, self.previews):
            listed[:] = [each for each in listed if each.get("step", 0) <= step]

    # ---- What is shown -----------------------------------------------------------------------

    def smoothed(self) -> float | None:
        """The smoothed loss of the last step, without its start's bias; None if not finite."""
        if self.loss and not math.isfinite(self.loss[-1]):
            return None
        mean, weight = 0.0, 0.0
        for loss in self.loss[-1000:]:
            if math.isfinite(loss):
                mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
                weight = SMOOTHING * weight + 1 - SMOOTHING
        return round(mean / weight, 6) if weight else None

    def seconds_per_step(self) -> float | None:
        """The mean time of the last steps."""
        recent = [each for each in self.seconds[-RECENT:] if each > 0]
        return round(sum(recent) / len(recent), 4) if recent else None

    def spark(self) -> list[float | None]:
        """The loss in at most `SPARK` points."""
        return _finite(self._means(self.loss, self._bounds(SPARK)))

    def series(self, points: int) -> dict[str, Any]:
        """The columns; of more steps than `points`, means, and the loss's extremes."""
        few = len(self.steps) <= points
        bounds = self._bounds(points)
        columns: dict[str, Any] = {"offset": self.offset}
        columns["steps"] = [self.steps[end - 1] for _, end in bounds]
        for name in ("loss", "rate", "norm", "seconds"):
            values = getattr(self, name)
            columns[name] = _finite(values if few else self._means(values, bounds))
        if not few:
            parts = [[x for x in self.loss[a:b] if math.isfinite(x)] for a, b in bounds]
            columns["low"] = [min(part, default=None) for part in parts]
            columns["high"] = [max(part, default=None) for part in parts]
        previews = ("step", "number", "prompt", "seed", "file")
        return columns | {
            "validation": [_sigmas(each) for each in self.validation],
            "checkpoints": [each["step"] for each in self.checkpoints],
            "saved": [each["step"] for each in self.saved],
            "previews": [{name: each.get(name) for name in previews} for each in self.previews],
            "generated": [
                {name: each.get(name) for name in ("step", "id", "prompt", "seed", "file")}
                for each in self.generated
            ],
            "resumed": self.resumed,
            "void": self.void,
        }

    def _bounds(self, points: int) -> list[tuple[int, int]]:
        """At most `points` parts of the columns."""
        count = len(self.steps)
        parts = min(count, points)
        edges = [k * count // parts for k in range(parts + 1)] if parts else [0]
        return list(zip(edges, edges[1:], strict=False))

    @staticmethod
    def _means(values: Sequence[float], bounds: Sequence[tuple[int, int]]) -> list[float]:
        """A part with a value that is not finite is not finite."""
        return [sum(values[a:b]) / (b - a) for a, b in bounds]


def _first(value: object) -> float:
    """The LoRA's value of a rate or norm by name, else another one; NaN if there is none."""
    if isinstance(value, dict):
        found = value.get("lora", next(iter(value.values()), None))
        return float(found) if isinstance(found, int | float) else math.nan
    return float(value) if isinstance(value, int | float) else math.nan


def _finite(values: Sequence[float]) -> list[float | None]:
    return [float(f"{each:.6g}") if math.isfinite(each) else None for each in values]


def _sigmas(event: Facts) -> Facts:
    by_sigma = zip(event.get("sigmas") or (), event.get("loss") or (), strict=False)
    return {
        "step": event["step"],
        "mean": event.get("mean"),
        "kind": event.get("kind"),
        "sigmas": {f"{sigma:g}": loss for sigma, loss in by_sigma},
    }
