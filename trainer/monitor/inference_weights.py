"""Temporarily gives the transformer of a run the weights that inference uses.

During training the transformer contains the LoRA's layers, and a training adapter may be merged
into the weights. To generate a preview, the LoRA's layers are removed, every affected weight is
computed as at inference (`adapters.merging`), and afterwards each is restored bit-identical. Copies
are stored in CPU memory, so the GPU never holds a second copy. If the text encoder and the VAE were
freed, they are loaded and freed again.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from adapters.formats import Deltas, check_fits
from adapters.lora import Lora
from adapters.merging import LoraMerger
from adapters.turbo import TurboAdapter
from families.family import Family, WeightStorage
from families.memory import RESERVE, free_memory
from families.quantization import block_values
from families.without_weights import transformer_without_weights

_PARTS = {"text_encoder", "vae"}


class NoRoom(RuntimeError):
    """The original weights do not fit into CPU memory."""


def check_originals_fit(family: Family, copies: int = 1) -> None:
    """Raises `NoRoom` if the unquantized block weights do not fit into CPU memory."""
    values = copies * block_values(transformer_without_weights(family.base))
    need = family.dtype.itemsize * values
    room = round(free_memory(torch.device("cpu")) * (1 - RESERVE))
    if need > room:
        raise NoRoom(
            f"images need the original weights, {need / 1e9:.1f} GB of CPU memory, and "
            f"{room / 1e9:.1f} GB are free"
        )


class InferenceWeights:
    """Copies the original weights of the training adapter's layers; create it before the merge."""

    def __init__(
        self, family: Family, turbo: TurboAdapter | None = None, copies: bool = True
    ) -> None:
        """Without `copies`, which previews need, the weights before the merge are lost."""
        self.family = family
        self._original: dict[str, Tensor] = {}
        self._adapted = () if turbo is None else tuple(turbo.factors)  # layers
        self.complete = turbo is None or copies  # whether images can be generated
        if turbo is not None and copies:
            check_fits(turbo.factors, family.transformer, turbo.name, family.base.name)
            self._original = self._copies(turbo.factors)

    def prepare(self) -> None:
        """Reads the original weights from the model's files, if they were not kept.

        Raises `NoRoom` if they do not fit.
        """
        if self.complete:
            return
        check_originals_fit(self.family, copies=2)  # these, and those of training while images are
        with _another_transformer(self.family):
            self._original = self._copies(self._adapted)
        self.complete = True

    @torch.no_grad()
    def restored(self, lora: Lora | None) -> Family | None:
        """The family with the unchanged base and without the LoRA, at the end of a run.

        None if it must be loaded again. It equals a newly loaded one bit for bit.
        """
        _remove(lora)
        if not self.complete:
            return None
        layers = dict(self.family.transformer.named_modules())
        for name, weight in self._original.items():
            layers[name].weight.copy_(weight)
        return self.family

    @contextmanager
    def applied(self, lora: Lora | None, deltas: Deltas, scale: float = 1.0) -> Iterator[None]:
        """Context in which the transformer is the original base plus scale * `deltas`."""
        loaded = _PARTS & set(vars(self.family))
        lifted = nullcontext() if lora is None else lora.lifted()
        with torch.no_grad(), torch.random.fork_rng(), lifted:
            training = self._copies([*self._original, *deltas])
            layers = dict(self.family.transformer.named_modules())
            try:
                merger = LoraMerger(self.family.transformer, training | self._original)
                merger.apply([(deltas, scale)])
                yield
            finally:
                for name, weight in training.items():
                    layers[name].weight.copy_(weight)
                self.family.release(*(_PARTS - loaded))

    @torch.no_grad()
    def _copies(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies the layers' current weights to CPU memory."""
        layers = dict(self.family.transformer.named_modules())
        return {name: layers[name].weight.to("cpu", copy=True) for name in dict.fromkeys(names)}


class OwnWeights(InferenceWeights):
    """`InferenceWeights` of a full training: inference uses the weights that are trained."""

    def restored(self, lora: Lora | None) -> Family | None:
        """None: the base model's weights are not in memory."""
        return None

    @contextmanager
    def applied(self, lora: Lora | None, deltas: Deltas, scale: float = 1.0) -> Iterator[None]:
        """Context in which nothing changes but parts of the model that are loaded meanwhile."""
        loaded = _PARTS & set(vars(self.family))
        with torch.no_grad(), torch.random.fork_rng():
            try:
                yield
            finally:
                self.family.release(*(_PARTS - loaded))


def _remove(lora: Lora | None) -> None:
    if lora is not None:
        lora.remove()


@contextmanager
def _another_transformer(family: Family) -> Iterator[None]:
    """Context in which the family has a newly loaded, unquantized transformer in CPU memory."""
    training, storage = family.transformer, family.storage
    with torch.random.fork_rng():
        try:
            family.set_storage(WeightStorage(offload=True))
            family.load_transformer()
            yield
        finally:
            family.set_storage(storage)
            vars(family)["transformer"] = training


class SecondBase(InferenceWeights):
    """`InferenceWeights` for a quantized or sharded base: a second one in CPU memory.

    Inference uses the original weights, which cannot be restored from quantized ones, and are not
    whole in one process if they are sharded. The second base is loaded at first use; its layers are
    moved to the GPU one at a time.
    """

    def __init__(self, family: Family) -> None:
        super().__init__(family)
        self._merger: LoraMerger | None = None
        self._transformer: nn.Module | None = None

    def prepare(self) -> None:
        """Raises `NoRoom` if the second base is not loaded yet and does not fit."""
        if self._transformer is None:
            check_originals_fit(self.family)

    def restored(self, lora: Lora | None) -> Family | None:
        """The family with the second base in place of the first; None without previews."""
        _remove(lora)
        if self._merger is None:
            return None
        self._merger.restore()
        if self.family.storage.quantize_text != "none" or self.family.storage.shard:
            self.family.release("text_encoder")
        self.family.set_storage(WeightStorage(offload=True))
        vars(self.family)["transformer"] = self._transformer
        return self.family

    @contextmanager
    def applied(self, lora: Lora | None, deltas: Deltas, scale: float = 1.0) -> Iterator[None]:
        """Context in which the transformer is the original base plus scale * `deltas`."""
        family, training, storage = self.family, self.family.transformer, self.family.storage
        loaded = _PARTS & set(vars(family))
        with torch.no_grad(), torch.random.fork_rng():
            try:
                family.set_storage(WeightStorage(offload=True))
                if self._transformer is None or self._merger is None:
                    self._transformer = family.load_transformer()
                    self._merger = LoraMerger(self._transformer)
                vars(family)["transformer"] = self._transformer
                self._merger.apply([(deltas, scale)])
                yield
            finally:
                family.set_storage(storage)
                vars(family)["transformer"] = training
                family.release(*(_PARTS - loaded))


def weights_for_inference(
    family: Family, full: bool, second_base: bool, turbo: TurboAdapter | None, copies: bool
) -> InferenceWeights:
    """Those of a full training, of a second base, or of the training adapter's layers."""
    if full:
        return OwnWeights(family)
    return SecondBase(family) if second_base else InferenceWeights(family, turbo, copies)
