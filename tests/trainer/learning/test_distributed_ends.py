"""Several processes end together: after an error, a kill, and early."""

import re
import sys
from pathlib import Path

import pytest
from launching import LAUNCH, launch, run_of

from adapters.archive import read_archive
from trainer.learning.checkpoint import read_checkpoint
from trainer.outputs import open_run

# Runs `python -m trainer`, in which one process fails in its fifth step.
FAILING = """
import os, signal, sys
from random import random
from threading import Timer
from trainer.__main__ import main
from trainer.learning.loop import Loop

step, failure = Loop.step, os.environ["FAILURE"]

def failing(self, number):
    if number == 4 and os.environ["RANK"] == failure[-1]:
        if failure.startswith("raise"):
            raise OSError("out of paper")
        Timer(random() / 5, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    step(self, number)

Loop.step = failing
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["raise 1", "raise 0", "kill 1", "kill 0"])
def test_the_end_of_one_process_ends_all(
    tmp_path: Path, photos: Path, vault: Path, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, with a checkpoint and the reason."""
    program = tmp_path / "failing.py"
    program.write_text(FAILING)
    monkeypatch.setattr(sys.modules["launching"], "PROGRAM", (str(program),))
    monkeypatch.setenv("FAILURE", failure)
    changes = {"steps": 1000, "batch_size": 1, "checkpoint_every": 2, "shard": True}
    done = launch(LAUNCH, tmp_path, photos, vault, **changes)
    said = done.stdout + done.stderr
    assert done.returncode != 0
    reason = "OSError: out of paper" if failure.startswith("raise") else "Signal 9 (SIGKILL)"
    assert reason in said.partition("Root Cause")[2]
    assert re.search(rf"rank +: {failure[-1]} ", said.partition("Root Cause")[2])
    newest = max(run_of(tmp_path).glob("checkpoints/*.safetensors"))
    assert read_checkpoint(newest).step >= 4
    if failure != "kill 0":
        assert f"to resume: {newest.relative_to(tmp_path)}" in said
    if failure == "raise 1":
        assert "error: another process of this run has ended" in said


@pytest.mark.slow
def test_all_processes_end_where_the_folder_is_in_use(
    tmp_path: Path, photos: Path, vault: Path
) -> None:
    """The main process alone asks; the others hear of it, and wait for nothing."""
    with open_run(photos, tmp_path / "held"):
        done = launch(LAUNCH, tmp_path, photos, vault, "--output_dir", "held")
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count("error: held is in use by another run") == 1


@pytest.mark.slow
def test_two_processes_end_early_at_the_same_step(
    tmp_path: Path, photos: Path, vault: Path
) -> None:
    """The main process measures, and the others follow it."""
    # As RISING in test_best_weights.py: the loss is lowest early.
    changes = {"early_stopping": True, "keep_best": True, "learning_rate": 0.3, "steps": 7}
    changes |= {"validation_every": 1, "validation_images": 2, "lr_warmup_steps": 0, "seed": 5}
    changes |= {"ema_decay": 0.2, "gradient_accumulation": 1, "caption_dropout": 0}
    changes |= {"lr_scheduler": "constant", "batch_size": 1}
    base = "--base-model", "miniature-turbo"
    folder = tmp_path / "two"
    folder.mkdir()
    done = launch(LAUNCH, folder, photos, vault, *base, **changes)
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("ended early at step") == 1
    [run] = (tmp_path / "two" / "outputs").glob("20*")
    meta = read_archive(run / "weights.zip").meta
    assert meta["shipped_step"] < meta["steps"] < 7
    assert read_checkpoint(sorted((run / "checkpoints").glob("*.safetensors"))[-1]).best
