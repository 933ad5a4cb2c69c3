"""Recomputes activations in the backward pass instead of keeping them (gradient checkpointing).

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.
"""

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from families.family import Family


def recompute(family: Family, share: float) -> None:
    """Recomputes the first blocks of the transformer's trunk, a share from 0 to 1 of them.

    Blocks before the trunk (refiners) are recomputed if any are. The backward pass begins at the
    last block: when it gets to the first ones, what the others kept is freed. If the last blocks
    were recomputed instead, the activations of one would be in memory beside all that are kept.
    """
    transformer = family.transformer
    blocks = transformer.get_submodule(family.trunk)
    kept = frozenset(blocks[round(share * len(blocks)) :])

    def run(block: nn.Module, *inputs: Any) -> Any:
        if block in kept:
            return block(*inputs)
        return checkpoint(block.__call__, *inputs, use_reentrant=False)

    if share:
        transformer.enable_gradient_checkpointing(run)
    else:
        transformer.disable_gradient_checkpointing()
