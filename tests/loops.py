"""The trainer's loop by itself, over the whole dataset, without what comes after it."""

from adapters.lora import Lora
from adapters.placeholder import Placeholder
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
