"""An adapter and a prompt in, images out."""

import families  # noqa: F401  before any library of the models: it silences their warnings
