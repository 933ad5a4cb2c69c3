"""Feeds mutated input to everything that reads what strangers send: `python -m lab.fuzz`."""

NAMES = (
    "dataset",
    "picture",
    "weights",
    "config",
    "caption",
    "checkpoint",
)  # of `lab.fuzz.harnesses`
