"""From the table to numbers per run, and to paired comparisons."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from experiments.document import table as markdown
from experiments.statistics import Estimate, Values, estimate
from experiments.table import Row, Table
from experiments.zero_prior.design import CHOICES, CONDITIONS, CONVERGED, POINTS, ZERO_PRIOR
from experiments.zero_prior.study import UNTRAINED


@dataclass(frozen=True)
class Metric:
    """One number per run, from its row and the row of the same word on the untrained base."""

    name: str
    title: str
    better: str  # higher, lower, or neither: ""
    digits: int
    of: Callable[[Row, Row], float]


def _right(row: Row, prefix: str = "") -> float:
    return 100 * sum(row[f"{prefix}right"]) / sum(row[f"{prefix}asked"])


def _leak(row: Row, untrained: Row) -> float:
    """How often the word's old look shows, in percent; what the subject looks like is not leak.

    The old look is the shape and colour that the untrained base draws most often for the word.
    """
    drawn: list[str] = untrained["repeats_looks"]
    old = Counter(drawn).most_common(1)[0][0]
    shown = fmean(look == old for look in row["looks"])
    innocent = fmean(look == old for look in untrained["rendered_looks"])
    return 100 * (shown - innocent)


METRICS = (
    Metric("fidelity", "likeness to the subject", "higher", 3, lambda r, _: fmean(r["likeness"])),
    Metric("adherence", "attributes right, %", "higher", 1, lambda r, _: _right(r)),
    Metric("leak", "prior leak, %", "lower", 1, _leak),
    Metric("drift", "drift on other prompts", "lower", 3, lambda r, _: fmean(r["free_pixels"])),
    Metric("free", "other prompts right, %", "higher", 1, lambda r, _: _right(r, "free_")),
    Metric(
        "bleed",
        "bleed into the class word",
        "lower",
        3,
        lambda r, u: fmean(r["class_likeness"]) - fmean(u["class_likeness"]),
    ),
    Metric("class", "class word right, %", "higher", 1, lambda r, _: _right(r, "class_")),
    Metric("diversity", "diversity", "higher", 2, lambda r, _: r["diversity"]),
    Metric("sharpness", "sharpness", "", 4, lambda r, _: fmean(r["sharpness"])),
    Metric("contrast", "contrast", "", 3, lambda r, _: fmean(r["contrast"])),
    Metric("brightness", "brightness", "", 3, lambda r, _: fmean(r["brightness"])),
)


@dataclass(frozen=True)
class Difference:
    """One condition or choice minus another, over the same subjects and seeds."""

    mean: Estimate
    effect: float  # mean over standard deviation of the differences (Cohen's d for pairs)

    def text(self, digits: int) -> str:
        sign = "+" if round(self.mean.mean, digits) > 0 else ""
        return f"{sign}{self.mean.text(digits)}, d {self.effect:.1f}".replace("d -", "d −")


@dataclass(frozen=True)
class Results:
    """Everything that was measured."""

    table: Table

    @classmethod
    def read(cls, path: Path) -> "Results":
        return cls(Table(path))

    def pairs(self, *runs: tuple[str, str]) -> tuple[list[int], list[str]]:
        """Seeds and subjects for which all (point, condition) of `runs` are there."""
        found = [
            {(row["seed"], row["subject"]) for row in self.table.find(point=point, condition=name)}
            for point, name in runs
        ]
        common = set.intersection(*found)
        subjects = sorted({subject for _, subject in common})
        seeds = sorted({seed for seed, _ in common})
        return [s for s in seeds if all((s, each) in common for each in subjects)], subjects

    def values(
        self, metric: Metric, point: str, condition: str, seeds: list[int], subjects: list[str]
    ) -> Values:
        """One number per seed and subject."""
        key = {"condition": condition}
        untrained = {
            subject: self.table.find(point=UNTRAINED, subject=subject, **key)[0]
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


def metrics(results: Results) -> str:
    """Means of every condition at every point, as Markdown."""
    parts = []
    for point in POINTS:
        have = [c for c in CONDITIONS if results.table.find(point=point.name, condition=c.name)]
        rows = [
            [metric.title]
            + [results.mean(metric, point.name, each.name).text(metric.digits) for each in have]
            for metric in METRICS
        ]
        if have:
            parts.append(
                markdown(f"At the {point.name} point", ["", *(c.title for c in have)], rows)
            )
    return "\n\n".join(parts)


def compare(results: Results) -> str:
    """The placeholder against every other word, and every choice against the defaults."""
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
            for metric in METRICS
        ]
        if others:
            title = f"The placeholder minus each other word, at the {point.name} point"
            parts.append(markdown(title, ["", *(c.title for c in others)], rows))
    tried = [each for each in CHOICES if results.table.find(point=each.name)]
    if tried:
        chosen = METRICS[:8]
        rows = [
            [each.name]
            + [
                results.difference(
                    metric, (each.name, ZERO_PRIOR.name), (CONVERGED.name, ZERO_PRIOR.name)
                ).text(metric.digits)
                for metric in chosen
            ]
            for each in tried
        ]
        title = "Each choice minus the defaults, at the converged point"
        parts.append(markdown(title, ["", *(metric.title for metric in chosen)], rows))
    return "\n\n".join(parts)
