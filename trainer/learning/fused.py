"""Optimizer steps within the backward pass, for a full training.

The gradients of a whole transformer take as much memory as its weights. Here each parameter has an
optimizer of its own, which is applied as soon as its gradient is complete, and the gradient is
freed at once: so there is one gradient at a time. (Lv et al. 2023, arXiv 2306.09782, for SGD;
PyTorch's `register_post_accumulate_grad_hook` for any optimizer.) The price: the norm of all
gradients is known only after the step, so they are not clipped to it, and batches cannot be
accumulated.

bfloat16 weights are rounded stochastically. They have 8 bits of mantissa, so an update below 1/256
of a weight would be lost by rounding to the nearest value; rounded up or down by chance, in
proportion to the distance, updates are right on average (Zamirai et al. 2020, arXiv 2010.06192).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.learning.randomness import seed_of

_LOST_BITS = 16  # of float32's mantissa, in bfloat16


class FusedOptimizer:
    """Like an optimizer of one group of parameters, but the steps are done in the backward pass.

    Call `begin` before it. State dicts have the form of PyTorch's optimizers.
    """

    def __init__(
        self,
        make: Callable[[list[nn.Parameter]], Optimizer],
        parameters: Sequence[nn.Parameter],
        seed: int,
    ) -> None:
        """`make` makes the optimizer of a parameter; not one that needs all gradients at once."""
        self._parameters, self._seed = list(parameters), seed
        # What the optimizers step on: the weights themselves, or float32 copies for one step.
        self._masters = [
            each if each.dtype == torch.float32 else nn.Parameter(_nothing(each.device))
            for each in parameters
        ]
        self._optimizers = [make([each]) for each in self._masters]
        self.param_groups = [{**self._optimizers[0].param_groups[0], "params": self._parameters}]
        self._random = torch.Generator(parameters[0].device)
        self._step = 0
        self._squares: list[Tensor] = []  # of the gradients' norms, of this step
        self._ended = False
        for number, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(partial(self._apply, number))

    def begin(self, step: int) -> None:
        """Prepares the backward pass of a step: a step has one.

        Raises RuntimeError if that of the last step failed after it had changed weights.
        """
        if self.begun:
            raise RuntimeError("the backward pass has changed some weights already")
        self._step, self._squares = step, []

    @property
    def begun(self) -> bool:
        """Whether a backward pass has changed weights, and the step has not ended."""
        return bool(self._squares) and not self._ended

    def norm(self) -> Tensor:
        """The norm of all gradients of the step, known after the backward pass."""
        if not self._squares:
            return torch.zeros(())
        return torch.stack(self._squares).sum().sqrt()

    @torch.no_grad()
    def _apply(self, number: int, parameter: Tensor) -> None:
        master, optimizer = self._masters[number], self._optimizers[number]
        assert parameter.grad is not None
        self._ended = False
        gradient, parameter.grad = parameter.grad.float(), None
        self._squares.append(gradient.square().sum())
        if master is not parameter:
            master.data = parameter.detach().float()
        master.grad = gradient
        optimizer.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        optimizer.step()
        master.grad = None
        del gradient
        if master is not parameter:
            self._random.manual_seed(seed_of(self._seed, "rounding", self._step, number))
            parameter.copy_(rounded_stochastically(master.data, self._random))
            master.data = _nothing(parameter.device)

    def step(self) -> None:
        """Ends the step, which the backward pass has done."""
        self._ended = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Frees gradients of a backward pass that was interrupted."""
        for each in (*self._parameters, *self._masters):
            each.grad = None

    def state_dict(self) -> dict[str, Any]:
        """As of one optimizer with all parameters; one that had no gradient yet has no state."""
        found = (each.state_dict()["state"] for each in self._optimizers)
        state = {number: each[0] for number, each in enumerate(found) if each}
        options = self._optimizers[0].state_dict()["param_groups"][0]
        group = options | {"lr": self.param_groups[0]["lr"]}
        numbers = list(range(len(self._parameters)))
        return {"state": state, "param_groups": [group | {"params": numbers}]}

    def load_state_dict(self, found: dict[str, Any]) -> None:
        """Loads what `state_dict` returned."""
        group = found["param_groups"][0]
        for number, optimizer in enumerate(self._optimizers):
            state = {0: found["state"][number]} if number in found["state"] else {}
            optimizer.load_state_dict({"state": state, "param_groups": [group | {"params": [0]}]})


def rounded_stochastically(values: Tensor, random: torch.Generator) -> Tensor:
    """float32 values as bfloat16, rounded up or down with a mean of the value.

    A float32 begins with the bits of a bfloat16. A random number is added to the others, and they
    are cut off: the carry is the rounding. NaN and infinity stay what they are.
    """
    noise = torch.randint(
        1 << _LOST_BITS, values.shape, generator=random, device=values.device, dtype=torch.int32
    )
    bits = noise.add_(values.view(torch.int32)).bitwise_and_(-(1 << _LOST_BITS))
    rounded = bits.view(torch.float32).to(torch.bfloat16)
    return torch.where(values.isfinite(), rounded, values.to(torch.bfloat16))


def _nothing(device: torch.device) -> Tensor:
    return torch.empty(0, device=device)
