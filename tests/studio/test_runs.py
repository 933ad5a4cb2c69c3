"""Runs as the page sees them: summaries, series, files, comparison. No process is started."""

import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import DATASET, with_dataset
from starlette.testclient import TestClient

from studio import new_runs
from studio.app import application
from studio.folder import Studio
from studio.history import History
from studio.jobs import forget
from studio.new_runs import write_record
from studio.replies import Problem, send_file
from studio.summaries import write_facts
from trainer.events import Events
from trainer.lock import Lock
from trainer.run_files import record_of
from trainer.settings import Settings

Make = Callable[..., Path]


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    """A client of a studio in `tmp_path`, without work in the background."""
    studio = Studio(tmp_path)
    yield TestClient(
        application(studio), base_url="http://127.0.0.1:8500", headers={"X-Studio": "1"}
    )
    forget(studio)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes the folder of a run with these events."""

    def run(name: str, *events: tuple[str, dict[str, Any]], **used: Any) -> Path:
        folder = tmp_path / "outputs" / name
        folder.mkdir(parents=True)
        used = {"base": "miniature-turbo", "steps": 100, "placeholder_token": "<zwx>"} | used
        record = {"program": "zeroprior", "settings": {"given": {"rank": 4}, "used": used}}
        (folder / "run.json").write_text(json.dumps(record))
        log = Events(folder)
        for kind, facts in events:
            log.emit(kind, **facts)
        log.close()
        return folder

    return run


def steps(first: int, *loss: float | None) -> tuple[str, dict[str, Any]]:
    facts = {"from": first, "loss": list(loss), "rate": {"lora": 1e-3}, "norm": {"lora": 0.5}}
    return "steps", facts | {"seconds": 0.1 * len(loss)}


def test_a_run_is_summed_up_from_its_events_and_its_lock(client: TestClient, make: Make) -> None:
    folder = make("one", ("started", {}), ("phase", {"name": "training"}), steps(1, 0.5, 0.25))
    lock = Lock.take(folder)
    run = client.get("/api/runs/one").json()
    assert (run["state"], run["step"], run["steps"]) == ("running", 2, 100)
    assert run["phase"] == {"name": "training", "done": None, "of": None}
    assert run["seconds_per_step"] == 0.1 and run["seconds_left"] == 9.8
    assert run["tokens"] == ["<zwx>"] and run["spark"] == [0.5, 0.25]
    assert "pause" in run["allowed"] and "delete" not in run["allowed"]
    lock.release()
    run = client.get("/api/runs/one").json()
    assert (run["state"], run["why"]) == ("stopped", "its process ended unexpectedly")
    assert run["allowed"] == ["restart", "delete"]  # there is no checkpoint


def test_a_loss_that_is_not_finite_is_a_gap_and_what_was_given_up_is_void(make: Make) -> None:
    folder = make(
        "one",
        ("started", {}),
        steps(1, 0.5, None, 0.4, 0.3),
        ("validation", {"step": 4, "kind": "fit", "sigmas": [0.5], "loss": [0.2], "mean": 0.2}),
        ("started", {}),
        ("resumed", {"step": 2}),
        steps(3, 0.9),
    )
    found = History(folder).read().series(2000)
    assert found["steps"] == [1, 2, 3] and found["loss"] == [0.5, None, 0.9]
    assert found["void"] == [{"steps": [3, 4], "loss": [0.4, 0.3]}]
    assert found["resumed"] == [2] and found["validation"] == []


def test_the_series_of_a_long_run_is_thinned_with_its_extremes(
    client: TestClient, make: Make
) -> None:
    events = [steps(1 + 20 * k, *[k / 500 + j / 1000 for j in range(20)]) for k in range(500)]
    make("long", ("started", {}), *events, steps=10_000)
    begun = time.perf_counter()
    found = client.get("/api/runs/long/series?points=1000").json()
    assert time.perf_counter() - begun < 2  # 0.1 s on an idle machine
    assert len(found["steps"]) == len(found["low"]) == 1000 and found["steps"][-1] == 10_000
    assert found["low"][0] == 0 and found["high"][0] == 0.009


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_every_cut_of_the_last_line_is_read(make: Make, cut: int) -> None:
    folder = make("one", ("started", {}), steps(1, 0.5), steps(2, 0.4))
    path = folder / "events.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    history = History(folder).read()
    assert list(history.steps) == [1]
    log = Events(folder)  # of the next process of the run
    log.emit("resumed", step=1)
    log.emit("steps", **steps(2, 0.3)[1])
    assert list(history.read().loss) == [0.5, 0.3]


def test_a_machine_that_was_restarted_is_the_reason(client: TestClient, make: Make) -> None:
    make("one", ("started", {"boot": "another"}), steps(1, 0.5))
    assert client.get("/api/runs/one").json()["why"] == "the machine was restarted"


def test_two_hundred_runs_are_listed_from_what_was_kept(client: TestClient, make: Make) -> None:
    for number in range(200):
        make(f"run-{number:03d}", ("started", {}), steps(1, 0.5), ("done", {"step": 1}))
    first = client.get("/api/runs?limit=200").json()
    assert len(first["runs"]) == 200 and not first["more"]
    begun = time.perf_counter()
    page = client.get("/api/runs?limit=50").json()
    assert time.perf_counter() - begun < 1  # 0.03 s on an idle machine
    assert page["more"] and page["runs"] == first["runs"][:50]
    rest = client.get(f"/api/runs?limit=150&before={page['runs'][-1]['id']}").json()
    assert page["runs"] + rest["runs"] == first["runs"]


def test_a_title_and_a_note_are_kept_beside_the_trainers_files(
    client: TestClient, make: Make
) -> None:
    folder = make("one", ("started", {}), ("done", {"step": 1}))
    before = (folder / "run.json").read_bytes()
    answer = client.patch("/api/runs/one", json={"title": "Robot", "note": "<b>good</b>"})
    assert (answer.json()["title"], answer.json()["note"]) == ("Robot", "<b>good</b>")
    assert (folder / "run.json").read_bytes() == before
    assert client.get("/api/runs").json()["runs"][0]["title"] == "Robot"


def test_a_deleted_run_is_in_the_trash_and_comes_back(client: TestClient, make: Make) -> None:
    folder = make("one", ("started", {}), ("done", {"step": 1}))
    lock = Lock.take(folder)
    refused = client.delete("/api/runs/one")
    assert refused.status_code == 409 and "in use" in refused.json()["error"]
    lock.release()
    trash = client.delete("/api/runs/one").json()["trash"]
    assert client.get("/api/runs/one").status_code == 404
    assert client.post(f"/api/trash/{trash}/restore").status_code == 200
    assert client.get("/api/runs/one").json()["state"] == "done"


def test_a_part_of_a_file_is_sent_and_nothing_outside_of_the_run(
    client: TestClient, make: Make, tmp_path: Path
) -> None:
    folder = make("one", ("started", {}))
    (folder / "samples").mkdir()
    (folder / "samples" / "a.png").write_bytes(bytes(range(100)))
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    path = "/api/runs/one/files/samples/a.png"
    assert client.get(path).content == bytes(range(100))
    part = client.get(path, headers={"Range": "bytes=10-19"})
    assert part.status_code == 206 and part.content == bytes(range(10, 20))
    assert part.headers["content-range"] == "bytes 10-19/100"
    assert client.get(path, headers={"Range": "bytes=-5"}).content == bytes(range(95, 100))
    assert client.get(path, headers={"Range": "bytes=200-"}).status_code == 416
    for wrong in ("link.txt", "..%2f..%2fsecret.txt", "%00", "samples", "none.png"):
        answer = client.get(f"/api/runs/one/files/{wrong}")
        assert answer.status_code in (400, 404) and b"secret" not in answer.content


def test_a_report_runs_no_script(client: TestClient, make: Make) -> None:
    folder = make("one", ("started", {}))
    (folder / "report.html").write_text("<script>alert(1)</script>")
    answer = client.get("/api/runs/one/report")
    policies = answer.headers.get_list("content-security-policy")
    assert any("sandbox" in each and "default-src 'none'" in each for each in policies)


def test_a_log_is_read_on_and_an_import_error_is_shown(client: TestClient, make: Make) -> None:
    folder = make("one")
    write_facts(folder, started=1.0)
    (folder / "console.txt").write_text("Traceback\nModuleNotFoundError: torch\n")
    run = client.get("/api/runs/one").json()
    assert (run["state"], run["why"]) == ("failed", "ModuleNotFoundError: torch")
    (folder / "log.txt").write_text("first\n")
    found = client.get("/api/runs/one/log").json()
    assert found == {"text": "first\n", "offset": 6}
    with (folder / "log.txt").open("a") as file:
        file.write("second\n")
    assert client.get("/api/runs/one/log?after=6").json()["text"] == "second\n"


def test_runs_are_compared_by_what_differs(client: TestClient, make: Make) -> None:
    image = {"step": 0, "number": 0, "prompt": "a dog", "seed": 5, "file": "samples/a.png"}
    make("one", ("started", {}), steps(1, 0.5), ("preview", image), rank=4)
    make("two", ("started", {}), steps(1, 0.4), ("preview", image), rank=8)
    found = client.get("/api/compare?runs=one,two").json()
    assert found["differ"] == [{"name": "rank", "values": [4, 8]}]
    assert [each["series"]["loss"] for each in found["runs"]] == [[0.5], [0.4]]
    [pair] = found["previews"]
    assert (pair["prompt"], pair["seed"], len(pair["files"])) == ("a dog", 5, 2)


def test_a_file_is_closed_although_the_browser_has_gone_before_its_first_byte(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"content")
    fd = os.open(path, os.O_RDONLY)
    answer = send_file(fd, path.name)
    del answer
    gc.collect()
    with pytest.raises(OSError):
        os.fstat(fd)


def test_a_run_of_the_command_line_is_begun_again_with_all_that_it_was_given(
    make: Make, tmp_path: Path
) -> None:
    place = with_dataset(tmp_path) / "datasets" / DATASET
    studio = Studio(tmp_path)

    def again(name: str, **given: Any) -> Settings:
        folder = make(name, **{k: given[k] for k in ("training", "steps") if k in given})
        record = record_of(folder) | {"dataset": {"path": str(place)}}
        record["settings"]["given"] |= given
        write_record(folder, record)
        return new_runs.again(studio, folder)[0]

    job = {"train_placeholder_token": False, "foreign_captions": True, "steps": 7}
    job |= {"epochs": {"steps": 2}, "sample_options": {"width": 64, "height": 64}}
    found = again("job", **job)
    assert found.foreign_captions and found.sample_options == {"width": 64, "height": 64}
    assert (found.steps, found.epochs, found.rank) == (7, {}, 4)
    found = again("two", subjects=["<abc>=a", "<kul>=b"], masks="off")
    assert (found.tokens, found.masks) == (("<abc>", "<kul>"), "off")
    with pytest.raises(Problem, match="full trained the whole model; begin it on the command"):
        again("full", training="full")
