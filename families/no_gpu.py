"""Detects large models on a machine without a GPU, before anything is downloaded."""

import torch

from families.base import Base
from families.loading import default_device
from families.without_weights import transformer_without_weights

LARGE = 1e9  # parameters of a transformer; one step of the smallest published base takes minutes


class NoGpu(ValueError):
    """A large model on a machine without a GPU, and the user has not asked to run it anyway."""


def why_too_slow(base: Base, device: torch.device | None = None) -> str | None:
    """Why a run with the base would be extremely slow on this device; None if it would not.

    Counts parameters from the model's config, or the published one, without its weights.
    """
    if (device or default_device()).type != "cpu":
        return None
    size = sum(each.numel() for each in transformer_without_weights(base).parameters())
    if size < LARGE:
        return None
    return (
        f"no GPU: this run would be extremely slow, since the transformer of {base.name} has "
        f"{size / 1e9:.0f} billion parameters"
    )


def how_to_run_anyway(slow: str) -> str:
    """The error message of a command: what is wrong, and what to do."""
    return (
        f"{slow}; choose the small test model (--base_model miniature-turbo), "
        "or add --cpu to run it anyway"
    )
