"""python -m lab.experiments.editing.study: trains and measures what is not in the table.

On miniature-qwen: a subject with its placeholder token, from images alone; and an edit of pairs,
`turn it into <zwx>`, whose targets are the control images with the subject in place of the object.
All images are generated as the product does. Measured with the miniature's judge:

likeness              of new scenes of the subject, or of new images that were edited
place kept            of those edits: the place is the reference's
other prompts right   everything asked for is seen, in prompts without the token
other edits right     the same, of instructions without the token
bleed                 the share of the other prompts' images that look like the subject
"""

import logging
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image

from adapters.archive import Archive, read_archive
from inference.engine import Engine
from inference.request import Request
from lab.experiments.measures import adherence, bleed, fully_right, subject_scores
from lab.experiments.prompts import FIRST_SEED, Prompt, free_prompts, subject_prompts
from lab.experiments.several_subjects.study import means
from lab.experiments.table import Table
from miniature.drawing import grid, render
from miniature.edits import sample_edit
from miniature.qwen.evaluate import small
from miniature.qwen.models import PIXELS
from miniature.world import Scene, caption, sample_scene, subject_scene
from trainer.run import train
from trainer.settings import preservation
from trainer.settings.fields import resolve
from trainer.settings.inputs import TrainingInputs

BASE, SUBJECT, TOKEN, SEED = "miniature-qwen", "robot", "<zwx>", 1
INSTRUCTION = f"turn it into {TOKEN}"
IMAGES, SHOWN = 16, 12
TABLE, ROOT = Path(__file__).with_name("results.jsonl"), Path(__file__).parents[3]
STRIPS = ROOT / "outputs" / "editing_study"


def write(scene: Scene, text: str, path: Path) -> None:
    """An image at the base's size, and its caption."""
    path.parent.mkdir(parents=True, exist_ok=True)
    render(scene, PIXELS).save(path)
    if text:
        path.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")


def subject_images(folder: Path) -> None:
    """The subject in various places, captioned."""
    for number in range(IMAGES):
        scene = subject_scene(SUBJECT, 1000 * SEED + number, "TOK")
        text = caption(scene, random.Random(f"subject {scene.seed}"))
        write(scene, text, folder / f"{number:02d}.png")


def before(number: int) -> Scene:
    """A scene with one object that has room for the subject."""
    while True:
        scene = sample_scene(number)
        if len(scene.things) == 1 and scene.things[0].size != "small":
            return scene
        number += 10_000_000


def after(scene: Scene) -> Scene:
    """The same with the subject in place of the object."""
    [thing] = scene.things
    subject = replace(thing, shape=SUBJECT, colour="", texture="", word="TOK", angle=0)
    return replace(scene, things=(subject,))


def pairs(folder: Path) -> None:
    """Control images and targets."""
    for number in range(IMAGES):
        scene = before(3_000_000 + number)
        write(scene, "", folder / "control" / f"{number:02d}.png")
        write(
            after(scene), INSTRUCTION.replace(TOKEN, "TOK"), folder / "target" / f"{number:02d}.png"
        )


WAYS: dict[str, tuple[Callable[[Path], None] | None, dict[str, Any]]] = {
    "the base": (None, {}),
    "subject, preserve: off": (subject_images, {"preserve": "off"}),
    "subject": (subject_images, {}),
    "subject, learning_rate: 6e-3": (subject_images, {"learning_rate": 6e-3}),
    "subject, learning_rate: 6e-3, preserve: off": (
        subject_images,
        {"learning_rate": 6e-3, "preserve": "off"},
    ),
    "pairs, preserve: off": (pairs, {"preserve": "off"}),
    "pairs, preserve: off, learning_rate: 6e-3": (
        pairs,
        {"learning_rate": 6e-3, "preserve": "off"},
    ),
    "pairs, preserve: off, learning_rate: 2e-3": (
        pairs,
        {"learning_rate": 2e-3, "preserve": "off"},
    ),
    "pairs": (pairs, {}),
    "pairs, preserve: 0.5": (pairs, {"preserve": 0.5}),
    "pairs, preserve: 0.5, all rows are edits": (pairs, {"preserve": 0.5}),
    "pairs, preserve: 2": (pairs, {"preserve": 2.0}),
}
EDIT_SHARES = {"pairs, preserve: 0.5, all rows are edits": 1.0}  # else that of the trainer


def trained(way: str) -> Archive | None:
    """The weights of a run; None: without training."""
    make, settings = WAYS[way]
    if make is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / "data")
        given: dict[str, Any] = {"dataset": Path(folder) / "data", "output_dir": Path(folder) / "o"}
        given |= {"base_model": BASE, "seed": SEED, "sample_prompts": (), "validation_every": 0}
        share = EDIT_SHARES.get(way, preservation.EDITS)
        with patch.object(preservation, "EDITS", share):
            return read_archive(train(resolve(TrainingInputs(**given | settings))))


class Measures:
    """Images with a LoRA, and their scores."""

    def __init__(self, subject_count: int = 32, other_count: int = 48) -> None:
        self.engine = Engine()
        self.prompts = subject_prompts(SUBJECT, TOKEN, subject_count)
        self.free = free_prompts(other_count)
        self.edits = [sample_edit(number, "eval") for number in range(other_count)]
        self.scenes = [before(4_000_000 + number) for number in range(subject_count)]

    def images(
        self,
        archive: Archive | None,
        prompts: Sequence[Prompt],
        references: Sequence[Image.Image] = (),
    ) -> list[Image.Image]:
        """One image per prompt, edits of `references` if there are some."""
        return [
            self.engine.generate(
                Request(
                    prompt=each.text,
                    seed=each.seed,
                    reference_images=references[i : i + 1],
                    apply_lora="always",
                ),
                archive,
                BASE,
            )[0]
            for i, each in enumerate(prompts)
        ]

    def of(self, way: str, archive: Archive | None) -> dict[str, Any]:
        row: dict[str, Any] = {}
        shown: list[Image.Image] = []
        if WAYS[way][0] is pairs:
            references = [render(each, PIXELS) for each in self.scenes]
            prompts = [
                Prompt(INSTRUCTION, {"place": scene.place}, FIRST_SEED + i, scene)
                for i, scene in enumerate(self.scenes)
            ]
            images = self.images(archive, prompts, references)
            row["likeness"] = subject_scores(images, prompts, SUBJECT)
            row["place kept"] = adherence(images, prompts)["right"]
            shown += references[:SHOWN] + images[:SHOWN]
        elif archive is not None:
            images = self.images(archive, self.prompts)
            row["likeness"] = subject_scores(images, self.prompts, SUBJECT)
            shown += images[:SHOWN]
        others = self.images(archive, self.free)
        row["other prompts right"] = fully_right(others, self.free)
        row["bleed"] = bleed(others, self.free, SUBJECT)
        references = [render(each.reference, PIXELS) for each in self.edits]
        prompts = [
            Prompt(each.instruction, each.asked, i, each.target)
            for i, each in enumerate(self.edits)
        ]
        edited = self.images(archive, prompts, references)
        row["other edits right"] = fully_right(edited, prompts)
        STRIPS.mkdir(parents=True, exist_ok=True)
        grid(small(shown + others[:SHOWN] + edited[:SHOWN]), SHOWN).save(STRIPS / f"{way}.png")
        return row


def main() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    table, measures = Table(TABLE), Measures()
    for way in WAYS:
        if not table.find(way=way, seed=SEED):
            scores = measures.of(way, trained(way))
            table.add({"way": way, "seed": SEED} | scores)
            print(way, means(scores), flush=True)


if __name__ == "__main__":
    main()
