"""python -m lab.benchmarks.presets: every preset at its own length, on the miniature and the demo's
images: what is the result, and does a judge see the subject?

`likeness` is that of 24 new scenes to the subject (0 to 1; renderings of it score 0.73 and more),
`right` the share of other prompts' images in which all that was asked for is seen. Seconds are
the processor's, for the whole training.
"""

import tempfile
import time
from pathlib import Path
from statistics import fmean

from adapters.archive import read_archive
from lab.benchmarks.machine import machine
from lab.experiments.drawing import Drawer, Way
from lab.experiments.measures import fully_right, subject_scores
from lab.experiments.prompts import free_prompts, subject_prompts
from trainer.run import train
from trainer.settings.fields import resolve
from trainer.settings.inputs import TrainingInputs
from trainer.settings.presets import PRESETS

BASE, WORD, SUBJECT = "miniature-turbo", "<zwx>", "robot"
DATASET = Path("demo/subject.zip")


def main() -> None:
    print(machine())
    prompts, free = subject_prompts(SUBJECT, WORD, 24), free_prompts(48)
    drawer, way = Drawer(BASE), Way("8 steps", 8)
    for preset in PRESETS:
        with tempfile.TemporaryDirectory() as folder:
            settings = resolve(TrainingInputs(
                dataset=DATASET, base_model=BASE, preset=preset, seed=1, output_dir=Path(folder),
                sample_prompts=(f"{WORD} in the desert",),
            ))  # fmt: skip
            start = time.process_time()
            weights = train(settings)
            seconds = time.process_time() - start
            archive = read_archive(weights)
        likeness = fmean(subject_scores(drawer.draw(archive, prompts, way), prompts, SUBJECT))
        right = fmean(fully_right(drawer.draw(archive, free, way), free))
        checks = {check["name"]: check["value"] for check in archive.meta["checks"]}
        print(
            f"{preset}: {archive.meta['steps']} steps, rank {archive.meta['rank']}, "
            f"{seconds:.0f} s, likeness {likeness:.2f}, right {right:.0%}, "
            f"result {archive.meta['result']}, checks {checks}",
            flush=True,
        )


if __name__ == "__main__":
    main()
