"""Plans the CPU memory of a run on a GPU. Sizes are in bytes.

Files of weights are memory-mapped, and their pages can be dropped at any time, so they do not
count. What counts: weights that are offloaded, copies of original weights for preview images,
copies of trained weights in a checkpoint, and the weight that is being merged and quantized.
"""

import torch

from families.family import Family
from families.memory import RESERVE, free_memory
from families.quantization import QUANTIZATIONS, block_values
from families.without_weights import transformer_without_weights
from trainer.memory.plan import Figures, Mode

# Of the weight that is being merged: in float32 before and after, their difference, and in 16 bits.
_MERGING = 3 * 4 + 2


class NoRoom(RuntimeError):
    """A part of the work that does not fit into CPU memory."""


def host_parts(figures: Figures, mode: Mode) -> dict[str, int]:
    """The CPU memory that a run needs on a GPU, without preview images."""
    parts = {"checkpoints": figures.trained()}
    if mode.quantize != "none":
        parts["loading"] = _MERGING * figures.largest_linear
    if mode.offload:
        quantization = QUANTIZATIONS.get(mode.quantize)
        each = figures.bytes_per_value if quantization is None else quantization.bytes_per_weight
        parts["offloaded weights"] = round(each * figures.block_weights)
    return parts


def host_previews(figures: Figures, mode: Mode, merged: bool) -> int:
    """The CPU memory that preview images need in addition; 0 without previews.

    A quantized base has a second one, offloaded. Otherwise it is a copy of the weights that the
    LoRA changes, and with a training adapter (`merged`) one of the weights before its merge.
    """
    if not figures.preview.bytes:
        return 0
    copies = 2 if merged and mode.quantize == "none" else 1
    return copies * figures.bytes_per_value * figures.block_weights


def room_of(free: int) -> int:
    """The part of the free CPU memory that a run may use."""
    return round(free * (1 - RESERVE))


def check_second_base(family: Family) -> None:
    """Raises `NoRoom` if an unquantized base with offloaded weights does not fit."""
    values = block_values(transformer_without_weights(family.base))
    need, room = family.dtype.itemsize * values, room_of(free_memory(torch.device("cpu")))
    if need > room:
        raise NoRoom(
            f"images need the original weights, {need / 1e9:.1f} GB of CPU memory, and "
            f"{room / 1e9:.1f} GB are free"
        )
