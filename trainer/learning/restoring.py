"""Restores the state of a loop from a checkpoint; `trainer.learning.saving` saves it."""

from typing import TYPE_CHECKING

import torch

from trainer.learning.best_weights import restore_best
from trainer.learning.checkpoint import Checkpoint
from trainer.learning.history import History

if TYPE_CHECKING:
    from trainer.learning.loop import Loop


@torch.no_grad()
def restore(loop: "Loop", checkpoint: Checkpoint) -> None:
    """Loads weights, optimizer states, EMA weights and history."""
    if loop.preservation is not None:
        loop.preservation.restore(checkpoint.subject_weights, loop.named)
    for name, parameter in loop.named.items():
        parameter.copy_(checkpoint.parameters[name])
    for name, optimizer in loop.optimizers.items():
        optimizer.load_state_dict(checkpoint.optimizers[name])
    if loop.ema is not None:  # without EMA weights in the checkpoint, starts here
        kept = checkpoint.averages or loop.named
        for name, average in zip(loop.named, loop.ema.shadow_params, strict=True):
            average.copy_(kept[name])
        loop.ema.optimization_step = checkpoint.averaged_steps
    loop.done = checkpoint.step
    loop.history = History.of(checkpoint.history, len(loop.placeholders))
    restore_best(loop, checkpoint)
