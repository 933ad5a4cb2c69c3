"""The trainable LoRA: PEFT's layers in the transformer, float32 weights on any base."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from adapters.formats import Factors
from families.frozen_linear import FrozenLinear
from families.sharding import gathered

_ADAPTER = "default"


class LoraLinear(PeftLinear):
    """A plain LoRA layer that computes in the dtype of its input.

    The weights stay float32; PEFT's forward would cast every activation to float32.
    """

    @property
    def down(self) -> nn.Parameter:
        """A, [rank, in]."""
        return cast(nn.Parameter, cast(nn.Linear, self.lora_A[_ADAPTER]).weight)

    @property
    def up(self) -> nn.Parameter:
        """B, [out, rank]."""
        return cast(nn.Parameter, cast(nn.Linear, self.lora_B[_ADAPTER]).weight)

    def float_masters(self) -> None:
        """Casts A and B to float32, on the device where the base computes."""
        base = self.base_layer
        weight = cast(Tensor, base.weight)
        device = base.device if isinstance(base, FrozenLinear) else weight.device
        for part in (self.lora_A, self.lora_B):
            cast(nn.Linear, part[_ADAPTER]).to(device, torch.float32)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        flat = torch.addmm(result.flatten(0, -2), x.flatten(0, -2) @ down.T, up.T)
        return flat.view_as(result)


class Lora:
    """The trainable LoRA of one run. Alpha equals the rank, so the scale is 1 everywhere.

    A is initialized uniformly in +-1/sqrt(in), B with zeros (Hu et al. 2021, arXiv 2106.09685, with
    PyTorch's linear initialization for A), depending only on `seed`.
    """

    def __init__(
        self, transformer: nn.Module, targets: Sequence[str], rank: int, seed: int
    ) -> None:
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets))
        config._register_custom_module({nn.Linear: LoraLinear})
        inject_adapter_in_model(config, transformer, adapter_name=_ADAPTER)
        self.transformer, self.rank = transformer, rank
        self.layers = {
            name: module
            for name, module in transformer.named_modules()
            if isinstance(module, LoraLinear)
        }
        missing = sorted(set(targets) - set(self.layers))
        if missing:
            raise ValueError(f"LoRA targets that are not linear layers: {', '.join(missing[:5])}")
        self._start(seed)

    def _start(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers.values():
            # PEFT uses the base's dtype; the weights are float32 (bfloat16 loses most updates).
            layer.float_masters()
            bound = layer.down.shape[1] ** -0.5
            start = torch.empty(layer.down.shape).uniform_(-bound, bound, generator=generator)
            layer.down.data.copy_(start)
            layer.up.data.zero_()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The float32 weights A and B of all layers."""
        for layer in self.layers.values():
            yield layer.down
            yield layer.up

    def factors(self) -> Factors:
        """A copy of all (A, B), float32 on the CPU."""
        return {
            name: (layer.down.detach().cpu().clone(), layer.up.detach().cpu().clone())
            for name, layer in self.layers.items()
        }

    @torch.no_grad()
    def base_norms(self) -> dict[str, float]:
        """The norms of the adapted base weights by layer; quantized weights are dequantized.

        Of a sharded base, all processes must call this.
        """
        norms = {}
        for name, layer in self.layers.items():
            base = layer.base_layer
            weight = cast(Tensor, base.weight)
            if isinstance(base, FrozenLinear):
                weight = base.dequantized(torch.float32)
            norms[name] = gathered(weight).float().norm().item()
        return norms

    @torch.no_grad()
    def load(self, factors: Factors) -> None:
        """Loads factors of the same layers and rank."""
        if factors.keys() != self.layers.keys():
            raise ValueError("the factors belong to other layers than this LoRA's")
        for name, (down, up) in factors.items():
            self.layers[name].down.copy_(down)
            self.layers[name].up.copy_(up)

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Disables the LoRA within the context: the transformer has its original layers."""
        self._put({name: layer.base_layer for name, layer in self.layers.items()})
        try:
            yield
        finally:
            self._put(self.layers)

    def remove(self) -> None:
        """Removes the LoRA from the transformer."""
        self._put({name: layer.base_layer for name, layer in self.layers.items()})
        self.layers = {}
        if hasattr(self.transformer, "peft_config"):
            del self.transformer.peft_config

    def _put(self, layers: Mapping[str, nn.Module]) -> None:
        """Replaces the transformer's layers by name."""
        for name, layer in layers.items():
            parent, _, child = name.rpartition(".")
            setattr(self.transformer.get_submodule(parent), child, layer)
