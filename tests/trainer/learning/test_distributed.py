"""Several processes under `accelerate launch` train what one would train."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from root import ROOT

from adapters.archive import read_archive
from trainer.learning.checkpoint import Checkpoint, read_checkpoint
from trainer.outputs import open_run

# What `accelerate launch` runs for several GPUs; for CPUs alone it would ask for an MPI.
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
STEPS = 3


def train(
    launcher: tuple[str, ...], folder: Path, photos: Path, vault: Path, **changes: float
) -> str:
    """What a training from a YAML file prints; `folder` is its working folder."""
    folder.mkdir()
    done = launch(launcher, folder, photos, vault, **changes)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def launch(
    launcher: tuple[str, ...],
    folder: Path,
    photos: Path,
    vault: Path,
    *given: str,
    **changes: float,
) -> subprocess.CompletedProcess[str]:
    train = {
        "train_placeholder_token": True,
        "resolution": "64",
        "rank": 2,
        "steps": STEPS,
        "gradient_accumulation": 2,
        "caption_dropout": 0.5,  # so that a process may miss the word that the other sees
        "ema_decay": 0.9,
        "checkpoint_every": STEPS,
        "preserve": "off",  # its rows are each process's own
        "validation_every": 0,
        "gradient_checkpointing": False,
    }
    config = {"base_model": "z-image", "dataset": str(photos), "sample": {"prompts": []}}
    (folder / "run.yaml").write_text(yaml.safe_dump({**config, "train": train | changes}))
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "MODEL_VAULT": str(vault),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *launcher, "-m", "trainer", str(folder / "run.yaml"), *given],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def state(folder: Path) -> Checkpoint:
    """The float32 state after the last step."""
    (run,) = (folder / "outputs").glob("20*")  # of all processes
    return read_checkpoint(run / "checkpoints" / f"step-{STEPS:06d}.safetensors")


def test_two_processes_train_what_one_does_with_the_doubled_batch(
    tmp_path: Path, photos: Path, vault: Path
) -> None:
    """The processes agree on a seed, which the run by one process is told."""
    reported = train(LAUNCH, tmp_path / "two", photos, vault, batch_size=1, shard=True)
    assert reported.count("wrote ") == 2  # weights.zip and report.html, by the main process alone
    two = state(tmp_path / "two")
    assert two.identity["settings"]["processes"] == 2
    seed = two.identity["settings"]["seed"]
    train((), tmp_path / "one", photos, vault, batch_size=2, seed=seed)
    one = state(tmp_path / "one")
    assert one.history["losses"] == pytest.approx(two.history["losses"], rel=1e-5)
    for kind in ("parameters", "averages"):
        ours, theirs = getattr(one, kind), getattr(two, kind)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            # Adam divides by the gradient's size, so that rounding shows where it is near zero.
            assert torch.allclose(value, theirs[name], rtol=1e-4, atol=2e-5), name


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
