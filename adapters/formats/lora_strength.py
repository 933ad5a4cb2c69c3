"""The scale alpha / rank of a LoRA, from tensors, header and PEFT's adapter_config.json."""

import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from adapters.formats.factors import shown
from adapters.formats.lora_formats import ALPHA, DOWN, MAGNITUDE, Fault
from adapters.formats.lora_header import CONFIG, BadHeader, Header

log = logging.getLogger(__name__)

Layers = Mapping[str, Collection[str]]  # names of a file's parts, by layer


@dataclass(frozen=True)
class Strength:
    """alpha / rank for the layers of one file.

    A layer's `.alpha` tensor has priority (`lora_formats.read_layer`). Then the header's
    lora_adapter_metadata and adapter_config.json, which must agree; then, for layers with kohya's
    names, the header's ss_network_alpha.
    """

    header: Header
    config: Header
    kohya: Header
    kohya_layers: Collection[str]

    @classmethod
    def read(
        cls,
        metadata: Mapping[str, str],
        config: str | bytes | None,
        layers: Layers,
        kohya_layers: Collection[str],
    ) -> "Strength":
        """Raises `BadHeader` for settings that are invalid or belong to another file."""
        bare = [n for n, parts in layers.items() if DOWN in parts and ALPHA not in parts]
        try:
            header = Header.read(metadata)
        except BadHeader:
            # The header is not needed if every layer has an alpha tensor.
            if not all(ALPHA in parts for parts in layers.values()):
                raise
            header = Header()
        kohya = Header.kohya(metadata) if bare and header.alpha is None else Header()
        if kohya.alpha != kohya.rank and not set(bare) <= set(kohya_layers):
            log.info(
                "the LoRA's header has ss_network_alpha %g at rank %g; a converter that writes "
                "lora_A and lora_B has multiplied it into the weights already",
                *(kohya.alpha, kohya.rank),
            )
        beside = Header() if config is None else Header.config(config)
        loras = [name for name, parts in layers.items() if DOWN in parts]
        said = (header.alpha, beside.alpha, kohya.alpha)
        if 0 < len(bare) < len(loras) and all(alpha is None for alpha in said):
            log.warning(
                "%d of %d layers have no alpha, but the others have; their rank is used as alpha: "
                "%s",
                *(len(bare), len(loras), shown(bare)),
            )
        absent = beside.without(loras)
        if absent:
            raise BadHeader(
                f"{len(absent)} layers are not among the target_modules of {CONFIG}: "
                f"{shown(absent)}; it belongs to another file"
            )
        return cls(header, beside, kohya, kohya_layers)

    def scale(self, layer: str, rank: int) -> float | None:
        """alpha / rank of a layer without an alpha tensor; None if it is nowhere given.

        Raises `BadHeader` for values that contradict the file or each other.
        """
        header, config = self.header.scale(layer, rank), self.config.scale(layer, rank)
        if header is not None and config is not None and not _close(header, config):
            raise BadHeader(
                f"has alpha {header * rank:g} in the file's header, {config * rank:g} in {CONFIG}"
            )
        found = config if header is None else header
        if found is None and layer in self.kohya_layers:
            found = self.kohya.scale(layer, rank)
        return found

    def check(self, layer: str, parts: Mapping[str, Tensor]) -> None:
        """Raises `Fault` or `BadHeader` if the tensors contradict header or config.

        For tensors on the meta device, the value of alpha is not checked.
        """
        if DOWN not in parts:
            return
        says = self.header if self.config.dora is None else self.config
        if says.dora and MAGNITUDE not in parts:
            raise Fault(f"has no lora_magnitude_vector, {says.where} says DoRA")
        if self.config.dora is False and MAGNITUDE in parts:
            raise Fault(f"has a lora_magnitude_vector, {CONFIG} says that it is not DoRA")
        if ALPHA in parts:
            rank = len(parts[DOWN])
            written = self.config.scale(layer, rank)
            if written is None or parts[ALPHA].is_meta:
                return
            own = float(parts[ALPHA]) / rank
            if not _close(own, written):
                raise BadHeader(f"has alpha {own * rank:g}, {CONFIG} says {written * rank:g}")


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=2**-7)  # alpha may be bfloat16
