"""python -m lab.experiments.several_subjects.study: trains and measures what is not in the table.

Robot and fish of the miniature's world, on miniature-turbo with the trainer's defaults. Each way is
measured on new prompts with one subject, with both, and with none.
"""

import logging
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from adapters.archive import Archive, read_archive
from adapters.formats import Factors
from adapters.placeholder import Placeholder
from lab.experiments.drawing import Drawer, Way
from lab.experiments.measures import fully_right, subject_scores
from lab.experiments.prompts import Prompt, free_prompts, subject_prompts
from lab.experiments.table import Table
from lab.experiments.zero_prior.captions import make_captions
from miniature.drawing import render
from miniature.world import PAIR_COLUMNS, Scene, describe, subject_scene
from trainer.run import train
from trainer.settings.fields import resolve
from trainer.settings.inputs import TrainingInputs

BASE, SEED = "miniature-turbo", 1
TABLE = Path(__file__).with_name("results.jsonl")
TOKENS = {"robot": "<zwx>", "fish": "<kul>"}
TOGETHER = 8  # images of both
FIRST_TOGETHER, FIRST_PROMPT = 5_000, 700_000  # their scenes, and those of new prompts with both
ALIKE = 0.60  # a likeness above it: the image shows the subject


@dataclass(frozen=True)
class Trained:
    """One training run."""

    subjects: tuple[str, ...]
    steps: int
    together: bool = False  # with images of both


# 16 images of each subject: with 800 steps for two, each is seen as often as with 400 for one.
RUNS = {
    "robot alone": Trained(("robot",), 400),
    "fish alone": Trained(("fish",), 400),
    "both in one LoRA": Trained(("robot", "fish"), 800),
    "both in one LoRA, with images of both": Trained(("robot", "fish"), 800, together=True),
}
TWO_LORAS = "the two LoRAs at once"


def pair_scene(number: int) -> Scene:
    """Both subjects next to each other, each as often on the left."""
    names = list(TOKENS) if number % 2 else list(TOKENS)[::-1]
    scenes = [subject_scene(name, number, TOKENS[name], company=True) for name in names]
    things = [replace(scene.things[0], x=x) for scene, x in zip(scenes, PAIR_COLUMNS, strict=True)]
    return replace(scenes[0], things=tuple(things))


def pair_prompts(count: int) -> list[Prompt]:
    """New prompts with both subjects."""
    prompts = []
    for number in range(count):
        scene = pair_scene(FIRST_PROMPT + number)
        caption = describe(scene, random.Random(f"both {number}"), full=True)
        prompts.append(Prompt(caption.text, caption.asked, 60_000 + number, scene))
    return prompts


def make_dataset(run: Trained, folder: Path) -> Path:
    """A folder for each subject, and one with both, whose captions contain the tokens."""
    for subject in run.subjects:
        make_captions(subject, SEED, "TOK", folder / subject)
    if run.together:
        (folder / "both").mkdir()
        for number in range(TOGETHER):
            scene = pair_scene(FIRST_TOGETHER + number)
            render(scene).save(folder / "both" / f"{number:02d}.png")
            text = describe(scene, random.Random(f"together {number}")).text
            (folder / "both" / f"{number:02d}.txt").write_text(text + "\n", encoding="utf-8")
    return folder


def trained(run: Trained) -> Archive:
    """The weights of a run with the trainer's defaults."""
    with tempfile.TemporaryDirectory() as folder:
        given: dict[str, Any] = {
            "dataset": make_dataset(run, Path(folder) / "data"),
            "output_dir": Path(folder) / "out",
            "base_model": BASE,
            "steps": run.steps,
            "seed": SEED,
            "sample_prompts": (),
            "validation_images": 0,
            "subjects": [f"{TOKENS[subject]}={subject}" for subject in run.subjects],
        }
        return read_archive(train(resolve(TrainingInputs(**given))))


def together(one: Archive, other: Archive) -> Archive:
    """Two LoRAs applied at once, as one."""
    factors: Factors = {}
    for name, (down, up) in one.factors.items():
        down_2, up_2 = other.factors[name]
        factors[name] = torch.cat([down, down_2]), torch.cat([up, up_2], dim=1)
    return Archive(factors, one.placeholders + other.placeholders, {})


class Measures:
    """Images of a LoRA and their scores."""

    def __init__(self, subject_count: int = 48, pairs: int = 48, free_count: int = 96) -> None:
        self.drawer = Drawer(BASE)
        self.way = Way("own", self.drawer.family.base.inference_steps)
        self.count = subject_count
        self.pairs, self.free = pair_prompts(pairs), free_prompts(free_count)

    def of(self, archive: Archive, subjects: Sequence[str]) -> dict[str, Any]:
        """Likeness to each subject in images of each, of both, and of neither."""
        row: dict[str, Any] = {}
        for asked in subjects:
            prompts = subject_prompts(asked, TOKENS[asked], self.count)
            images = self.drawer.draw(archive, prompts, self.way)
            for seen in TOKENS:
                row[f"{seen} where {asked} is asked"] = subject_scores(images, prompts, seen)
        if len(subjects) > 1:
            images = self.drawer.draw(archive, self.pairs, self.way)
            row |= self._pairs(images)
        free = self.drawer.draw(archive, self.free, self.way)
        return row | {"other prompts fully right": fully_right(free, self.free)}

    def renderings(self) -> dict[str, Any]:
        """The scores of the scenes themselves."""
        return self._pairs([render(prompt.scene) for prompt in self.pairs])

    def _pairs(self, images: Sequence[Any]) -> dict[str, Any]:
        scores = {seen: subject_scores(images, self.pairs, seen) for seen in TOKENS}
        each = zip(*scores.values(), strict=True)
        return {f"{seen} where both are asked": found for seen, found in scores.items()} | {
            "both are there": [float(min(pair) > ALIKE) for pair in each]
        }


def means(row: dict[str, Any]) -> dict[str, float]:
    return {name: round(sum(v) / len(v), 3) for name, v in row.items() if isinstance(v, list)}


def main() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    table, measures = Table(TABLE), Measures()

    def add(way: str, scores: dict[str, Any], steps: int = 0) -> None:
        table.add({"way": way, "seed": SEED, "steps": steps} | scores)
        print(way, means(scores), flush=True)

    if not table.find(way="base"):
        width = measures.drawer.family.text_width
        words = (Placeholder.create(token, width, 1e-5, 0).detached() for token in TOKENS.values())
        add("base", measures.of(Archive({}, tuple(words), {}), list(TOKENS)))
        add("renderings", measures.renderings())
    alone: list[Archive] = []
    for way, run in RUNS.items():
        needed = len(run.subjects) == 1 and not table.find(way=TWO_LORAS)
        if table.find(way=way) and not needed:
            continue
        archive = trained(run)
        alone += [archive] * (len(run.subjects) == 1)
        if not table.find(way=way):
            add(way, measures.of(archive, run.subjects), run.steps)
    if not table.find(way=TWO_LORAS):
        add(TWO_LORAS, measures.of(together(*alone), list(TOKENS)), 800)


if __name__ == "__main__":
    main()
