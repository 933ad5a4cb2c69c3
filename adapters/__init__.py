"""LoRA, placeholder token, and weights.zip with both."""

import families  # noqa: F401  first, since it silences warnings of the models' libraries
