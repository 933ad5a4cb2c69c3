"""Means with bootstrap intervals over seeds and prompts.

S training seeds, P prompts, D resamples.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

DRAWS = 2000  # resamples


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def text(self, digits: int = 2) -> str:
        """`0.71 (0.68 to 0.74)`; with a real minus sign."""
        # Adding 0 makes a rounded −0 a 0.
        rounded = (round(value, digits) + 0.0 for value in (self.mean, self.low, self.high))
        parts = (f"{value:.{digits}f}" for value in rounded)
        return "{} ({} to {})".format(*parts).replace("-", "−")


def estimate(values_SP: Values, over_1P: Values | None = None) -> Estimate:
    """The mean over training seeds and prompts, or its ratio to the mean of `over_1P`.

    The interval resamples seeds and prompts, crossed, since every seed is measured on the same
    prompts (percentile bootstrap, Efron and Tibshirani 1993). With three seeds it is a rough one.
    """
    often_DS, often_DP = (_resampled(size, axis) for axis, size in enumerate(values_SP.shape))
    means_D = ((often_DS @ values_SP) * often_DP).sum(axis=1)
    mean = values_SP.mean()
    if over_1P is not None:
        means_D = means_D / (often_DP * over_1P).sum(axis=1)
        mean = mean / over_1P.mean()
    low, high = np.percentile(means_D, (2.5, 97.5))
    return Estimate(float(mean), float(low), float(high))


@cache
def _resampled(size: int, stream: int) -> Values:
    """How often each of `size` things is drawn in each resample, as shares of 1: [D, size]."""
    random = np.random.default_rng((size, stream))
    return random.multinomial(size, np.full(size, 1 / size), size=DRAWS) / size
