"""From the table to numbers per run, and to paired comparisons."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lab.experiments.document import table as markdown
from lab.experiments.statistics import Estimate, Values, estimate
from lab.experiments.table import Table
from lab.experiments.zero_prior.design import (
    CHOICES,
    CONDITIONS,
    CONVERGED,
    POINTS,
    ZERO_PRIOR,
    Point,
)
from lab.experiments.zero_prior.metrics import PHOTOGRAPHS, WORLD, Metric
from lab.experiments.zero_prior.study import UNTRAINED


@dataclass(frozen=True)
class Difference:
    """One condition or choice minus another, over the same subjects and seeds."""

    mean: Estimate
    effect: float  # mean over standard deviation of the differences (Cohen's d for pairs)

    def signed(self, digits: int) -> str:
        """`+0.02 (0.01 to 0.03)`"""
        return ("+" if round(self.mean.mean, digits) > 0 else "") + self.mean.text(digits)

    def text(self, digits: int) -> str:
        """The same with the size of the effect."""
        return f"{self.signed(digits)}, d {self.effect:.1f}".replace("d -", "d −")


@dataclass(frozen=True)
class Results:
    """Everything that was measured."""

    table: Table

    @classmethod
    def read(cls, path: Path) -> "Results":
        return cls(Table(path))

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Those of the ground that the table was measured on."""
        return PHOTOGRAPHS if "old_look" in self.table.rows[0] else WORLD

    @property
    def choices(self) -> list[Point]:
        """What was tried of the placeholder."""
        return [each for each in CHOICES if self.table.find(point=each.name)]

    def pairs(self, *runs: tuple[str, str]) -> tuple[list[int], list[str]]:
        """Seeds and subjects for which all (point, condition) of `runs` are there."""
        return self.table.pairs(*({"point": point, "condition": name} for point, name in runs))

    def values(
        self, metric: Metric, point: str, condition: str, seeds: list[int], subjects: list[str]
    ) -> Values:
        """One number per seed and subject."""
        key = {"condition": condition}
        untrained = {
            subject: self.table.find(point=UNTRAINED.name, subject=subject, **key)[0]
            for subject in subjects
        }
        return np.array(
            [
                [
                    metric.of(
                        self.table.find(point=point, subject=subject, seed=seed, **key)[0],
                        untrained[subject],
                    )
                    for subject in subjects
                ]
                for seed in seeds
            ]
        )

    def mean(self, metric: Metric, point: str, condition: str) -> Estimate:
        """A metric over all seeds and subjects."""
        return estimate(self.values(metric, point, condition, *self.pairs((point, condition))))

    def difference(
        self, metric: Metric, one: tuple[str, str], other: tuple[str, str]
    ) -> Difference:
        """(point, condition) `one` minus `other`, paired by seed and subject."""
        common = self.pairs(one, other)
        apart = self.values(metric, *one, *common) - self.values(metric, *other, *common)
        spread = float(apart.std(ddof=1)) if apart.size > 1 else 0.0
        mean = estimate(apart)
        return Difference(mean, mean.mean / spread if spread else 0.0)

    def choice(self, metric: Metric, name: str) -> Difference:
        """What a choice makes of the placeholder, minus what the defaults do."""
        return self.difference(metric, (name, ZERO_PRIOR.name), (CONVERGED.name, ZERO_PRIOR.name))


TOLD = 8  # metrics that are told of choices and drawn, the first ones


def metrics(results: Results) -> str:
    """Means of every condition at every point, as Markdown."""
    parts = []
    for point in (UNTRAINED, *POINTS):
        have = [c for c in CONDITIONS if results.table.find(point=point.name, condition=c.name)]
        rows = [
            [metric.title]
            + [results.mean(metric, point.name, each.name).text(metric.digits) for each in have]
            for metric in results.metrics
        ]
        if have:
            title = "The untrained base" if point is UNTRAINED else f"At the {point.name} point"
            parts.append(markdown(title, ["", *(c.title for c in have)], rows))
    by = {row["apart_by"] for row in results.table.rows if "apart_by" in row}
    if by:
        parts.append(f"Distances are {' or '.join(sorted(by))}'s.")
    return "\n\n".join(parts)


def compare(results: Results) -> str:
    """The placeholder against every other word, and every choice against the defaults."""
    return "\n\n".join(filter(None, (compare_words(results), compare_choices(results))))


def compare_words(results: Results) -> str:
    """The placeholder against every other word."""
    parts = []
    for point in POINTS:
        others = [
            c
            for c in CONDITIONS
            if c is not ZERO_PRIOR and results.table.find(point=point.name, condition=c.name)
        ]
        rows = [
            [f"{metric.title}{f' ({metric.better} is better)' if metric.better else ''}"]
            + [
                results.difference(
                    metric, (point.name, ZERO_PRIOR.name), (point.name, each.name)
                ).text(metric.digits)
                for each in others
            ]
            for metric in results.metrics
        ]
        if others:
            title = f"The placeholder minus each other word, at the {point.name} point"
            parts.append(markdown(title, ["", *(c.title for c in others)], rows))
    return "\n\n".join(parts)


def compare_choices(results: Results) -> str:
    """Every choice against the defaults; nothing where none was tried."""
    chosen = results.metrics[:TOLD]
    rows = [
        [each.name] + [results.choice(metric, each.name).text(metric.digits) for metric in chosen]
        for each in results.choices
    ]
    title = "Each choice minus the defaults, at the converged point"
    return markdown(title, ["", *(metric.title for metric in chosen)], rows) if rows else ""
