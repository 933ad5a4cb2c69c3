"""A training run with the trainer's parts, paused for measurements."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapters.archive import Archive
from adapters.lora import Lora
from adapters.placeholder import Placeholder
from adapters.turbo import TurboAdapter
from families.base import Base
from families.family import Family
from families.loading import load_family
from families.repository import adapter_path
from trainer.data.dataset import read_dataset
from trainer.learning.features import Captions, encode_images
from trainer.learning.loop import Loop
from trainer.settings.fields import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """One training: the trainer's settings, and what is tried beside them."""

    settings: Settings
    vectors: int = 1  # embedding rows of the placeholder
    start: str = ""  # a word whose embedding the placeholder begins with; "" for noise
    train_lora: bool = True
    train_placeholder: bool = True  # where there is one; else its rows stay as they began
    clip_together: bool = False  # one gradient norm over LoRA and placeholder


@dataclass(frozen=True)
class Milestone:
    """A training run after some of its steps."""

    step: int
    archive: Archive  # what would be shipped now
    steps_per_second: float  # since the milestone before


def training_adapter(base: Base) -> TurboAdapter:
    """What `turbo_adapter=auto` means on a distilled base."""
    return TurboAdapter.read(adapter_path(list(base.training_adapters.values())[-1]))


def train(recipe: Recipe, milestones: Sequence[int]) -> Iterator[Milestone]:
    """Trains, and stops after so many steps each time."""
    settings, base = recipe.settings, recipe.settings.base
    family = load_family(base, dtype=torch.float32)
    examples = read_dataset(settings.dataset, settings.default_caption, settings.subject)
    samples = encode_images(family, examples, settings)
    placeholder = _placeholder(recipe, family)
    vectors = {placeholder.token: placeholder.vectors} if placeholder is not None else {}
    captions = Captions(family, [each.caption for each in samples], vectors)
    if settings.turbo_adapter == "auto" and base.training_adapters:
        adapter = training_adapter(base)
        share = adapter.merge(family.transformer, base.name)
        log.info("%s: merged %d, |dW|/|W| = %.4g", adapter.name, len(adapter.factors), share)
    lora = None
    if recipe.train_lora:
        lora = Lora(family.transformer, family.lora_targets(), settings.form, settings.seed)
    trained = [placeholder] if placeholder is not None and recipe.train_placeholder else []
    loop = Loop(family, settings, samples, captions, lora, trained)
    if recipe.clip_together:
        loop.lora_parameters, loop.rows = loop.parameters, []  # what each norm is taken of
    for milestone in milestones:
        begun, first = time.perf_counter(), loop.done
        for step in range(first, milestone):
            loop.step(step)
        rate = (milestone - first) / (time.perf_counter() - begun)
        meta = {"base_model": base.hub_id, "rank": settings.rank, "steps": milestone}
        factors = lora.deltas() if lora is not None else {}
        words = (placeholder.detached(),) if placeholder is not None else ()
        yield Milestone(milestone, Archive(factors, words, meta), rate)


def _placeholder(recipe: Recipe, family: Family) -> Placeholder | None:
    settings = recipe.settings
    if settings.subject is None:
        return None
    rows: Tensor
    if recipe.start:
        # With the space before it that the word has inside a caption.
        ids = family.prompts.tokenizer(f" {recipe.start}", add_special_tokens=False)["input_ids"]
        table = family.text_encoder.get_input_embeddings().weight
        rows = table[ids].float().mean(dim=0, keepdim=True).expand(recipe.vectors, -1).clone()
    else:
        random = torch.Generator().manual_seed(settings.seed)
        rows = torch.randn(recipe.vectors, family.text_width, generator=random)
        rows = (rows * settings.placeholder_init_std).to(family.device)
    return Placeholder(settings.subject, nn.Parameter(rows))
