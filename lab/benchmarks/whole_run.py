"""python -m lab.benchmarks.whole_run: training from start to archive, and diffusers' script.

Both train the same LoRA on the same base and images, with cached latents, one image a step,
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

from families.loading import load_family
from families.registry import find_base_or_folder
from lab.benchmarks.machine import machine
from lab.benchmarks.training_step import RANK, SMALL
from miniature.models import write_random

PICTURES, EDGE = 8, 256
CAPTION = "a photo of a cat"
PEER = "diffusers' script"
FIELDS = ("wall", "processor", "memory")  # of `Cost`
# Plain training runs, so that neither side is charged for what the other lacks.
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
    """The small base in bfloat16, and a folder of images."""
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
    """`python -m trainer` with a file of settings in `folder`, to be run once."""
    output = Path(tempfile.mkdtemp(prefix="ours-", dir=folder))
    config = output.with_suffix(".yaml")
    settings = {
        "base_model": str(base),
        "dataset": str(pictures),
        "output_dir": str(output),
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
        "sample": {"prompts": []},
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


def cost(command: list[str], log: Path, environment: dict[str, str]) -> Cost:
    """Runs a command to its end; raises SystemExit with the end of what it said if it fails."""
    start = time.perf_counter()
    with log.open("wb") as said:
        child = subprocess.Popen(
            command,
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, "DTYPE": "bfloat16", **environment},
        )
        _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - start
    if status != 0:
        end = log.read_text(errors="replace")[-2000:]
        raise SystemExit(f"error: {' '.join(command[:3])} … failed:\n{end}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def show(steps: int, costs: dict[str, list[Cost]]) -> None:
    """A row for each who trained so many steps."""
    for who, each in costs.items():
        wall, processor, memory = (
            statistics.median(getattr(one, name) for one in each)
            for name in ("wall", "processor", "memory")
        )
        figures = f"{wall:.1f} s | {processor:.1f} s | {memory / 1e9:.2f} GB"
        print(f"| {steps} | {who} | {figures} | {to_peer(costs, who)} |", flush=True)


def show_step(costs: dict[int, dict[str, list[Cost]]]) -> None:
    """What one step takes: the longest training runs less the shortest, by the steps between."""
    short, long = min(costs), max(costs)
    apart = {
        who: [
            Cost(*((getattr(b, name) - getattr(a, name)) / (long - short) for name in FIELDS))
            for a, b in zip(costs[short][who], costs[long][who], strict=True)
        ]
        for who in costs[short]
    }
    for who, each in apart.items():
        wall, processor = (statistics.median(getattr(one, n) for one in each) for n in FIELDS[:2])
        figures = f"{1e3 * wall:.0f} ms | {1e3 * processor:.0f} ms | "
        print(f"| one of {long - short} | {who} | {figures} | {to_peer(apart, who)} |")


def to_peer(costs: dict[str, list[Cost]], who: str) -> str:
    """The median ratio to the script, by the clock and by the processor, round by round."""
    pairs = list(zip(costs[who], costs.get(PEER, []), strict=False))
    if not pairs:
        return "not measured |"
    clock = statistics.median(a.wall / b.wall for a, b in pairs)
    processor = statistics.median(a.processor / b.processor for a, b in pairs)
    return f"{clock:.2f} | {processor:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.benchmarks.whole_run", description=__doc__)
    parser.add_argument("--peer-script", type=Path)
    parser.add_argument("--peer-python", default=sys.executable, help="that has torchvision")
    parser.add_argument("--steps", type=int, nargs="*", default=[30, 200])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="ours with compiled blocks, too")
    given = parser.parse_args()
    print(machine())
    print("| steps | who | clock | processor | peak memory | to the script, clock | processor |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        log = folder / "log.txt"
        base, pictures = write_inputs(folder)
        targets = load_family(find_base_or_folder(str(base))).lora_targets()
        costs: dict[int, dict[str, list[Cost]]] = {}
        for _ in range(given.rounds):
            for steps in given.steps:
                names = {"ours": "0"} | ({"ours, compiled": "1"} if given.compile else {})
                ways = {
                    name: (our_command(folder, base, pictures, steps), {"COMPILE": value})
                    for name, value in names.items()
                }
                if given.peer_script is not None:
                    start = [given.peer_python, str(given.peer_script.resolve())]
                    peer = peer_command(start, folder, base, pictures, steps, targets)
                    ways[PEER] = peer, {}
                if given.compile and not costs:
                    first = our_command(folder, base, pictures, steps)
                    cost(first, log, {"COMPILE": "1"})  # fills its cache
                for who, (command, environment) in ways.items():
                    each = cost(command, log, environment)
                    costs.setdefault(steps, {}).setdefault(who, []).append(each)
                    print(f"{who}, {steps} steps: {each.wall:.1f} s", file=sys.stderr, flush=True)
        for steps in given.steps:
            show(steps, costs[steps])
        if len(costs) > 1:
            show_step(costs)
    if given.peer_script is None:
        print("with --peer-script PATH the same trainings run in diffusers' script, in turns")


if __name__ == "__main__":
    main()
