"""Trackers show a training, cost it nothing when they break, and no key of theirs is ever seen."""

import base64
import copy
import importlib.util
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from PIL import Image
from wandb_server import WandB

from trainer.monitor.trackers import FOLDER, Trackers, check_trackers, configuration
from trainer.settings.fields import Settings, SettingsError, resolve
from trainer.settings.inputs import TrainingInputs
from trainer.settings.secret import Secret, Secrets, hidden

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
        return resolve(
            TrainingInputs(
                dataset="imgs.zip", base_model="z-image", resolution=64, **(given | changes)
            )
        )

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


AWKWARD = "hf_Aa/9+Zz=?" + KEY  # with characters that URLs quote


@pytest.mark.parametrize("key", [KEY, AWKWARD])
@pytest.mark.parametrize(
    "written",
    [
        lambda key: key,
        lambda key: quote(key, safe=""),
        lambda key: quote(key, safe="").lower(),
        quote_plus,
        lambda key: base64.b64encode(f"api:{key}".encode()).decode(),
        lambda key: base64.b64encode(f"me:{key}".encode()).decode(),
        lambda key: base64.urlsafe_b64encode(f"user:{key}".encode()).decode(),
        lambda key: key[:12] + "...",
        lambda key: "..." + key[-9:],
        lambda key: f"{key[:8]}***{key[-8:]}",
        lambda key: key + key[:20],
    ],
)
def test_a_message_of_another_library_loses_the_key(
    key: str, written: Callable[[str], str]
) -> None:
    shown = hidden(f"401 for {written(key)}!", Secret(key), None)
    assert shown.startswith("401 for ") and shown.endswith("!") and "**********" in shown
    for start in range(len(key) - 5):
        assert key[start : start + 6].lower() not in shown.lower()


def test_a_short_key_takes_nothing_else_from_a_message() -> None:
    assert hidden("401 for abc: YWJj is unknown", Secret("abc")) == (
        "401 for **********: YWJj is unknown"
    )


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


def test_the_documented_tensorboard_command_reads_the_files_of_a_run(
    small: Small, tmp_path: Path
) -> None:
    settings = small().replace(trackers=("tensorboard",))
    with Trackers(settings, tmp_path) as trackers:
        trackers.log({"loss": 0.5}, 1)
        trackers.log({"loss": 0.25}, 2)
    command = Path(sys.executable).with_name("tensorboard")
    for options in (["--version"], ["--inspect", "--logdir", str(tmp_path / FOLDER)]):
        done = subprocess.run([command, *options], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    assert "Event statistics" in done.stdout
    assert "loss" in done.stdout


def test_tensorboard_holds_numbers_pictures_and_settings(small: Small, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = small().replace(trackers=("tensorboard",))
    with Trackers(settings, tmp_path) as trackers:
        for step in (1, 2):
            trackers.log({"loss": 0.5 / step, "learning_rate/lora": 1e-4}, step)
        trackers.images({"samples/00": picture(255)}, 2)
    events = EventAccumulator(str(tmp_path / FOLDER / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert events.Scalars("learning_rate/lora")[0].value == pytest.approx(1e-4)
    assert (events.Images("samples/00")[0].width, events.Images("samples/00")[0].step) == (32, 2)
    [written] = (tmp_path / FOLDER).rglob("hparams.yml")
    assert "base_model: Tongyi-MAI/Z-Image" in written.read_text()


def test_tensorboard_stays_in_its_folder_when_the_working_folder_changes(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It opens its file by name again for every number."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    settings = small().replace(trackers=("tensorboard",))
    with Trackers(settings, Path("out")) as trackers:
        monkeypatch.chdir("/")
        trackers.log({"loss": 0.5}, 1)
    events = EventAccumulator(str(tmp_path / "out" / FOLDER / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("loss")] == [0.5]


def test_wandb_gets_the_run_and_its_key_reaches_no_file(
    small: Small, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    settings = small().replace(trackers=("wandb",), wandb_project="cats", wandb_run="first")
    with Trackers(settings, tmp_path, Secret(KEY)) as trackers:
        trackers.log({"loss": 0.125}, 1)
        trackers.images({"samples/00": picture(255)}, 1)
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
    settings = small().replace(trackers=("trackio",), wandb_project="cats", wandb_run="first")
    with Trackers(settings, tmp_path) as trackers:
        trackers.log({"loss": 0.125}, 1)
        trackers.images({"samples/00": picture(255)}, 1)
    import trackio

    [run] = trackio.Api().runs("cats")
    assert run.name == "first"
    assert [path.suffix for path in (tmp_path / "trackio").rglob("*.png")] == [".png"]


# ---- Whose key ----------------------------------------------------------------------------------

ANNA, BERT, OPERATOR = "a" * 40, "b" * 40, "c" * 40


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandB]:
    """A W&B server on this machine in the place of the real one."""
    pytest.importorskip("wandb")
    with WandB() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_MODE", "online")
        yield server


def run_for(key: str | None, settings: Settings, folder: Path, from_request: bool = True) -> None:
    """A run of one step with wandb."""
    settings = settings.replace(trackers=("wandb",))
    with Trackers(settings, folder, Secret.of(key), from_request) as trackers:
        trackers.log({"loss": 0.5}, 1)


def wandb_cores() -> list[int]:
    """Living wandb-core processes of this one."""
    listed = subprocess.run(
        ["ps", "--ppid", str(os.getpid()), "-o", "pid=,stat=,comm="], capture_output=True, text=True
    )
    rows = [line.split() for line in listed.stdout.splitlines()]
    return [int(pid) for pid, state, name in rows if "wandb" in name and "Z" not in state]


def test_each_requests_run_carries_its_own_key_alone(
    small: Small, tmp_path: Path, server: WandB
) -> None:
    for key in (ANNA, BERT, ANNA):
        server.keys.clear()
        run_for(key, small(), tmp_path)
        assert set(server.keys) == {key} and len(server.keys) > 2


def test_nothing_of_a_run_is_left_in_the_process(
    small: Small, tmp_path: Path, server: WandB
) -> None:
    import wandb
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib import wbauth

    before = dict(os.environ)
    run_for(ANNA, small(), tmp_path)
    assert wandb.run is None and wandb_setup._singleton is None and wandb_cores() == []
    assert wbauth.session_credentials(host=server.url) is None
    assert dict(os.environ) == before


@pytest.mark.parametrize("place", ["environment and files", "login", "identity token"])
def test_the_operators_own_account_is_no_part_of_a_requests_run(
    place: str, small: Small, tmp_path: Path, server: WandB, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    if place == "login":
        wandb.login(key=OPERATOR)
    elif place == "identity token":
        (home / "token").write_text(OPERATOR)
        monkeypatch.setenv("WANDB_IDENTITY_TOKEN_FILE", str(home / "token"))
    else:
        monkeypatch.setenv("WANDB_API_KEY", OPERATOR)
        for name in ("ENTITY", "RUN_ID", "NOTES", "PROJECT", "TAGS", "RUN_GROUP", "USERNAME"):
            monkeypatch.setenv(f"WANDB_{name}", "operator-of-this")
        (home / ".netrc").write_text(f"machine 127.0.0.1 login user password {OPERATOR}\n")
        for folder in (home / ".config" / "wandb", home / "wandb", home / ".wandb"):
            folder.mkdir(parents=True)
            (folder / "settings").write_text(
                f"[default]\napi_key = {OPERATOR}\nentity = operator-of-this\n"
            )
    server.keys.clear()
    server.bodies.clear()
    run_for(ANNA, small(), tmp_path)
    assert set(server.keys) == {ANNA}
    sent = b"".join(server.bodies).decode(errors="replace")
    for private in ("operator-of-this", str(tmp_path)):
        assert private not in sent


def test_on_the_command_line_the_environment_counts(
    small: Small, tmp_path: Path, server: WandB, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", OPERATOR)
    run_for(None, small(), tmp_path, from_request=False)
    assert set(server.keys) == {OPERATOR}


def test_a_session_that_the_program_began_before_stays(
    small: Small, tmp_path: Path, server: WandB, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_API_KEY", BERT)
    wandb.setup()
    try:
        run_for(None, small(), tmp_path, from_request=False)
        run_for(None, small(), tmp_path, from_request=False)
        assert set(server.keys) == {BERT} and len(wandb_cores()) == 1
    finally:
        wandb.teardown()


def test_after_wandbs_own_process_died_the_next_run_starts(
    small: Small, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("wandb")
    settings = small().replace(trackers=("wandb",))
    for number in range(2):
        with Trackers(settings, tmp_path, Secret(KEY), True) as trackers:
            [core] = wandb_cores()
            os.kill(core, signal.SIGKILL)
            trackers.log({"loss": 0.5}, number)
        assert wandb_cores() == []
    caplog.clear()
    with Trackers(settings, tmp_path, Secret(KEY), True) as trackers:
        trackers.log({"loss": 0.5}, 1)
    assert [each for each in caplog.records if each.name.startswith("trainer")] == []


def test_a_server_that_never_answers_leaves_nothing_to_the_next_run(
    small: Small, tmp_path: Path, server: WandB, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.monitor import trackers as module

    monkeypatch.setattr(module, "TIMEOUT", 0.5)
    settings = small().replace(trackers=("wandb",))
    with Trackers(settings, tmp_path, Secret(ANNA), True):
        server.answers.clear()
    assert wandb_cores() == []
    server.answers.set()
    server.keys.clear()
    run_for(BERT, small(), tmp_path)
    assert BERT in server.keys


class Cancelled(BaseException):
    """What the runtime throws into a request that is cancelled."""


@pytest.mark.parametrize("moment", ["start", "close"])
def test_a_cancellation_is_heard_while_a_tracker_waits(
    moment: str, small: Small, tmp_path: Path, server: WandB
) -> None:
    import ctypes

    settings = small().replace(trackers=("wandb",))
    ended: list[BaseException] = []

    def training() -> None:
        try:
            if moment == "start":
                server.answers.clear()
            with Trackers(settings, tmp_path, Secret(ANNA), True):
                server.answers.clear()
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=training)
    thread.start()
    deadline = time.monotonic() + 30
    while server.answers.is_set() or not server.waiting:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident), ctypes.py_object(Cancelled)
    )
    thread.join(10)
    server.answers.set()
    assert not thread.is_alive() and isinstance(ended[0], Cancelled)
    server.keys.clear()
    run_for(BERT, small(), tmp_path)
    assert BERT in server.keys


def test_a_run_that_cleans_up_late_leaves_the_session_of_the_next_one(
    tmp_path: Path, server: WandB
) -> None:
    from wandb.sdk import wandb_setup

    from trainer.monitor.wandb_run import WandBRun

    first, second = (
        WandBRun("cats", None, None, tmp_path, Secret.of(key), True) for key in (ANNA, BERT)
    )
    first.start()
    first.kill()
    first.forget()
    second.start()
    session = wandb_setup._singleton
    first.forget()
    assert session is not None and wandb_setup._singleton is session
    second.finish()
    assert wandb_setup._singleton is None and wandb_cores() == []


@pytest.mark.parametrize(
    ("tracker", "key", "said"),
    [
        ("wandb", None, "wandb needs wandb_api_key in the same request"),
        ("tensorboard,wandb", " ", "wandb needs wandb_api_key in the same request"),
        ("trackio", KEY, "trackio is not available on a server"),
    ],
)
def test_a_request_without_a_key_is_refused_before_its_dataset_is_read(
    tracker: str, key: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.run import train_from_inputs

    monkeypatch.setenv("WANDB_API_KEY", OPERATOR)
    monkeypatch.setenv("HF_TOKEN", "hf_operator")
    with pytest.raises(SettingsError, match=said) as refusal:
        train_from_inputs(
            TrainingInputs(
                dataset=tmp_path / "is-not-there.zip", output_dir=tmp_path / "out", trackers=tracker
            ),
            served=True,
            wandb_api_key=key,
        )
    assert OPERATOR not in str(refusal.value) and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_real_server_uses_each_customers_key_and_never_the_operators(
    server: WandB, miniature_vault: Path, photos: Path, tmp_path: Path
) -> None:
    from cog_server import PREFER_ASYNC, CogServer, Webhooks, copy_of_the_code

    env = {
        **{"MODEL_VAULT": str(miniature_vault), "BASE_MODEL": "miniature-turbo"},
        **{"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_TOKEN": "hf_operator"},
        **{"WANDB_BASE_URL": server.url, "WANDB_MODE": "online", "WANDB_API_KEY": OPERATOR},
        "ZEROPRIOR_FILES": str(photos.parent),
    }
    small = {"rank": 2, "steps": 2, "batch_size": 1, "resolution": "64", "validation_every": 0}
    small |= {"dataset": str(photos), "trackers": "wandb", "preserve": "off"}

    with CogServer("train", env, copy_of_the_code(tmp_path)) as cog:

        def train(inputs: dict[str, Any]) -> dict[str, Any]:
            server.keys.clear()
            with Webhooks() as hooks:
                cog.wait_idle()
                request = {"input": inputs, "webhook": hooks.url}
                assert cog.post("/trainings", request, PREFER_ASYNC).status_code == 202
                return hooks.finished()

        for key in (ANNA, BERT):
            report = train(small | {"wandb_api_key": key})
            assert report["status"] == "succeeded", report
            assert set(server.keys) == {key}
        for inputs, said in (
            (small, "wandb needs wandb_api_key in the same request"),
            (small | {"trackers": "", "hf_repo_id": "me/fox"}, "hf_repo_id needs hf_token in the"),
        ):
            report = train(inputs)
            assert report["status"] == "failed" and said in report["error"]
            assert server.keys == []
            assert OPERATOR not in str(report) and "hf_operator" not in str(report)


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

    from trainer.monitor import trackers as module

    broken = Broken()
    monkeypatch.setitem(module.MAKERS, "wandb", lambda *_: broken)  # type: ignore[arg-type]
    settings = small().replace(trackers=("wandb", "tensorboard"))
    with caplog.at_level(logging.WARNING), Trackers(settings, tmp_path, Secret(KEY)) as trackers:
        for step in (1, 2, 3):
            trackers.log({"loss": 1.0}, step)
    assert broken.calls == 2
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning == (
        "wandb could not log numbers (ConnectionError: lost https://api.example/?key=**********); "
        "the run continues without it"
    )
    events = EventAccumulator(str(tmp_path / FOLDER / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]


def test_a_tracker_that_does_not_start_stops_the_training_before_it_costs_anything(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.monitor import trackers as module

    def refuse(*_: Any) -> Any:
        raise ValueError(f"the key {KEY} is not known")

    monkeypatch.setitem(module.MAKERS, "wandb", refuse)
    with pytest.raises(SettingsError, match="wandb does not start") as refusal:
        Trackers(small().replace(trackers=("wandb",)), tmp_path, Secret(KEY))
    assert KEY not in str(refusal.value) and refusal.value.__cause__ is None
    assert "WANDB_MODE=offline" in str(refusal.value)


def test_a_tracker_that_never_finishes_sending_is_left_behind(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from trainer.monitor import trackers as module

    never = threading.Event()
    stuck = Broken()
    stuck.finish = never.wait  # type: ignore[method-assign,assignment]
    monkeypatch.setitem(module.MAKERS, "wandb", lambda *_: stuck)  # type: ignore[arg-type]
    monkeypatch.setattr(module, "TIMEOUT", 0.01)
    with Trackers(small().replace(trackers=("wandb",)), tmp_path):
        pass
    never.set()
    assert "wandb is still sending" in caplog.text
