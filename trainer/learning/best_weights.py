"""The best weights of a run, and early stopping: by the loss on held-out images.

keep_best        the weights of the measurement with the lowest loss become weights.zip
early_stopping   the run ends if the loss has not improved for a while

Both depend only on what a checkpoint contains, so a resumed run decides as an uninterrupted one.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer.learning.checkpoint import Checkpoint
from trainer.learning.saving import identity_of
from trainer.settings import Settings

if TYPE_CHECKING:
    from trainer.learning.loop import Loop

log = logging.getLogger(__name__)

# A run ends early if its lowest loss is older than this share of its steps, and than so many
# measurements: three of the ten that a run has by default. Noise and sigmas of the measurements are
# fixed, so a new lowest loss is an improvement, however small.
PATIENCE, LEAST_MEASUREMENTS = 0.3, 3

# Settings that the loss on held-out images depends on, besides the weights.
_MEASURED_BY = (
    *("seed", "validation_images", "timestep_sampling", "training_shift", "resolutions"),
    *("turbo_adapter", "quantize"),
)


@dataclass(frozen=True)
class Best:
    """The weights of the measurement with the lowest loss so far."""

    step: int
    loss: float
    weights: dict[str, Tensor]  # by name as in `Loop.named`; EMA weights, if enabled; on the CPU

    def plain(self) -> dict[str, Any]:
        """Its values by name, for a checkpoint."""
        return vars(self)


def keep_best(loop: "Loop", loss: float) -> None:
    """Copies the loop's current weights if their loss is the lowest so far.

    Call it within `loop.averaged()`.
    """
    if not math.isfinite(loss) or (loop.best is not None and loss >= loop.best.loss):
        return
    weights = {name: value.detach().cpu().clone() for name, value in loop.named.items()}
    loop.best = Best(loop.done, loss, weights)
    loop.events.emit("best", step=loop.done, mean=loss)


@torch.no_grad()
def load_best(loop: "Loop") -> int | None:
    """Loads the best weights for `final_weights`; returns their step.

    None without `keep_best`. The loop cannot be continued after that.
    """
    if not loop.settings.keep_best:
        return None
    if loop.best is None:
        log.warning("keep_best has no effect: no measured loss is finite")
        return loop.done
    for name, parameter in loop.named.items():
        parameter.copy_(loop.best.weights[name])
    loop.ema = None  # the best weights are EMA weights already
    log.info(
        "weights.zip gets the weights of step %d, whose validation loss is the lowest (%.4f)",
        *(loop.best.step, loop.best.loss),
    )
    return loop.best.step


def why_ended(steps: Sequence[int], losses: Sequence[float], settings: Settings) -> str:
    """Why the run ends after the last of these measurements; empty if it continues.

    The first one is the base model's, which does not count.
    """
    done, planned = steps[-1], settings.steps
    if not settings.early_stopping or len(steps) < 2 or done >= planned:
        return ""
    lowest = min(range(1, len(steps)), key=losses.__getitem__)
    since = len(steps) - 1 - lowest
    if since < LEAST_MEASUREMENTS or done - steps[lowest] < PATIENCE * planned:
        return ""
    return (
        f"ended early at step {done:,} of {planned:,}: the validation loss was lowest at step "
        f"{steps[lowest]:,} ({losses[lowest]:.4f}; now {losses[-1]:.4f})"
    )


def restore_best(loop: "Loop", checkpoint: Checkpoint) -> None:
    """Loads the best weights of a checkpoint, and discards measurements of other images."""
    settings = loop.settings
    if not settings.by_validation:
        return
    then, now = checkpoint.identity, identity_of(loop)
    before, after = (each.get("settings", {}) for each in (then, now))
    same = all(before.get(name) == after.get(name) for name in _MEASURED_BY)
    if not same or then.get("data") != now["data"]:
        log.warning(
            "the dataset or settings that the validation loss depends on have changed: its curve, "
            "and the choice of the best weights, begin again at step %d",
            loop.done,
        )
        loop.history.validation.clear()
    elif settings.keep_best and checkpoint.best:
        loop.best = Best(**checkpoint.best)
    elif settings.keep_best and len(loop.history.validation) > 1:
        log.warning(
            "keep_best was off until step %d, so the weights of earlier steps are not kept: the "
            "best of the later ones are saved",
            loop.done,
        )
