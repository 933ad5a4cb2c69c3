"""The history of a run: losses and norms, step by step."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class History:
    """Values of each step.

    New values are tensors, on any device, until `read` converts them to numbers, so that a step
    does not wait for the device.
    """

    losses: list[float | Tensor] = field(default_factory=list)  # one per step
    # Of each token's gradient, in steps with it.
    row_norms: list[list[float | Tensor]] = field(default_factory=list)
    validation: list[list[float]] = field(default_factory=list)  # a step and its loss at each sigma

    def read(self) -> None:
        """Converts all values to numbers. Waits for the device if there are new ones."""
        for values in (self.losses, *self.row_norms):
            _read(values, len(values))

    def losses_read(self) -> list[float]:
        """The losses of the first steps, as far as they have been read."""
        known = len(self.losses)
        while known and isinstance(self.losses[known - 1], Tensor):
            known -= 1
        return [float(each) for each in self.losses[:known]]

    def mean_loss(self, steps: int, done: int | None = None) -> float:
        """The mean of the last `steps` losses, or of those before step `done`."""
        done = len(self.losses) if done is None else done
        _read(self.losses, done)
        last = [float(each) for each in self.losses[max(0, done - steps) : done]]
        return sum(last) / len(last)

    def plain(self) -> dict[str, list[Any]]:
        """All values as numbers, oldest first. Those of further tokens have a list of their own."""
        self.read()
        first, *others = self.row_norms or [[]]
        plain: dict[str, list[Any]] = {
            "losses": list(self.losses),
            "row_norms": list(first),
            "validation": self.validation,
        }
        return plain | ({"other_row_norms": [list(each) for each in others]} if others else {})

    @classmethod
    def of(cls, plain: Mapping[str, Any], tokens: int) -> "History":
        """The history of a run with so many tokens, from `plain`."""
        norms = [plain["row_norms"], *plain.get("other_row_norms", ()), *[()] * tokens]
        return cls(
            losses=list(plain["losses"]),
            row_norms=[list(each) for each in norms[:tokens]],
            validation=[list(row) for row in plain.get("validation", [])],
        )


def _read(values: list[float | Tensor], stop: int) -> None:
    """Converts the values before `stop` to numbers, from the first that is none."""
    first = stop
    while first and isinstance(values[first - 1], Tensor):
        first -= 1
    values[first:stop] = [float(each) for each in values[first:stop]]


@dataclass(frozen=True)
class Trained:
    """Results of the loop."""

    losses: list[float]  # one per step
    steps_per_second: float
    row_norms: list[list[float]]  # of each token's gradient, one per step with it
    preservation: float | None = None  # the last loss of its rows; None if there were none
    ended_early: str = ""  # the reason, with early_stopping
