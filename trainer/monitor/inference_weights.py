"""The stage: a training's own transformer, made for a while what a prediction draws with.

While a LoRA is trained, its layers sit in the transformer, and a turbo adapter may be merged into
the weights. To draw what will be shipped, the LoRA's layers are lifted out, every touched weight
is computed as a prediction computes it (`adapters.merging`), and afterwards each is put back bit
for bit. What has to be remembered lies in host memory, so the GPU never holds a second copy.
The text encoder and the VAE are loaded where they have left memory, and leave it again.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from adapters.formats import Factors, check_fits
from adapters.lora import Lora
from adapters.merging import LoraMerger
from adapters.turbo import TurboAdapter
from families.family import Family, WeightStorage

_PARTS = {"text_encoder", "vae"}


class InferenceWeights:
    """Made before the turbo adapter is merged, of whose layers it keeps the pristine weights."""

    def __init__(self, family: Family, turbo: TurboAdapter | None = None) -> None:
        self.family = family
        self._original: dict[str, Tensor] = {}
        if turbo is not None:
            check_fits(turbo.factors, family.transformer, turbo.name, family.base.name)
            self._original = self._copies(turbo.factors)

    @contextmanager
    def holding(self, lora: Lora, factors: Factors, scale: float = 1.0) -> Iterator[None]:
        """Inside, the transformer is the pristine base with scale * `factors` laid over it."""
        there = _PARTS & set(vars(self.family))
        with torch.no_grad(), torch.random.fork_rng(), lora.lifted():
            training = self._copies([*self._original, *factors])
            layers = dict(self.family.transformer.named_modules())
            try:
                merger = LoraMerger(self.family.transformer, training | self._original)
                merger.apply([(factors, scale)])
                yield
            finally:
                for name, weight in training.items():
                    layers[name].weight.copy_(weight)
                self.family.release(*(_PARTS - there))

    @torch.no_grad()
    def _copies(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The layers' weights as they are now, in host memory."""
        layers = dict(self.family.transformer.named_modules())
        return {name: layers[name].weight.to("cpu", copy=True) for name in dict.fromkeys(names)}


class SecondBase(InferenceWeights):
    """The stage of a training on a quantised base: an unquantised one that waits in host memory.

    Rounded weights are not what a prediction draws with, and cannot be turned back into it. The
    second base is loaded when it is first needed; its layers visit the GPU one at a time.
    """

    def __init__(self, family: Family) -> None:
        super().__init__(family)
        self._merger: LoraMerger | None = None
        self._transformer: nn.Module | None = None

    @contextmanager
    def holding(self, lora: Lora, factors: Factors, scale: float = 1.0) -> Iterator[None]:
        """Inside, the transformer is the pristine base with scale * `factors` laid over it."""
        family, training, storage = self.family, self.family.transformer, self.family.storage
        there = _PARTS & set(vars(family))
        with torch.no_grad(), torch.random.fork_rng():
            try:
                family.set_storage(WeightStorage(offload=True))
                if self._transformer is None:
                    self._transformer = family.load_transformer()
                    self._merger = LoraMerger(self._transformer)
                assert self._merger is not None
                vars(family)["transformer"] = self._transformer
                self._merger.apply([(factors, scale)])
                yield
            finally:
                family.set_storage(storage)
                vars(family)["transformer"] = training
                family.release(*(_PARTS - there))
