"""The state of a run, read from its events and its lock; never stored. Does not import PyTorch.

    queued ─► running ─► done
              │ ▲  └── stop ──► stopping ─► stopped, or done early (stop and keep)
              │ └── resume ◄── paused ◄─ pausing
              └── error ─► failed

A run whose process ended without a final event is stopped, too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.events import STATE_EVENTS, read_events
from trainer.lock import Lock
from trainer.run_files import record_of

_STATES = {
    **dict.fromkeys(("started", "resumed"), "running"),
    **{each: each for each in ("pausing", "paused", "stopping", "stopped", "done")},
    "error": "failed",
}
# States that need a running process.
_ALIVE = ("running", "pausing", "stopping")

# The commands that are allowed in each state.
ALLOWED: dict[str, tuple[str, ...]] = {
    "queued": ("resume",),
    "running": ("pause", "stop", "save", "preview"),
    "pausing": (),
    "paused": ("resume", "stop", "save", "preview"),
    "paused, memory freed": ("resume",),
    "stopping": (),
    "stopped": ("resume",),
    "failed": ("resume",),
    "done": (),
}


@dataclass(frozen=True)
class RunState:
    """The state of a run, as recorded in its folder."""

    state: str  # a key of ALLOWED
    step: int  # the last one in an event
    phase: str = ""  # while running
    why: str = ""  # if it was stopped, has failed or has ended early

    @property
    def allowed(self) -> tuple[str, ...]:
        """The commands that are allowed now."""
        return ALLOWED[self.state]

    def __str__(self) -> str:
        phase = f", {self.phase}" if self.phase else ""
        step = f" at step {self.step:,}" if self.step else ""
        return f"{self.state}{phase}{step}{f': {self.why}' if self.why else ''}"


def run_state(folder: Path) -> RunState | None:
    """The state of the run in a folder; None if there is no run."""
    held = Lock.is_held(folder)  # first: a process that ends later has written its last event
    last, step, phase = None, 0, ""
    for event in read_events(folder):
        if event["type"] in STATE_EVENTS:
            last = event
        if event["type"] == "phase":
            phase = str(event.get("name", ""))
        if event["type"] == "steps":
            step = event["from"] + len(event["loss"]) - 1
        elif "step" in event:
            step = event["step"]
    if last is None and not (held or record_of(folder)):
        return None
    return derived(last, held, step, phase)


def derived(last: Mapping[str, Any] | None, held: bool, step: int, phase: str) -> RunState:
    """The state that follows from the last state event, if there is one, and from the lock."""
    if last is None:
        return RunState("queued", 0)
    state = _STATES[last["type"]]
    if state == "paused" and not last.get("kept"):
        return RunState("paused, memory freed", step)
    if not held and state in (*_ALIVE, "paused"):
        return RunState("stopped", step, why="its process ended unexpectedly")
    why = str(last.get("text") or last.get("why") or "")
    return RunState(state, step, phase if state == "running" else "", why)
