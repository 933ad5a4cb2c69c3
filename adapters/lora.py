"""The LoRA in training: PEFT's layers inside the transformer, float32 over any base."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from adapters.formats import Factors
from families.frozen_linear import FrozenLinear

_ADAPTER = "default"


class LoraLinear(PeftLinear):
    """A plain LoRA layer whose two products run in the base's own type.

    The masters stay float32; PEFT's own forward would lift every activation to float32 with them.
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
        """Makes A and B float32, where the base computes, whatever its type and place."""
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

    A starts uniform in +-1/sqrt(in) and B at zero (Hu et al. 2021, arXiv 2106.09685, with
    PyTorch's own linear initialisation for A), drawn from `seed` alone.
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
            # PEFT follows the base's type; the masters are float32 (bfloat16 loses most updates).
            layer.float_masters()
            bound = layer.down.shape[1] ** -0.5
            start = torch.empty(layer.down.shape).uniform_(-bound, bound, generator=generator)
            layer.down.data.copy_(start)
            layer.up.data.zero_()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The float32 masters."""
        for layer in self.layers.values():
            yield layer.down
            yield layer.up

    def factors(self) -> Factors:
        """A copy of what has been learned, float32 on the CPU."""
        return {
            name: (layer.down.detach().cpu().clone(), layer.up.detach().cpu().clone())
            for name, layer in self.layers.items()
        }

    @torch.no_grad()
    def base_norms(self) -> dict[str, float]:
        """The norms of the base weights under the LoRA, by layer; quantized ones dequantized."""
        norms = {}
        for name, layer in self.layers.items():
            base = layer.base_layer
            weight = cast(Tensor, base.weight)
            if isinstance(base, FrozenLinear):
                weight = base.fetch(base.weight, base.device, torch.float32)
            norms[name] = weight.float().norm().item()
        return norms

    @torch.no_grad()
    def load(self, factors: Factors) -> None:
        """Puts earlier factors of the same layers and rank in the place of the start."""
        if factors.keys() != self.layers.keys():
            raise ValueError("the factors are of other layers than this LoRA's")
        for name, (down, up) in factors.items():
            self.layers[name].down.copy_(down)
            self.layers[name].up.copy_(up)

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Inside, the transformer has its own layers back, as if there were no LoRA."""
        self._put({name: layer.base_layer for name, layer in self.layers.items()})
        try:
            yield
        finally:
            self._put(self.layers)

    def remove(self) -> None:
        """Puts the transformer's own layers back; what was learned is gone from it."""
        self._put({name: layer.base_layer for name, layer in self.layers.items()})
        self.layers = {}
        if hasattr(self.transformer, "peft_config"):
            del self.transformer.peft_config

    def _put(self, layers: Mapping[str, nn.Module]) -> None:
        """Makes each layer the one that the transformer calls by its name."""
        for name, layer in layers.items():
            parent, _, child = name.rpartition(".")
            setattr(self.transformer.get_submodule(parent), child, layer)
