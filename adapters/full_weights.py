"""Full training: the transformer's own weights are the trained parameters, in place of a LoRA."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from families.components import original_transformer
from families.family import Family


def trained_names(family: Family, wanted: str) -> list[str]:
    """Names of the transformer's parameters that a full training changes, in its order.

    auto: all of them (embeddings, norms and modulation too), as other programs do, since a layer
    that stays frozen limits what the others can learn. Any other value of `lora_targets` selects
    linear layers as for a LoRA; of these, weight and bias are trained. Layers that have no effect,
    and so no gradient, are never trained. Raises ValueError for targets that match no layer.
    """
    idle = family.idle_layers()
    layers = None if wanted == "auto" else set(family.lora_targets(wanted))
    return [
        name
        for name, _ in family.transformer.named_parameters()
        if (layer := name.rpartition(".")[0]) not in idle and (layers is None or layer in layers)
    ]


class FullWeights:
    """The trained parameters of a full training, by name in the transformer.

    They have the dtype of the base model: float32, or bfloat16 with stochastic rounding
    (`trainer.learning.fused`).
    """

    def __init__(self, family: Family, names: Sequence[str]) -> None:
        """Makes these parameters trainable: see `trained_names`."""
        self._family = family
        self.named = {name: family.transformer.get_parameter(name) for name in names}
        for parameter in self.named.values():
            parameter.requires_grad_(True)

    @property
    def transformer(self) -> nn.Module:
        """The transformer, as it is now."""
        transformer: nn.Module = self._family.transformer
        return transformer

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters, in a fixed order."""
        return list(self.named.values())

    def values(self) -> int:
        """The number of trained values."""
        return sum(each.numel() for each in self.named.values())

    def nbytes(self) -> int:
        """Bytes of the whole transformer, with the parameters that are not trained."""
        return sum(each.nbytes for each in self.transformer.state_dict().values())

    def layers(self) -> list[str]:
        """The linear layers that are trained."""
        modules = dict(self.transformer.named_modules())
        names = (name.removesuffix(".weight") for name in self.named if name.endswith(".weight"))
        return [name for name in names if isinstance(modules[name], nn.Linear)]

    def originals(self) -> Iterator[Tensor]:
        """The base model's values of the parameters, in their order, in CPU memory.

        They are read from the files again, which are memory-mapped: nothing else keeps a copy.
        """
        original = original_transformer(self._family)
        for name in self.named:
            yield original.get_parameter(name).detach()

    @torch.no_grad()
    def changes(self) -> dict[str, tuple[float, float]]:
        """|W - W0| and |W0| of each trained parameter, with the base model's W0."""
        found = {}
        for (name, now), before in zip(self.named.items(), self.originals(), strict=True):
            start = before.to(now.device, torch.float32)
            found[name] = (now.float() - start).norm().item(), start.norm().item()
        return found

    def freeze(self) -> None:
        """The parameters need no gradients any more; their values stay."""
        for parameter in self.named.values():
            parameter.requires_grad_(False)
