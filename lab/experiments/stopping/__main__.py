"""python -m lab.experiments.stopping: the held-out loss of a run against its images, step by step.

Each run trains one subject of the miniature's world with the trainer's parts and defaults, on 24
images of which two are held out. At every measurement the loss on these two, that on 40 more images
of the subject, and the images of the weights at that step are measured. Rows are written to a table
as they are measured; a run that is there is not trained again.
"""

import argparse
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from adapters.archive import Archive
from adapters.lora import Lora
from adapters.placeholder import Placeholder
from families.loading import load_family
from lab.experiments.drawing import Drawer, Way
from lab.experiments.measures import fully_right, subject_scores
from lab.experiments.prompts import free_prompts, subject_prompts
from lab.experiments.table import Table
from lab.experiments.training import training_adapter
from lab.experiments.zero_prior.captions import caption, template_of
from miniature.drawing import render
from miniature.world import subject_scene
from trainer.data import read_dataset
from trainer.learning import Captions, Loop, Preservation, encode_images, preservation_prompts
from trainer.monitor import Validation, hold_out, split, validation
from trainer.settings import TrainingInputs, resolve

T = TypeVar("T")
BASE, TOKEN = "miniature-turbo", "<zwx>"
PUBLISHED = Path(__file__).with_name("runs.jsonl")
IMAGES, FRESH = 24, 40  # of the dataset, and further ones whose loss is measured
# The trainer's when the table was measured. It also had four rows of preservation, not three.
DEFAULTS: dict[str, Any] = {
    **{"learning_rate": 4e-3, "placeholder_learning_rate": 0.02, "preserve": 0.1},
}
# Name, subject, seed, steps between measurements, settings.
RUNS: list[tuple[str, str, int, int, dict[str, Any]]] = [
    ("default", "robot", 1, 50, DEFAULTS),
    ("twice as long", "robot", 3, 100, DEFAULTS | {"steps": 1000}),
]


def write_images(subject: str, first: int, count: int, folder: Path) -> Path:
    """Images of the subject with their captions; gives the folder."""
    folder.mkdir()
    for number in range(first, first + count):
        scene = subject_scene(subject, number)
        render(scene).save(folder / f"{number:06d}.png")
        text = caption(scene, TOKEN, template_of(subject, number))
        (folder / f"{number:06d}.txt").write_text(text + "\n", encoding="utf-8")
    return folder


def train(
    subject: str, seed: int, every: int, changes: dict[str, Any]
) -> Iterator[tuple[dict[str, Any], Archive]]:
    """Trains; yields the losses and the weights at every measurement."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_images(subject, 1000 * seed, IMAGES, folder / "images")
        more = write_images(subject, 500_000 + 1000 * seed, FRESH, folder / "more")
        given: dict[str, Any] = {"placeholder_token": TOKEN, "seed": seed, **changes}
        settings = resolve(TrainingInputs(dataset=data, base_model=BASE, **given))
        settings = settings.for_images(IMAGES)
        family = load_family(settings.base, dtype=torch.float32)
        of_run, others = (
            encode_images(family, read_dataset(each, "", TOKEN), settings) for each in (data, more)
        )
    trained_on, held_out = split(of_run, hold_out(of_run, settings))
    placeholder = Placeholder.create(
        TOKEN, family.text_width, settings.placeholder_init_std, seed, family.device
    )
    prompts = preservation_prompts(settings)
    texts = [each.caption for each in (*of_run, *others)]
    captions = Captions(family, texts, {TOKEN: placeholder.vectors}, prompts.all)
    training_adapter(settings.base).merge(family.transformer, BASE)
    preservation = Preservation(family, settings, captions, prompts)
    lora = Lora(family.transformer, family.lora_targets(), settings.rank, seed)
    loop = Loop(
        family, settings, trained_on, captions, lora, [placeholder], None, None, preservation
    )
    narrow = Validation(loop, held_out)
    narrow.begin(loop)
    wide = _with_items(FRESH, lambda: Validation(loop, others))
    while loop.done < settings.steps:
        loop.step(loop.done)
        if loop.done % every == 0:
            with loop.averaged():
                held, fresh = narrow.measure(), _with_items(FRESH, wide.measure)
            facts = {"step": loop.done, "held_out": held, "fresh": fresh}
            if loop.done == every:
                facts["base"] = narrow.curves.losses[0]
            yield facts, Archive(*loop.final_weights(), {})


def _with_items(count: int, call: Callable[[], T]) -> T:
    """The result of a call in which `count` images are measured per sigma."""
    usual, validation.ITEMS = validation.ITEMS, count
    try:
        return call()
    finally:
        validation.ITEMS = usual


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--table", type=Path, default=PUBLISHED)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    table, drawer = Table(options.table), Drawer(BASE)
    way = Way("own", drawer.family.base.inference_steps)
    free = free_prompts(48)
    for name, subject, seed, every, changes in RUNS:
        key = {"run": name, "subject": subject, "seed": seed}
        if table.find(**key):
            continue
        asked = subject_prompts(subject, TOKEN, 48)
        for facts, archive in train(subject, seed, every, changes):
            likeness = subject_scores(drawer.draw(archive, asked, way), asked, subject)
            others = fully_right(drawer.draw(archive, free, way), free)
            means = {"likeness": _mean(likeness), "others_right": _mean(others)}
            table.add(key | facts | means)
            print(table.rows[-1], flush=True)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
