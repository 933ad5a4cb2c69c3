"""Trackers show a training, cost it nothing when they break, and no key of theirs is ever seen."""

import copy
import importlib.util
import json
import logging
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from trainer.secret import Secret, Secrets, hidden
from trainer.settings import Settings, SettingsError, settle
from trainer.trackers import FOLDER, Trackers, check_trackers, configuration

KEY = "0123456789abcdef0123456789abcdef01234567"  # of the form of a W&B key

Small = Callable[..., Settings]


@pytest.fixture(autouse=True)
def nothing_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key of the machine's user, no network, no folder of theirs."""
    for name in ("WANDB_API_KEY", "WANDB_DIR", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


@pytest.fixture
def small() -> Small:
    """Settings of a training that needs no model, since none is begun."""

    def make(**changes: Any) -> Settings:
        given: dict[str, Any] = {"rank": 2, "steps": 3, "seed": 5, "output_dir": "/home/me/out"}
        return settle(dataset="imgs.zip", base_model="z-image", resolution=64, **(given | changes))

    return make


def picture(level: int) -> Image.Image:
    return Image.new("RGB", (32, 16), (level, 0, 0))


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


# ---- Secrets -------------------------------------------------------------------------------------


def test_a_secret_shows_itself_nowhere_but_where_it_is_revealed() -> None:
    secret = Secret(KEY)
    for shown in (str(secret), repr(secret), f"{secret}", f"{Secrets(wandb_api_key=secret)}"):
        assert KEY not in shown and "***" in shown
    for store in (json.dumps, pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError):
            store(secret)  # type: ignore[operator]
    assert secret.reveal() == KEY


def test_a_pasted_key_loses_its_line_break() -> None:
    assert Secret(f" {KEY}\n").reveal() == KEY


def test_cogs_secrets_and_plain_text_become_secrets_and_empty_ones_none() -> None:
    from cog import Secret as CogSecret

    for given in (KEY, CogSecret(KEY), Secret(KEY)):
        found = Secret.of(given)
        assert found is not None and found.reveal() == KEY
    assert [Secret.of(nothing) for nothing in (None, "", " \n", CogSecret(""))] == [None] * 4


def test_a_message_of_another_library_loses_the_key() -> None:
    assert hidden(f"401 for {KEY}!", Secret(KEY), None) == "401 for **********!"


# ---- What is asked for ---------------------------------------------------------------------------


def test_a_tracker_that_is_not_installed_is_refused_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "trackio" else find(name)
    )
    with pytest.raises(SettingsError, match="trackio is not installed; pip install trackio"):
        check_trackers(["tensorboard", "trackio"])


def test_an_unknown_tracker_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="'comet' is not one of tensorboard, wandb, trackio"):
        check_trackers(["comet"])


def test_the_configuration_says_all_but_where_things_lie(small: Small) -> None:
    settings = small(sample_prompts=("a cat", "a dog"), sample_options={"width": 64})
    values = configuration(settings)
    assert {type(value) for value in values.values()} <= {bool, int, float, str}
    assert values["base_model"] == "Tongyi-MAI/Z-Image"
    assert (values["steps"], values["rank"], values["resolutions"]) == (3, 2, "64")
    assert (values["sample_prompts"], values["sample_options"]) == ("a cat, a dog", "width 64")
    assert str(settings.output_dir) not in str(values)


# ---- What is shown -------------------------------------------------------------------------------


def test_tensorboard_holds_numbers_pictures_and_settings(small: Small, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = replace(small(), trackers=("tensorboard",))
    with Trackers(settings, tmp_path) as trackers:
        for step in (1, 2):
            trackers.log({"loss": 0.5 / step, "learning_rate/lora": 1e-4}, step)
        trackers.pictures({"samples/00": picture(255)}, 2)
    events = EventAccumulator(str(tmp_path / FOLDER / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert events.Scalars("learning_rate/lora")[0].value == pytest.approx(1e-4)
    assert (events.Images("samples/00")[0].width, events.Images("samples/00")[0].step) == (32, 2)
    [written] = (tmp_path / FOLDER).rglob("hparams.yml")
    assert "base_model: Tongyi-MAI/Z-Image" in written.read_text()


def test_wandb_gets_the_run_and_its_key_reaches_no_file(
    small: Small, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    settings = replace(small(), trackers=("wandb",), wandb_project="cats", wandb_run="first")
    with Trackers(settings, tmp_path, Secret(KEY)) as trackers:
        trackers.log({"loss": 0.125}, 1)
        trackers.pictures({"samples/00": picture(255)}, 1)
    [run] = (tmp_path / FOLDER / "wandb").glob("offline-run-*")
    [record] = run.glob("*.wandb")
    wanted = (b"cats", b"first", b"loss", b"Tongyi-MAI/Z-Image", b"samples/00")
    deadline = time.monotonic() + 30  # wandb's own process may still be writing its record
    while not all(said in record.read_bytes() for said in wanted):
        assert time.monotonic() < deadline, record.read_bytes()
        time.sleep(0.05)
    assert [path.suffix for path in (run / "files" / "media").rglob("*.png")] == [".png"]
    files = files_below(tmp_path)
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    assert KEY not in "".join(capfd.readouterr())


def test_trackio_holds_numbers_and_pictures(small: Small, tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    settings = replace(small(), trackers=("trackio",), wandb_project="cats", wandb_run="first")
    with Trackers(settings, tmp_path) as trackers:
        trackers.log({"loss": 0.125}, 1)
        trackers.pictures({"samples/00": picture(255)}, 1)
    import trackio

    [run] = trackio.Api().runs("cats")
    assert run.name == "first"
    assert [path.suffix for path in (tmp_path / "trackio").rglob("*.png")] == [".png"]


# ---- What breaks ---------------------------------------------------------------------------------


class Broken:
    """A tracker whose network goes away after the first step."""

    name = "broken"

    def __init__(self) -> None:
        self.calls = 0

    def start(self) -> None:
        pass

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        pass

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self.calls += 1
        if step > 1:
            raise ConnectionError(f"lost https://api.example/?key={KEY}")

    def finish(self) -> None:
        raise AssertionError("a tracker that broke is left alone")


def test_a_tracker_that_breaks_is_named_once_and_the_others_go_on(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from trainer import trackers as module

    broken = Broken()
    monkeypatch.setitem(module.TRACKERS, "wandb", lambda *_: broken)  # type: ignore[arg-type]
    settings = replace(small(), trackers=("wandb", "tensorboard"))
    with caplog.at_level(logging.WARNING), Trackers(settings, tmp_path, Secret(KEY)) as trackers:
        for step in (1, 2, 3):
            trackers.log({"loss": 1.0}, step)
    assert broken.calls == 2
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning == (
        "wandb could not log numbers (ConnectionError: lost https://api.example/?key=**********); "
        "the training goes on without it"
    )
    events = EventAccumulator(str(tmp_path / FOLDER / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]


def test_a_tracker_that_does_not_start_stops_the_training_before_it_costs_anything(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer import trackers as module

    def refuse(*_: Any) -> Any:
        raise ValueError(f"the key {KEY} is not known")

    monkeypatch.setitem(module.TRACKERS, "wandb", refuse)
    with pytest.raises(SettingsError, match="wandb does not start") as refusal:
        Trackers(replace(small(), trackers=("wandb",)), tmp_path, Secret(KEY))
    assert KEY not in str(refusal.value) and refusal.value.__cause__ is None
    assert "WANDB_MODE=offline" in str(refusal.value)


def test_a_tracker_that_never_finishes_sending_is_left_behind(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import threading

    from trainer import trackers as module

    never = threading.Event()
    stuck = Broken()
    stuck.finish = never.wait  # type: ignore[method-assign,assignment]
    monkeypatch.setitem(module.TRACKERS, "wandb", lambda *_: stuck)  # type: ignore[arg-type]
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    with Trackers(replace(small(), trackers=("wandb",)), tmp_path):
        pass
    never.set()
    assert "wandb is still sending" in caplog.text
