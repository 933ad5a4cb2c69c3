"""Muon: orthogonalized momentum.

After Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/), with update sizes matched to
AdamW's as in Liu et al. 2025 (arXiv 2502.16982). torch.optim has it too; this one batches matrices
of equal shape and distributes them over the processes, because at miniature size the
orthogonalization is a tenth of a training step.

N matrices, R rows, C columns.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from miniature.parallel import gather_rows, rank, world

# The quintic iteration's coefficients, from the post above.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalize(matrices_NRC: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrices, roughly: singular values between 0.7 and 1.2."""
    wide = matrices_NRC.shape[1] <= matrices_NRC.shape[2]
    x = (matrices_NRC if wide else matrices_NRC.mT).bfloat16()
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """For matrices and convolutions. Every process must have the same gradients."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.01,
        momentum: float = 0.95,
    ) -> None:  # fmt: skip
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay,
                                      "momentum": momentum})  # fmt: skip

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One optimizer step; `closure` is not used."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                moments = [self._momentum(p, group["momentum"]).flatten(1) for p in parameters]
                stack_NRC = torch.stack(moments)
                share = -(-len(parameters) // world())
                mine = stack_NRC[rank() * share : (rank() + 1) * share]
                if len(mine) < share:  # the last process pads, as all shares must be equal
                    missing = stack_NRC.new_zeros(share - len(mine), *stack_NRC.shape[1:])
                    mine = torch.cat([mine, missing])
                updates_NRC = gather_rows(orthogonalize(mine)).to(stack_NRC.dtype)
                length = group["lr"] * 0.2 * max(stack_NRC.shape[1:]) ** 0.5
                for parameter, update in zip(parameters, updates_NRC, strict=False):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.view(shape), alpha=-length)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """Updates the momentum buffer; returns the Nesterov momentum."""
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer: Tensor = state["momentum_buffer"]
        buffer.lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum)
