"""How a base's models are stored for generation: the most exact way that fits the GPU.

`Base.generation_memory` is the memory with the whole model in 16 bits, to which
`Base.editing_memory` is added, since a loaded model stays as it is when reference images come. What
a quantized text encoder or transformer saves is counted from the models' sizes. The VAE stays in
float32.
`$QUANTIZE` sets the transformer's quantization: in fp8, GPUs that have float8 products are faster.
"""

import logging
import os
from collections.abc import Sequence

import torch

from families.base import Base
from families.family import WeightStorage
from families.memory import RESERVE, free_memory
from families.quantization import (
    QUANTIZATIONS,
    QuantizationUnavailable,
    block_values,
    check_available,
)
from families.without_weights import family_without_weights

log = logging.getLogger(__name__)

SIXTEEN_BITS = WeightStorage()
# From the most exact to the smallest: the text encoder runs once for a prompt, and an error in the
# transformer is made in every step. Weights in CPU memory are copied to the GPU in every step.
LADDER = (
    SIXTEEN_BITS,
    WeightStorage("none", "int8"),
    WeightStorage("int8", "int8"),
    WeightStorage("nf4", "nf4"),
    WeightStorage("int8", "int8", offload=True),
    WeightStorage("int8", "nf4", offload=True),
)
_BYTES = 2  # of an unquantized weight


def choose_storage(base: Base, device: torch.device) -> WeightStorage:
    """The first storage of `LADDER` that fits the GPU's free memory, else the last usable one.

    Logs the choice and its reason, unless it is 16 bits. On a CPU it is always 16 bits. With
    `$QUANTIZE` only the text encoder's storage is chosen; raises `QuantizationUnavailable` if it
    cannot run here.
    """
    ladder: Sequence[WeightStorage] = LADDER
    if asked := os.environ.get("QUANTIZE", ""):
        try:
            check_available(asked, device)
        except QuantizationUnavailable as error:
            raise QuantizationUnavailable(f"$QUANTIZE: {error}") from None
        ladder = [WeightStorage(asked, text) for text in ("none", "int8", "nf4")]
    if device.type != "cuda":
        return ladder[0]
    room = free_memory(device) * (1 - RESERVE)
    most = _sixteen_bits(base)
    if ladder[0] == SIXTEEN_BITS and most <= room:
        return SIXTEEN_BITS
    needs = memory_needed(base, ladder)
    usable = [storage for storage in ladder if _usable(storage, device)]
    fitting = [storage for storage in usable if needs[storage] <= room]
    chosen = (fitting or usable[-1:])[0]
    (log.info if fitting else log.warning)(
        "memory: %s with %s: needs %.1f GB of %.1f GB; 16 bits would need %.1f GB%s",
        *(base.name, describe(chosen), needs[chosen] / 1e9, room / 1e9, most / 1e9),
        "" if fitting else "; expect an out-of-memory error",
    )
    return chosen


def memory_needed(
    base: Base, ladder: Sequence[WeightStorage] = LADDER
) -> dict[WeightStorage, float]:
    """Bytes on the GPU to generate an image of the default resolution, for each storage."""
    family = family_without_weights(base)
    transformer, text = block_values(family.transformer), block_values(family.text_encoder)
    return {
        storage: _sixteen_bits(base)
        - transformer * (_BYTES - (0.0 if storage.offload else _bytes(storage.quantize)))
        - text * (_BYTES - _bytes(storage.quantize_text))
        for storage in ladder
    }


def describe(storage: WeightStorage) -> str:
    """The storage in words."""
    names = {"none": "16 bits"}
    transformer = names.get(storage.quantize, storage.quantize)
    text = names.get(storage.quantize_text, storage.quantize_text)
    where = " in CPU memory" if storage.offload else ""
    return f"the transformer in {transformer}{where} and the text encoder in {text}"


def _sixteen_bits(base: Base) -> float:
    """Bytes on the GPU with the whole model in 16 bits."""
    return (base.generation_memory + base.editing_memory) * 1e9


def _bytes(quantize: str) -> float:
    return _BYTES if quantize == "none" else QUANTIZATIONS[quantize].bytes_per_weight


def _usable(storage: WeightStorage, device: torch.device) -> bool:
    try:
        for name in (storage.quantize, storage.quantize_text):
            check_available(name, device)
    except QuantizationUnavailable:
        return False
    return True
