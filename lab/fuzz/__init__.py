"""Feeds mutated input to everything that reads what strangers send: `python -m lab.fuzz`."""

NAMES = (
    "dataset",
    "picture",
    "table",
    "weights",
    "config",
    "caption",
    "checkpoint",
)  # of `lab.fuzz.harnesses`
