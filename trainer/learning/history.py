"""What happens in a run, step by step: its numbers."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class History:
    """What happened in each step.

    New values are tensors, wherever they lie, until they are read; then they are numbers. So
    values of a checkpoint and of a device stand in one list.
    """

    losses: list[float | Tensor] = field(default_factory=list)  # one per step
    row_norms: list[float | Tensor] = field(default_factory=list)  # gradient, where the word was
    validation: list[list[float]] = field(default_factory=list)  # a step and its loss at each sigma

    def read(self) -> None:
        """Makes all values numbers. Waits for the device if there are new ones."""
        for values in (self.losses, self.row_norms):
            first = len(values)
            while first and isinstance(values[first - 1], Tensor):
                first -= 1
            values[first:] = [float(each) for each in values[first:]]

    def mean_loss(self, steps: int) -> float:
        """The mean of the last `steps` losses."""
        self.read()
        last = [float(each) for each in self.losses[-steps:]]
        return sum(last) / len(last)

    def plain(self) -> dict[str, list[Any]]:
        """The same as numbers, oldest first."""
        self.read()
        return {
            "losses": list(self.losses),
            "row_norms": list(self.row_norms),
            "validation": self.validation,
        }


@dataclass(frozen=True)
class Trained:
    """What is known about the run when all steps are done."""

    losses: list[float]  # one per step
    steps_per_second: float
    row_norms: list[float]  # of the placeholder's gradient, one per step that saw it
