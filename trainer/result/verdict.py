"""The verdict on a run's result, one of three classes, from its checks.

good        every check passed
doubtful    none failed, but one was skipped or is between its two limits
broken      at least one failed
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.result.headline import Headline, headlines
from trainer.result.result_checks import DOUBTFUL, FAILED, PASSED, SKIPPED, CheckResult

log = logging.getLogger(__name__)

GOOD, BROKEN = "good", "broken"  # the third is DOUBTFUL, as for a check

# Without held-out images, a lower loss only shows that the LoRA fits the training images.
NOT_VALIDATED = "not validated: no image was held out"


@dataclass(frozen=True)
class Verdict:
    """The class of a result, its two numbers, and the counts of its checks."""

    result: str  # good, doubtful, broken
    counts: str
    headlines: tuple[Headline, ...] = ()

    def __str__(self) -> str:
        numbers = ", ".join(map(str, self.headlines))
        return f"{self.result}: {numbers + '; ' if numbers else ''}{self.counts}"


def verdict(checks: Sequence[CheckResult], validated: bool) -> Verdict:
    """The verdict from the checks; `validated` if images were held out."""
    numbers = tuple(headlines(checks))
    states = [each.state for each in checks]
    counts = f"{states.count(PASSED)} checks passed"
    if DOUBTFUL in states:
        counts += f", {states.count(DOUBTFUL)} doubtful"
    counts += f", {states.count(FAILED)} failed, {states.count(SKIPPED)} skipped"
    if not validated:
        counts += f"; {NOT_VALIDATED}"
    if FAILED in states:
        return Verdict(BROKEN, counts, numbers)
    doubtful = DOUBTFUL in states or SKIPPED in states or PASSED not in states
    return Verdict(DOUBTFUL if doubtful else GOOD, counts, numbers)


def log_verdict(checks: Sequence[CheckResult], result: Verdict) -> None:
    """Logs every check, then the verdict; those that are not good are warnings."""
    for check in checks:
        level = logging.WARNING if check.state in (FAILED, DOUBTFUL) else logging.INFO
        log.log(level, "check %s: %s: %s", check.state, check.name, check.sentence)
    log.log(logging.INFO if result.result == GOOD else logging.WARNING, "result %s", result)
