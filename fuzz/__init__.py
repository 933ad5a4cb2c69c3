"""Feeds mutated input to everything that reads what strangers send: `python -m fuzz`."""

NAMES = ("dataset", "picture", "weights", "config", "caption", "checkpoint")  # of `fuzz.harnesses`
