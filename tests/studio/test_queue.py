"""The queue, commands to runs, and their processes, with a trainer that has no model."""

import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pages import DATASET, Page, until, with_dataset

from studio import commands, processes, queue, summaries
from trainer.lock import Lock
from trainer.run_files import record_of


def test_runs_start_one_after_another_and_each_request_makes_one(page: Page) -> None:
    first, second = page.new("one"), page.new("two")
    assert page.new("one") == first and first != second
    assert page.client.get("/api/queue").json() == {"order": [second], "held": False}
    page.becomes(second, "done")
    ends = page.events(first, "done")[0]["t"]
    assert page.events(second, "started")[0]["t"] >= ends
    assert page.run(first)["datasets"] == [DATASET] and page.run(first)["tokens"] == ["<zwx>"]


def test_the_same_request_twice_at_once_makes_one_run(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "check_known", lambda *_: asyncio.sleep(0.5))
    page.client.put("/api/queue", json={"held": True})
    body = {"datasets": [{"name": DATASET, "token": "<zwx>"}], "settings": {"steps": 2}}
    with ThreadPoolExecutor(2) as pool:
        sent = [pool.submit(page.client.post, "/api/runs", json=body | {"key": "k"}) for _ in "ab"]
        answers = [each.result() for each in sent]
    assert {each.status_code for each in answers} <= {201, 409}
    assert len(page.client.get("/api/queue").json()["order"]) == 1


def test_a_held_queue_starts_what_is_started_by_hand_and_keeps_the_order(page: Page) -> None:
    page.client.put("/api/queue", json={"held": True})
    runs = [page.new() for _ in range(3)]
    queue = page.client.put("/api/queue", json={"order": [runs[2], runs[0]]}).json()
    assert queue == {"order": [runs[2], runs[0], runs[1]], "held": True}
    page.do(runs[1], "start")
    page.becomes(runs[1], "done")
    time.sleep(0.2)
    assert page.run(runs[2])["state"] == "queued"
    assert page.client.delete(f"/api/runs/{runs[2]}").status_code == 200
    page.client.put("/api/queue", json={"held": False})
    page.becomes(runs[0], "done")
    assert page.client.get("/api/queue").json()["order"] == []


def test_a_run_is_paused_resumed_and_stopped_and_each_command_is_done_once(page: Page) -> None:
    run = page.new(steps=1000)
    until(lambda: page.run(run)["step"])
    for _ in range(3):
        page.do(run, "pause", key="same")
    paused = page.becomes(run, "paused")
    assert not paused["freed"] and "resume" in paused["allowed"]
    assert page.do(run, "pause", expect=409)["allowed"] == paused["allowed"]
    page.do(run, "resume")
    page.becomes(run, "running")
    page.do(run, "stop")
    stopped = page.becomes(run, "stopped")
    until(lambda: not Lock.is_held(page.folder / "outputs" / run))
    assert len(page.events(run, "command")) == 3
    refused = page.do(run, "stop", expect=409)
    assert "cannot stop" in refused["error"] and "resume" in refused["allowed"]
    page.do(run, "resume")
    page.becomes(run, "running")
    assert until(lambda: page.events(run, "resumed")[1:])[0]["step"] == stopped["checkpoint"]
    page.do(run, "free")
    assert page.becomes(run, "paused")["freed"]


def test_a_stop_is_heard_while_the_process_starts(page: Page) -> None:
    for _ in range(5):  # on a busy machine a run may have started before it is looked at
        run = page.new(steps=1000)
        found = page.run(run)
        if found["phase"]["name"] == "starting":
            break
        page.do(run, "stop")
        page.becomes(run, "stopped")
    assert found["phase"]["name"] == "starting" and found["allowed"] == ["stop"]
    page.do(run, "stop", key="early")
    assert page.do(run, "stop", key="early")["run"]["state"] == "stopping"
    page.becomes(run, "stopped")
    assert len(page.events(run, "command")) == 1


def test_a_done_run_is_continued_and_repeated_in_folders_of_their_own(page: Page) -> None:
    run = page.new()
    page.becomes(run, "done")
    (page.folder / "datasets" / DATASET / "new.txt").write_text("not part of the first run")
    more = page.do(run, "more", steps=3)["run"]["id"]
    record = record_of(page.folder / "outputs" / more)
    assert record["settings"]["used"]["steps"] == 5
    assert record["settings"]["given"]["resume_from"].endswith(f"{run}/checkpoints")
    again = page.do(run, "restart", key="again")["run"]["id"]
    assert page.do(run, "restart", key="again")["run"]["id"] == again != more
    page.becomes(again, "done")


def test_settings_are_refused_at_their_field_in_the_command_lines_words(page: Page) -> None:
    for changes, field, words in (
        ({"learning_rate": 5}, "learning_rate", "learning_rate is 5; it must be between 0 and 1"),
        ({"base_model": "/etc"}, "base_model", "base_model '/etc' is not one of"),
        ({"output_dir": "/tmp/x"}, "output_dir", "it cannot be set here"),
        ({"resume_from": "/tmp/x"}, "resume_from", "it cannot be set here"),
        ({"turbo_adapter": "/etc/passwd"}, "turbo_adapter", "must be one of"),
        ({"trackers": "wandb"}, "trackers", "only tensorboard"),
        ({"optimizer": "adam"}, "optimizer", "did you mean 'adamw'?"),
        ({"optimizer": "adamw8bit"}, "optimizer", "needs a GPU, and this machine has none"),
        ({"datasets": [{"name": "none"}]}, "dataset", "there is no dataset none"),
        ({"datasets": [{"name": DATASET, "token": "a b"}]}, "placeholder_token", ""),
    ):
        answer = page.new(expect=422, **changes)
        assert answer["field"] == field and words in answer["error"]
    assert page.new(expect=400, datasets=[{"name": "../outputs"}])
    (page.folder / "datasets" / DATASET / "broken.png").write_bytes(b"no image")
    assert "broken.png" in page.new(expect=422)["error"]
    assert not any((page.folder / "outputs").iterdir())


def test_several_subjects_are_one_dataset_in_the_runs_folder(page: Page) -> None:
    with_dataset(page.folder, "second, one", most=4)
    page.client.put("/api/queue", json={"held": True})
    pair = [{"name": DATASET, "token": "<zwx>"}, {"name": "second, one", "token": "<kul>"}]
    run = page.new(datasets=pair)
    assert page.run(run)["tokens"] == ["<zwx>", "<kul>"]
    used = record_of(page.folder / "outputs" / run)["settings"]["used"]
    assert used["subjects"] == ["<zwx>=1-shapes", "<kul>=2-second-one"]
    assert page.run(run)["dataset_images"] == 10
    # A caption that is changed afterwards does not change the run.
    place = page.folder / "outputs" / run / "dataset" / "1-shapes"
    assert len(list(place.iterdir())) == len(list((page.folder / "datasets" / DATASET).iterdir()))


def test_a_killed_run_is_stopped_at_once_and_leaves_no_process(page: Page) -> None:
    run = page.new(steps=1000, rank=13)
    until(lambda: page.run(run)["step"])
    folder = page.folder / "outputs" / run
    pids = until(lambda: p if len(p := processes.members().get(str(folder), [])) == 2 else None)
    os.kill(page.events(run, "started")[0]["pid"], 9)
    stopped = page.becomes(run, "stopped")
    until(lambda: page.run(run)["why"].startswith("its process was ended by signal 9"))
    assert stopped["allowed"] == ["restart", "delete"]
    until(lambda: not processes.members().get(str(folder)))
    assert len(pids) == 2


def test_a_run_that_does_not_listen_can_be_ended(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "TERM_SECONDS", 0.5)
    monkeypatch.setattr(summaries, "STUCK", 0.3)
    run = page.new(steps=1000, rank=14)
    until(lambda: page.events(run, "started"))
    page.do(run, "end", expect=409)
    page.do(run, "stop")
    assert page.run(run)["state"] == "stopping"
    until(lambda: page.run(run)["allowed"] == ["end"])
    page.do(run, "end")
    page.becomes(run, "stopped")


def test_a_process_that_stays_after_its_last_event_is_ended(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "PATIENCE", 0.3)
    run = page.new(rank=15)
    page.becomes(run, "done")
    until(lambda: not Lock.is_held(page.folder / "outputs" / run))


def test_a_server_that_starts_again_finds_its_runs(page: Page) -> None:
    run = page.new(steps=1000)
    waiting = page.new()
    until(lambda: page.run(run)["step"])
    page.end()
    page.start()
    assert page.run(run)["state"] == "running"
    assert page.client.get("/api/queue").json()["order"] == [waiting]
    page.do(run, "stop")
    page.becomes(run, "stopped")
    page.becomes(waiting, "done")


def test_after_a_restart_of_the_machine_nothing_starts_by_itself(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = page.new(steps=1000)
    waiting = page.new()
    until(lambda: page.run(run)["step"])
    page.do(run, "free")
    page.becomes(run, "paused")
    page.becomes(waiting, "done")
    page.do(run, "resume")
    until(lambda: page.run(run)["step"] > page.run(run)["checkpoint"])
    page.client.put("/api/queue", json={"held": True})
    waiting = page.new()
    page.client.put("/api/queue", json={"held": False})
    page.end()
    os.kill(page.events(run, "started")[-1]["pid"], 9)
    monkeypatch.setattr(queue, "boot_id", lambda: "another")
    monkeypatch.setattr(summaries, "boot_id", lambda: "another")
    page.start()
    found = page.client.get("/api/queue").json()
    assert found == {"order": [waiting], "held": True}
    assert page.becomes(run, "stopped")["why"] == "the machine was restarted"
    page.end()
    page.start(resume=True)
    page.becomes(run, "running")


def test_a_failed_start_is_said_with_its_last_line(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "TRAINER", ("-c", "import nothing_of_this_name"))
    run = page.new()
    failed = page.becomes(run, "failed")
    assert failed["why"] == "ModuleNotFoundError: No module named 'nothing_of_this_name'"
    assert failed["log_tail"][0].startswith("Traceback")
    assert failed["allowed"] == ["restart", "delete"]


def test_a_run_that_is_resumed_later_has_time_to_start(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    (trainer,) = processes.TRAINER
    run = page.new(steps=1000)
    until(lambda: page.run(run)["step"] > 10)
    page.do(run, "stop")
    page.becomes(run, "stopped")
    until(lambda: not Lock.is_held(page.folder / "outputs" / run))
    slow = (
        "import runpy, sys, time; time.sleep(1.5); "
        f"sys.argv = [{trainer!r}, sys.argv[1]]; runpy.run_path({trainer!r}, run_name='__main__')"
    )
    monkeypatch.setattr(processes, "TRAINER", ("-c", slow))
    monkeypatch.setattr(commands, "PATIENCE", 0.3)
    time.sleep(0.5)  # the last event is older than that
    page.do(run, "resume")
    assert until(lambda: page.events(run, "resumed"))
    page.do(run, "stop")


def test_a_run_whose_start_fails_once_stays_in_the_queue(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, failed = processes.Processes.start, []

    def fails_once(self: processes.Processes, folder: Path) -> None:
        if not failed:
            failed.append(folder)
            raise OSError("no process can be started")
        start(self, folder)

    monkeypatch.setattr(processes.Processes, "start", fails_once)
    page.client.put("/api/queue", json={"held": True})
    run = page.new()
    page.client.put("/api/queue", json={"held": False}, headers={"X-Studio": "1"})
    page.becomes(run, "done")
    assert failed
