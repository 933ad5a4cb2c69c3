"""What can be wrong with settings by themselves, before data or models are looked at."""

import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from families.tokens import check_unicode
from trainer.checkpoint import MAX_STEPS
from trainer.noise_levels import SCHEDULED, TIMESTEP_SAMPLINGS
from trainer.optimizers import OPTIMIZERS, SCHEDULES, is_installed
from trainer.outputs import is_safe_name

if TYPE_CHECKING:
    from trainer.settings import Settings

QUANTIZATIONS = ("auto", "none", "fp8", "int8", "nf4")
TRACKERS = ("tensorboard", "wandb", "trackio")

MAX_TEXT_BYTES = 64 << 10  # of a setting, as JSON: meta.json holds them all

LEAST_FACTOR = 0.01  # of a rate that is found; what is below was meant for another optimiser

RANGES: dict[str, tuple[float, float]] = {
    "rank": (1, 256),
    "batch_size": (1, 256),
    "gradient_accumulation": (1, 1000),
    "learning_rate": (0, 1),
    "placeholder_learning_rate": (0, 1),
    "placeholder_init_std": (0, 1),
    "caption_dropout": (0, 1),
    "training_shift": (0.1, 20),
    "weight_decay": (0, 1),
    "max_grad_norm": (1e-6, 1e6),
    "ema_decay": (0, 0.99999),
    "seed": (0, 2**63 - 1),
    "sample_every": (0, MAX_STEPS),
}
CHOICES: dict[str, Sequence[str]] = {
    "optimizer": tuple(OPTIMIZERS),
    "lr_scheduler": tuple(SCHEDULES),
    "timestep_sampling": TIMESTEP_SAMPLINGS,
    "quantize": QUANTIZATIONS,
}


def faults(settings: "Settings") -> list[str]:
    """One line for each setting that is out of range or does not go with another."""
    return [
        *_unreadable(settings),
        *_out_of_range(settings),
        *_unknown(settings),
        *_at_odds(settings),
        *_unsafe(settings),
    ]


def _unreadable(settings: "Settings") -> Iterator[str]:
    samples = {f"sample.{name}": each for name, each in settings.sample_options.items()}
    values = (vars(settings) | samples).items()
    texts = {name: each for name, each in values if isinstance(each, str)}
    prompts = enumerate(settings.sample_prompts, start=1)
    for name, text in (texts | {f"sample prompt {n}": prompt for n, prompt in prompts}).items():
        try:
            check_unicode(name, text)
        except ValueError as error:
            yield str(error)
    for name, value in (texts | {"sample_prompts": settings.sample_prompts}).items():
        size = len(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
        if size > MAX_TEXT_BYTES:
            yield f"{name} has {size:,} bytes; {MAX_TEXT_BYTES:,} is the most, so shorten it"


def _out_of_range(settings: "Settings") -> Iterator[str]:
    # 0 steps were left out.
    ranges = ({"steps": (1, MAX_STEPS)} if settings.steps else {}) | RANGES
    if settings.lr_warmup_steps is not None:
        ranges["lr_warmup_steps"] = (0, settings.steps or MAX_STEPS)
    for name in ("validation_every", "checkpoint_every"):
        if getattr(settings, name) is not None:
            ranges[name] = (0, MAX_STEPS)
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            yield f"{name} is {value!r}, not a number"
        elif not low <= value <= high:
            yield f"{name} is {value:g}; it lies between {low:g} and {high:g}"


def _unknown(settings: "Settings") -> Iterator[str]:
    named = [(name, getattr(settings, name), known) for name, known in CHOICES.items()]
    named += [("trackers", tracker, TRACKERS) for tracker in settings.trackers]
    for name, value, known in named:
        if value not in known:
            near = difflib.get_close_matches(str(value), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            yield f"{name} {value!r} is not one of {', '.join(known)}{hint}"
    wanted, versions = settings.turbo_adapter, settings.base.training_adapters
    if wanted not in ("auto", "none", *versions) and not Path(wanted).expanduser().is_file():
        known = ", ".join(("auto", "none", *versions))
        yield (
            f"turbo_adapter is {wanted!r}; for {settings.base.name} it is one of {known}, or a "
            "LoRA file"
        )


def _unsafe(settings: "Settings") -> Iterator[str]:
    if settings.name is not None and not is_safe_name(str(settings.name)):
        yield (
            f"name is {settings.name!r}; it becomes part of a folder's name: use up to 64 letters "
            "(a to z), digits, '.', '-' and '_', with a letter or digit first"
        )


def _at_odds(settings: "Settings") -> Iterator[str]:
    name, kind = settings.optimizer, OPTIMIZERS.get(settings.optimizer)
    if kind is not None:
        if kind.finds_rate and settings.learning_rate < LEAST_FACTOR:
            yield (
                f"learning_rate is {settings.learning_rate:g}, but {name} finds the rate by itself "
                "and takes this as a factor; leave it out, which is 1"
            )
    if settings.timestep_sampling == SCHEDULED and settings.training_shift != 1:
        yield (
            f"training_shift is {settings.training_shift:g}, but timestep_sampling {SCHEDULED} has "
            "the shift of the base's own schedule; leave training_shift out"
        )


def missing_here(settings: "Settings") -> list[str]:
    """One line for each setting that needs a GPU or a package which this machine lacks.

    Asked before a run, not of a plan, which may be for another machine.
    """
    # PyTorch takes a second to import, which a mistyped setting need not wait for.
    import torch

    from families.loading import default_device
    from families.quantization import QuantizationUnavailable, check_available

    name, kind, lacking = settings.optimizer, OPTIMIZERS[settings.optimizer], []
    if kind.needs_gpu and not torch.cuda.is_available():
        lacking.append(
            f"optimizer {name} needs a GPU, and this machine has none; adamw is faster on a CPU"
        )
    if not is_installed(name):
        lacking.append(f"optimizer {name} needs a package: pip install {kind.package}")
    if settings.quantize != "auto":
        try:
            check_available(settings.quantize, default_device())
        except QuantizationUnavailable as error:
            lacking.append(str(error))
    return lacking
