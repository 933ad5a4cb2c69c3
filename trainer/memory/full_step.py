"""Stands for the optimizer of a full training where its memory is counted."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# float32 copies while a parameter's gradient is applied (`trainer.learning.fused`): of itself, of
# its gradient, and two of Adafactor's, which needs more than the others. The first two are of a
# bfloat16 parameter only. `tests/trainer/memory/test_full_plan.py` compares with real steps.
COPIES = 4


@contextmanager
def applied_at_once(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Context in which each gradient is freed in the backward pass, after so many copies."""

    def apply(parameter: Tensor) -> None:
        copies = COPIES if parameter.dtype != torch.float32 else COPIES - 2
        kept = [torch.empty_like(parameter, dtype=torch.float32) for _ in range(copies)]
        parameter.grad = None
        del kept

    hooks = [each.register_post_accumulate_grad_hook(apply) for each in parameters]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()
