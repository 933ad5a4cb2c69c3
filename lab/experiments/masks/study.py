"""python -m lab.experiments.masks.study: trains and measures what is not in the table.

Every image shows the subject next to the same star in the same place, and no caption names them.
So a LoRA learns them as part of the subject. With masks of the subject it should not. Trained on
miniature-turbo, first without preservation, whose rows also hold other places; measured on new
prompts of the subject alone in another place, of the subject and nothing else, and without it.
"""

import logging
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from adapters.archive import Archive, read_archive
from adapters.placeholder import Placeholder
from lab.experiments.drawing import Drawer, Way
from lab.experiments.measures import fully_right, subject_scores
from lab.experiments.prompts import FIRST_SCENE, FIRST_SEED, Prompt, free_prompts
from lab.experiments.several_subjects.study import means
from lab.experiments.table import Table
from miniature.drawing import SUBJECT_LAYERS, SUPERSAMPLING, grid, placed, render
from miniature.judge import load_judge
from miniature.world import PAIR_COLUMNS, Scene, Thing, describe, subject_scene
from trainer.learning import features, loss
from trainer.run import train
from trainer.settings.fields import resolve
from trainer.settings.inputs import TrainingInputs

BASE, TOKEN, STEPS, IMAGES = "miniature-turbo", "<zwx>", 240, 16
TABLE, ROOT = Path(__file__).with_name("results.jsonl"), Path(__file__).parents[3]
STRIPS, SHOWN = ROOT / "outputs" / "masks_study", 8
SHOWN_WAYS = ("no masks", "masks", "masks, black 0")  # in the figure, from above
PLACE = "desert"
STAR = Thing("star", "purple", "plain", "medium", 0, 34, 0)
PIXELS = 64


@dataclass(frozen=True)
class Trained:
    """One training run."""

    masks: str = "auto"
    floor: float | None = None  # black counts so much of white; None: as in the trainer
    preserve: str = "off"


WAYS = {
    "no masks": Trained("off"),
    "masks, black 0.1 of white": Trained(floor=0.1),
    "masks, black 0.02 of white": Trained(floor=0.02),
    "masks, black 0": Trained(floor=0.0),
    "masks": Trained(),
    "no masks, preserve": Trained("off", preserve="auto"),
    "masks, preserve": Trained(preserve="auto"),
}
SUBJECTS = {"robot": 1}  # and their seeds


def with_star(subject: str, number: int) -> Scene:
    """The subject and the star, each as often on the left."""
    scene = subject_scene(subject, number, "TOK", place=PLACE, company=False)
    columns = PAIR_COLUMNS if number % 2 else PAIR_COLUMNS[::-1]
    mine = replace(scene.things[0], x=columns[0], size="medium")
    things = sorted((mine, replace(STAR, x=columns[1])), key=lambda each: each.x)
    return replace(scene, things=tuple(things), position="")


def mask(scene: Scene) -> Image.Image:
    """White where the subject is."""
    unit = PIXELS * SUPERSAMPLING / 64
    canvas = Image.new("L", (PIXELS * SUPERSAMPLING,) * 2)
    for thing in scene.things:
        if thing.is_subject:
            for _, points in SUBJECT_LAYERS[thing.shape]:
                ImageDraw.Draw(canvas).polygon(placed(points, thing, unit), fill=255)
    return canvas.resize((PIXELS, PIXELS), Image.Resampling.BOX)


def make_dataset(subject: str, seed: int, folder: Path) -> Path:
    """Images with captions that name the subject only, and their masks."""
    (folder / "masks").mkdir(parents=True)
    for number in range(IMAGES):
        scene = with_star(subject, 1000 * seed + number)
        render(scene).save(folder / f"{number:02d}.png")
        mask(scene).save(folder / "masks" / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text("a picture of a TOK\n", encoding="utf-8")
    return folder


def floor_weights(floor: float) -> Callable[[Tensor], Tensor]:
    """Another way to weight an image by its mask, that of OneTrainer."""

    def weights(mask_1HW: Tensor) -> Tensor:
        weights_1HW = mask_1HW.clamp(min=floor)
        return weights_1HW / weights_1HW.mean()

    return weights


def trained(subject: str, run: Trained) -> Archive:
    """The weights of a run."""
    weights = loss.loss_weights if run.floor is None else floor_weights(run.floor)
    setattr(features, "loss_weights", weights)  # noqa: B010 - where the trainer finds it
    with tempfile.TemporaryDirectory() as folder:
        given: dict[str, Any] = {
            "dataset": make_dataset(subject, SUBJECTS[subject], Path(folder) / "data"),
            "output_dir": Path(folder) / "out",
            "base_model": BASE,
            "steps": STEPS,
            "seed": SUBJECTS[subject],
            "sample_prompts": (),
            "validation_every": 0,
            "preserve": run.preserve,
            "masks": run.masks,
        }
        return read_archive(train(resolve(TrainingInputs(**given))))


def elsewhere(subject: str, count: int) -> list[Prompt]:
    """New prompts with the subject alone, in a place that its images do not show."""
    prompts: list[Prompt] = []
    number = FIRST_SCENE
    while len(prompts) < count:
        scene = subject_scene(subject, number, TOKEN, company=False)
        number += 1
        if scene.place != PLACE:
            caption = describe(scene, random.Random(f"elsewhere {number}"), full=True)
            prompts.append(Prompt(caption.text, caption.asked, FIRST_SEED + number, scene))
    return prompts


class Measures:
    """Images of a LoRA and their scores."""

    def __init__(self, count: int = 48, free_count: int = 48) -> None:
        self.drawer = Drawer(BASE)
        self.way = Way("own", self.drawer.family.base.inference_steps)
        self.count, self.free = count, free_prompts(free_count)

    def of(self, archive: Archive, subject: str, strip: Path) -> dict[str, Any]:
        """The scores of prompts elsewhere, of the subject and nothing else, and without it.

        Some images of the second kind are written to `strip`.
        """
        prompts = elsewhere(subject, self.count)
        images = self.drawer.draw(archive, prompts, self.way)
        views = load_judge().read(images)
        pairs = list(zip(views, prompts, strict=True))
        row: dict[str, Any] = {
            "likeness": subject_scores(images, prompts, subject),
            "place as asked": [float(v["place"] == p.asked["place"]) for v, p in pairs],
            "alone as asked": [float(v["count"] == "1") for v, _ in pairs],
        }
        bare = [replace(p, text=f"a picture of a {TOKEN}", asked={}) for p in prompts]
        images = self.drawer.draw(archive, bare, self.way)
        strip.parent.mkdir(parents=True, exist_ok=True)
        grid(images[:SHOWN], SHOWN).save(strip)
        row["likeness, nothing else asked"] = subject_scores(images, bare, subject)
        row["place of training, not asked"] = _share(images, "place", PLACE)
        row["second thing, not asked"] = _share(images, "count", "2")
        free = self.drawer.draw(archive, self.free, self.way)
        return row | {"other prompts fully right": fully_right(free, self.free)}


def _share(images: Sequence[Image.Image], key: str, value: str) -> list[float]:
    return [float(view[key] == value) for view in load_judge().read(images)]


def figure(subject: str) -> Image.Image:
    """Training images and masks, and below them images of each way."""
    scenes = [with_star(subject, 1000 * SUBJECTS[subject] + number) for number in range(SHOWN)]
    rows = [grid([render(each) for each in scenes], SHOWN)]
    rows.append(grid([mask(each).convert("RGB") for each in scenes], SHOWN))
    for way in SHOWN_WAYS:
        with Image.open(STRIPS / f"{subject}, {way}.png") as strip:
            rows.append(strip.convert("RGB"))
    return grid(rows, 1, gap=4)


def main() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    table, measures = Table(TABLE), Measures()

    def add(way: str, subject: str, archive: Archive) -> None:
        scores = measures.of(archive, subject, STRIPS / f"{subject}, {way}.png")
        table.add({"way": way, "subject": subject, "seed": SUBJECTS[subject]} | scores)
        print(way, subject, means(scores), flush=True)

    for subject in SUBJECTS:
        if not table.find(way="base", subject=subject):
            width = measures.drawer.family.text_width
            token = Placeholder.create(TOKEN, width, 1e-5, 0).detached()
            add("base", subject, Archive({}, (token,), {}))
        for way, run in WAYS.items():
            if not table.find(way=way, subject=subject):
                add(way, subject, trained(subject, run))
        shown = figure(subject)
        shown = shown.resize((2 * shown.width, 2 * shown.height), Image.Resampling.NEAREST)
        shown.quantize(64).save(ROOT / "docs/images" / f"masks_{subject}.png", optimize=True)


if __name__ == "__main__":
    main()
