"""A fleet of two engines on this machine: what it answers, and what it survives.

Needs .venv-fleet (`make fleet`).
"""

import base64
import http.client
import json
import os
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from root import ROOT

from adapters.archive import read_archive
from lab.benchmarks.fleet import equality, kill
from lab.benchmarks.fleet_process import PYTHON, Fleet, fleet
from lab.benchmarks.soak import write_loras

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="needs .venv-fleet, which `make fleet` makes"),
]
PORT = 8345
QUEUED = 6
Json = dict[str, Any]
TRAINING: Json = {"dataset": "subject.zip", "steps": 24, "checkpoint_every": 8, "seed": 1}


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    files = write_loras(tmp_path_factory.mktemp("loras"), 9, seed=5)
    return files  # the last one is broken


@pytest.fixture(scope="module")
def served(loras: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    place = tmp_path_factory.mktemp("fleet")
    folders = os.pathsep.join([str(loras[0].parent), str(ROOT / "demo")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZEROPRIOR_FILES", folders)
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        options = ["--replicas", "2", "--loras", "3", "--ongoing", "2", "--queued", str(QUEUED)]
        options += ["--store", (place / "store").as_uri(), "--runs", (place / "runs").as_uri()]
        with fleet(PORT, options) as running:
            yield running


def until(found: Callable[[], Any], seconds: float = 240) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := found():
            return result
        time.sleep(0.3)
    raise AssertionError("it did not happen")


def test_it_answers_as_one_engine_does(served: Fleet, loras: list[Path]) -> None:
    images, refused, different = equality(served, loras, 40)
    assert images > 20 and refused and not different


def test_what_predict_refuses_it_refuses(served: Fleet) -> None:
    reply = served.predict({"prompt": "a circle", "num_outputs": 9, "sed": 1})
    assert reply.status == 422
    assert [each["loc"][-1] for each in reply.body["detail"]] == ["sed", "num_outputs"]
    other = served.predict({"prompt": "a circle", "base_model": "miniature"})
    assert other.body["status"] == "failed"
    assert "this server generates with miniature-turbo" in other.body["error"]
    file = served.predict({"prompt": "a circle", "replicate_weights": "/etc/passwd"})
    assert "is not a file that a request may name" in file.body["error"]


def test_steps_and_previews_are_streamed(served: Fleet, loras: list[Path]) -> None:
    data = base64.b64encode(loras[0].read_bytes()).decode()
    inputs = {"prompt": "a circle", "seed": 1, "replicate_weights": f"data:;base64,{data}"}
    request = urllib.request.Request(
        f"{served.url}/predictions",
        json.dumps({"input": inputs}).encode(),
        {"Content-Type": "application/json", "Accept": "text/event-stream"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        parts = answer.read().decode().split("\n\n")[:-1]
    names = [part.splitlines()[0].removeprefix("event: ") for part in parts]
    assert names.count("preview") == 3 and names[-1] == "done" and len(names) == 9
    done = json.loads(parts[-1].partition("data: ")[2])
    plain = served.predict(inputs | {"replicate_weights": str(loras[0])})
    assert done["output"] == plain.body["output"]


def test_a_request_whose_client_has_gone_ends(served: Fleet) -> None:
    body = {"input": {"prompt": "a circle", "num_inference_steps": 200, "num_outputs": 8}}
    host, port = served.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port))
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
    begin = worked(served)
    connection.request("POST", "/predictions", json.dumps(body), headers)
    assert connection.getresponse().readline() == b"event: step\n"
    connection.close()

    def rests() -> bool:
        before = worked(served)
        time.sleep(3)
        return worked(served) - before < 0.15

    until(rests)
    assert worked(served) - begin < 8  # seconds; 1,600 steps take 16


def worked(served: Fleet) -> float:
    """Processor time of the replicas so far."""
    return sum(each.cpu_times().user for each in served.replicas())


def test_a_full_queue_says_when_to_come_back(served: Fleet) -> None:
    asks = [{"prompt": "a circle", "num_inference_steps": 40, "seed": n} for n in range(16)]
    with ThreadPoolExecutor(len(asks)) as clients:
        replies = list(clients.map(served.predict, asks))
    full = [each for each in replies if each.status == 429]
    assert full and all(int(each.headers["Retry-After"]) >= 1 for each in full)
    others = [each.body["status"] for each in replies if each.status != 429]
    assert len(others) >= QUEUED and set(others) == {"succeeded"}


def test_a_killed_replica_loses_no_request(served: Fleet) -> None:
    assert kill(served, 12, clients=3)[0] == 0
    until(lambda: served.ask("GET", "/health-check").body["replicas"] == 2)


def test_its_metrics_count_hits_and_times(served: Fleet) -> None:
    found = until(lambda: (m := served.metrics()).get("fleet_lora_requests_total hit") and m, 60)
    assert found["fleet_lora_requests_total miss"] > 0
    assert found["fleet_images_total"] > 0 and found["fleet_lora_swap_seconds_count"] > 0


def training(served: Fleet, name: str) -> Json:
    return served.ask("GET", f"/trainings/{name}").body


def test_a_training_whose_machine_ends_is_resumed_to_the_same_weights(
    served: Fleet, tmp_path: Path
) -> None:
    for name in ("whole", "killed"):
        reply = served.ask("POST", "/trainings", {"id": name, "input": TRAINING})
        assert (reply.status, reply.body["status"]) == (202, "starting")
    until(lambda: training(served, "killed")["step"] >= 10)
    for each in served.trainers():
        each.kill()
    until(lambda: training(served, "killed")["status"] == "succeeded")
    assert (training(served, "whole")["attempt"], training(served, "killed")["attempt"]) == (1, 2)
    archives = []
    for name in ("whole", "killed"):
        url = served.url + training(served, name)["output"]["weights"]
        file, _ = urllib.request.urlretrieve(url, tmp_path / f"{name}.zip")
        archives.append(read_archive(file))
    assert archives[0].lora_sha256 == archives[1].lora_sha256


def test_events_are_those_of_the_studio(served: Fleet) -> None:
    request = f"{served.url}/trainings/killed/events"
    kinds, last = [], 0
    with urllib.request.urlopen(request, timeout=30) as answer:
        for line in answer:
            if line.startswith(b"id: "):
                last = int(line[4:])
            if line.startswith(b"data: "):
                kinds.append(json.loads(line[6:])["type"])
                if kinds[-1] == "done":
                    break
    assert kinds[0] == "started" and "resumed" in kinds and kinds.count("checkpoint") >= 3
    again = urllib.request.Request(request, headers={"Last-Event-ID": str(last - 1)})
    with urllib.request.urlopen(again, timeout=30) as answer:
        read = [answer.readline() for _ in range(5)]
    assert read[3] == b"id: %d\n" % last


def test_a_training_is_cancelled_whether_it_runs_or_waits(served: Fleet) -> None:
    for name in ("runs", "waits"):
        served.ask("PUT", f"/trainings/{name}", {"input": TRAINING | {"steps": 500}})
    until(lambda: training(served, "runs")["step"] > 0)
    for name in ("waits", "runs"):
        assert served.ask("POST", f"/trainings/{name}/cancel").status == 200
    for name in ("waits", "runs"):
        until(lambda: training(served, name)["status"] == "canceled")  # noqa: B023
    assert served.ask("GET", "/trainings/none").status == 404
    refused = served.ask("POST", "/trainings", {"input": TRAINING | {"hf_token": "hf_x"}})
    assert refused.status == 422 and "hf_x" not in json.dumps(refused.body)
