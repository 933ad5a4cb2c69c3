"""Counts the figures of a run on a base model, without its weights."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from adapters.forms import as_form
from adapters.full_weights import trained_names
from families.base import Base
from families.family import Family
from families.quantization import block_linears, block_values
from families.without_weights import family_without_weights
from trainer.memory.plan import Figures
from trainer.memory.shapes import Shape
from trainer.memory.step_cost import (
    NOTHING,
    Load,
    caption_load,
    decode_load,
    image_load,
    placeholder_load,
    preservation_load,
    step_loads,
    velocity_load,
)
from trainer.settings import Extent


def figures(
    base: Base,
    lora_targets: str,
    shape: Shape,
    *,
    placeholder: bool,
    optimizer: str,
    ema: bool,
    accumulates: bool,
    images: Sequence[Shape] = (),
    captions: int = 1,
    preview: Shape | None = None,
    preservation: Extent | None = None,
    dtype: torch.dtype = torch.bfloat16,
    compiled: bool = False,
    full: bool = False,
    kept_copies: int = 0,
) -> Figures:
    """The figures of a run on a base, counted without its weights.

    `shape` is that of a step; `images` are batches of the VAE, by default one image of that shape;
    `captions` is the batch size of the text encoder; `preview` is the largest preview image. With
    `full`, the targets' own weights are trained, not a LoRA; `kept_copies` as in `Figures`.
    """
    family = family_without_weights(base, dtype)
    linears = dict(family.transformer.named_modules())
    if full:
        targets = trained_names(family, lora_targets)
        trained = _count(map(family.transformer.get_parameter, targets))
    else:
        targets = family.lora_targets(lora_targets)
        trained = as_form(shape.form).values(linears[name].weight.shape for name in targets)
    block, other = _split(family.transformer)
    text_block, text_other = _split(family.text_encoder)
    return Figures(
        block_weights=block,
        other_weights=other,
        text_block_weights=text_block,
        text_other_weights=text_other,
        vae_weights=_count(family.vae.parameters()),
        vision_weights=_count(family.vision_encoder.parameters()) if shape.references else 0,
        lora_modules=len(targets),
        lora_values=trained,
        bytes_per_value=dtype.itemsize,
        optimizer=optimizer,
        ema=ema,
        accumulates=accumulates,
        placeholder=placeholder,
        steps=step_loads(family, targets, shape, full),
        placeholder_pass=placeholder_load(family, shape) if placeholder else NOTHING,
        image=max(
            (image_load(family, each) for each in images or [replace(shape, batch_size=1)]),
            key=lambda load: load.bytes,
        ),
        caption=caption_load(family, replace(shape, batch_size=captions)),
        preview=_preview_load(family, preview) if preview is not None else NOTHING,
        largest_linear=max(
            family.transformer.get_parameter(f"{name}.weight").numel()
            for name in block_linears(family.transformer)
        ),
        preservation=preservation_load(family, targets, shape, preservation, full),
        compiled=compiled,
        full=full,
        kept_copies=kept_copies,
    )


def _preview_load(family: Family, shape: Shape) -> Load:
    """One image: the larger load of the transformer's and the VAE's pass."""
    passes = velocity_load(family, shape), decode_load(family, shape)
    return Load(max(each.bytes for each in passes), sum(each.flops for each in passes))


def _split(model: torch.nn.Module) -> tuple[int, int]:
    """Values in the block linears' weights, and in all others."""
    inside = block_values(model)
    return inside, _count(model.parameters()) - inside


def _count(parameters: Iterable[torch.Tensor]) -> int:
    return sum(each.numel() for each in parameters)
