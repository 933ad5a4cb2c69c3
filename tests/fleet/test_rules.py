"""Where a request goes and when it is sent again; runs in a storage. Without Ray."""

from pathlib import Path

import pytest

from fleet.contents import Contents
from fleet.rules import replica_ended, retry_after, routing_key
from fleet.run_state import Progress, found
from fleet.run_storage import Job, RunStorage
from fleet.settings import FleetSettings
from inference.fetch import DiskCache, SourceError
from trainer.inbox import Command


class ActorDiedError(Exception):
    """Named as Ray's."""


def test_requests_for_a_lora_have_one_key_and_requests_without_one_have_none() -> None:
    assert routing_key(["first", "second"]) == routing_key(["first"]) == "first"
    assert routing_key([]) == ""


def test_only_the_end_of_a_replica_is_retried() -> None:
    assert replica_ended(ActorDiedError())
    assert not replica_ended(ValueError("prompt is empty"))


def test_a_longer_queue_asks_for_more_patience() -> None:
    assert retry_after(64, 2, 1.0) == 16
    assert retry_after(1, 100, 0.01) == 1
    assert retry_after(10_000, 1, 60.0) == 300


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="max_replicas is 2; it must be 0 or at least replicas, 4"):
        FleetSettings(replicas=4, max_replicas=2)


def test_weights_reach_another_machine_by_their_content(tmp_path: Path) -> None:
    store = (tmp_path / "store").as_uri()
    here, there = (Contents(DiskCache(tmp_path / name), store) for name in ("here", "there"))
    file = tmp_path / "cat.zip"
    file.write_bytes(b"weights")
    sha256 = here.add(file)
    assert there.get(sha256).read_bytes() == b"weights"

    (tmp_path / "store" / sha256).write_bytes(b"other")
    with pytest.raises(SourceError, match="damaged"):
        Contents(DiskCache(tmp_path / "third"), store).get(sha256)


def test_a_run_moves_with_its_files_and_events(tmp_path: Path) -> None:
    storage = RunStorage((tmp_path / "runs").as_uri())
    storage.write_job(Job("one", {"dataset": "dataset.zip"}, 1.0))
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "checkpoints").mkdir(parents=True)
    (old / "checkpoints" / "step-000010.safetensors").write_bytes(b"10")
    known: dict[str, tuple[int, int]] = {}
    storage.upload("one", old, known)
    (old / "checkpoints" / "step-000010.safetensors").rename(
        old / "checkpoints" / "step-000020.safetensors"
    )
    storage.upload("one", old, known)
    offset = storage.append_events("one", 0, b'{"n":1,"type":"started"}\n{"n":2,"ty')
    offset = storage.append_events("one", offset, b'{"n":2,"type":"checkpoint","step":20}\n')

    new.mkdir()
    assert storage.download("one", new) == offset
    assert [each.name for each in (new / "checkpoints").iterdir()] == ["step-000020.safetensors"]
    assert (new / "events.jsonl").read_bytes().count(b"\n") == 2
    # As in the studio: from any line on, and from the first one if the events were cleared.
    assert [end for end, _ in storage.events_after("one", 25)] == [offset]
    assert len(storage.events_after("one", 10_000)) == 2
    storage.send("one", Command("stop"))
    assert [each.do for each in storage.take_commands("one")] == ["stop"]
    assert storage.take_commands("one") == []


def test_the_state_of_a_run_says_whether_a_process_is_missing(tmp_path: Path) -> None:
    storage, progress = RunStorage((tmp_path / "runs").as_uri()), Progress()
    job = Job("one", {}, 1.0, attempt=1)

    def state(ray: str) -> tuple[str, bool]:
        run = found(job, storage, ray, progress)
        return run.status, run.must_start

    assert state("") == ("starting", True)
    assert state("PENDING") == ("starting", False)
    storage.append_events("one", 0, b'{"n":1,"type":"started"}\n')
    assert state("RUNNING") == ("processing", False)
    assert state("FAILED") == ("processing", True)  # its machine has ended
    for attempt in range(1, 4):
        storage.note_start(Job("one", {}, 1.0, attempt), "step-000010.safetensors")
    assert state("FAILED") == ("failed", False)
    assert "3 times" in found(job, storage, "FAILED", progress).error
    storage.note_start(Job("one", {}, 1.0, 4), "step-000020.safetensors")  # it goes on
    assert state("FAILED") == ("processing", True)
    storage.write("one", "cancelled", b"")
    assert state("STOPPED") == ("canceled", False)
