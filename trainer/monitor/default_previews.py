"""Default preview images, if the settings contain no `sample_prompts` (`[]`: no previews).

Two prompts, built from the token or trigger word and the captions: one close to the dataset, one
far from it. With several subjects: one of each, one with two of them, one without any. Of pairs:
the first two edits. Images are generated before the first step, in the middle and at the end.
"""

import logging
import math
from collections.abc import Sequence
from typing import TypeVar

import torch

from families.loading import default_device, default_dtype
from families.memory import free_memory
from families.tokens import mentions, name_subject
from families.without_weights import transformer_without_weights
from inference.request import LONGEST
from trainer.data import Example
from trainer.settings import Settings

log = logging.getLogger(__name__)

Pair = TypeVar("Pair")

EDGE = 768  # maximum pixels; Qwen-Image needs half a minute for an image of 1024 on an H100
MAX_CHARACTERS = 1000  # longer captions are used as a prompt only if there is no shorter one
PAIRS = 2  # whose edits are the default previews of a run on pairs
SHARE = 0.05  # maximum share of the run's compute for previews that include the middle
BACKWARD = 3  # a training step in forward passes: the backward pass costs two


def with_default_previews(
    settings: Settings, captions: Sequence[str], pairs: Sequence[Example] = ()
) -> Settings:
    """The settings with prompts, size and interval of the default previews, if enabled.

    The number of steps must be known. A given size or `sample_every` is kept. Previews of pairs
    have the aspect ratio of their last control image (`pair_of`), also those of given prompts.
    """
    if not settings.sample_defaults:
        return _sized(settings, pairs, settings.base.reference_resolution) if pairs else settings
    if pairs:
        edge = max(32, min(EDGE, *settings.resolutions))
        prompts = tuple(each.caption for each in pairs[:PAIRS])
        return _with_interval(_sized(settings.replace(sample_prompts=prompts), pairs, edge))
    options = dict(settings.sample_options)
    if not {"width", "height", "aspect_ratio"} & options.keys():
        edge = max(32, min(EDGE, *settings.resolutions) // 32 * 32)
        options |= {"width": edge, "height": edge}
    prompts = default_prompts(settings, captions)
    return _with_interval(settings.replace(sample_prompts=prompts, sample_options=options))


def _with_interval(chosen: Settings) -> Settings:
    """The settings with an interval of the default previews, unless one is given."""
    if chosen.sample_every:
        return chosen
    share, steps, prompts = cost(chosen, moments=3), chosen.steps, chosen.sample_prompts
    every = math.ceil(steps / 2) if share <= SHARE else steps
    middle = f", after {every:,} steps" if every < steps else ""
    log.info("preview images: before the first step%s and at the end, of: %s", middle, prompts)
    if share > SHARE and steps > 1:
        log.info("no preview images in the middle: they would add %.0f %% compute", 100 * share)
    return chosen.replace(sample_every=every)


def pair_of(number: int, pairs: Sequence[Pair]) -> Pair:
    """The pair whose control images the preview of a prompt begins with: each prompt another."""
    return pairs[number % len(pairs)]


def _sized(settings: Settings, pairs: Sequence[Example], edge: int) -> Settings:
    """The settings with the size of each preview without one: about edge² pixels."""
    own, sizes = settings.sample_overrides or ({},) * len(settings.sample_prompts), []
    for number, options in enumerate(own):
        if not {"width", "height", "aspect_ratio"} & (settings.sample_options | options).keys():
            last = pair_of(number, pairs).controls[-1]
            ratio = min(max(last.width / last.height, 1 / LONGEST), LONGEST)
            sides = (edge * ratio**0.5, edge / ratio**0.5)
            width, height = (max(32, round(side / 32) * 32) for side in sides)
            options = options | {"width": width, "height": height}
        sizes.append(options)
    return settings.replace(sample_overrides=tuple(sizes))


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
    options = options | next(iter(settings.sample_overrides), {})
    edge = base.default_resolution
    pixels = (options.get("width") or edge) * (options.get("height") or edge)
    guidance = options.get("guidance_scale") or base.guidance_scale
    passes = options.get("num_inference_steps") or base.inference_steps
    passes *= options.get("num_outputs", 1) * (2 if guidance > 1 else 1)
    images = moments * len(settings.sample_prompts)
    seen = settings.steps * settings.batch_size * settings.gradient_accumulation
    trained = sum(each**2 for each in settings.resolutions) / len(settings.resolutions)
    return images * passes * pixels / (BACKWARD * seen * trained)


def previews_while_training(settings: Settings, quantized: bool) -> bool:
    """Whether memory suffices for previews during training; else only the last step has them.

    Previews need the original weights: up to two copies in CPU memory, or a second base model if
    the base is quantized. A default must not fill the memory.
    """
    if not settings.sample_defaults:
        return True
    width = default_dtype(default_device()).itemsize
    transformer = transformer_without_weights(settings.base)
    needed = 2 * width * sum(each.numel() for each in transformer.parameters())
    free = free_memory(torch.device("cpu"))
    if quantized:
        why = "the base is quantized, and previews need its original weights too"
    elif needed > free / 2:
        why = f"they need up to {needed / 1e9:.0f} GB of CPU memory, {free / 1e9:.0f} GB are free"
    else:
        return True
    log.info("preview images only at the end: %s", why)
    return False
