"""Trains an adapter from a dataset: pictures and captions in, `weights.zip` out."""

import families  # noqa: F401  before any library of the models: it silences their warnings
