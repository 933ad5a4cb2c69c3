"""python -m benchmarks.whole_run: a training from start to archive, beside diffusers' script.

Both train the same LoRA on the same base and pictures, with cached latents, one picture a step,
in processes of their own that take turns; ours keeps float32 masters, the script trains in
bfloat16. Seconds by the clock and of the processor, and the peak of resident memory, as the
system counts them for the whole process.

`--peer-script` is examples/dreambooth/train_dreambooth_lora_z_image.py of the diffusers sources,
which asks for torchvision besides. Without it ours runs alone.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from benchmarks.machine import machine
from benchmarks.training_step import RANK, SMALL
from families.bases import find_base
from families.loading import load_family
from miniature.models import write_random

PICTURES, EDGE = 8, 256
CAPTION = "a photo of a cat"
# Plain trainings, so that neither side is charged for what the other lacks.
OURS = {
    "train_placeholder_token": False,
    "gradient_checkpointing": False,
    "validation_every": 0,
    "caption_dropout": 0.0,
    "quantize": "none",
}


@dataclass(frozen=True)
class Cost:
    """What one process took."""

    wall: float  # seconds
    processor: float  # seconds, of all threads
    memory: float  # bytes, the peak of what was resident


def write_inputs(folder: Path) -> tuple[Path, Path]:
    """The small base in bfloat16, and a folder of pictures."""
    base, pictures = folder / "base", folder / "pictures"
    write_random(base, dtype=torch.bfloat16, arch=SMALL)
    pictures.mkdir()
    draw = np.random.default_rng(0)
    for number in range(PICTURES):
        coarse = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((EDGE, EDGE), Image.Resampling.BICUBIC)
        smooth.save(pictures / f"{number}.jpg")
    return base, pictures


def our_command(folder: Path, base: Path, pictures: Path, steps: int) -> list[str]:
    """`python -m trainer` with a file of settings in `folder`."""
    config = folder / "config.yaml"
    settings = {
        "base_model": str(base),
        "dataset": str(pictures),
        "output_dir": str(folder / "ours"),
        "train": OURS
        | {
            "default_caption": CAPTION,
            "resolution": EDGE,
            "rank": RANK,
            "steps": steps,
            "batch_size": 1,
            "learning_rate": 1e-4,
            "seed": 0,
        },
    }
    config.write_text(yaml.safe_dump(settings))
    return [sys.executable, "-m", "trainer", str(config)]


def peer_command(
    start: list[str], folder: Path, base: Path, pictures: Path, steps: int, targets: list[str]
) -> list[str]:
    """The script, begun by `start`, with the same settings, no drawing, and no checkpoint."""
    options = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": pictures,
        "instance_prompt": CAPTION,
        "output_dir": folder / "peer",
        "resolution": EDGE,
        "rank": RANK,
        "lora_alpha": RANK,
        "lora_layers": ",".join(targets),
        "train_batch_size": 1,
        "max_train_steps": steps,
        "checkpointing_steps": 10 * steps,
        "learning_rate": 1e-4,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "mixed_precision": "bf16",
        "seed": 0,
    }
    given = [f"--{name}={value}" for name, value in options.items()]
    return [*start, *given, "--cache_latents", "--skip_final_inference"]


def cost(command: list[str], log: Path) -> Cost:
    """Runs a command to its end; raises SystemExit with the end of what it said if it fails."""
    start = time.perf_counter()
    with log.open("wb") as said:
        child = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, env={**os.environ, "DTYPE": "bfloat16"}
        )
        _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - start
    if status != 0:
        end = log.read_text(errors="replace")[-2000:]
        raise SystemExit(f"error: {' '.join(command[:3])} … failed:\n{end}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.whole_run", description=__doc__)
    parser.add_argument("--peer-script", type=Path)
    parser.add_argument("--peer-python", default=sys.executable, help="that has torchvision")
    parser.add_argument("--steps", type=int, nargs="*", default=[30, 200])
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print(machine())
    print("| steps | who | clock | processor | peak memory | clock, to the script |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base, pictures = write_inputs(folder)
        targets = load_family(find_base(str(base))).lora_targets()
        for steps in given.steps:
            commands = {"ours": our_command(folder, base, pictures, steps)}
            if given.peer_script is not None:
                start = [given.peer_python, str(given.peer_script.resolve())]
                commands["diffusers' script"] = peer_command(
                    start, folder, base, pictures, steps, targets
                )
            costs: dict[str, list[Cost]] = {who: [] for who in commands}
            for _ in range(given.rounds):
                for who, command in commands.items():
                    costs[who].append(cost(command, folder / "log.txt"))
            peers = costs.get("diffusers' script", [])
            for who, each in costs.items():
                wall, processor, memory = (
                    statistics.median(getattr(one, name) for one in each)
                    for name in ("wall", "processor", "memory")
                )
                ratios = [a.wall / b.wall for a, b in zip(each, peers, strict=False)]
                ratio = f"{statistics.median(ratios):.2f}" if ratios else "not measured"
                figures = f"{wall:.1f} s | {processor:.1f} s | {memory / 1e9:.2f} GB"
                print(f"| {steps} | {who} | {figures} | {ratio} |", flush=True)
    if given.peer_script is None:
        print("with --peer-script PATH the same trainings run in diffusers' script, in turns")


if __name__ == "__main__":
    main()
