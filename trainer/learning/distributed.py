"""Data parallelism with several processes, if started by `accelerate launch`."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce
from torch import Tensor, nn

from families.loading import default_device

Value = TypeVar("Value")

# The others wait while the main process generates preview images and checks the result.
PATIENCE = timedelta(hours=3)


def processes() -> PartialState:
    """The process's rank and the number of processes; a single one without a launcher."""
    return PartialState(cpu=default_device().type == "cpu", timeout=PATIENCE)


def same_for_all(value: Value) -> Value:
    """Broadcasts the main process's value."""
    processes()
    values = [value]
    broadcast_object_list(values)
    return values[0]


def by_main(call: Callable[[], Value]) -> Value:
    """The result of a call in the main process only; its error is raised in all processes."""
    outcome: tuple[Any, Exception | None] = (None, None)
    if processes().is_main_process:
        try:
            outcome = call(), None
        except Exception as error:
            outcome = None, error
    value, failed = same_for_all(outcome)
    if failed is not None:
        raise failed
    return value


def least_of_all(value: int) -> int:
    """The minimum over all processes."""
    processes()
    return min(gather_object([value]))


def mean_of_all(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Averages gradients and loss over all processes; returns the loss."""
    grads = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
    mean = reduce(torch.cat([loss.view(1), *(each.flatten() for each in grads)]), "mean")
    shares = mean[1:].split([each.numel() for each in grads])
    for each, share in zip(parameters, shares, strict=True):
        each.grad = share.view_as(each)
    return mean[0]
