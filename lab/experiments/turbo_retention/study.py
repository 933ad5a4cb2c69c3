"""Trains every condition and measures it along the way, into a table that can be resumed."""

import logging
from pathlib import Path
from typing import Any

from PIL import Image

from adapters.archive import Archive, write_archive
from adapters.placeholder import Placeholder
from demo.subject import SUBJECT
from lab.experiments import measures
from lab.experiments.drawing import Drawer, Way
from lab.experiments.prompts import Prompt, free_prompts, subject_prompts
from lab.experiments.table import Row, Table
from lab.experiments.training import Milestone
from lab.experiments.turbo_retention.design import (
    CONDITIONS,
    TURBO,
    UNDISTILLED,
    WORD,
    Condition,
    Plan,
    Size,
)
from lab.experiments.turbo_retention.training import train, training_adapter
from miniature.drawing import grid

log = logging.getLogger(__name__)

RESULTS = "results.jsonl"
MERGED = f"{TURBO}+adapter"  # the distilled base without its distillation
SHOWN = 8  # images that are kept of each set


class Study:
    """Drawers, prompts and the table.

    The folder gets the table, every LoRA (`weights/`) and the first images of every set
    (`pictures/`). Rows of a point have the columns condition, plan, seed, step, base (that it was
    drawn on), way and kind: `subject` or `free` prompts, or `weights` of the LoRA itself.
    """

    def __init__(self, folder: Path, size: Size) -> None:
        self.folder, self.size = folder, size
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        self.table = Table(folder / RESULTS)
        self.prompts = {
            "subject": subject_prompts(SUBJECT, WORD, size.subject_prompts),
            "free": free_prompts(size.free_prompts),
        }
        self.adapter = training_adapter()
        self.drawers = {
            TURBO: Drawer(TURBO),
            MERGED: Drawer(TURBO, self.adapter),
            UNDISTILLED: Drawer(UNDISTILLED),
        }
        family = self.drawers[TURBO].family
        self.layers = {  # as they are before any LoRA
            name: family.transformer.get_submodule(name).weight.clone()
            for name in family.lora_targets()
        }
        untrained = Placeholder.create(WORD, family.text_width, std=1e-5, seed=0)
        self.blank = Archive({}, (untrained.detached(),), {})
        self._untouched: dict[tuple[str, int, float], list[Image.Image]] = {}

    def run(self) -> None:
        """Measures what the table lacks; one seed of everything before the next."""
        for base in self.drawers:
            key = {"condition": "untouched", "plan": "", "seed": 0, "step": 0, "base": base}
            self._measure(key, self.blank, self.size.ways)
        for seed in self.size.seeds:
            for plan in self.size.plans:
                for condition in CONDITIONS:
                    self._follow(condition, plan, seed)

    def _follow(self, condition: Condition, plan: Plan, seed: int) -> None:
        """One training, measured at its milestones; nothing where the table has the last one.

        What a run measures last of a milestone is its weights.
        """
        key = {"condition": condition.name, "plan": plan.name, "seed": seed}
        if key | {"step": plan.milestones[-1], "kind": "weights"} in self.table:
            return
        for milestone in train(condition, plan, seed):
            at = key | {"step": milestone.step}
            name = "-".join(map(str, at.values()))
            log.info("%s: %.2f steps/s", name, milestone.steps_per_second)
            write_archive(milestone.archive, self.folder / "weights" / f"{name}.zip")
            finished = condition is CONDITIONS[0] and milestone.step == plan.milestones[-1]
            ways = self.size.ways + (self.size.weaker if finished else ())
            self._measure(at | {"base": TURBO}, milestone.archive, ways)
            if condition.base != TURBO:  # with the settings of its own base model
                slowest = self.size.ways[-1:]
                self._measure(at | {"base": condition.base}, milestone.archive, slowest)
            self._weigh(at, milestone)

    def _weigh(self, key: Row, milestone: Milestone) -> None:
        factors = milestone.archive.factors
        scores = measures.trace_of(factors, self.adapter.factors, self.layers)
        self._add(key | {"kind": "weights"}, scores)

    def _measure(self, key: Row, archive: Archive, ways: tuple[Way, ...]) -> None:
        for way in ways:
            for kind, prompts in self.prompts.items():
                point = key | {"way": way.name, "kind": kind}
                if point in self.table:
                    continue
                few = prompts[: max(1, round(len(prompts) * way.share))]
                pictures = self.drawers[key["base"]].draw(archive, few, way)
                shown = grid(pictures[:SHOWN], columns=SHOWN, gap=0)
                shown.save(self.folder / "pictures" / picture_name(point), optimize=True)
                self._add(point, self._scores(point, way, pictures, few))

    def _scores(
        self, point: Row, way: Way, pictures: list[Image.Image], prompts: list[Prompt]
    ) -> dict[str, Any]:
        scores: dict[str, Any] = dict(measures.adherence(pictures, prompts))
        scores["sharpness"] = measures.sharpness(pictures)
        if point["kind"] == "subject":
            scores["likeness"] = measures.subject_scores(pictures, prompts, SUBJECT)
            return scores
        pristine = UNDISTILLED if point["base"] == UNDISTILLED else TURBO
        key = (pristine, way.steps, way.guidance)
        if key not in self._untouched:
            self._untouched[key] = self.drawers[pristine].draw(self.blank, prompts, way)
        scores |= measures.drift(pictures, self._untouched[key])
        scores["distance"] = measures.distance(pictures)
        return scores

    def _add(self, point: Row, scores: dict[str, Any]) -> None:
        if point not in self.table:
            self.table.add(point | scores)


def picture_name(point: Row) -> str:
    """The file of a point's first images."""
    columns = ("condition", "plan", "seed", "step", "base", "way", "kind")
    return "-".join(str(point[column]) for column in columns) + ".png"
