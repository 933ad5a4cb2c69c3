"""Linear layers that fetch (dequantize, copy to the GPU) their frozen weight for each product.

A frozen layer needs its weight twice, in the forward and in the backward pass. By default autograd
saves what the forward pass multiplied with: the 16-bit copy of a quantized weight, or the copy on
the GPU of an offloaded one. Then neither saves memory. Here the weight is fetched again for the
backward pass, as bitsandbytes does it for nf4.

The layer and its gradient are plain tensor operations, so a compiled block is one graph.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from families.packed_weights import FLOAT8_MULTIPLE, Packing, float8_gradient, float8_product
from families.pinned import pinned
from families.sharding import gathered


class FrozenLinear(nn.Linear):
    """A linear layer with the weight of another, which is fetched for each product.

    It computes on `device`; the weight may be stored elsewhere. `weight` has the packed values.
    With `float8`, products are computed in float8, if size and dtype allow it.
    """

    def __init__(
        self, linear: nn.Linear, packing: Packing, device: torch.device, float8: bool = False
    ) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        stored: Any = linear.weight
        self.packing, self.device = packing, device
        self.dtype: torch.dtype = getattr(stored, "quant_state", stored).dtype
        values, *beside = packing.unpack(stored)
        self.weight = nn.Parameter(values.detach(), requires_grad=False)
        self.bias = linear.bias
        self._names = [f"scale_{number}" for number in range(len(beside))]
        for name, each in zip(self._names, beside, strict=True):
            self.register_buffer(name, each, persistent=False)
        fits = not any(n % FLOAT8_MULTIPLE for n in (self.out_features, self.in_features))
        self.float8 = float8 and fits and self.dtype == torch.bfloat16

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The packed values and what is needed to dequantize them."""
        return self.weight, *(getattr(self, name) for name in self._names)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] on `device`, which is the stored tensor if it is like that.

        Of a sharded layer, all processes must call this.
        """
        fetched = [gathered(each).to(self.device) for each in self.parts]
        shape = self.out_features, self.in_features
        return self.packing.dequantize(shape, self.dtype, fetched).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        shape = self.out_features, self.in_features
        dequantize = partial(self.packing.dequantize, shape, self.dtype)
        return _FrozenProduct.apply(x, self.bias, dequantize, self.float8, *self.parts)

    def offload(self) -> None:
        """Moves the packed values to CPU memory, pinned if a GPU will read them."""
        values = self.weight.data.to("cpu")
        self.weight.data = pinned(values) if self.device.type == "cuda" else values


class _FrozenProduct(torch.autograd.Function):
    """y = x W^T + b, with a gradient only for x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        # Without `rest` as it is, the compiler takes the function for one without a context: it
        # compares the number of arguments with that of names.
        bias, ctx.dequantize, ctx.float8, *parts = rest
        ctx.save_for_backward(*parts)  # as stored, so that nothing is kept in addition
        fetched = _fetched(parts, x.device)
        if ctx.float8:
            product = float8_product(x, *fetched)
            return product if bias is None else product + bias
        return F.linear(x, ctx.dequantize(fetched).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        parts = _fetched(ctx.saved_tensors, grad.device)
        if ctx.float8:
            product = float8_gradient(grad, *parts)
        else:
            # As another view: in a compiled graph, an equal expression would be computed once, in
            # the forward pass, and its result, the 16-bit weight, saved.
            weight = ctx.dequantize([each[None] for each in parts])[0].to(grad.dtype)
            product = grad @ weight
        return product, *[None] * (3 + len(parts))


def _fetched(parts: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    return [each.to(device, non_blocking=True) for each in parts]
