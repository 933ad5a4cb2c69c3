"""Optimizers and learning rate schedules."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from trainer.learning.fused import FusedOptimizer
from trainer.settings import OPTIMIZERS, Settings


def _adamw8bit(groups: list[dict[str, Any]]) -> Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups)


def _adamw(groups: list[dict[str, Any]]) -> Optimizer:
    return AdamW(groups, fused=True)  # on a CPU three times faster than the other implementations


def _prodigy(groups: list[dict[str, Any]]) -> Optimizer:
    from prodigyopt import Prodigy

    # With its defaults. Bias correction, often recommended, slowed the estimate: after 10 and 20
    # steps of the miniature the rate was 4e-6 and 6e-5 with it, 3e-4 and 2e-3 without.
    return Prodigy(groups)


def _adafactor(groups: list[dict[str, Any]]) -> Optimizer:
    from transformers import Adafactor

    # Without its own learning rate schedule.
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
    """The optimizer of one group of parameters; LoRA and placeholder have one each.

    A full training has one for each parameter (`trainer.learning.fused`).
    """
    group = {"params": parameters, "lr": rate, "weight_decay": weight_decay}
    return _MAKERS[name]([group])


@dataclass(frozen=True)
class Optimizers:
    """The optimizers of a run by group of parameters."""

    of: dict[str, Optimizer | FusedOptimizer]
    kinds: dict[str, str]  # names
    rates: dict[str, float]  # learning rates without a schedule


def make_optimizers(groups: Mapping[str, list[nn.Parameter]], settings: Settings) -> Optimizers:
    """The optimizers of `transformer` (a full training), `lora` and `placeholder`, if not empty."""
    kinds, rates = {}, {}
    of: dict[str, Optimizer | FusedOptimizer] = {}
    for name, parameters in groups.items():
        if not parameters:
            continue
        rows = name == "placeholder"
        kind = rows_optimizer(settings.optimizer) if rows else settings.optimizer
        rate = settings.placeholder_learning_rate if rows else settings.learning_rate
        decay = 0.0 if rows else settings.weight_decay
        kinds[name], rates[name] = kind, rate
        make = partial(make_optimizer, kind, rate=rate, weight_decay=decay)
        fused = name == "transformer"
        of[name] = FusedOptimizer(make, parameters, settings.seed) if fused else make(parameters)
    return Optimizers(of, kinds, rates)


def rows_optimizer(name: str) -> str:
    """The optimizer of the placeholder if the LoRA uses this one."""
    return OPTIMIZERS[name].for_rows or name


@cache
def fresh_state(name: str, shape: tuple[int, ...], start: float = 1.0) -> dict[str, Any]:
    """The optimizer's state_dict for one parameter of a shape, after one step.

    For the size of a state, and to check a state from a file. Prodigy's state is smaller for a
    parameter that starts with zeros, such as B of a LoRA.
    """
    device = "cuda" if OPTIMIZERS[name].needs_gpu and torch.cuda.is_available() else "cpu"
    parameter = nn.Parameter(torch.full(shape, start, device=device))
    optimizer = make_optimizer(name, [parameter], 1e-3, 0.0)
    parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    return optimizer.state_dict()


# Factor of the learning rate, by the fraction of the steps after the warmup.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda way: 1.0,
    "linear": lambda way: 1 - way,
    "cosine": lambda way: 0.5 * (1 + math.cos(math.pi * way)),
}


def rate_at(step: int, schedule: str, warmup: int, steps: int) -> float:
    """Factor of the learning rate at a step: a linear warmup, then the schedule."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return SCHEDULES[schedule]((step - warmup) / max(1, steps - warmup))
