"""Commands to a run: pause, resume, stop, save, given while it trains."""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from root import ROOT

from adapters.archive import Archive, read_archive
from trainer import commands, run
from trainer.commands import CommandRefused
from trainer.events import STATE_EVENTS, Events, read_events
from trainer.inbox import Command, Inbox, put
from trainer.learning.control import Stopped
from trainer.learning.loop import Loop
from trainer.lock import Lock
from trainer.settings.fields import Settings, resolve
from trainer.settings.inputs import TrainingInputs
from trainer.state import run_state

STEPS = 6


def settings_of(dataset: Path, output_dir: Path | str = "out", **changes: Any) -> Settings:
    """Those of a short run on the embedded miniature."""
    values: dict[str, Any] = {"dataset": dataset, "base_model": "miniature", "resolution": "64"}
    values |= {"rank": 2, "steps": STEPS, "seed": 5, "batch_size": 1, "validation_every": 2}
    values |= {"sample_prompts": (), "checkpoint_every": 0, "ema_decay": 0.5, "preserve": "off"}
    values |= {"output_dir": output_dir, "lr_scheduler": "cosine", "learning_rate": 1e-3}
    return resolve(TrainingInputs(**values | changes))


@pytest.fixture
def tiny(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Settings]:
    """Settings of a short run, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    return partial(settings_of, photos)


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """The weights of the same run without a command."""
    return read_archive(run.train(settings_of(photos, tmp_path_factory.mktemp("whole"))))


def after(monkeypatch: pytest.MonkeyPatch, step: int, *asked: Command) -> None:
    """Gives commands once, while a step is done."""
    original, waiting = Loop.step, [asked]

    def changed(self: Loop, number: int) -> None:
        original(self, number)
        if self.done == step and waiting:
            for each in waiting.pop():
                put(Path("out"), each)

    monkeypatch.setattr(Loop, "step", changed)


def events(kind: str, folder: Path = Path("out")) -> list[dict[str, Any]]:
    return [each for each in read_events(folder) if each["type"] == kind]


def assert_equal(one: Archive, other: Archive) -> None:
    assert one.factors.keys() == other.factors.keys()
    pairs = [(one.factors[name], other.factors[name]) for name in one.factors]
    assert all(torch.equal(a, b) for each, right in pairs for a, b in zip(each, right, strict=True))
    assert one.placeholder is not None and other.placeholder is not None
    assert torch.equal(one.placeholder.vectors, other.placeholder.vectors)
    assert one.meta["fit"] == other.meta["fit"]


def test_a_run_that_is_paused_saved_stopped_and_resumed_equals_an_uninterrupted_one(
    tiny: Callable[..., Settings], whole: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, said = Command("save", key="twice"), []

    def from_elsewhere() -> None:
        while (state := run_state(Path("out"))) is None or state.state != "paused":
            time.sleep(0.02)
        with pytest.raises(CommandRefused, match="cannot pause out, which is paused at step 3"):
            commands.pause("out")
        said.append(commands.save("out"))
        said.append(commands.resume("out"))

    thread = threading.Thread(target=from_elsewhere)
    with monkeypatch.context() as patch:
        after(patch, 3, Command("pause"), save, save)
        after(patch, 5, Command("stop"))
        thread.start()
        with pytest.raises(Stopped):
            run.train(tiny())
        thread.join()
    saved = Path("out/saved/step-000003.zip")
    first, second = said
    assert first == f"out: saved {saved}"
    # the run goes on while its state is read: the step is the one it paused at or a later one
    assert re.fullmatch("out: running, training at step [345]", second)
    assert read_archive(saved).meta["steps"] == 3
    assert str(run_state(Path("out"))) == "stopped at step 5: by a command"
    settings = commands.resume("out")
    assert isinstance(settings, Settings)
    weights = run.train(settings)
    assert weights.parent == Path("out")
    assert_equal(read_archive(weights), whole)

    order = [each["type"] for each in read_events(Path("out"))]
    wanted = ["started", "pausing", "paused", "resumed", "stopping", "stopped"]
    wanted += ["started", "resumed", "done"]
    assert [each for each in order if each in STATE_EVENTS] == wanted
    done = events("command")
    assert [each["do"] for each in done] == ["pause", "save", "save", "resume", "stop"]
    assert all(each["accepted"] for each in done)
    assert not Path("out/commands").exists()


def test_an_image_can_be_asked_for_between_two_steps_and_changes_nothing_else(
    tiny: Callable[..., Settings], whole: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"num_inference_steps": 1, "width": 64, "height": 64}
    asked = [Command("preview", prompt="TOK on a beach", seed=7, key="one"), Command("preview")]
    after(monkeypatch, 3, *asked)
    weights = run.train(tiny().replace(sample_options=options))
    assert_equal(read_archive(weights), whole)
    [image] = events("generated")
    assert (image["step"], image["id"], image["seed"]) == (3, "one", 7)
    assert image["prompt"] == "<zwx> on a beach"
    assert (image["width"], image["height"], image["steps"], image["lora_scale"]) == (64, 64, 1, 1)
    assert Path("out", image["file"]).name == "step-000003-1.png"
    assert Path("out", image["file"]).is_file()
    first, second = events("command")
    assert first["accepted"] and not second["accepted"]
    assert second["why"] == "no image was generated: the run has no sample_prompts; give a prompt"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "state"),
    [
        (Command("stop"), "stopped at step 4: by a command"),
        (Command("pause", free=True), "paused, memory freed at step 4"),
    ],
)
def test_a_run_that_ends_with_a_checkpoint_is_resumed_by_its_name(
    asked: Command,
    state: str,
    tiny: Callable[..., Settings],
    whole: Archive,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        after(patch, 4, asked)
        with pytest.raises(Stopped):
            run.train(tiny())
    assert str(run_state(Path("out"))) == state
    assert not Path("out/weights.zip").exists()
    settings = commands.resume("out")
    assert isinstance(settings, Settings)
    weights = run.train(settings)
    assert weights.parent == Path("out")
    assert str(run_state(Path("out"))) == f"done at step {STEPS}"
    [resumed] = events("resumed")
    assert resumed["step"] == 4
    assert_equal(read_archive(weights), whole)


@pytest.mark.slow
def test_a_run_that_is_stopped_and_kept_has_weights_checks_and_report(
    tiny: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    after(monkeypatch, 2, Command("stop", keep=True))
    weights = run.train(tiny())
    meta = read_archive(weights).meta
    assert meta["steps"] == 3 and meta["fit"]["steps"] == [0, 2, 3]
    assert meta["checks"] and (weights.parent / "report.html").is_file()
    [done] = events("done")
    assert done["early"] and done["step"] == 3
    with pytest.raises(
        CommandRefused, match="cannot resume out, which is done at step 3; possible now: nothing"
    ):
        commands.resume("out")


def test_a_stop_is_heard_while_images_are_encoded(
    tiny: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = run.encode_images

    def changed(*arguments: Any) -> Any:
        put(Path("out"), Command("stop"))
        return encode(*arguments)

    monkeypatch.setattr(run, "encode_images", changed)
    monkeypatch.setattr(Loop, "step", lambda *_: pytest.fail("a step was done"))
    with pytest.raises(Stopped, match="before the first step"):
        run.train(tiny())
    assert not Path("out").exists()  # nothing was made, so nothing is left


@pytest.mark.slow
def test_a_pause_without_room_for_its_checkpoint_is_refused_and_the_run_goes_on(
    tiny: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Path:
        raise OSError(28, "No space left on device")

    after(monkeypatch, 2, Command("pause", free=True))
    with monkeypatch.context() as patch:
        patch.setattr("trainer.learning.saving.write_checkpoint", full)
        assert run.train(tiny(steps=3)).is_file()
    [answer] = events("command")
    assert not answer["accepted"] and "no checkpoint can be written" in answer["why"]


@pytest.mark.slow
def test_a_command_to_an_earlier_process_is_not_done(
    tiny: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        after(patch, 1, Command("stop"))
        with pytest.raises(Stopped):
            run.train(tiny(steps=2))
    put(Path("out"), Command("stop"))
    settings = commands.resume("out")
    assert isinstance(settings, Settings) and run.train(settings).is_file()
    assert [each["accepted"] for each in events("command")] == [True, False]


def test_a_queued_run_begins_with_its_settings_and_is_described_then(
    tiny: Callable[..., Settings],
) -> None:
    settings, folder = tiny(steps=1), Path("out")
    folder.mkdir()
    given = settings.given.model_dump(mode="json", exclude_unset=True)
    used = {"base": "miniature", "steps": 1}
    record = {"program": "zeroprior", "begun": False, "settings": {"given": given, "used": used}}
    record["dataset"] = {"path": str(settings.dataset)}
    (folder / "run.json").write_text(json.dumps(record))
    assert str(run_state(folder)) == "queued"
    begun = commands.resume("out")
    assert isinstance(begun, Settings) and begun.resume_from is None and begun.rank == 2
    assert run.train(begun).is_file()
    assert json.loads((folder / "run.json").read_text())["dataset"]["sha256"]


# ---- Without a run -------------------------------------------------------------------------------


def test_commands_are_taken_in_their_order_and_each_key_once(tmp_path: Path) -> None:
    for _ in range(12):
        put(tmp_path, Command("save"))
    last = Command("stop", keep=True, key="last")
    put(tmp_path, last)
    (tmp_path / "commands" / "0003-pause.json").write_text('{"do": "dance"}')
    (tmp_path / "commands" / "notes.txt").write_text("not a command")
    taken = Inbox(tmp_path).take()
    assert [command.do for command, fault in taken if not fault] == ["save"] * 12 + ["stop"]
    assert [fault for _, fault in taken if fault] == [
        "0003-pause.json is not a valid command; do must be one of pause, resume, stop, save, "
        "preview"
    ]
    Events(tmp_path).emit("command", id="last", do="stop", accepted=True)
    put(tmp_path, last)
    assert Inbox(tmp_path).take() == []
    assert [each.name for each in (tmp_path / "commands").iterdir()] == ["notes.txt"]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An outputs/ with one run of yesterday, which is done."""
    monkeypatch.chdir(tmp_path)
    folder = Path("outputs/2026-11-26-robot-01")
    folder.mkdir(parents=True)
    Events(folder).emit("done", step=4)
    return folder


def test_a_run_that_is_not_there_is_an_error_that_names_those_that_are(runs: Path) -> None:
    for name in ("2026-11-26-robot-02", "robot"):
        with pytest.raises(CommandRefused, match=f"no run {name} in .*2026-11-26-robot-01"):
            commands.stop(name)


def test_a_command_that_the_state_does_not_allow_names_those_that_it_does(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CommandRefused, match="cannot pause .*robot-01, which is done .*nothing"):
        commands.pause("2026-11-26-robot-01")
    Events(runs).emit("started")
    with pytest.raises(CommandRefused, match="stopped at step 4: its .*; possible now: resume"):
        commands.save(runs)
    with pytest.raises(CommandRefused, match="has no checkpoint to resume from; start the run"):
        commands.resume(runs)
    lock = Lock.take(runs)
    with pytest.raises(CommandRefused, match="running at step 4; possible now: pause, stop, save"):
        commands.resume(runs)
    monkeypatch.setattr(commands, "PATIENCE", 0.1)
    assert "after the current step" in commands.pause(runs)  # nobody answers
    lock.release()


def test_the_command_line_gives_commands_without_pytorch(runs: Path) -> None:
    program = (
        "import sys; sys.argv = ['trainer', 'stop', '2026-11-26-robot-01']\n"
        "from trainer.__main__ import main\n"
        "try: main()\nfinally: assert 'torch' not in sys.modules"
    )
    words = [sys.executable, "-c", program]
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot stop 2026-11-26-robot-01, which is done at step 4")
