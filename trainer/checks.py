"""What can be wrong with settings by themselves, before data or models are looked at."""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from families.tokens import check_unicode
from trainer.noise_levels import SCHEDULED, TIMESTEP_SAMPLINGS
from trainer.optimizers import OPTIMIZERS, SCHEDULES, is_installed

if TYPE_CHECKING:
    from trainer.settings import Settings

QUANTIZATIONS = ("auto", "none", "fp8", "int8", "nf4")
TRACKERS = ("tensorboard", "wandb", "trackio")

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
    "checkpoint_every": (0, 100_000),
    "sample_every": (0, 100_000),
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
    ]


def _unreadable(settings: "Settings") -> Iterator[str]:
    texts = {name: each for name, each in vars(settings).items() if isinstance(each, str)}
    prompts = enumerate(settings.sample_prompts, start=1)
    for name, text in (texts | {f"sample prompt {n}": prompt for n, prompt in prompts}).items():
        try:
            check_unicode(name, text)
        except ValueError as error:
            yield str(error)


def _out_of_range(settings: "Settings") -> Iterator[str]:
    # 0 steps were left out.
    ranges = ({"steps": (1, 100_000)} if settings.steps else {}) | RANGES
    if settings.lr_warmup_steps is not None:
        ranges["lr_warmup_steps"] = (0, settings.steps or 100_000)
    if settings.validation_every is not None:
        ranges["validation_every"] = (0, 100_000)
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


def _at_odds(settings: "Settings") -> Iterator[str]:
    name, kind = settings.optimizer, OPTIMIZERS.get(settings.optimizer)
    if kind is not None:
        if kind.needs_gpu and not torch.cuda.is_available():
            yield (
                f"optimizer {name} is for a GPU, and there is none here; use adamw, which is "
                "faster on a CPU"
            )
        if not is_installed(name):
            yield f"optimizer {name} needs a package: pip install {kind.package}"
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
