"""The summary of a run, from its folder: run.json, events, lock, and the studio's own facts.

`studio.json` in a run's folder has what only the studio knows: title, note, datasets, and the key
of the request. The trainer does not read it.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.files.atomic import atomic_file
from studio.folder import Studio, entry_name
from studio.history import History
from studio.processes import CONSOLE, Processes
from studio.replies import Problem
from trainer.inbox import Command
from trainer.lock import Lock
from trainer.run_files import (
    CHECKPOINTS,
    EVENTS,
    LOG,
    RECORD,
    REPORT,
    WEIGHTS,
    checkpoints_in,
    listed,
    record_of,
)
from trainer.state import derived

FACTS = "studio.json"
STUCK = 60.0  # seconds of pausing or stopping
PATIENCE = 30.0  # seconds between the final event and the end of the process
STARTING = "starting"  # phase of a process that has not written an event
RESTARTED = "the machine was restarted"  # why a run was stopped
LIVE = ("running", "pausing", "stopping")
_BOOT = Path("/proc/sys/kernel/random/boot_id")

_ALLOWED = {
    "queued": ("start", "delete"),
    "running": ("pause", "free", "stop", "keep", "save", "preview"),
    "pausing": (),
    "paused": ("resume", "free", "stop", "keep", "save", "preview"),
    "stopping": (),
    "stopped": ("resume", "restart", "keep_weights", "delete"),
    "failed": ("resume", "restart", "keep_weights", "delete"),
    "done": ("more", "restart", "delete"),
}


def boot_id() -> str:
    """Identifies the start of this machine; empty where the system has no such file."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""


class Runs:
    """The runs in a studio's folder. Summaries are cached; histories only of live runs."""

    def __init__(self, studio: Studio, processes: Processes) -> None:
        self._studio, self._processes = studio, processes
        self._histories: dict[str, History] = {}
        self._summaries: dict[str, tuple[object, dict[str, Any]]] = {}
        self._ages: dict[str, tuple[float, str]] = {}
        self._boot = boot_id()
        # Runs that were paused for images, and the keys of these commands; written by `Queue`.
        self.lent: dict[str, str] = {}

    def folder(self, identity: str) -> Path:
        """The folder of a run. Raises `Problem` 404 if it is not a run's."""
        folder = self._studio.outputs / entry_name(identity)
        if not _is_run(folder):
            raise Problem(404, f"there is no run {identity}")
        return folder

    def ids(self) -> list[str]:
        """All runs, the newest first."""
        try:
            found = [each.name for each in os.scandir(self._studio.outputs) if each.is_dir()]
        except FileNotFoundError:
            return []
        runs = [each for each in found if _is_run(self._studio.outputs / each)]
        for name in runs:
            if name not in self._ages:
                self._ages[name] = _age(self._studio.outputs / name)
        return sorted(runs, key=lambda name: self._ages[name], reverse=True)

    def history(self, identity: str) -> History:
        """The run's history, read up to now."""
        known = self._histories.get(identity) or History(self.folder(identity))
        return known.read()

    def summary(self, identity: str) -> dict[str, Any]:
        """The summary of a run as JSON. Raises `Problem` 404."""
        folder = self.folder(identity)
        held = Lock.is_held(folder)  # first: a process that ends later has written its last event
        sent = self._processes.sent.get(identity, {})
        key = (
            held,
            (*sent, identity in self._processes.waiting),
            self._processes.exits.get(identity),
            *(_stamp(folder / name) for name in (EVENTS, FACTS, RECORD, ".")),
        )
        cached = self._summaries.get(identity)
        if cached is None or cached[0] != key:
            history = self.history(identity)
            if held:
                self._histories[identity] = history
            else:
                self._histories.pop(identity, None)
            for each in [each for each in sent if each in history.answers]:
                del sent[each]
            cached = key, self._summarized(folder, history, held, sent)
            self._summaries[identity] = cached
        return self._now(cached[1], held)

    def is_held(self, identity: str) -> bool:
        """Whether a process holds the run."""
        return Lock.is_held(self._studio.outputs / identity)

    def all(self) -> list[dict[str, Any]]:
        """The summaries of all runs, the newest first."""
        found = []
        for identity in self.ids():
            try:
                found.append(self.summary(identity))
            except Problem:  # deleted meanwhile
                continue
        return found

    def forget(self, identity: str) -> None:
        """Drops what is cached of a deleted run."""
        self._histories.pop(identity, None)
        self._summaries.pop(identity, None)
        self._ages.pop(identity, None)

    def _summarized(
        self, folder: Path, history: History, held: bool, sent: Mapping[str, tuple[Command, float]]
    ) -> dict[str, Any]:
        facts, record = facts_of(folder), record_of(folder)
        used = (record.get("settings") or {}).get("used") or {}
        phase = str(history.phase.get("name", ""))
        found = derived(history.last, held, history.step, phase)
        state, freed = found.state.partition(",")[0], "," in found.state
        why, since = found.why, history.last.get("t") if history.last else None
        begun = facts.get("started")
        starting = held and isinstance(begun, float) and begun > (since or 0)
        if starting:  # the process has been started, and has not written an event yet
            state, freed, why, phase = "running", False, "", STARTING
        elif state == "queued" and held:  # the same, started elsewhere
            state, phase = "running", STARTING
        elif state == "queued" and begun:
            state, why = "failed", _last_line(folder) or "its process ended before it began"
        elif state == "stopped" and not held and "unexpectedly" in why:
            why = self._why_ended(folder.name, history, why)
        if state in ("running", "paused") and held:
            for command, at in sent.values():  # not yet executed
                name = {"pause": "pausing", "stop": "stopping"}.get(command.do, state)
                state, since = (name, at) if name != state else (state, since)
        checkpoints = checkpoints_in(folder / CHECKPOINTS)
        steps = int(used.get("steps") or 0)
        weights = (folder / WEIGHTS).is_file()
        if history.done is not None:
            steps = history.step
        allowed = (
            _ALLOWED[state]
            if not (state == "paused" and freed)
            else ("resume", "restart", "keep_weights", "delete")
        )
        if phase == STARTING:  # commands to a process that has not begun are refused by it
            allowed = () if folder.name in self._processes.waiting else ("stop",)
            state = "running" if allowed else "stopping"
        lacking = set() if checkpoints or state == "paused" and not freed else {"resume", "more"}
        if weights or not usable_weights(folder):
            lacking.add("keep_weights")
        seconds = history.seconds_per_step()
        left = max(0, steps - history.step)
        tokens = used.get("subjects") or [used.get("placeholder_token")]
        return {
            "id": folder.name,
            "title": facts.get("title") or folder.name,
            "note": facts.get("note") or "",
            "state": state,
            "freed": freed,
            "step": history.step,
            "steps": steps,
            "phase": {
                "name": phase,
                "done": None if starting else history.phase.get("done"),
                "of": None if starting else history.phase.get("of"),
            }
            if phase and state in LIVE
            else None,
            "why": why,
            "allowed": [each for each in allowed if each not in lacking],
            "stuck": False,
            "base_model": used.get("base") or "",
            "tokens": [str(each).partition("=")[0] for each in tokens if each]
            if used.get("train_placeholder_token", True)
            else [],
            "datasets": [each["name"] for each in facts.get("datasets") or ()]
            or [Path((record.get("dataset") or {}).get("path") or "").name],
            "created": facts.get("created") or history.begun or folder.stat().st_mtime,
            "started": history.begun,
            "ended": history.sign if not held and history.last else None,
            "last_sign": history.sign,
            "seconds_per_step": seconds,
            "seconds_left": round(left * seconds, 1) if seconds and state == "running" else None,
            "loss": history.smoothed(),
            "spark": history.spark(),
            "preview": history.previews[-1]["file"] if history.previews else None,
            "weights": weights,
            "report": (folder / REPORT).is_file(),
            "checkpoint": int(checkpoints[-1].stem.partition("-")[2]) if checkpoints else None,
            "since": since,
        }

    def _now(self, summary: Mapping[str, Any], held: bool) -> dict[str, Any]:
        """The summary with what depends on the time."""
        now, state = time.time(), summary["state"]
        since = now - (summary["since"] or now)
        stuck = held and (
            (state in ("pausing", "stopping") and since > STUCK)
            or ((state in ("stopped", "failed", "done") or summary["freed"]) and since > PATIENCE)
        )
        found = {**summary, "stuck": stuck}
        del found["since"]
        allowed = summary["allowed"]
        if held and (state not in (*LIVE, "paused") or summary["freed"]):  # its process is ending
            allowed = []
        if summary["id"] in self.lent and "stop" not in allowed:
            allowed = [*allowed, "stop"]  # so that it is not resumed after the images
        found["allowed"] = [*allowed, "end"] if stuck else list(allowed)
        found["lent"] = summary["id"] in self.lent  # its GPU, to images; it is resumed after them
        return found

    def _why_ended(self, identity: str, history: History, why: str) -> str:
        """Why a process ended without a final event, if it is known."""
        boot = history.started.get("boot")
        if boot and self._boot and boot != self._boot:
            return RESTARTED
        code = self._processes.exits.get(identity)
        if code is not None and code < 0:
            hint = ", maybe because the machine had no free memory" if code == -9 else ""
            return f"its process was ended by signal {-code}{hint}"
        return why


def _is_run(folder: Path) -> bool:
    if folder.is_symlink() or not folder.is_dir() or folder.name.startswith("."):
        return False
    return (folder / RECORD).is_file() or (folder / EVENTS).is_file()


def _age(folder: Path) -> tuple[float, str]:
    """The time at which a run was created, and its name."""
    history = History(folder)
    created = facts_of(folder).get("created") or history.first_time()
    try:
        return float(created or (folder / RECORD).stat().st_mtime), folder.name
    except (OSError, ValueError, TypeError):
        return 0.0, folder.name


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def usable_weights(folder: Path) -> list[Path]:
    """The weights of single steps, in checkpoints and saved, the last step last."""
    found = [
        each
        for place in (CHECKPOINTS, "saved")
        for each in listed(folder / place)
        if each.suffix == ".zip"
    ]
    return sorted(found, key=lambda each: each.name)


def facts_of(folder: Path) -> dict[str, Any]:
    """The studio's facts about a run; empty if there are none."""
    try:
        facts = json.loads((folder / FACTS).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def write_facts(folder: Path, **changes: Any) -> None:
    """Changes the studio's facts about a run."""
    with atomic_file(folder / FACTS) as file:
        file.write(json.dumps(facts_of(folder) | changes, indent=1).encode())


def log_lines(folder: Path, most: int) -> list[str]:
    """The last lines of the log, or of the process's output if there is no log."""
    for name in (LOG, CONSOLE):
        try:
            with (folder / name).open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 32_000))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            continue
        if lines:
            return lines[-most:]
    return []


def _last_line(folder: Path) -> str:
    return next((each for each in reversed(log_lines(folder, 50)) if each.strip()), "").strip()
