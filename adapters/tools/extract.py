"""Extracts a LoRA from the difference of a tuned model and its base, layer by layer."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapters.archive import Archive, read_loose_placeholders
from adapters.archive_members import PLACEHOLDER
from adapters.formats import as_written, shown
from adapters.tools.checkpoint import Checkpoint, open_checkpoint
from adapters.tools.low_rank import leading_singular, rank_for, shares
from adapters.tools.merge import Changed, LayerError, named
from adapters.tools.opened import ToolError, check_width
from families.base import Base
from families.registry import meta_of_full_training
from families.repository import transformer_source

MAX_RANK = 1024  # that readers accept


@dataclass(frozen=True)
class Extracted:
    """A LoRA and how much of the difference it explains."""

    changed: Changed
    equal: int  # layers without a difference
    explained: float  # 1 - ||D - result||^2 / ||D||^2 of all its layers together


def extract(tuned: Path, base: Base, rank: int, energy: float | None = None) -> Extracted:
    """The best LoRA of `rank` for the difference of each linear layer, rounded to bfloat16.

    With `energy`, a share from 0 to 1, a layer gets the lowest rank up to `rank` that explains this
    share of its squared difference. `tuned` is a transformer's folder or file in diffusers' or the
    original layout, or the folder of a full training, whose tokens the LoRA gets. Raises
    `ToolError` for files that cannot be read, values that are NaN, and a model that does not
    differ; and `MissingModel` for a base that cannot be found.
    """
    if not 1 <= rank <= MAX_RANK:
        raise ToolError(f"--rank must be between 1 and {MAX_RANK:,}")
    if energy is not None and not 0 < energy <= 1:
        raise ToolError("--energy is a share between 0 and 1, such as 0.95")
    embeddings = tuned / PLACEHOLDER
    is_full = meta_of_full_training(tuned) is not None and embeddings.is_file()
    tokens = read_loose_placeholders(embeddings) if is_full else ()
    check_width(tokens, base, tuned.name)
    factors, rows, energies = {}, [], {}
    other: dict[str, float] = {}
    whole = rest = 0.0
    equal = 0
    with (
        open_checkpoint(tuned, base) as theirs,
        open_checkpoint(transformer_source(base), base) as ours,
    ):
        for name, difference, size in _differences(theirs, ours):
            if difference is None:
                equal += _is_layer(name, theirs)
                continue
            if not _is_layer(name, theirs):
                other[name] = size
                continue
            layer = name.removesuffix(".weight")
            pair, shared, error = _layer(layer, difference, rank, energy)
            factors[layer] = pair
            energies[layer] = shared
            rows.append(LayerError(layer, len(pair[0]), error))
            whole += size**2
            rest += (error * size) ** 2
        unused = theirs.unused
    if not factors:
        raise ToolError(f"{tuned} does not differ from {base.name} in any linear layer")
    facts = {
        **{"name": tuned.name, "rank": rank, "energy": energy, "explained": 1 - rest / whole},
        "explained_by_layer": {each.layer: round(1 - each.error**2, 6) for each in rows},
    }
    meta = {
        "base_model": base.hub_id,
        **base.license_facts,
        "extracted": facts,
        "rank": max(each.rank for each in rows),
    }
    archive = Archive(factors, tokens, meta | named(tokens))
    changed = Changed(archive, tuple(rows), energies, tuple(_notes(other, unused)))
    return Extracted(changed, equal, 1 - rest / whole)


def _differences(tuned: Checkpoint, base: Checkpoint) -> Iterator[tuple[str, Tensor | None, float]]:
    """Each parameter's difference in float32 and its norm; None where there is none."""
    for name in base.parameters:
        after, before = tuned.read(name), base.read(name)
        if after.dtype.itemsize < before.dtype.itemsize:  # as the tuned one was rounded
            before = before.to(after.dtype)
        if after.dtype == before.dtype and torch.equal(after, before):
            yield name, None, 0.0
            continue
        difference = after.float().sub_(before.float())
        size = float(difference.norm())
        if not math.isfinite(size):
            raise ToolError(f"{tuned.source}: {name} contains NaN or infinite values")
        yield name, difference if size else None, size


def _layer(
    layer: str, difference: Tensor, rank: int, energy: float | None
) -> tuple[tuple[Tensor, Tensor], list[float], float]:
    """(A, B), the shares of each rank, and the error as written. `difference` is overwritten."""
    size = float(difference.norm())
    parts = leading_singular(difference, rank)
    shared = shares(parts.s, size**2)
    used = len(shared) if energy is None else rank_for(shared, energy)
    pair = parts.factors(used)
    down, up = as_written({layer: pair})[layer].tensors()
    error = float(difference.addmm_(up, down, alpha=-1).norm()) / size
    return (down.bfloat16(), up.bfloat16()), shared, error


def _is_layer(name: str, checkpoint: Checkpoint) -> bool:
    return name.endswith(".weight") and len(checkpoint.parameters[name]) == 2


def _notes(other: dict[str, float], unused: tuple[str, ...]) -> Iterator[str]:
    if other:
        worst = sorted(other, key=lambda name: -other[name])
        yield (
            f"{len(other)} differences that a LoRA cannot represent are missing (norms, biases, "
            f"tokens): {shown(worst)}"
        )
    if unused:
        yield f"{len(unused)} tensors that the model does not have were ignored: {shown(unused)}"
