"""Default preview images, if the settings contain no `sample_prompts` (`[]`: no previews).

Two prompts, built from the token or trigger word and the captions: one close to the dataset, one
far from it. With several subjects: one of each, one with two of them, one without any. Images are
generated before the first step, in the middle and at the end.
"""

import logging
import math
from collections.abc import Sequence

import torch

from families.loading import default_device, default_dtype
from families.memory import free_memory
from families.tokens import mentions, name_subject
from families.without_weights import transformer_without_weights
from trainer.settings import Settings

log = logging.getLogger(__name__)

EDGE = 768  # maximum pixels; Qwen-Image needs half a minute for an image of 1024 on an H100
MAX_CHARACTERS = 1000  # longer captions are used as a prompt only if there is no shorter one
SHARE = 0.05  # maximum share of the run's compute for previews that include the middle
BACKWARD = 3  # a training step in forward passes: the backward pass costs two


def with_default_previews(settings: Settings, captions: Sequence[str]) -> Settings:
    """The settings with prompts, size and interval of the default previews, if enabled.

    The number of steps must be known. A given size or `sample_every` is kept.
    """
    if not settings.sample_defaults:
        return settings
    options = dict(settings.sample_options)
    if not {"width", "height", "aspect_ratio"} & options.keys():
        edge = max(32, min(EDGE, *settings.resolutions) // 32 * 32)
        options |= {"width": edge, "height": edge}
    prompts = default_prompts(settings, captions)
    chosen = settings.replace(sample_prompts=prompts, sample_options=options)
    if settings.sample_every:
        return chosen
    share, steps = cost(chosen, moments=3), settings.steps
    every = math.ceil(steps / 2) if share <= SHARE else steps
    middle = f", after {every:,} steps" if every < steps else ""
    log.info("preview images: before the first step%s and at the end, of: %s", middle, prompts)
    if share > SHARE and steps > 1:
        log.info("no preview images in the middle: they would add %.0f %% compute", 100 * share)
    return chosen.replace(sample_every=every)


def default_prompts(settings: Settings, captions: Sequence[str]) -> tuple[str, ...]:
    """A caption of the dataset, preferably with the subject, and the base model's prompt."""
    base, subject = settings.base, settings.subject or settings.trigger_word
    usable = sorted((each for each in captions if each.strip()), key=_is_long)
    if len(settings.tokens) > 1:
        return _several(settings, usable)
    if subject is None:
        far = base.preview_prompt_without_subject
    else:
        far = name_subject(base.preview_prompt, subject)
        usable = [each for each in usable if mentions(each, subject)] or usable
    return tuple(dict.fromkeys([*usable[:1], far]))


def _several(settings: Settings, captions: Sequence[str]) -> tuple[str, ...]:
    """A caption with each token alone, one with the first two, and a prompt without any."""
    base, tokens = settings.base, settings.tokens

    def caption(*wanted: str) -> str:
        exact = (
            each
            for each in captions
            if [token for token in tokens if mentions(each, token)] == [*wanted]
        )
        return next(exact, name_subject(base.preview_prompt, " and ".join(wanted)))

    each = [caption(token) for token in tokens]
    prompts = [*each, caption(*tokens[:2]), base.preview_prompt_without_subject]
    return tuple(dict.fromkeys(prompts))


def _is_long(caption: str) -> bool:
    return len(caption) > MAX_CHARACTERS


def cost(settings: Settings, moments: int) -> float:
    """Estimates the compute of previews at `moments` steps as a share of the training's.

    Counts forward passes of the transformer, each in proportion to the image's pixels.
    """
    base, options = settings.base, settings.sample_options
    edge = base.default_resolution
    pixels = (options.get("width") or edge) * (options.get("height") or edge)
    guidance = options.get("guidance_scale") or base.guidance_scale
    passes = options.get("num_inference_steps") or base.inference_steps
    passes *= options.get("num_outputs", 1) * (2 if guidance > 1 else 1)
    images = moments * len(settings.sample_prompts)
    seen = settings.steps * settings.batch_size * settings.gradient_accumulation
    trained = sum(each**2 for each in settings.resolutions) / len(settings.resolutions)
    return images * passes * pixels / (BACKWARD * seen * trained)


def previews_while_training(settings: Settings, second_base: bool) -> bool:
    """Whether memory suffices for previews during training; else only the last step has them.

    Previews need the original weights: up to two copies in CPU memory, or a second base model if
    the base is quantized or sharded. A default must not fill the memory.
    """
    if not settings.sample_defaults:
        return True
    width = default_dtype(default_device()).itemsize
    transformer = transformer_without_weights(settings.base)
    needed = 2 * width * sum(each.numel() for each in transformer.parameters())
    free = free_memory(torch.device("cpu"))
    if second_base:
        why = "the base is quantized or sharded, and previews need its original weights too"
    elif needed > free / 2:
        why = f"they need up to {needed / 1e9:.0f} GB of CPU memory, {free / 1e9:.0f} GB are free"
    else:
        return True
    log.info("preview images only at the end: %s", why)
    return False
