"""What is laid over a base: LoRA, placeholder, and the archive that carries them."""

import families  # noqa: F401  before any library of the models: it silences their warnings
