"""Trains a LoRA from a dataset of images and captions, and writes `weights.zip`."""

import families  # noqa: F401  imported first: it silences warnings of the model libraries
