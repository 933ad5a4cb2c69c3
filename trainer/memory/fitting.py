"""Fits a training into this machine: what is free, what is needed, and the choice said aloud."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from families.family import Family
from families.memory import free_memory
from families.out_of_memory import is_out_of_memory
from families.quantization import (
    QUANTIZATIONS,
    QuantizationUnavailable,
    check_available,
)
from families.without_weights import family_without_weights
from inference.request import Request, wanted_size
from trainer.learning import BATCH_PIXELS, BATCH_TOKENS, Saver, least_of_all
from trainer.memory.plan import Choice, Figures, Mode, Wishes, choose, figures, leaner
from trainer.memory.step_cost import Shape
from trainer.settings import Settings

log = logging.getLogger(__name__)

ROUNDED_TO = 32  # pixels: a multiple of every base's own
TEXT_TOKENS = 128  # of a caption inside its template, where the captions are not known yet
# More than the activations of one pixel in float32: 52 kB for Qwen-Image, the largest base.
_PIXEL_BYTES = 64_000


class TooLarge(RuntimeError):
    """A training that this machine's memory does not hold."""


class RanOut(Exception):
    """Memory ran out in the middle of a training; `leaner` is what would take less, or None."""

    def __init__(self, mode: Mode, leaner: Settings | None) -> None:
        super().__init__(str(mode))
        self.mode, self.leaner = mode, leaner


@contextmanager
def running_out(
    settings: Settings, dtype: torch.dtype, device: torch.device, mode: Mode, saver: Saver
) -> Iterator[None]:
    """Inside, a device that is out of memory raises `RanOut`.

    The settings that need less memory resume from the checkpoint that `saver` has written last. It
    holds nothing of the base model, which has to leave memory before the result is checked.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        log.warning("out of memory with the %s: %s", mode, str(error).partition("\n")[0])
        # The caption's length weighs little in what the modes differ by.
        counted = figures_of(settings, TEXT_TOKENS, dtype)
        less = leaner(counted, mode, wishes_of(settings), usable(device))
        if less is None:
            raise RanOut(mode, None) from error
        changed = settings.replace(
            quantize=less.quantize,
            gradient_checkpointing=less.checkpointing,
            low_memory=less.offload,
            resume_from=saver.newest or settings.resume_from,
        )
        raise RanOut(mode, changed) from error


def fit(settings: Settings, family: Family, captions: Sequence[str]) -> Choice:
    """How this training will lie in memory; one line in the log says why.

    Raises `QuantizationUnavailable` where a wish cannot be granted on this machine.
    """
    if settings.quantize not in ("auto", "none"):
        check_available(settings.quantize, family.device)
    if family.device.type == "cpu":
        choice = _as_wished(settings)
        check_host_memory(settings, choice.mode, family.dtype)
        return choice
    longest = max((len(family.tokenize(text).ids) for text in {*captions}), default=TEXT_TOKENS)
    counted = figures_of(settings, min(longest, family.max_text_tokens), family.dtype)
    # The same number in every process, so that all of them train in the same way.
    free = least_of_all(free_memory(family.device))
    choice = choose(counted, free, wishes_of(settings), usable(family.device))
    (log.info if choice.fits else log.warning)("memory: %s", choice.reason)
    if choice.no_previews:
        log.warning("no preview images while training: %s", choice.no_previews)
    _tell_of_text(settings, choice)
    return choice


def _as_wished(settings: Settings) -> Choice:
    """On a CPU, where models are small, nothing is done but what is asked for."""
    wishes = wishes_of(settings)
    quantize = "none" if wishes.quantize == "auto" else wishes.quantize
    mode = Mode(quantize, bool(wishes.checkpointing), bool(wishes.offload))
    text = "none" if settings.subject is not None else quantize
    choice = Choice(mode, text, 0, True, f"{mode}: on a CPU nothing is saved unless asked for")
    log.info("memory: %s", choice.reason)
    _tell_of_text(settings, choice)
    return choice


def check_host_memory(settings: Settings, mode: Mode, dtype: torch.dtype) -> None:
    """Raises `TooLarge` where a run on a CPU needs more memory than is free.

    There, running out does not raise an error: the system ends the process. The count takes a
    second, so it is left out where an upper bound from the sizes alone is below what is free.
    """
    free, edge = free_memory(torch.device("cpu")), max(settings.resolutions)
    family = family_without_weights(settings.base, dtype)
    parts = (family.transformer, family.text_encoder, family.vae)
    values = sum(each.numel() for part in parts for each in part.parameters())
    # An optimizer's state and copies beside the LoRA, which is smaller than the model.
    bound = 8 * 4 * values + _PIXEL_BYTES * settings.batch_size * edge**2
    if bound < free:
        return
    counted = figures_of(settings, TEXT_TOKENS, dtype)
    need = counted.peak(mode)
    if need <= free:
        return
    less = counted.peak(replace(mode, checkpointing=True))
    raise TooLarge(
        f"this run needs about {need / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free; "
        f"lower batch_size ({settings.batch_size}) or resolution ({edge})"
        + (
            f", or set gradient_checkpointing, which needs about {less / 1e9:.1f} GB"
            if less <= free and not mode.checkpointing
            else ""
        )
    )


def _tell_of_text(settings: Settings, choice: Choice) -> None:
    if settings.subject is not None and choice.mode.quantize != "none":
        log.info(
            "the text encoder is not quantised: %s is trained through it, and predictions read it "
            "through unrounded weights",
            settings.subject,
        )


def figures_of(settings: Settings, text_tokens: int, dtype: torch.dtype) -> Figures:
    """The numbers of a training at its largest resolution."""
    rank, edge = settings.rank, max(settings.resolutions)
    pictures = [
        Shape(rank, max(1, BATCH_PIXELS // side**2), side, side, text_tokens)
        for side in settings.resolutions
    ]
    preview = None
    if settings.sample_prompts:
        width, height = preview_size(settings)
        preview = Shape(rank, 1, width, height, text_tokens)
    return figures(
        settings.base,
        settings.lora_targets,
        Shape(rank, settings.batch_size, edge, edge, text_tokens),
        placeholder=settings.subject is not None,
        optimizer=settings.optimizer,
        ema=settings.ema_decay > 0,
        accumulates=settings.gradient_accumulation > 1,
        pictures=pictures,
        captions=max(1, BATCH_TOKENS // text_tokens),
        preview=preview,
        dtype=dtype,
    )


def preview_size(settings: Settings) -> tuple[int, int]:
    """Width and height in pixels of the preview images, before they are rounded up."""
    request = Request(prompt=settings.sample_prompts[0], **settings.sample_options)
    width, height = wanted_size(request, settings.base.default_resolution)
    return _rounded(width), _rounded(height)


def _rounded(side: float) -> int:
    return math.ceil(side / ROUNDED_TO) * ROUNDED_TO


def wishes_of(settings: Settings) -> Wishes:
    """What the settings ask for."""
    return Wishes(
        settings.quantize,
        settings.gradient_checkpointing,
        settings.low_memory,
        previews=bool(
            settings.sample_prompts and settings.sample_every and not settings.sample_defaults
        ),
    )


def usable(device: torch.device) -> list[str]:
    """The quantisations that this machine can run."""
    names = []
    for name in QUANTIZATIONS:
        try:
            check_available(name, device)
        except QuantizationUnavailable:
            continue
        names.append(name)
    return names
