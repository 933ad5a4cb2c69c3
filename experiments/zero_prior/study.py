"""Trains every condition of every subject and seed, and measures it; resumable."""

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapters.archive import Archive
from adapters.placeholder import Placeholder
from experiments import measures
from experiments.drawing import Drawer, Way
from experiments.prompts import Prompt, class_prompts, free_prompts, subject_prompts
from experiments.table import Row, Table
from experiments.training import Recipe, train
from experiments.zero_prior.captions import make_captions
from experiments.zero_prior.design import (
    BASE,
    CLASS_WORDS,
    CONDITIONS,
    PLACEHOLDER,
    ZERO_PRIOR,
    Condition,
    Point,
    Size,
)
from miniature.drawing import grid, render
from trainer.settings import settle

log = logging.getLogger(__name__)

RESULTS = "results.jsonl"
UNTRAINED = "untrained"  # the point of the base as it is
SHOWN = 8  # pictures that are kept of each run
REPEATS_SEED = 70_000  # of the first picture of one prompt drawn many times


class Study:
    """The drawer, the prompts and the table: one row per point, condition, subject and seed.

    The folder gets the table and the first pictures of every run (`pictures/`).
    """

    def __init__(self, folder: Path, size: Size) -> None:
        self.folder, self.size = folder, size
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        self.table = Table(folder / RESULTS)
        self.drawer = Drawer(BASE)
        self.way = Way(f"{size.steps} steps", size.steps)
        self.free = free_prompts(size.free_prompts)
        untrained = Placeholder.create(PLACEHOLDER, self.drawer.family.text_width, 1e-5, seed=0)
        self.blank = Archive({}, untrained.detached(), {})
        self.untouched = self.drawer.draw(self.blank, self.free, self.way)

    def run(self, part: int = 0, parts: int = 1) -> None:
        """Measures what the table lacks; of several processes each takes its part of the runs."""
        for subject in self.size.subjects:
            for condition in CONDITIONS:
                key = _key(UNTRAINED, condition, subject, 0)
                if part == 0 and key not in self.table:
                    self.table.add(key | self._measure(key, condition, subject, self.blank))
        for number, (point, condition, subject, seed) in enumerate(self._runs()):
            key = _key(point.name, condition, subject, seed)
            if number % parts == part and key not in self.table:
                archive = self._train(point, condition, subject, seed)
                self.table.add(key | self._measure(key, condition, subject, archive))

    def _runs(self) -> Iterator[tuple[Point, Condition, str, int]]:
        """One seed of everything before the next; what is tried of the placeholder last."""
        size = self.size
        for points, conditions, seeds in (
            (size.points, CONDITIONS, size.seeds),
            (size.choices, (ZERO_PRIOR,), size.choice_seeds),
        ):
            for seed in seeds:
                for point in points:
                    for subject in size.subjects:
                        for condition in conditions:
                            yield point, condition, subject, seed

    def _train(self, point: Point, condition: Condition, subject: str, seed: int) -> Archive:
        recipe = dict(point.recipe)
        if recipe.get("start") == "class":
            recipe["start"] = CLASS_WORDS[subject]
        with tempfile.TemporaryDirectory() as folder:
            dataset = Path(folder) / subject
            settings = settle(
                dataset=make_captions(subject, seed, condition.word_for(subject), dataset),
                base_model=BASE,
                placeholder_token=PLACEHOLDER,
                train_placeholder_token=condition.zero_prior,
                seed=seed,
                **{"steps": self.drawer.family.base.training_steps.most} | point.settings,
            )
            (done,) = train(Recipe(settings, **recipe), (settings.steps,))
        log.info("%s: %.2f steps/s", run_name(point.name, condition, subject, seed),
                 done.steps_per_second)  # fmt: skip
        return done.archive

    def _measure(
        self, key: Row, condition: Condition, subject: str, archive: Archive
    ) -> dict[str, Any]:
        word, size = condition.word_for(subject), self.size
        prompts = subject_prompts(subject, word, size.subject_prompts)
        pictures = self.drawer.draw(archive, prompts, self.way)
        name = run_name(key["point"], condition, subject, key["seed"])
        shown = grid(pictures[:SHOWN], columns=SHOWN, gap=0)
        shown.save(self.folder / "pictures" / f"{name}.png", optimize=True)
        scores: dict[str, Any] = dict(measures.adherence(pictures, prompts))
        scores["likeness"] = measures.subject_scores(pictures, prompts, subject)
        scores["sharpness"] = measures.sharpness(pictures)
        scores |= measures.tones(pictures)
        alone = [not p.colour and len(p.scene.things) == 1 for p in prompts]
        scores["looks"] = [
            look for look, own in zip(measures.looks(pictures), alone, strict=True) if own
        ]
        if key["point"] == UNTRAINED:  # what the judge reads where there is nothing but the subject
            rendered = [render(p.scene) for p, own in zip(prompts, alone, strict=True) if own]
            scores["rendered_looks"] = measures.looks(rendered)

        free = self.drawer.draw(archive, self.free, self.way)
        scores |= {f"free_{k}": v for k, v in measures.adherence(free, self.free).items()}
        scores |= {f"free_{k}": v for k, v in measures.drift(free, self.untouched).items()}

        classes = class_prompts(CLASS_WORDS[subject], size.class_prompts)
        drawn = self.drawer.draw(archive, classes, self.way)
        scores |= {f"class_{k}": v for k, v in measures.adherence(drawn, classes).items()}
        scores["class_likeness"] = measures.subject_scores(drawn, classes, subject)

        repeats = [
            Prompt(f"a picture of a {word}", {}, REPEATS_SEED + i, prompts[0].scene)
            for i in range(size.repeats)
        ]
        repeated = self.drawer.draw(archive, repeats, self.way)
        scores["repeats_looks"] = measures.looks(repeated)
        scores["diversity"] = measures.diversity(repeated)
        if archive.placeholder is not None and condition.zero_prior:
            scores["placeholder_norm"] = archive.placeholder.norm()
        return scores


def _key(point: str, condition: Condition, subject: str, seed: int) -> Row:
    return {"point": point, "condition": condition.name, "subject": subject, "seed": seed}


def run_name(point: str, condition: Condition, subject: str, seed: int) -> str:
    """The name of a run's files."""
    return f"{point}-{condition.name}-{subject}-{seed}".replace(" ", "_")
