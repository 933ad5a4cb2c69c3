"""The sizes of one step, and its inputs without values."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.forms import Form
from families.family import Family
from families.references import References


@dataclass(frozen=True)
class Shape:
    """Sizes of one step."""

    form: Form | int  # of the trained layers; a number is the rank of a plain LoRA
    batch_size: int
    width: int  # pixels
    height: int
    text_tokens: int
    references: int = 0  # control images beside each row, of `Base.reference_resolution`


def sides(family: Family, shape: Shape) -> tuple[int, int]:
    """Width and height in pixels, rounded down to what the model can have, as buckets are."""
    multiple = family.resolution_multiple
    width, height = (max(each - each % multiple, multiple) for each in (shape.width, shape.height))
    return width, height


def empty_latents(family: Family, shape: Shape) -> Tensor:
    """Zeros in place of the latents of a batch."""
    rows, columns = family.latent_size(*sides(family, shape))
    return torch.zeros(
        shape.batch_size, family.latent_channels, rows, columns, device=family.device
    )


def _slots(family: Family) -> int:
    """Tokens of the text encoder for one reference image."""
    form, edge = family.reference_format, family.base.reference_resolution
    assert form is not None
    seen, eye = form.seen_pixels or edge**2, family.vision_encoder
    return round(math.sqrt(seen) / (eye.patch_size * eye.spatial_merge_size)) ** 2


def tokens_read(family: Family, shape: Shape) -> int:
    """Tokens that the text encoder reads for one row."""
    return shape.text_tokens + (shape.references * _slots(family) if shape.references else 0)


def text_features(family: Family, shape: Shape) -> list[Tensor]:
    """Text features of each row: with those of reference images, unless latents replace them."""
    form = family.reference_format
    tokens = shape.text_tokens if form and form.latents_in_text else tokens_read(family, shape)
    return list(embeddings(family, shape.batch_size, tokens).unbind())


def reference_images(family: Family, shape: Shape) -> list[References]:
    """Square reference images for each row."""
    if not shape.references:
        return []
    edge = family.base.reference_resolution
    edge -= edge % family.resolution_multiple
    size = 1, family.latent_channels, *family.latent_size(edge, edge)
    count, form = shape.references, family.reference_format
    latents = (torch.zeros(size, device=family.device),) * count
    places = tuple((k + 1) * shape.text_tokens // (count + 1) for k in range(count))
    places = places if form and form.latents_in_text else ()
    return [References(latents, (), (), "", places)] * shape.batch_size


def embeddings(family: Family, batch_size: int, tokens: int) -> Tensor:
    """Embeddings of captions, with the same width as their features."""
    width = family.text_encoder.get_input_embeddings().weight.shape[1]
    return torch.zeros(batch_size, tokens, width, dtype=family.dtype, device=family.device)
