"""The trainer's loop by itself, without what comes after it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from adapters.full_weights import FullWeights, trained_names
from adapters.lora import Lora
from adapters.placeholder import Placeholder
from families.loading import load_family
from families.prefix import read_prefix
from trainer.data.dataset import read_dataset
from trainer.learning.checkpoint import write_checkpoint
from trainer.learning.features import Captions, encode_images
from trainer.learning.loop import Loop
from trainer.learning.samples import edits_of
from trainer.learning.saving import state_of
from trainer.settings.fields import Settings


def make_loop(
    settings: Settings,
    pictures: int | None = None,
    with_lora: bool = True,
    with_placeholder: bool = True,
) -> Loop:
    """A loop at its first step, over so many pictures, which is all of them if left out."""
    tokens = settings.tokens if with_placeholder else ()
    named = settings.named_subjects if with_placeholder else ()
    subject = None if named else next(iter(tokens), None)
    caption = settings.default_caption
    masks = settings.masks
    given: dict[str, Any] = {"subjects": named, "masks": masks, "controls": settings.control_counts}
    examples = read_dataset(settings.dataset, caption, subject, **given)[:pictures]
    family = load_family(settings.base)
    samples = encode_images(family, examples, settings)
    trained: Lora | FullWeights | None = None
    start = family.text_width, settings.placeholder_init_std
    placeholders = [
        Placeholder.create(token, *start, settings.seed + number, family.device)
        for number, token in enumerate(tokens)
    ]
    vectors = {each.token: each.vectors for each in placeholders}
    edits = edits_of(samples, (), family, settings.caption_dropout)
    texts = [text for sample in samples for text in sample.captions]
    captions = Captions(family, () if edits else texts, vectors, edits=edits)
    if settings.full:
        names = trained_names(family, settings.lora_targets)
        trained = FullWeights(family, names)
    elif with_lora:
        targets = family.lora_targets(settings.lora_targets)
        trained = Lora(family.transformer, targets, settings.form, settings.seed)
    return Loop(family, settings, samples, captions, trained, placeholders)


def make_checkpoint(
    settings: Settings, folder: Path, data: Mapping[str, Any] | None = None
) -> Path:
    """A real checkpoint of a run with these settings after its first step."""
    loop = make_loop(settings, 1)
    loop.data = dict(data or {})
    loop.step(0)
    return write_checkpoint(state_of(loop), folder)


def loop_on_meta(settings: Settings) -> Loop:
    """A loop on a device without any values, where asking for one is an error."""
    assert settings.subject is not None
    examples = read_dataset(settings.dataset, settings.default_caption, settings.subject)
    family = load_family(settings.base)
    samples = encode_images(family, examples, settings)
    start = settings.subject, family.text_width, 1e-5, 0
    vectors = {settings.subject: Placeholder.create(*start).vectors}
    captions = Captions(family, [sample.caption for sample in samples], vectors)

    nowhere = family.device = torch.device("meta")
    for model in (family.transformer, family.text_encoder):
        model.to(nowhere)
    placeholder = Placeholder.create(*start, nowhere)
    captions.vectors = {placeholder.token: placeholder.vectors}
    assert captions._prefix is not None
    ids = captions._prefix.ids
    captions._prefix = read_prefix(family.text_encoder, ids)
    lora = Lora(family.transformer, family.lora_targets(), settings.form, settings.seed)
    loop = Loop(family, settings, samples, captions, lora, [placeholder])
    return loop
