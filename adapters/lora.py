"""The trainable LoRA, of any form: layers in the transformer, float32 weights on any base."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from adapters.formats import Delta, Deltas, as_delta
from adapters.forms import Form, as_form
from adapters.trained_layers import LAYERS, TrainedLinear


class Lora:
    """The trainable LoRA of one run. Alpha equals the rank, so the scale is 1 everywhere.

    All is zero at the start: the weights do not change. The other values depend only on `seed`.
    """

    def __init__(
        self,
        transformer: nn.Module,
        targets: Sequence[str],
        form: Form | int,
        seed: int,
        original: nn.Module | None = None,
    ) -> None:
        """A number as `form` is the rank of a plain LoRA.

        `original` is the transformer with the weights that inference uses, if those in
        `transformer` are others (quantized, or with a training adapter); only DoRA needs it.
        """
        self.form = as_form(form)
        self.transformer = transformer
        modules = dict(transformer.named_modules())
        missing = [name for name in targets if not isinstance(modules.get(name), nn.Linear)]
        if missing:
            raise ValueError(f"LoRA targets that are not linear layers: {', '.join(missing[:5])}")
        wanted = set(targets)
        self.layers: dict[str, TrainedLinear] = {
            name: LAYERS[self.form.kind](module, self.form)
            for name, module in modules.items()
            if name in wanted and isinstance(module, nn.Linear)
        }
        generator = torch.Generator().manual_seed(seed)
        for name, layer in self.layers.items():
            weight = None if original is None else original.get_parameter(f"{name}.weight")
            layer.start(generator, weight)
        self._put(self.layers)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trained float32 parameters of all layers."""
        for layer in self.layers.values():
            yield from layer.parts.values()

    def deltas(self) -> dict[str, Delta]:
        """A copy of the change of each layer, float32 on the CPU."""
        return {name: layer.delta() for name, layer in self.layers.items()}

    @torch.no_grad()
    def changes(self) -> dict[str, tuple[float, float]]:
        """|dW| and |W| of each layer, with the base model's W as it is in training."""
        return {name: layer.change() for name, layer in self.layers.items()}

    @torch.no_grad()
    def load(self, deltas: Deltas) -> None:
        """Loads changes of the same layers, form and rank."""
        if deltas.keys() != self.layers.keys():
            raise ValueError("the changes belong to other layers than this LoRA's")
        for name, delta in deltas.items():
            parts = as_delta(delta).parts()
            for part, parameter in self.layers[name].parts.items():
                parameter.copy_(parts[part])

    def undo(self) -> None:
        """Sets values that change no weight."""
        for layer in self.layers.values():
            layer.undo()

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

    def _put(self, layers: Mapping[str, nn.Module]) -> None:
        """Replaces the transformer's layers by name."""
        for name, layer in layers.items():
            parent, _, child = name.rpartition(".")
            setattr(self.transformer.get_submodule(parent), child, layer)
