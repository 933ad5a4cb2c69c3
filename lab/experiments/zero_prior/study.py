"""Trains every condition of every subject and seed, and measures it; resumable."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from adapters.archive import Archive
from lab.experiments.table import Row, Table
from lab.experiments.zero_prior.design import PLACEHOLDER, Condition, Point, Size
from miniature.drawing import grid

RESULTS = "results.jsonl"
UNTRAINED = Point("untrained")  # the base as it is
SHOWN = 8  # images that are kept of each run


@dataclass(frozen=True)
class Run:
    """One training, or the untrained base with the same word."""

    point: Point
    condition: Condition
    subject: str
    seed: int = 0

    @property
    def key(self) -> Row:
        """What tells its row from others."""
        return {"point": self.point.name, "condition": self.condition.name,
                "subject": self.subject, "seed": self.seed}  # fmt: skip


def run_name(key: Row) -> str:
    """The name of a run's files."""
    return "{point}-{condition}-{subject}-{seed}".format(**key).replace(" ", "_")


Measured = tuple[list[Image.Image], dict[str, Any]]  # images of the subject, and scores


class Ground(Protocol):
    """Where the question is asked: what runs are trained on, and what is measured of them."""

    conditions: Sequence[Condition]
    size: Size

    def train(self, run: Run) -> Archive:
        """What the training would ship."""

    def measure(
        self, run: Run, archive: Archive | None
    ) -> tuple[list[Image.Image], dict[str, Any]]:
        """Generates with the archive, or with the untrained base model if there is none."""


class Study:
    """The table: one row per point, condition, subject and seed.

    The folder gets the table and the first images of every run (`pictures/`).
    """

    def __init__(self, folder: Path, ground: Ground) -> None:
        self.folder, self.ground = folder, ground
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        self.table = Table(folder / RESULTS)

    def run(self, part: int = 0, parts: int = 1) -> None:
        """Measures what the table lacks; of several processes each takes its part of the runs."""
        for subject in self.ground.size.subjects:
            for condition in self.ground.conditions:
                untrained = Run(UNTRAINED, condition, subject)
                if part == 0 and untrained.key not in self.table:
                    self._keep(untrained, None)
        for number, run in enumerate(self._runs()):
            if number % parts == part and run.key not in self.table:
                self._keep(run, self.ground.train(run))

    def _runs(self) -> Iterator[Run]:
        """One seed and subject of everything before the next; what is tried of the placeholder
        last."""
        size, conditions = self.ground.size, self.ground.conditions
        placeholder = [each for each in conditions if each.word == PLACEHOLDER]
        for points, words, seeds in (
            (size.points, conditions, size.seeds),
            (size.choices, placeholder, size.choice_seeds),
        ):
            for seed in seeds:
                for subject in size.subjects:
                    for point in points:
                        for condition in words:
                            yield Run(point, condition, subject, seed)

    def _keep(self, run: Run, archive: Archive | None) -> None:
        pictures, scores = self.ground.measure(run, archive)
        shown = grid(pictures[:SHOWN], columns=SHOWN, gap=0)
        shown.save(self.folder / "pictures" / f"{run_name(run.key)}.png", optimize=True)
        self.table.add(run.key | scores)
