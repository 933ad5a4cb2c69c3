"""The two numbers that a result shows first: what was learned, and what else has changed.

Both are measured by checks and need no other model, so they exist for every base model. Neither is
a likeness or an image quality: the first is a loss, the second a change of velocity.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trainer.result.result_checks import DRIFT, FAILED, FIT_FELL, CheckResult

LEARNED, CHANGED = "subject learned", "other prompts changed"


@dataclass(frozen=True)
class Headline:
    """One of the two numbers."""

    name: str
    value: float | None  # None: not measured, or not finite
    state: str  # of its check
    meaning: str
    unit: str = "%"

    def __str__(self) -> str:
        return f"{self.name} {self.shown}"

    @property
    def shown(self) -> str:
        """The value with its unit."""
        if self.value is None:
            return "not finite" if self.state == FAILED else "not measured"
        return f"{self.value:.0f} {self.unit}".replace("-0 ", "0 ")

    def plain(self) -> dict[str, Any]:
        """The number as JSON types."""
        return asdict(self)


def headlines(checks: Sequence[CheckResult]) -> list[Headline]:
    """The numbers that were checked, the subject's first."""
    found = []
    for check in checks:
        if check.name == FIT_FELL:
            meaning = (
                "Share of the base model's loss on the training images that the LoRA removes, at "
                "fixed noise: 0 % is the base model, 100 % a perfect prediction. It grows with the "
                "likeness, but is not the likeness."
            )
            removed = None if check.value is None else 100 * (1 - check.value)
            found.append(Headline(LEARNED, removed, check.state, meaning))
        elif check.name == DRIFT:
            meaning = (
                "Change of the predicted velocity for prompts without the subject, with the LoRA "
                "applied, relative to the base model's: 0 % is the base model, 100 % as wrong "
                "as a prediction of zero."
            )
            changed = None if check.value is None else 100 * check.value
            found.append(Headline(CHANGED, changed, check.state, meaning))
    return sorted(found, key=lambda each: each.name != LEARNED)
