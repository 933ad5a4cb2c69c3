"""Linear layers that fetch (dequantize, copy to the GPU) their frozen weight for each product.

A frozen layer needs its weight twice, in the forward and in the backward pass. By default autograd
saves what the forward pass multiplied with: the 16-bit copy of a quantized weight, or the copy on
the GPU of an offloaded one. Then neither saves memory. Here the weight is fetched again for the
backward pass, as bitsandbytes does it for nf4.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from families.pinned import pinned

Fetch = Callable[[Any, torch.device, torch.dtype], Tensor]


def fetch_plain(weight: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """An unquantized weight, from the device that stores it."""
    return weight.to(device, dtype, non_blocking=True)


def fetch_torchao(weight: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A torchao tensor, moved before it is dequantized."""
    return weight.to(device).dequantize().to(dtype)


def fetch_bitsandbytes(weight: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A 4-bit parameter of bitsandbytes; its scales are on the device already."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data.to(device, non_blocking=True), weight.quant_state).to(dtype)


class FrozenLinear(nn.Linear):
    """A linear layer with the weight of another, which is fetched for each product.

    It computes on `device`; the weight may be stored elsewhere.
    """

    def __init__(self, linear: nn.Linear, fetch: Fetch, device: torch.device) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.fetch, self.device = fetch, device

    def forward(self, x: Tensor) -> Tensor:
        return _FetchedProduct.apply(x, self)

    def offload(self) -> None:
        """Moves the weight to CPU memory, pinned if a GPU will read it."""
        scales = getattr(self.weight, "quant_state", None)
        self.weight = moved(self.weight, torch.device("cpu"))
        if scales is not None:  # of bitsandbytes: small, and not moved with the weight
            scales.to(self.device)
        if self.device.type == "cuda":
            _pin(self.weight)


class _FetchedProduct(torch.autograd.Function):
    """y = x W^T + b, with a gradient only for x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.fetch(layer.weight, x.device, x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        layer = ctx.layer
        return grad @ layer.fetch(layer.weight, grad.device, grad.dtype), None


def moved(weight: Any, device: torch.device) -> Any:
    """The frozen weight on another device, with all inner tensors of a quantized one."""
    if hasattr(weight, "__tensor_flatten__"):  # setting `.data` would leave its parts in place
        return nn.Parameter(weight.to(device), requires_grad=False)
    weight.data = weight.data.to(device)
    return weight


def _pin(weight: Any) -> None:
    """Pins a weight in CPU memory; of a quantized tensor, each inner tensor."""
    if hasattr(weight, "__tensor_flatten__"):
        for part in weight.__tensor_flatten__()[0]:
            setattr(weight, part, pinned(getattr(weight, part)))
    else:
        weight.data = pinned(weight.data)
