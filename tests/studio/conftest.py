"""A studio with a trainer that has no model."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import small_gpu
from pages import Page, with_dataset

from studio import commands, processes

HERE = Path(__file__).parent


@pytest.fixture
def small_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator without a model, and with $SMALL_GPU a GPU."""
    for each in small_gpu.replaced():
        monkeypatch.setattr(*each)


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
