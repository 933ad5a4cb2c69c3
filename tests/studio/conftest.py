"""A studio with a trainer that has no model."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import small_gpu
from pages import Page, with_dataset
from starlette.testclient import TestClient

from studio import commands, processes
from studio.app import application
from studio.folder import Studio

HERE = Path(__file__).parent


@pytest.fixture
def small_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator without a model, and with $SMALL_GPU a GPU."""
    for each in small_gpu.replaced():
        monkeypatch.setattr(*each)


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    return Studio(tmp_path)


@pytest.fixture
def client(studio: Studio) -> Iterator[TestClient]:
    headers = {"X-Studio": "1"}
    with TestClient(application(studio), "http://127.0.0.1:8500", headers=headers) as found:
        yield found


@pytest.fixture
def robot(client: TestClient) -> TestClient:
    """A client of a studio with a dataset named robot."""
    client.post("/api/datasets", json={"name": "robot"})
    return client


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    monkeypatch.setenv("PYTHONPATH", str(HERE))  # of the small trainer and the small generator
    monkeypatch.setattr(processes, "TRAINER", (str(HERE / "small_trainer.py"),))
    monkeypatch.setattr(commands, "INTERVAL", 0.05)
    monkeypatch.setattr(commands, "REAP_SECONDS", 0.2)
    found = Page(with_dataset(tmp_path))
    yield found
    found.end()
    for name, pids in processes.members().items():
        if name.startswith(str(tmp_path)):
            for pid in pids:
                os.kill(pid, 9)
