"""Zero pairs for layers that are not trained because their output is not used.

Readers that join layers (SGLang, vLLM-Omni, nunchaku's loader: queries, keys and values) or count
them (OneTrainer) need every layer of a block. A pair with B = 0 changes no image.
"""

import re
from collections.abc import Iterable

import torch

from adapters.formats.deltas import Delta
from adapters.formats.factors import Factors
from families.family import Family
from families.registry import FAMILIES


def family_of_layers(layers: Iterable[str]) -> type[Family] | None:
    """The family whose transformer's blocks have these layer names, or None."""
    names = list(layers)
    trunks = {name.partition(".")[0] for name in names}
    found = [family for family in FAMILIES.values() if family.trunk in trunks]
    if len(found) > 1:
        found = [family for family in found if _has_its_own(names, family)]
    return found[0] if len(found) == 1 else None


def _has_its_own(layers: list[str], family: type[Family]) -> bool:
    """Whether a layer has a name that no other family with the same trunk uses."""
    own = re.compile(family.layer_names or "$^")
    return any(own.search(name) or name.endswith(family.idle_in_last_block) for name in layers)


def completed(factors: Factors) -> Factors:
    """The factors, and zero pairs for the idle layers of their last block.

    Only for layers that another block of the LoRA has. A is random, so that a further training can
    change the pair.
    """
    family = family_of_layers(factors)
    generator = torch.Generator().manual_seed(0)
    pairs: Factors = {}
    for name in _idle(factors) - factors.keys():
        assert family is not None
        within = re.sub(rf"^{re.escape(family.trunk)}\.\d+\.", "", name)
        like = next((pair for each, pair in factors.items() if each.endswith(f".{within}")), None)
        if like is not None:
            down, up = like
            bound = down.shape[1] ** -0.5
            start = torch.empty(down.shape).uniform_(-bound, bound, generator=generator)
            pairs[name] = (start.to(down.dtype), torch.zeros_like(up))
    return {**factors, **dict(sorted(pairs.items()))}


def without_idle(deltas: dict[str, Delta]) -> dict[str, Delta]:
    """The changes of a file without such pairs, by the model's or the file's layer names."""
    idle = {
        name
        for name in _idle(deltas) & deltas.keys()
        if isinstance(pair := deltas[name], tuple) and not pair[1].any()
    }
    return {name: delta for name, delta in deltas.items() if name not in idle} or deltas


def _idle(layers: Iterable[str]) -> frozenset[str]:
    """Names of the idle layers of the last block that has a layer here."""
    names = list(layers)
    family = family_of_layers(names)
    if family is None or not family.idle_in_last_block:
        return frozenset()
    block = re.compile(rf"{re.escape(family.trunk)}\.(\d{{1,5}})\.")
    numbers = [int(match[1]) for name in names if (match := block.match(name))]
    return family.idle_in(1 + max(numbers)) if numbers else frozenset()
