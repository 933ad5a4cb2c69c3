"""Trainings by several processes."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from root import ROOT

from trainer.learning.checkpoint import Checkpoint, read_checkpoint

# What `accelerate launch` runs for several GPUs; for CPUs alone it would ask for an MPI.
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
PROGRAM = "-m", "trainer"
STEPS = 3


def train(
    launcher: tuple[str, ...], folder: Path, photos: Path, vault: Path, **changes: Any
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
    **changes: Any,
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
        "preserve": "off",
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
        [sys.executable, *launcher, *PROGRAM, str(folder / "run.yaml"), *given],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )


def run_of(folder: Path) -> Path:
    """The folder of the run of all processes."""
    (run,) = (folder / "outputs").glob("20*")
    return run


def state(folder: Path, steps: int = STEPS) -> Checkpoint:
    """The float32 state after the last step."""
    return read_checkpoint(run_of(folder) / "checkpoints" / f"step-{steps:06d}.safetensors")


def shares(reported: str) -> list[tuple[float, float]]:
    """MB of blocks in the main process, and in all, of each sharded model, as it counted them."""
    found = re.findall(r"([0-9.]+) of ([0-9.]+) MB of its blocks are in this process", reported)
    return [(float(here), float(whole)) for here, whole in found]
