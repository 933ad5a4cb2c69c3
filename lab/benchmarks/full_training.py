"""python -m lab.benchmarks.full_training: a full training and forms of LoRA, on the miniature.

Each row is a whole run with the demo's images: the run's defaults, or what its name says. The base
is the undistilled miniature. `likeness` is that of 48 new scenes to the subject (0 to 1; renderings
of it score 0.73 and more), `right` the share of 96 other prompts' images in which everything asked
for is seen, `bleed` the share of these that look like the subject (docs/preservation.md). Seconds
are the processor's, for the whole training; megabytes those of the result. `--base`, `--steps` and
`--images` make it shorter.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from adapters.archive import Archive
from adapters.trained_model import read_weights
from families.base import Base
from families.components import original_transformer
from families.registry import BASES, with_transformer
from lab.benchmarks.machine import machine
from lab.experiments.drawing import Drawer, Way
from lab.experiments.measures import bleed, fully_right, subject_scores
from lab.experiments.prompts import free_prompts, subject_prompts
from trainer.learning import size_of
from trainer.run import train
from trainer.settings.fields import resolve
from trainer.settings.inputs import TrainingInputs

WORD, SUBJECT = "<zwx>", "robot"
DATASET = Path("demo/subject.zip")
FULL: dict[str, Any] = {"training": "full"}
ROWS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA, preserve: off": {"preserve": "off"},
    "DoRA, preserve: off": {"adapter": "dora", "preserve": "off"},
    "LoKr, preserve: off": {"adapter": "lokr", "preserve": "off"},
    "LoKr, lokr_factor: 2, preserve: off": {"adapter": "lokr", "lokr_factor": 2, "preserve": "off"},
    "LoHa, preserve: off": {"adapter": "loha", "preserve": "off"},
    "full": FULL,
    "full, preserve: off": FULL | {"preserve": "off"},
    "full, learning_rate: 2e-4": FULL | {"learning_rate": 2e-4},
    "full, learning_rate: 2e-3": FULL | {"learning_rate": 2e-3},
    "full, optimizer: adamw": FULL | {"optimizer": "adamw"},
    "full, lora_targets: attention": FULL | {"lora_targets": "attention"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", default=list(ROWS), help="names of rows; default: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--base", default="miniature", help="base model")
    parser.add_argument("--steps", type=int, help="default: the run's own")
    parser.add_argument("--images", type=int, default=48, help="with the subject; others: twice")
    given = parser.parse_args()
    print(machine())
    base = BASES[given.base]
    way = Way("the base's", base.inference_steps, base.guidance_scale - 1)
    prompts = subject_prompts(SUBJECT, WORD, given.images)
    free = free_prompts(2 * given.images)
    for row in given.rows:
        with tempfile.TemporaryDirectory() as folder:
            settings = resolve(TrainingInputs(
                dataset=DATASET, base_model=base.name, seed=given.seed, output_dir=Path(folder),
                steps=given.steps,
                sample_prompts=(), checkpoint_every=0, validation_every=0, **ROWS[row],
            ))  # fmt: skip
            start = time.process_time()
            result = train(settings)
            seconds = time.process_time() - start
            archive, size = read_weights(result), size_of(result)
            drawer = _drawer(archive, base)
        images = drawer.draw(archive, prompts, way)
        likeness = fmean(subject_scores(images, prompts, SUBJECT))
        others = drawer.draw(archive, free, way)
        right, seen = fmean(fully_right(others, free)), fmean(bleed(others, free, SUBJECT))
        print(
            f"| {row} | {likeness:.2f} | {right:.0%} | {seen:.0%} | {seconds:.0f} s "
            f"| {size / 1e6:.1f} MB |",
            flush=True,
        )


def _drawer(archive: Archive, of: Base) -> Drawer:
    """One with the archive's transformer, if it has one."""
    drawer = Drawer(of.name)
    if archive.model is not None:
        base = with_transformer(of, archive.model)
        trained = original_transformer(drawer.family, base)
        drawer.family.transformer.load_state_dict(trained.state_dict())
    return drawer


if __name__ == "__main__":
    main()
