"""A full training's optimizer step as the memory plan counts it: memory without values."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from adapters.full_weights import FullWeights
from families.family import Family

# float32 copies while a parameter's gradient is applied (`trainer.learning.fused`): of itself, of
# its gradient, and two of Adafactor's, which needs more than the others. The first two are of a
# bfloat16 parameter only. `tests/trainer/memory/test_full_plan.py` compares with real steps.
COPIES = 4


@contextmanager
def trained_in_full(family: Family, names: Sequence[str]) -> Iterator[list[nn.Parameter]]:
    """Context in which the transformer's parameters of these names are trained, as far as it has
    them; each gradient is freed in the backward pass, after so many copies."""

    def apply(parameter: Tensor) -> None:
        copies = COPIES if parameter.dtype != torch.float32 else COPIES - 2
        kept = [torch.empty_like(parameter, dtype=torch.float32) for _ in range(copies)]
        parameter.grad = None
        del kept

    inside = {each for each, _ in family.transformer.named_parameters()}
    full = FullWeights(family, [each for each in names if each in inside])
    hooks = [each.register_post_accumulate_grad_hook(apply) for each in full.parameters()]
    try:
        yield full.parameters()
    finally:
        for each in hooks:
            each.remove()
        full.freeze()
