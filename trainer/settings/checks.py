"""What can be wrong with settings by themselves, before data or models are looked at."""

import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.placeholder_token import MAX_LENGTH
from families.tokens import check_unicode
from inference.request import LENGTHS as PROMPT_LENGTHS
from inference.request import Request, check_length, check_size, out_of_range
from trainer.settings.choices import (
    LR_SCHEDULERS,
    MAX_STEPS,
    OPTIMIZERS,
    QUANTIZATIONS,
    SCHEDULED,
    TIMESTEP_SAMPLINGS,
    TRACKERS,
    is_installed,
)
from trainer.settings.presets import PRESETS

if TYPE_CHECKING:
    from trainer.settings.fields import Settings

# Times the default: on the miniature, 20 times ends in noise (`trainer.result.result_checks`).
HIGH_RATE = 20
LEAST_FACTOR = 0.01  # of a rate that is found; what is below was meant for another optimiser

# The bounds of every number, the choices of every name, and the length of every text. The defaults
# are in `trainer.settings.fields`. docs/training.md has both, and train.py repeats them for Cog; a
# test compares all of them.
RANGES: dict[str, tuple[float, float]] = {
    "rank": (1, 256),
    "steps": (1, MAX_STEPS),
    "lr_warmup_steps": (0, MAX_STEPS),
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
    "validation_every": (0, MAX_STEPS),
    "validation_images": (0, MAX_STEPS),
    "checkpoint_every": (0, MAX_STEPS),
}
CHOICES: dict[str, Sequence[str]] = {
    "optimizer": tuple(OPTIMIZERS),
    "lr_scheduler": LR_SCHEDULERS,
    "timestep_sampling": TIMESTEP_SAMPLINGS,
    "quantize": ("auto", "none", *QUANTIZATIONS),
    "preset": tuple(PRESETS),
    "trackers": TRACKERS,  # each of them
}
# Characters. `sample_prompts` counts all of them, with line ends.
LENGTHS: dict[str, int] = {
    "default_caption": PROMPT_LENGTHS["prompt"],
    "placeholder_token": MAX_LENGTH,
    "trigger_word": 1_000,
    "caption_prefix": 1_000,
    "caption_suffix": 1_000,
    "lora_targets": 1_000,
    "turbo_adapter": 1_000,  # the longest path that systems commonly take is 1,024
    "resolution": 64,
    "trackers": 64,
    "validation_images": 16,
    "sample_prompts": 20_000,
    "name": 64,
    "wandb_project": 128,
    "wandb_run": 128,
    "wandb_entity": 128,
    "hf_repo_id": 128,
    "wandb_api_key": 1_000,
    "hf_token": 1_000,
}
MOST_SAMPLE_PROMPTS = 64
MOST_RESOLUTIONS = 8  # all images are encoded at each of them

# Settings that become part of a path or file name, here or in a library.
NAMES = ("name", "wandb_project", "wandb_run", "wandb_entity")
NAME_BYTES = 200  # file systems take 255, and some is put before and after
_RESERVED = {"CON", "PRN", "AUX", "NUL"} | {
    f"{x}{n}" for x in ("COM", "LPT") for n in "123456789¹²³"
}


IN_WORDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
}


def mistyped(given: Mapping[str, Any], types: Mapping[str, Any]) -> list[str]:
    """One line for each value that is not of its setting's type, as plain Python can pass it."""
    found = []
    for name, value in given.items():
        wanted = types.get(name)
        kinds = [each for each in typing.get_args(wanted) or (wanted,) if each is not type(None)]
        if value is None or not all(kind in IN_WORDS for kind in kinds):
            continue
        accepted = (*kinds, int) if float in kinds else tuple(kinds)
        if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(IN_WORDS[kind] for kind in kinds)
            found.append(f"{name} is {repr(value)[:80]}; it must be {expected}")
    return found


def faults(settings: "Settings") -> list[str]:
    """One line for each setting that is out of range or does not go with another."""
    return [
        *_unreadable(settings),
        *_too_long(settings),
        *_not_names(settings),
        *_too_large(settings),
        *_out_of_range(settings),
        *_unknown(settings),
        *_at_odds(settings),
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


def _too_long(settings: "Settings") -> Iterator[str]:
    texts = {name: getattr(settings, name, None) for name in LENGTHS}
    texts["sample_prompts"] = "\n".join(settings.sample_prompts)
    for name, text in texts.items():
        if isinstance(text, str) and name not in NAMES:  # names have a sentence of their own
            try:
                check_length(name, text, LENGTHS[name])
            except ValueError as error:
                yield str(error)
    for number, prompt in enumerate(settings.sample_prompts, start=1):
        if len(prompt) > PROMPT_LENGTHS["prompt"]:
            yield (
                f"sample prompt {number} has {len(prompt):,} characters; at most "
                f"{PROMPT_LENGTHS['prompt']:,} are accepted"
            )
    if len(settings.sample_prompts) > MOST_SAMPLE_PROMPTS:
        yield (
            f"sample_prompts are {len(settings.sample_prompts):,}; at most {MOST_SAMPLE_PROMPTS} "
            "are accepted"
        )


def _not_names(settings: "Settings") -> Iterator[str]:
    for name in NAMES:
        text = getattr(settings, name, None)
        if text is not None and (fault := fault_of_name(text, LENGTHS[name])):
            yield f"{name} {text[:80]!r} {fault}; use a plain name such as red-fox"


def fault_of_name(text: str, most: int = 128) -> str | None:
    """Why a text is not a plain name, which is a file name on every system; None where it is."""
    if not 1 <= len(text) <= most:
        return f"has {len(text)} characters, not 1 to {most}"
    if any(0xD800 <= ord(character) <= 0xDFFF for character in text) or not text.isprintable():
        return "contains characters that do not print"
    if any(character in text for character in "/\\:"):
        return "contains a slash, a backslash or a colon"
    if text.startswith((".", "~")) or text.endswith(".") or text != text.strip():
        return "begins with a dot, ~ or a space, or ends with a dot or a space"
    if text.partition(".")[0].strip().upper() in _RESERVED:
        return "is reserved by Windows"
    if len(text.encode()) > NAME_BYTES:
        return f"has {len(text.encode())} bytes, more than {NAME_BYTES}"
    return None


def _too_large(settings: "Settings") -> Iterator[str]:
    base, edges = settings.base, settings.resolutions
    if max(edges) > base.largest_resolution:
        yield (
            f"resolution {max(edges)} is too large for {base.name}; at most "
            f"{base.largest_resolution} is accepted"
        )
    if len(edges) > MOST_RESOLUTIONS:
        yield f"resolution has {len(edges)} edge lengths; at most {MOST_RESOLUTIONS} are accepted"
    if settings.sample_options:
        try:
            check_size(_preview(settings.sample_options), base)
        except ValueError as error:
            yield f"sample options: {error}"
    for number, own in enumerate(settings.sample_overrides, start=1):
        try:
            check_size(_preview(settings.sample_options | own), base)
        except ValueError as error:
            yield f"sample prompt {number}: {error}"


def _preview(options: Mapping[str, Any]) -> Request:
    """A request with the options of a preview. Raises ValueError."""
    if ("width" in options) != ("height" in options):  # the other one may come with each prompt
        options = {k: v for k, v in options.items() if k not in ("width", "height")}
    return Request(prompt="-", **options)


def _out_of_range(settings: "Settings") -> Iterator[str]:
    for name, (low, high) in RANGES.items():
        value = getattr(settings, name)
        if value is None or (name == "steps" and value == 0):  # the number of images decides
            continue
        if (fault := out_of_range(name, value, low, high, type(settings))) is not None:
            yield fault


def _unknown(settings: "Settings") -> Iterator[str]:
    values = {name: getattr(settings, name) for name in CHOICES}
    named = [
        (name, each, CHOICES[name])
        for name, value in values.items()
        for each in (value if isinstance(value, tuple) else (value,))
    ]
    for name, value, known in named:
        if value is not None and value not in known:
            near = difflib.get_close_matches(str(value).lower(), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            yield f"{name} {str(value)[:80]!r} is not one of {', '.join(known)}{hint}"
    wanted, versions = settings.turbo_adapter, settings.base.training_adapters
    if wanted not in ("auto", "none", *versions) and not _is_file(wanted):
        known = ", ".join(("auto", "none", *versions))
        yield (
            f"turbo_adapter is {wanted[:80]!r}; for {settings.base.name} it is one of {known}, "
            "or a LoRA file"
        )


def _is_file(path: str) -> bool:
    try:
        return Path(path).expanduser().is_file()
    except (OSError, RuntimeError):  # too long for a file system; ~ of somebody who is not there
        return False


def _at_odds(settings: "Settings") -> Iterator[str]:
    if settings.validation_images and settings.validation_every == 0:
        yield (
            f"validation_images is {settings.validation_images}, but validation_every is 0, so "
            "they would never be measured; remove one of the two"
        )
    name, kind = settings.optimizer, OPTIMIZERS.get(settings.optimizer)
    if kind is not None:
        if kind.finds_rate and settings.learning_rate < LEAST_FACTOR:
            yield (
                f"learning_rate is {settings.learning_rate:g}, but {name} finds the rate by itself "
                "and takes this as a factor; leave it out, which is 1"
            )
    warmup, steps = settings.lr_warmup_steps, settings.steps
    if warmup is not None and 0 < steps < warmup:
        yield f"lr_warmup_steps is {warmup}, more than the {steps} steps of the run"
    if settings.train_placeholder_token and settings.trigger_word is not None:
        yield (
            f"trigger_word is {settings.trigger_word[:80]!r}, but a placeholder token is trained "
            f"({settings.placeholder_token}), and TOK can stand for only one of them; remove "
            "trigger_word, or set train_placeholder_token to false"
        )
    if settings.timestep_sampling == SCHEDULED and settings.training_shift != 1:
        yield (
            f"training_shift is {settings.training_shift:g}, but timestep_sampling {SCHEDULED} has "
            "the shift of the base's own schedule; leave training_shift out"
        )


def high_rates(settings: "Settings") -> list[str]:
    """One line for each learning rate that is far above the base model's default."""
    found = []
    for name in ("learning_rate", "placeholder_learning_rate"):
        rate, default = getattr(settings, name), getattr(settings.base, name)
        trained = name == "learning_rate" or settings.subject is not None
        # A rate that the optimizer finds by itself is given as a factor.
        is_factor = name == "learning_rate" and OPTIMIZERS[settings.optimizer].finds_rate
        if trained and not is_factor and rate > HIGH_RATE * default:
            found.append(
                f"{name} is {rate:g}, {rate / default:,.0f} times the default of "
                f"{settings.base.name} ({default:g}); training will most likely fail"
            )
    return found


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
