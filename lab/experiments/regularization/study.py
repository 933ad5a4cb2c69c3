"""python -m lab.experiments.regularization.study: trains and measures what is not in the table.

The demo's images of a robot, on miniature-turbo with preservation: without regularization images,
with images of one class (circles), and of all shapes. They are rendered, with the captions of the
pre-training data. Measured on new prompts with the robot, of circles, and of other things.
"""

import logging
import random
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from adapters.archive import Archive, read_archive
from lab.experiments.drawing import Drawer, Way
from lab.experiments.measures import fully_right, subject_scores
from lab.experiments.prompts import Prompt, free_prompts, subject_prompts
from lab.experiments.several_subjects.study import means
from lab.experiments.table import Table
from miniature.drawing import render
from miniature.world import caption, sample_scene
from trainer.run import train
from trainer.settings.fields import resolve
from trainer.settings.inputs import TrainingInputs

BASE, TOKEN, STEPS, CLASS, SEED = "miniature-turbo", "<zwx>", 240, "circle", 1
TABLE, ROOT = Path(__file__).with_name("results.jsonl"), Path(__file__).parents[3]
WAYS = {"none": (), "one class": (CLASS,), "all shapes": ()}
IMAGES, FIRST_SCENE = 64, 5_000_000


def add_images(folder: Path, shapes: tuple[str, ...]) -> None:
    """Writes regularization images of these shapes, or of all, with captions."""
    folder.mkdir()
    number, written = FIRST_SCENE, 0
    while written < IMAGES:
        scene = sample_scene(number)
        number += 1
        if not shapes or all(each.shape in shapes for each in scene.things):
            render(scene).save(folder / f"{written:02d}.png")
            text = caption(scene, random.Random(f"regularization {number}"))
            (folder / f"{written:02d}.txt").write_text(text, encoding="utf-8")
            written += 1


def trained(way: str) -> Archive:
    """The weights of a run."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        with zipfile.ZipFile(ROOT / "demo" / "subject.zip") as archive:
            archive.extractall(data)
        if way != "none":
            add_images(data / "reg", WAYS[way])
        given: dict[str, Any] = {"dataset": data, "output_dir": Path(folder) / "out"}
        given |= {"base_model": BASE, "steps": STEPS, "seed": SEED}
        given |= {"sample_prompts": (), "validation_every": 0}
        return read_archive(train(resolve(TrainingInputs(**given))))


def measured(drawer: Drawer, archive: Archive, free: list[Prompt]) -> dict[str, Any]:
    """Likeness, and the other prompts that are fully right, of the class and of the rest."""
    way = Way("own", drawer.family.base.inference_steps)
    prompts = subject_prompts("robot", TOKEN, 48)
    row: dict[str, Any] = {
        "likeness": subject_scores(drawer.draw(archive, prompts, way), prompts, "robot")
    }
    right = fully_right(drawer.draw(archive, free, way), free)
    of_class = [CLASS in each.text for each in free]
    for name, wanted in (("prompts of the class right", True), ("other prompts right", False)):
        row[name] = [r for r, own in zip(right, of_class, strict=True) if own == wanted]
    return row


def main() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    table, drawer, free = Table(TABLE), Drawer(BASE), free_prompts(192)
    for way in WAYS:
        if not table.find(way=way, seed=SEED):
            scores = measured(drawer, trained(way), free)
            table.add({"way": way, "seed": SEED} | scores)
            print(way, means(scores), flush=True)


if __name__ == "__main__":
    main()
