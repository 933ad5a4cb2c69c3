"""Encoded images, and what a batch of them needs beside their latents."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from families.family import Family
from families.references import References
from families.transfer import onto


@dataclass(frozen=True)
class Sample:
    """An encoded image at one resolution."""

    name: str
    caption: str
    mean_CHW: Tensor  # of the VAE's posterior, normalized, float32, memory-mapped
    std_CHW: Tensor
    repeats: int = 1  # how often it is used, relative to others
    others: tuple[str, ...] = ()  # further captions, which take turns with the first
    mirrored: bool = False
    shift: float = 0.0  # of the crop, from the center
    weights_1HW: Tensor | None = None  # of the loss, by the image's mask; None without masks
    references: References | None = None  # of a pair: its control images, memory-mapped
    uncropped: References | None = None  # the same as at inference; of pairs with a preview

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions."""
        return self.caption, *self.others

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """Of the latents, and of those of the references: each makes another sequence."""
        latents = self.references.latents if self.references is not None else ()
        return (self.mean_CHW.shape, *(each.shape for each in latents))


def weights_of(samples: Iterable[Sample], device: torch.device) -> Tensor | None:
    """weights_B1HW of a batch, whose samples all have some or none."""
    known = [each.weights_1HW for each in samples if each.weights_1HW is not None]
    return onto(device, torch.stack(known)) if known else None


def references_of(samples: Iterable[Sample]) -> list[References]:
    """The references of each row of a batch of pairs; empty for single images."""
    return [each.references for each in samples if each.references is not None]


def uncropped_of(samples: Iterable[Sample]) -> list[References]:
    """The references of previews, by pair in the order of the dataset; empty for single images."""
    by_name = {each.name: each.uncropped for each in samples}
    return [each for each in by_name.values() if each is not None]


def edits_of(
    samples: Sequence[Sample], others: Sequence[str], family: Family, dropout: float
) -> list[tuple[str, References]]:
    """The texts of pairs whose features are needed, each with its references.

    `others` are with those of the first sample. Where captions are dropped, the empty prompt has
    the references, as without an instruction at inference.
    """
    dropped = [family.empty_prompt] if dropout > 0 else []
    found = [(text, each) for each in samples for text in (*each.captions, *dropped)]
    found += [(text, samples[0]) for text in others]
    return [(text, each.references) for text, each in found if each.references is not None]
