"""Data parallelism with several processes, if started by `accelerate launch`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce
from torch import Tensor, nn

from families.loading import default_device
from families.sharding import processes_here
from trainer.settings import Settings, SettingsError

Value = TypeVar("Value")

# The others wait while the main process generates preview images and checks the result.
PATIENCE = timedelta(hours=3)


class ProcessLost(RuntimeError):
    """Another process of the launch has ended, or does not answer."""


@contextmanager
def lost_processes_named() -> Iterator[None]:
    """Converts errors of communication within the context to `ProcessLost`."""
    try:
        yield
    except RuntimeError as error:
        # Gloo's errors have no class of their own, but begin with the place in its source.
        if not isinstance(error, torch.distributed.DistError) and "/gloo/" not in str(error):
            raise
        reason = str(error).partition("\n")[0].partition(". ")[0].rpartition("] ")[2]
        raise ProcessLost(
            f"another process of this run has ended, or does not answer ({reason}); the launcher "
            "names it below"
        ) from error


def processes() -> PartialState:
    """The process's rank and the number of processes; a single one without a launcher."""
    return PartialState(cpu=default_device().type == "cpu", timeout=PATIENCE)


def same_for_all(value: Value) -> Value:
    """Broadcasts the main process's value."""
    processes()
    values = [value]
    broadcast_object_list(values)
    return values[0]


def by_main(call: Callable[[], Value], together: bool = False) -> Value:
    """The result of a call in the main process only; its error is raised in all processes.

    together: all processes call it, as a sharded model needs it. The result is the main one's.
    """
    outcome: tuple[Any, Exception | None] = (None, None)
    if together or processes().is_main_process:
        try:
            outcome = call(), None
        except Exception as error:
            outcome = None, error
    value, failed = same_for_all(outcome)
    if failed is not None:
        raise failed
    return value


def check_launch(settings: Settings) -> None:
    """Raises `SettingsError` for settings that do not go with this number of processes."""
    if settings.full and processes().num_processes > 1:
        raise SettingsError(
            "training is full, which runs in one process; start it without launcher"
        )
    if settings.shard and sharing() == 1:
        raise SettingsError(
            "shard is on, which needs several processes on this machine, and as many on every "
            "other; start it with `accelerate launch` (docs/several_gpus.md), or remove shard"
        )


def sharing() -> int:
    """The number of processes that can share a base model: those of one machine.

    1 if the machines of the launch have different numbers of them.
    """
    counts = gather_object([processes_here()]) if processes().num_processes > 1 else [1]
    return counts[0] if len(set(counts)) == 1 else 1


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
