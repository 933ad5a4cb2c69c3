"""What a setting can be: the names that are accepted, and the facts about each of them.

Imports no PyTorch, so that settings are checked before it is loaded. The functions behind the names
are in `trainer.learning` and `trainer.monitor`; a test compares the names.
"""

import importlib.util
from dataclasses import dataclass

MAX_STEPS = 100_000  # optimizer steps of one run


@dataclass(frozen=True)
class OptimizerFacts:
    """What settings, memory plan and checks know of an optimizer."""

    package: str  # that brings it
    state_bytes: float  # per trained value, between two steps
    finds_rate: bool = False  # by itself: the LoRA's rate is a factor, and there is no warm-up
    for_rows: str | None = None  # optimizer of the placeholder in this one's stead
    needs_gpu: bool = False


# bitsandbytes' 8-bit AdamW does run on a CPU, eleven times slower than AdamW there (0.75 against
# 0.07 s for 420 matrices of 16 x 3840 on one core), and the memory it saves is a GPU's: refused.
OPTIMIZERS: dict[str, OptimizerFacts] = {
    "adamw": OptimizerFacts("torch", 8.0),  # two moments
    "adamw8bit": OptimizerFacts("bitsandbytes", 2.0, needs_gpu=True),  # the same in 8 bits
    # Prodigy cannot estimate a rate for a near-zero vector, since its gradient shrinks as it
    # grows: on the miniature the rate stayed at 3e-6, where 2e-2 is right. It keeps two moments,
    # the start and the distance from it.
    "prodigy": OptimizerFacts("prodigyopt", 16.0, finds_rate=True, for_rows="adamw"),
    "adafactor": OptimizerFacts("transformers", 0.1),  # sums of rows and columns only
}
LR_SCHEDULERS = ("constant", "linear", "cosine")
SCHEDULED = "shift"  # every timestep of the base's inference schedule alike
TIMESTEP_SAMPLINGS = ("uniform", "sigmoid", "logit_normal", SCHEDULED)
QUANTIZATIONS = ("fp8", "int8", "nf4")  # of the frozen base
TRACKERS = ("tensorboard", "wandb", "trackio")


def is_installed(optimizer: str) -> bool:
    """Whether the package that brings the optimizer is installed."""
    return importlib.util.find_spec(OPTIMIZERS[optimizer].package) is not None
