"""Chooses quantization, checkpointing and offloading from free memory, and logs the choice."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from families.family import Family
from families.memory import free_memory
from families.out_of_memory import is_out_of_memory
from families.quantization import check_available, usable
from families.sharding import processes_here
from families.without_weights import family_without_weights
from inference.acceleration import wanted_in_training
from inference.request import Request, wanted_size
from trainer.learning import BATCH_PIXELS, BATCH_TOKENS, Saver, by_main, least_of_all, sharing
from trainer.memory.counting import figures
from trainer.memory.host import host_parts, host_previews, room_of
from trainer.memory.plan import Choice, Figures, Mode, Wishes, choose, leaner
from trainer.memory.shapes import Shape
from trainer.settings import Settings, extent_of

log = logging.getLogger(__name__)

ROUNDED_TO = 32  # pixels: a multiple of every base's resolution multiple
TEXT_TOKENS = 128  # of a caption with its template, if the captions are unknown
# Above the activations of one pixel in float32: 52 kB for Qwen-Image, the largest base.
_PIXEL_BYTES = 64_000


class TooLarge(RuntimeError):
    """A training run that does not fit into this machine's memory."""


class RanOut(Exception):
    """Out of memory in a run; `leaner` are settings that need less memory, or None."""

    def __init__(self, mode: Mode, leaner: Settings | None) -> None:
        super().__init__(str(mode))
        self.mode, self.leaner = mode, leaner


@contextmanager
def running_out(
    settings: Settings,
    dtype: torch.dtype,
    device: torch.device,
    mode: Mode,
    saver: Saver,
) -> Iterator[None]:
    """Converts out-of-memory errors within the context to `RanOut`.

    The settings that need less memory resume from the last checkpoint of `saver`. Keeps no
    reference to the base model, which is freed before the next attempt.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        log.warning("out of memory with the %s: %s", mode, str(error).partition("\n")[0])
        # The length of captions has little effect on the difference between modes. Compilation may
        # have failed, so plain blocks are counted.
        counted = figures_of(settings, TEXT_TOKENS, dtype)
        less = leaner(counted, mode, wishes_of(settings), usable(device))
        if less is None:
            raise RanOut(mode, None) from error
        changed = settings.replace(
            quantize=less.quantize,
            gradient_checkpointing=bool(less.checkpointing),
            low_memory=less.offload,
            resume_from=saver.newest or settings.resume_from,
        )
        raise RanOut(mode, changed) from error


def fit(settings: Settings, family: Family, captions: Sequence[str]) -> Choice:
    """Chooses the memory mode of a run and logs the reason on one line.

    The main process chooses for all, by the least memory that any of them has.

    Raises `QuantizationUnavailable` if the set quantization cannot run on this machine, and
    `TooLarge` if CPU memory does not suffice.
    """
    if settings.quantize not in ("auto", "none"):
        check_available(settings.quantize, family.device)
    gpus = sharing()
    if family.device.type == "cpu":
        return by_main(lambda: _on_cpu(settings, family, gpus))
    free = least_of_all(free_memory(family.device))
    # Processes of one machine have the same CPU memory.
    host = least_of_all(room_of(free_memory(torch.device("cpu"))) // processes_here())
    longest = max((len(family.tokenize(text).ids) for text in {*captions}), default=TEXT_TOKENS)
    compiled = wanted_in_training(family.device)
    tokens = min(longest, family.max_text_tokens)

    def chosen() -> Choice:
        counted = figures_of(settings, tokens, family.dtype, compiled)
        return _on_gpu(settings, family, counted, gpus, free, host)

    return by_main(chosen)


def _on_gpu(
    settings: Settings, family: Family, counted: Figures, gpus: int, free: int, host: int
) -> Choice:
    """free: bytes of a GPU; host: bytes of CPU memory for each process."""
    wishes = wishes_of(settings, gpus)
    if family.device.type == "mps" and wishes.offload is None:
        wishes = replace(wishes, offload=False)  # its memory is the CPU's
    choice = choose(counted, free, wishes, usable(family.device))
    choice = _with_host(settings, counted, choice, host)
    (log.info if choice.fits else log.warning)("memory: %s", choice.reason)
    if choice.no_previews:
        log.warning("no preview images during training: %s", choice.no_previews)
    _log_text_encoder(settings, choice)
    return choice


def _with_host(settings: Settings, counted: Figures, choice: Choice, room: int) -> Choice:
    """The choice, without previews if CPU memory does not suffice for them; logs what it needs.

    Raises `TooLarge` if it does not suffice for the run: the system would kill the process.
    """
    count = processes_here()
    parts = {name: count * size for name, size in host_parts(counted, choice.mode).items()}
    need, room = sum(parts.values()), count * room
    contents = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
    line = f"CPU memory: needs {need / 1e9:.1f} GB ({contents}) of {room / 1e9:.1f} GB"
    if need > room:
        advice = "free some, or use a machine with more"
        if choice.mode.offload and choice.mode.quantize == "none":
            advice = "set quantize to int8, which needs half, or free some"
        raise TooLarge(f"{line}, which is not enough with the {choice.mode}; {advice}")
    log.info("%s", line)
    previews = host_previews(counted, choice.mode, is_merged(settings))
    if need + previews > room and not choice.no_previews:
        why = f"an image needs {previews / 1e9:.1f} GB more CPU memory, and "
        why += f"{(room - need) / 1e9:.1f} GB are free"
        return replace(choice, no_previews=why)
    return choice


def is_merged(settings: Settings) -> bool:
    """Whether a training adapter is merged into the base."""
    if settings.turbo_adapter == "auto":
        return bool(settings.base.training_adapters)
    return settings.turbo_adapter != "none"


def _on_cpu(settings: Settings, family: Family, gpus: int) -> Choice:
    """The mode on a CPU, where models are small: only what the settings contain."""
    mode = mode_on_cpu(wishes_of(settings, gpus))
    text = "none" if settings.subject is not None or mode.shards > 1 else mode.quantize
    reason = f"{mode} (CPU: quantization, checkpointing, offloading and sharding only if set)"
    choice = Choice(mode, text, 0, True, reason)
    log.info("memory: %s", choice.reason)
    _log_text_encoder(settings, choice)
    check_cpu_memory(settings, mode, family.dtype)
    return choice


def mode_on_cpu(wishes: Wishes) -> Mode:
    """The mode that contains only the wishes."""
    quantize = "none" if wishes.quantize == "auto" else wishes.quantize
    shards = wishes.gpus if wishes.shard else 1
    return Mode(quantize, float(wishes.checkpointing or 0), bool(wishes.offload), shards)


def check_cpu_memory(settings: Settings, mode: Mode, dtype: torch.dtype) -> None:
    """Raises `TooLarge` if a run on a CPU needs more memory than is free.

    Otherwise the system would kill the process. Counting takes a second, so it is skipped if an
    upper bound by the sizes is below the free memory.
    """
    free, edge = free_memory(torch.device("cpu")), max(settings.resolutions)
    family = family_without_weights(settings.base, dtype)
    parts = (family.transformer, family.text_encoder, family.vae)
    values = sum(each.numel() for part in parts for each in part.parameters())
    # Includes the optimizer's state and copies of the LoRA, which is smaller than the model.
    pixels = edge**2 + settings.pairs * settings.base.reference_resolution**2
    bound = 8 * 4 * values + _PIXEL_BYTES * settings.batch_size * pixels
    if bound < free:
        return
    counted = figures_of(settings, TEXT_TOKENS, dtype)
    need = counted.peak(mode)
    if need <= free:
        return
    less = counted.peak(replace(mode, checkpointing=1.0))
    raise TooLarge(
        f"this run needs about {need / 1e9:.1f} GB of memory, but {free / 1e9:.1f} GB are free; "
        f"lower batch_size ({settings.batch_size}) or resolution ({edge})"
        + (
            f", or set gradient_checkpointing, which needs about {less / 1e9:.1f} GB"
            if less <= free and not mode.checkpointing
            else ""
        )
    )


def _log_text_encoder(settings: Settings, choice: Choice) -> None:
    if settings.subject is not None and choice.mode.quantize != "none":
        log.info(
            "the text encoder is not quantized: %s is trained through it, and inference uses the "
            "unquantized text encoder",
            settings.subject,
        )


def figures_of(
    settings: Settings,
    text_tokens: int,
    dtype: torch.dtype,
    compiled: bool = False,
) -> Figures:
    """The figures of a run at its largest resolution, with or without compiled blocks."""
    form, edge, controls = settings.form, max(settings.resolutions), settings.pairs
    encoded = settings.base.reference_resolution if controls else edge
    images = [
        Shape(form, max(1, BATCH_PIXELS // side**2), side, side, text_tokens)
        for side in {*settings.resolutions, encoded}
    ]
    preview = None
    if settings.sample_prompts:
        width, height = preview_size(settings)
        preview = Shape(form, 1, width, height, text_tokens, controls)
    return figures(
        settings.base,
        settings.lora_targets,
        Shape(form, settings.batch_size, edge, edge, text_tokens, controls),
        placeholder=settings.subject is not None,
        optimizer=settings.optimizer,
        ema=settings.ema_decay > 0,
        accumulates=settings.gradient_accumulation > 1,
        images=images,
        captions=1 if controls else max(1, BATCH_TOKENS // text_tokens),
        preview=preview,
        preservation=extent_of(settings) if settings.preserve else None,
        dtype=dtype,
        # The share that compiled blocks keep was measured with frozen weights.
        compiled=compiled and not settings.full,
        full=settings.full,
        kept_copies=settings.keep_best + bool(settings.preserve),
    )


def preview_size(settings: Settings) -> tuple[int, int]:
    """Width and height of the preview images in pixels, rounded up."""
    request = Request(prompt=settings.sample_prompts[0], **settings.sample_options)
    width, height = wanted_size(request, settings.base)
    return _rounded(width), _rounded(height)


def _rounded(side: float) -> int:
    return math.ceil(side / ROUNDED_TO) * ROUNDED_TO


def wishes_of(settings: Settings, gpus: int = 1) -> Wishes:
    """The modes that the settings allow on so many GPUs of a machine.

    Weights that are trained are in 16 bits on each of them.
    """
    return Wishes(
        "none" if settings.full else settings.quantize,
        settings.gradient_checkpointing,
        False if settings.full else settings.low_memory,
        False if settings.full else settings.shard if gpus > 1 else None,
        gpus,
        previews=bool(
            settings.sample_prompts and settings.sample_every and not settings.sample_defaults
        ),
    )
