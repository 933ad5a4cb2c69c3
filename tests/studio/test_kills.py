"""Server and trainer are killed at random moments: nothing is lost, doubled or left running."""

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import Server, until, with_dataset

from adapters.archive import read_archive
from studio.processes import members
from trainer.events import read_events


def trainers(server: Server) -> list[int]:
    """The processes of all runs."""
    here = str(server.folder / "outputs")
    return [pid for name, pids in members().items() if name.startswith(here) for pid in pids]


def kill(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def killed_and_resumed(
    server: Server, runs: list[str], kills: int, moment: Callable[[], float]
) -> list[str]:
    """Kills at random moments and resumes what has stopped, until all runs are done.

    Returns the runs, with those that began again since they had no checkpoint.
    """
    random_kind = random.Random(5)
    left, runs = kills, list(runs)
    while True:
        states = {run: server.get(f"/api/runs/{run}") for run in runs}
        for run, found in states.items():
            if found["state"] not in ("stopped", "failed") or server.held(run):
                continue
            if "resume" in found["allowed"] and run not in server.get("/api/queue")["order"]:
                server.post(f"/api/runs/{run}/commands", do="resume", key=f"{run}{left}")
            elif "resume" not in found["allowed"]:
                new = server.post(f"/api/runs/{run}/commands", do="restart", key=f"{run}-again")[
                    "run"
                ]["id"]
                runs[runs.index(run)] = new
        if all(found["state"] == "done" for found in states.values()):
            assert not left, "the runs ended before all kills"
            return runs
        if left:
            time.sleep(moment())
            left -= 1
            kind = random_kind.choice(("server", "trainer", "both"))
            if kind != "server":
                kill(trainers(server))
            if kind != "trainer":
                server.kill()
                server.start()
        else:
            time.sleep(0.2)


def assert_whole(server: Server, runs: list[str], begun: int) -> None:
    """Every run is there once, its events are whole, and no process is left."""
    listed = [each["id"] for each in server.get("/api/runs?limit=200")["runs"]]
    assert len(listed) == len(set(listed)) >= begun and set(runs) <= set(listed)
    for run in runs:
        numbers = [each["n"] for each in read_events(server.folder / "outputs" / run)]
        assert numbers == sorted(set(numbers)), "an event was written twice"
        series = server.get(f"/api/runs/{run}/series")
        assert series["steps"] == sorted(set(series["steps"]))
        assert len([e for e in read_events(server.folder / "outputs" / run) if e["type"] == "done"])
    assert server.get("/api/queue")["order"] == []
    until(lambda: not trainers(server), 45)


def small_runs(tmp_path: Path, kills: int, steps: int) -> None:
    server, choose = Server(with_dataset(tmp_path), small=True), random.Random(7)
    try:
        changes: dict[str, Any] = {"placeholder_learning_rate": 0.02, "steps": steps}
        runs = [server.new(f"key{k}", **changes) for k in range(2)]
        ended = killed_and_resumed(server, runs, kills, lambda: choose.uniform(0.05, 0.7))
        assert_whole(server, ended, 2)
        process = Path(f"/proc/{server.process.pid}")
        assert "libtorch" not in (process / "maps").read_text()
        memory = next(e for e in (process / "status").read_text().split("\n") if "VmRSS" in e)
        assert int(memory.split()[1]) < 150_000  # kB
    finally:
        server.stop()


def test_runs_survive_three_kills(tmp_path: Path) -> None:
    small_runs(tmp_path, 3, 60)


@pytest.mark.slow
def test_runs_survive_fifty_kills(tmp_path: Path) -> None:
    small_runs(tmp_path, 50, 2000)


@pytest.mark.slow
def test_a_run_on_the_miniature_that_was_killed_equals_one_that_was_not(tmp_path: Path) -> None:
    server, choose = Server(with_dataset(tmp_path)), random.Random(3)
    try:
        steps = {"steps": 120, "checkpoint_every": 3}
        whole = server.new("whole", **steps)
        until(lambda: server.state(whole) == "done", 180)
        run = server.new("killed", **steps)
        until(lambda: server.get(f"/api/runs/{run}")["step"] > 3, 120)
        [run] = killed_and_resumed(server, [run], 5, lambda: choose.uniform(0.1, 5))
        assert_whole(server, [run], 2)
        one, other = (
            read_archive(tmp_path / "outputs" / name / "weights.zip") for name in (whole, run)
        )
        for name, pair in one.factors.items():
            for a, b in zip(pair, other.factors[name], strict=True):
                assert torch.equal(a, b), name
    finally:
        server.stop()
