"""The values of settings with fixed choices, and facts about them.

Imports no PyTorch, so that settings are checked before it is loaded. The implementations are in
`trainer.learning` and `trainer.monitor`; a test compares the names.
"""

import importlib.util
from dataclasses import dataclass

MAX_STEPS = 100_000  # optimizer steps of one run


@dataclass(frozen=True)
class OptimizerFacts:
    """Facts about an optimizer for settings, memory plan and checks."""

    package: str
    state_bytes: float  # per trained value of a LoRA, between two steps
    full_state_bytes: float | None = None  # of a full training, whose matrices are larger
    finds_rate: bool = False  # estimates the learning rate: the setting is a factor, no warmup
    for_rows: str | None = None  # another optimizer for the placeholder token
    needs_gpu: bool = False


# On a CPU, bitsandbytes' 8-bit AdamW works but is eleven times slower than AdamW (0.75 s instead of
# 0.07 s for 420 matrices of 16 x 3840 on one core) and saves no GPU memory, so it is refused.
OPTIMIZERS: dict[str, OptimizerFacts] = {
    "adamw": OptimizerFacts("torch", 8.0),  # two moments
    "adamw8bit": OptimizerFacts("bitsandbytes", 2.0, needs_gpu=True),  # the same in 8 bits
    # Prodigy cannot estimate a rate for a near-zero vector, whose gradient shrinks as it grows: on
    # the miniature the rate stayed at 3e-6 instead of 2e-2. It stores two moments, the initial
    # weights and the distance from them.
    "prodigy": OptimizerFacts("prodigyopt", 16.0, finds_rate=True, for_rows="adamw"),
    "adafactor": OptimizerFacts("transformers", 0.1, 0.01),  # sums of rows and columns only
}
TRAININGS = ("lora", FULL := "full")
# The learning rate of a full training, as a share of a LoRA's: 1e-5 for the published models, as in
# OneTrainer's presets (musubi-tuner: 1e-6). Measured on the miniature (docs/training.md).
FULL_RATE = 0.1
FULL_OPTIMIZER = "adafactor"  # its default: hardly any state
LR_SCHEDULERS = ("constant", "linear", "cosine")
SCHEDULED = "shift"  # every timestep of the base's inference schedule equally
TIMESTEP_SAMPLINGS = ("uniform", "sigmoid", "logit_normal", SCHEDULED)
MASKS = ("auto", "alpha", "off")  # what limits the loss to a part of the images
REGULARIZATIONS = ("auto", "off")  # what regularization images are for
QUANTIZATIONS = ("fp8", "int8", "nf4")  # of the frozen base
TRACKERS = ("tensorboard", "wandb", "trackio")


def is_installed(optimizer: str) -> bool:
    """Whether the optimizer's package is installed."""
    return importlib.util.find_spec(OPTIMIZERS[optimizer].package) is not None
