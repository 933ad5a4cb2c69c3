"""Checkpoints of a training stage: written atomically at intervals, and loaded to resume."""

import time
from pathlib import Path
from typing import Any

import torch

from miniature.device import DEVICE


class Checkpoint:
    """A checkpoint file that is due every `seconds`.

    A stage resumes from `path` if it exists.
    """

    def __init__(self, path: Path, seconds: float = 120.0) -> None:
        self.path, self.seconds = path, seconds
        self.saved_at = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The last state saved, or None."""
        if not self.path.exists():
            return None
        state: dict[str, Any] = torch.load(self.path, weights_only=True, map_location=DEVICE)
        return state

    def due(self) -> bool:
        return time.monotonic() - self.saved_at >= self.seconds

    def save(self, state: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".partial")
        torch.save(state, scratch)
        scratch.rename(self.path)
        self.saved_at = time.monotonic()
