"""Plans the CPU memory of a run on a GPU. Sizes are in bytes.

Files of weights are memory-mapped, and their pages can be dropped at any time, so they do not
count. What counts: weights that are offloaded, copies of original weights for preview images,
copies of trained weights in a checkpoint, and the weight that is being merged and quantized.
"""

from families.memory import RESERVE
from families.quantization import QUANTIZATIONS
from trainer.memory.plan import Figures, Mode

# Of the weight that is being merged: in float32 before and after, their difference, and in 16 bits.
_MERGING = 3 * 4 + 2


def host_parts(figures: Figures, mode: Mode) -> dict[str, int]:
    """The CPU memory that each process of a run needs on a GPU, without preview images."""
    parts = {"checkpoints": figures.checkpoint()}
    quantization = QUANTIZATIONS.get(mode.quantize)
    each = figures.bytes_per_value if quantization is None else quantization.bytes_per_weight
    if quantization is not None:
        # A sharded base is quantized in CPU memory before it is split.
        sharded = each * figures.block_weights * (mode.shards > 1)
        parts["loading"] = _MERGING * figures.largest_linear + round(sharded)
    if mode.offload:
        parts["offloaded weights"] = round(each * figures.block_weights)
    return parts


def host_previews(figures: Figures, mode: Mode, merged: bool) -> int:
    """The CPU memory that preview images need in addition; 0 without previews.

    A quantized or sharded base has a second one, offloaded. Otherwise it is a copy of the weights
    that the LoRA changes, and with a training adapter (`merged`) one of those before its merge.
    """
    if not figures.preview.bytes or figures.full:  # then they use the weights that are trained
        return 0
    copies = 2 if merged and not mode.second_base else 1
    return copies * figures.bytes_per_value * figures.block_weights


def room_of(free: int) -> int:
    """The part of the free CPU memory that a run may use."""
    return round(free * (1 - RESERVE))
