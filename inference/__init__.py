"""Generates images from a prompt and trained weights."""

import families  # noqa: F401  first, since it silences warnings of the models' libraries
