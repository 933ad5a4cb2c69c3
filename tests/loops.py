"""The trainer's loop by itself, over the whole dataset, without what comes after it."""

from adapters.lora import Lora
from adapters.placeholder import Placeholder
from families.family import Family
from families.loading import load_family
from trainer.dataset import read_dataset
from trainer.features import Captions, encode_pictures
from trainer.loop import Loop
from trainer.settings import Settings


def make_loop(settings: Settings) -> Loop:
    """A loop at its first step, with a LoRA and a placeholder."""
    assert settings.subject is not None
    examples = read_dataset(settings.dataset, settings.default_caption, settings.subject)
    family = load_family(settings.base)
    samples = encode_pictures(family, examples, settings)
    start = (settings.placeholder_init_std, settings.seed, family.device)
    placeholder = Placeholder.create(settings.subject, family.text_width, *start)
    vectors = {placeholder.token: placeholder.vectors}
    captions = Captions(family, [sample.caption for sample in samples], vectors)
    targets = family.lora_targets(settings.lora_targets)
    lora = Lora(family.transformer, targets, settings.rank, settings.seed)
    return Loop(family, settings, samples, captions, lora, placeholder)


def prepare(
    settings: Settings, with_lora: bool, with_placeholder: bool
) -> tuple[Family, Loop, Placeholder | None]:
    """A loop over one picture, with the LoRA or the placeholder or both."""
    subject = "<zwx>" if with_placeholder else None
    examples = read_dataset(settings.dataset, settings.default_caption, subject)[:1]
    family = load_family(settings.base)
    samples = encode_pictures(family, examples, settings)
    placeholder = None
    if with_placeholder:
        placeholder = Placeholder.create("<zwx>", family.text_width, 1e-5, settings.seed)
    vectors = {placeholder.token: placeholder.vectors} if placeholder else {}
    captions = Captions(family, [sample.caption for sample in samples], vectors)
    lora = None
    if with_lora:
        lora = Lora(family.transformer, family.lora_targets(), settings.rank, settings.seed)
    return family, Loop(family, settings, samples, captions, lora, placeholder), placeholder
