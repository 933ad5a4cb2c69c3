"""Several processes that train as one: accelerate's, where `accelerate launch` started them."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce
from torch import Tensor, nn

from families.loading import default_device

Value = TypeVar("Value")

# The others wait while the main process draws previews and judges the result.
PATIENCE = timedelta(hours=3)


def processes() -> PartialState:
    """Which process this is, and of how many; without a launcher the only one."""
    return PartialState(cpu=default_device().type == "cpu", timeout=PATIENCE)


def same_for_all(value: Value) -> Value:
    """The main process's value in every process."""
    processes()
    values = [value]
    broadcast_object_list(values)
    return values[0]


def by_main(call: Callable[[], Value]) -> Value:
    """What the main process gets from a call that it alone makes; its error is raised in all."""
    made: tuple[Any, Exception | None] = (None, None)
    if processes().is_main_process:
        try:
            made = call(), None
        except Exception as error:
            made = None, error
    value, failed = same_for_all(made)
    if failed is not None:
        raise failed
    return value


def least_of_all(value: int) -> int:
    """The smallest value of all processes."""
    processes()
    return min(gather_object([value]))


def mean_of_all(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Makes the gradients their mean over all processes, and returns that of the loss."""
    grads = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
    mean = reduce(torch.cat([loss.view(1), *(each.flatten() for each in grads)]), "mean")
    shares = mean[1:].split([each.numel() for each in grads])
    for each, share in zip(parameters, shares, strict=True):
        each.grad = share.view_as(each)
    return mean[0]
