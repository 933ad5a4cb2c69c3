"""The optimisers and the learning rate's way through a training."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from trainer.settings import OPTIMIZERS


def _adamw8bit(groups: list[dict[str, Any]]) -> Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups)


def _adamw(groups: list[dict[str, Any]]) -> Optimizer:
    return AdamW(groups, fused=True)  # a third of the time of its other two ways on a CPU


def _prodigy(groups: list[dict[str, Any]]) -> Optimizer:
    from prodigyopt import Prodigy

    # Its own defaults. Bias correction, often advised, slowed the estimate: after 10 and 20 steps
    # of the miniature the rate was 4e-6 and 6e-5 with it, 3e-4 and 2e-3 without.
    return Prodigy(groups)


def _adafactor(groups: list[dict[str, Any]]) -> Optimizer:
    from transformers import Adafactor

    # The rate is ours to schedule, not its own.
    return Adafactor(groups, scale_parameter=False, relative_step=False)


_MAKERS: dict[str, Callable[[list[dict[str, Any]]], Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "prodigy": _prodigy,
    "adafactor": _adafactor,
}


def make_optimizer(
    name: str, parameters: list[nn.Parameter], rate: float, weight_decay: float
) -> Optimizer:
    """The optimiser over one group of parameters; LoRA and placeholder get one each."""
    group = {"params": parameters, "lr": rate, "weight_decay": weight_decay}
    return _MAKERS[name]([group])


def rows_optimizer(name: str) -> str:
    """The optimizer of the placeholder where the LoRA has this one."""
    return OPTIMIZERS[name].for_rows or name


@cache
def fresh_state(name: str, shape: tuple[int, ...], start: float = 1.0) -> dict[str, Any]:
    """The optimizer's state_dict for one parameter of a shape, after one step.

    It tells how large a state is, and what a state from a file has to look like. Of a parameter
    that starts from zeros, as half of a LoRA does, prodigy keeps less.
    """
    device = "cuda" if OPTIMIZERS[name].needs_gpu and torch.cuda.is_available() else "cpu"
    parameter = nn.Parameter(torch.full(shape, start, device=device))
    optimizer = make_optimizer(name, [parameter], 1e-3, 0.0)
    parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    return optimizer.state_dict()


# The share of the full rate at a share of the way from the end of the warm-up to the last step.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda way: 1.0,
    "linear": lambda way: 1 - way,
    "cosine": lambda way: 0.5 * (1 + math.cos(math.pi * way)),
}


def rate_at(step: int, schedule: str, warmup: int, steps: int) -> float:
    """The share of the full learning rate at a step: a linear warm-up, then the schedule."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return SCHEDULES[schedule]((step - warmup) / max(1, steps - warmup))
