"""events.jsonl holds what happened in a run, and its state follows from it and from the lock."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loops import loop_on_meta
from root import ROOT

from adapters.archive import read_archive
from trainer import run
from trainer.events import Events, read_events
from trainer.inbox import Command, put
from trainer.learning.control import Control
from trainer.learning.step_report import StepReport
from trainer.lock import Lock
from trainer.outputs import Run
from trainer.settings.fields import Settings
from trainer.state import run_state


@pytest.fixture
def tiny(
    small: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Settings]:
    """Settings of a short run on the embedded miniature-turbo."""
    monkeypatch.delenv("MODEL_VAULT")

    def make(**changes: Any) -> Settings:
        return small(**{"base_model": "miniature-turbo", "batch_size": 1, **changes})

    return make


def types(events: list[dict[str, Any]]) -> list[str]:
    return [each["type"] for each in events]


def test_a_run_writes_what_happens_in_order(tiny: Callable[..., Settings], tmp_path: Path) -> None:
    options = {"num_inference_steps": 1, "width": 64, "height": 64}
    settings = tiny(
        steps=4, checkpoint_every=2, learning_rate=0.5, lr_warmup_steps=0, validation_every=4
    )
    settings = settings.replace(sample_prompts=("<zwx>",), sample_options=options)
    settings = settings.replace(sample_overrides=({},), sample_every=4)
    weights = run.train(settings)
    folder = tmp_path / "out"
    events = list(read_events(folder))
    found = types(events)
    assert [each["n"] for each in events] == [*range(1, len(events) + 1)]
    assert (found[0], found[-1]) == ("started", "done")
    for order in (
        ["started", "plan", "validation", "preview", "steps", "check", "done"],
        ["preview", "checkpoint", "saved", "check"],
    ):
        assert sorted(order, key=found.index) == order
    assert {"phase", "warning"} <= set(found)  # the learning rate is a warning
    phases = [each["name"] for each in events if each["type"] == "phase"]
    wanted = ["loading", "encoding images", "encoding captions", "training", "checking", "writing"]
    assert [*dict.fromkeys(phases)] == wanted

    steps = [each for each in events if each["type"] == "steps"]
    losses = [loss for each in steps for loss in each["loss"]]
    assert [each["from"] for each in steps] == [
        1 + sum(len(each["loss"]) for each in steps[:number]) for number in range(len(steps))
    ]
    record = json.loads((folder / "record.json").read_text())
    assert losses == record["losses"] and len(losses) == 4
    measured = [each for each in events if each["type"] == "validation"]
    assert [each["loss"] for each in measured] == record["fit"]["losses"]
    for each in events:
        if each["type"] in ("checkpoint", "saved", "preview"):
            assert (folder / each["file"]).is_file()
    assert [each["name"] for each in events if each["type"] == "check"] == [
        each["name"] for each in record["checks"]
    ]
    assert events[-1]["files"] == ["weights.zip", "report.html"]
    assert run_state(folder) is not None and str(run_state(folder)) == "done at step 4"

    # record.json holds all that meta.json says, and more.
    meta = read_archive(weights).meta
    del meta["format_version"]  # of the archive
    assert {name: record.get(name) for name in meta} == meta
    assert record["files"]["weights.zip"] == weights.stat().st_size
    assert record["timings"]["steps_per_second"] > 0
    phases = {*wanted, "starting", "validation", "previews", "checkpoints"}
    assert {*record["timings"]["phases"]} == phases == {*events[-1]["phases"]}


def test_the_last_line_is_read_once_it_is_whole(tmp_path: Path) -> None:
    events = Events(tmp_path)
    events.emit("started")
    events.emit("warning", text="half \udcff, ä\n")
    path = tmp_path / "events.jsonl"
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole)):
        path.write_bytes(whole[:end])
        assert types(list(read_events(tmp_path))) == ["started"]
        writer = Events(tmp_path)  # of a process that goes on after the first was killed
        writer.emit("resumed", step=0)
        writer.close()
        found = list(read_events(tmp_path))
        lacks_its_end = ["warning"] if end == len(whole) - 1 else []
        kept = ["started", *lacks_its_end, "resumed"]
        assert types(found) == kept
        assert [each["n"] for each in found] == [*range(1, len(kept) + 1)]
    path.write_bytes(whole + b"null\n{}\n[[[\n\xff\n")
    assert types(list(read_events(tmp_path))) == ["started", "warning"]


def test_numbers_that_json_lacks_are_null(tmp_path: Path) -> None:
    Events(tmp_path).emit("steps", **{"from": 1}, loss=[1.0, float("nan"), float("inf")])
    assert next(read_events(tmp_path))["loss"] == [1.0, None, None]


def test_a_full_disk_costs_the_events_and_not_the_run(
    tmp_path: Path, fill_the_disk: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    events = Events(tmp_path)
    events.emit("started")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    fill_the_disk()
    for _ in range(3):
        events.emit("warning", text="x" * 90_000)
    assert caplog.text.count("events.jsonl cannot be written") == 1
    assert types(list(read_events(tmp_path))) == ["started", "warning"]


def test_other_processes_of_a_launch_write_no_events(tmp_path: Path) -> None:
    held = Run(tmp_path, Lock.take(tmp_path))
    copy = pickle.loads(pickle.dumps(held))
    copy.events.emit("started")
    assert not (tmp_path / "events.jsonl").exists() and not copy.holds_lock
    held.close()


def test_events_of_steps_do_not_wait_for_the_device(
    small: Callable[..., Settings], tmp_path: Path
) -> None:
    """On the meta device, reading any value is an error."""
    loop = loop_on_meta(small(steps=1000))
    loop.control = Control(Events(tmp_path))
    loop.events = loop.control.events
    shown = StepReport(loop, None, None)
    loop.history.losses += [0.5, torch.zeros((), device="meta"), torch.zeros((), device="meta")]
    loop.done = 3
    shown.after_step()
    shown.emit()
    assert [each["loss"] for each in read_events(tmp_path)] == [[0.5]]
    with pytest.raises((RuntimeError, NotImplementedError)):
        shown.show(3, {})


def test_on_a_device_a_loss_is_read_when_the_next_step_is_queued(
    small: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, reading any value is an error."""
    loop, reported = loop_on_meta(small(steps=10)), list[tuple[str, float]]()
    progress = SimpleNamespace(set_postfix=lambda **_: None)
    shown = StepReport(loop, progress, lambda *values: reported.append(values))
    for done in (1, 2, 3):
        loop.history.losses.append(torch.zeros((), device="meta"))
        loop.done = done
        shown.after_step()
        loop.history.losses[-1] = torch.tensor(done / 4)  # the device has finished the step
    assert reported == [("loss", 0.25), ("step", 1.0), ("loss", 0.5), ("step", 2.0)]


def test_the_times_of_a_run_are_counted_by_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("trainer.events.time.monotonic", lambda: now[0])
    events = Events()

    def passes(seconds: float) -> None:
        now[0] += seconds

    passes(1)
    events.phase("loading")
    passes(2)
    events.phase("training")
    passes(3)
    with events.within_phase("previews"):
        passes(4)
    passes(5)
    events.phase("training", 1, 2)
    events.phase("checking")
    passes(6)
    wanted = {"starting": 1, "loading": 2, "training": 8, "previews": 4, "checking": 6}
    assert events.seconds() == wanted


# ---- State ---------------------------------------------------------------------------------------


STATES: list[tuple[list[tuple[str, dict[str, Any]]], str, str]] = [
    # events, state while the lock is held, state when it is free
    ([("started", {})], "running", "stopped"),
    ([("started", {}), ("pausing", {"step": 2})], "pausing", "stopped"),
    ([("started", {}), ("paused", {"step": 2, "kept": True})], "paused", "stopped"),
    ([("paused", {"kept": False})], "paused, memory freed", "paused, memory freed"),
    ([("paused", {"kept": True}), ("resumed", {"step": 2})], "running", "stopped"),
    ([("stopping", {"step": 2})], "stopping", "stopped"),
    ([("stopping", {}), ("stopped", {"step": 2})], "stopped", "stopped"),
    ([("stopped", {"step": 2}), ("started", {})], "running", "stopped"),
    ([("started", {}), ("error", {"text": "no"})], "failed", "failed"),
    ([("started", {}), ("done", {"step": 4})], "done", "done"),
    ([("done", {}), ("warning", {"text": "late"})], "done", "done"),
]


@pytest.mark.parametrize(("events", "held", "free"), STATES)
def test_the_state_is_that_of_the_last_state_event_and_the_lock(
    events: list[tuple[str, dict[str, Any]]], held: str, free: str, tmp_path: Path
) -> None:
    assert run_state(tmp_path) is None
    lock = Lock.take(tmp_path)
    assert str(run_state(tmp_path)) == "queued"
    writer = Events(tmp_path)
    for kind, facts in events:
        writer.emit(kind, **facts)
    assert run_state(tmp_path).state == held  # type: ignore[union-attr]
    lock.release()
    assert run_state(tmp_path).state == free  # type: ignore[union-attr]


def test_asking_for_the_state_does_not_keep_a_run_from_its_lock(tmp_path: Path) -> None:
    Lock.take(tmp_path).release()
    assert not Lock.is_held(tmp_path)
    lock = Lock.take(tmp_path)
    assert Lock.is_held(tmp_path)
    lock.release()
    assert not Lock.is_held(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_killed_is_stopped(number: int, tmp_path: Path) -> None:
    options = "--base-model miniature --batch-size 1 --steps 2000 --checkpoint-every 1"
    options += " --validation-every 0 --preserve off --sample-prompts= --output-dir out"
    words = [sys.executable, "-m", "trainer", str(ROOT / "demo" / "subject.zip"), *options.split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "console.txt").open("w") as console:
        child = subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=console)
    try:
        folder, until = tmp_path / "out", time.monotonic() + 120
        while (state := run_state(folder)) is None or state.step < 3:
            assert child.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        assert state.state == "running" and state.phase == "training"
        put(folder, Command("save"))
        while not list((folder / "saved").glob("*.zip")):
            assert child.poll() is None and time.monotonic() < until
            time.sleep(0.05)
    finally:
        child.send_signal(number)
        child.wait()
    state = run_state(folder)
    assert state is not None and state.state == "stopped"
    wanted = "unexpectedly" if number == signal.SIGKILL else "SystemExit"
    assert wanted in state.why and state.allowed == ("resume",)
