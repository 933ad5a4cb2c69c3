"""Merges LoRAs into one, and puts a training adapter into a LoRA or takes it out."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adapters.archive import Archive
from adapters.formats import Factors
from adapters.placeholder import Placeholder
from adapters.placeholder_token import PlaceholderError, check_distinct
from adapters.tools.low_rank import distance, norm, singular
from adapters.tools.opened import Opened, ToolError
from adapters.turbo import TurboAdapter
from families.repository import adapter_path


@dataclass(frozen=True)
class LayerError:
    """What one layer lost."""

    layer: str
    rank: int  # in the result
    error: float  # ||dW - result|| / ||dW||; 0 for a layer of zeros


@dataclass(frozen=True)
class Changed:
    """A new LoRA, and its error by layer, rounding to bfloat16 included."""

    archive: Archive
    layers: tuple[LayerError, ...]
    # By layer, for each rank the share of the squared norm that the first singular values have;
    # empty if they were not computed.
    energies: Mapping[str, Sequence[float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> float:
        """The largest error of a layer."""
        return max((each.error for each in self.layers), default=0.0)


Pair = tuple[Tensor, Tensor]
Scaled = tuple[Factors, float]  # a LoRA's pairs, and the scale that it gets
Exchanged = tuple[str, Pair, Pair]  # a layer, its exact change, and what takes its place


def merge(loras: Sequence[tuple[Opened, float]], rank: int | None = None) -> Changed:
    """The sum of LoRAs, each multiplied by its scale; the placeholder tokens of all are kept.

    Without `rank` the factors are joined: exact, and the ranks add up. With it, the best
    approximation of that rank. Raises `ToolError` for LoRAs of different models, for other kinds
    than plain LoRA, and for a token that two of them have with different embeddings.
    """
    first = loras[0][0]
    for each, _ in loras:
        if each.layout.shapes != first.layout.shapes:
            raise ToolError(
                f"{first.name} is for {first.base.name}, {each.name} for {each.base.name}: LoRAs "
                "of different models cannot be merged"
            )
    merged = joined([(each.factors("merge"), scale) for each, scale in loras], rank)
    placeholders = _tokens([each for each, scale in loras if scale != 0])
    facts = [
        {"name": each.name, "scale": scale, "sha256": each.archive.lora_sha256}
        for each, scale in loras
    ]
    meta = {"base_model": first.base.hub_id, **first.base.license_facts, "merged": facts}
    return measured(merged, placeholders, meta | named(placeholders))


def with_training_adapter(opened: Opened, scale: float, version: str = "") -> Changed:
    """The LoRA plus `scale` times the training adapter of its base.

    Raises `ToolError` for a base without one, and `MissingModel` if its file cannot be found.
    """
    base = opened.base
    if not base.training_adapters:
        raise ToolError(
            f"{base.name} has no training adapter; name the distilled base with --base, such as "
            "z-image-turbo"
        )
    version = version or list(base.training_adapters)[-1]
    if version not in base.training_adapters:
        raise ToolError(
            f"{base.name} has the training adapters {', '.join(base.training_adapters)}"
        )
    adapter = TurboAdapter.read(adapter_path(base.training_adapters[version]))
    opened.layout.fit(adapter.factors, adapter.name)  # raises for another model's
    merged = joined([(opened.factors("this"), 1.0), (adapter.factors, scale)])
    facts = {"name": adapter.name, "scale": scale}
    meta = {**meta_of(opened), "base_model": base.hub_id, "training_adapter_added": facts}
    return measured(merged, opened.archive.placeholders, meta)


def joined(loras: Sequence[Scaled], rank: int | None = None) -> Iterator[Exchanged]:
    """sum of scale * B @ A by layer with joined factors, and the same at a rank if one is given."""
    layers = dict.fromkeys(name for factors, _ in loras for name in factors)
    for name in layers:
        pairs = [(factors[name], scale) for factors, scale in loras if name in factors]
        downs = [down.float() for (down, _), _ in pairs]
        ups = [up.float() * scale for (_, up), scale in pairs]
        exact = torch.cat(downs), torch.cat(ups, dim=1)
        if rank is not None and len(exact[0]) > rank:
            yield name, exact, singular(*exact).factors(rank)
        else:
            yield name, exact, exact


def measured(
    layers: Iterable[Exchanged], placeholders: Sequence[Placeholder], meta: dict[str, Any]
) -> Changed:
    """The results with their errors against the exact changes. Keeps only what is written."""
    rows = []
    kept: Factors = {}
    for name, exact, (down, up) in layers:
        kept[name] = pair = down.bfloat16(), up.bfloat16()
        whole = norm(*exact)
        error = distance(exact, (pair[0].float(), pair[1].float())) / whole if whole else 0.0
        rows.append(LayerError(name, len(down), error))
    facts = {**meta, "rank": max(each.rank for each in rows)}
    return Changed(Archive(kept, tuple(placeholders), facts), tuple(rows))


def meta_of(opened: Opened) -> dict[str, Any]:
    """The meta.json of a LoRA made from another: what stays true of it."""
    kept = ("training_mode", "default_caption", "zero_prior", "zero_priors")
    known = {key: opened.archive.meta[key] for key in kept if key in opened.archive.meta}
    known |= {"base_model": opened.base.hub_id, **opened.base.license_facts}
    return known | named(opened.archive.placeholders)


def named(placeholders: Sequence[Placeholder]) -> dict[str, Any]:
    """The entries of meta.json for placeholder tokens."""
    tokens = [each.token for each in placeholders]
    return {"placeholder_token": tokens[0], "placeholder_tokens": tokens} if tokens else {}


def _tokens(loras: Sequence[Opened]) -> list[Placeholder]:
    found: dict[str, Placeholder] = {}
    for opened in loras:
        for each in opened.archive.placeholders:
            known = found.setdefault(each.token, each)
            if known is not each and not torch.equal(known.vectors, each.vectors):
                raise ToolError(
                    f"{opened.name} and another LoRA both have the token {each.token}, with "
                    "different embeddings; train one of them with another token"
                )
    try:
        check_distinct(list(found))
    except PlaceholderError as error:
        raise ToolError(str(error)) from error
    return list(found.values())
