"""The study's table as numbers: what was measured at a point, per training seed and prompt.

S training seeds, P prompts.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lab.experiments.drawing import Way
from lab.experiments.statistics import Estimate, Values, estimate
from lab.experiments.table import Row, Table
from lab.experiments.turbo_retention.design import CONDITIONS, TURBO


@dataclass(frozen=True)
class Curve:
    """One measure of the study, along the steps of training."""

    title: str
    measure: str  # a column of the table, or `right` or `whole`: percentages per image
    kind: str  # of prompts: subject or free; or weights
    way: Way | None  # of drawing; None for weights
    digits: int
    base: str = TURBO  # the base model for generation


@dataclass(frozen=True)
class Results:
    """Everything that was measured."""

    table: Table

    @classmethod
    def read(cls, path: Path) -> "Results":
        return cls(Table(path))

    def steps(self, plan: str) -> list[int]:
        """The milestones of a plan that every condition has been measured at."""
        found = {row["step"] for row in self.table.find(plan=plan, kind="weights")}
        return [step for step in sorted(found) if self.seeds(plan, step)]

    def seeds(self, plan: str, step: int) -> list[int]:
        """The training seeds that every condition has been measured with, at a milestone."""
        at = {"plan": plan, "step": step, "kind": "weights"}
        found = [
            {row["seed"] for row in self.table.find(condition=condition.name, **at)}
            for condition in CONDITIONS
        ]
        return sorted(set.intersection(*found))

    def values(self, curve: Curve, condition: str, plan: str, step: int) -> Values:
        """Numbers [S, P] as measured, of the seeds that all conditions have."""
        where = {"condition": condition, "plan": plan, "step": step, "kind": curve.kind}
        if curve.way is not None:
            where |= {"way": curve.way.name, "base": curve.base}
        rows = [self.table.find(seed=seed, **where)[0] for seed in self.seeds(plan, step)]
        return np.array([_numbers(row, curve.measure) for row in rows])

    def untouched(self, measure: str, kind: str, way: Way, base: str = TURBO) -> Values:
        """Numbers [1, P] of a base without any LoRA."""
        where = {"condition": "untouched", "base": base, "way": way.name, "kind": kind}
        return np.array([_numbers(self.table.find(**where)[0], measure)])

    def estimate(self, curve: Curve, condition: str, plan: str, step: int) -> Estimate:
        """The measure at a point, with its interval."""
        return estimate(self.values(curve, condition, plan, step), self._unit(curve))

    def level(self, curve: Curve, base: str) -> float:
        """The measure on a base without any LoRA."""
        assert curve.way is not None
        found, unit = self.untouched(curve.measure, curve.kind, curve.way, base), self._unit(curve)
        return float(found.mean() / (1 if unit is None else unit.mean()))

    def _unit(self, curve: Curve) -> Values | None:
        """What the measure is told in: sharpness in the untouched turbo's, all else as it is."""
        if curve.measure != "sharpness" or curve.way is None:
            return None
        return self.untouched(curve.measure, curve.kind, curve.way)

    def against(self, curve: Curve, condition: str, other: str, plan: str, step: int) -> Estimate:
        """How much more a condition has than another, on the same prompts and seeds.

        `untouched` stands for the distilled base itself.
        """
        mine = self.values(curve, condition, plan, step)
        if other != "untouched":
            return estimate(mine - self.values(curve, other, plan, step), self._unit(curve))
        assert curve.way is not None
        return estimate(mine - self.untouched(curve.measure, curve.kind, curve.way))


def _numbers(row: Row, measure: str) -> list[float]:
    """A row's measure, one number per image where it is one of images."""
    if measure in ("right", "whole"):
        pairs = zip(row["right"], row["asked"], strict=True)
        if measure == "right":
            return [100 * right / asked for right, asked in pairs]
        return [100.0 * (right == asked) for right, asked in pairs]
    value = row[measure]
    return value if isinstance(value, list) else [value]
