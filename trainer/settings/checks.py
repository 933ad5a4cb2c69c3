"""Checks combinations of settings, before data or models are read."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.baked import own_tokens
from adapters.forms import FACTOR, MOST_RANK
from families.registry import editing, trainable
from inference.request import Request, check_size
from trainer.settings.choices import FULL_RATE, OPTIMIZERS, SCHEDULED, is_installed
from trainer.settings.full_training import conflicts_with_full
from trainer.settings.preservation import wrong_prompts

if TYPE_CHECKING:
    from trainer.settings.fields import Settings

# Times the default: on the miniature, 20 times gives noise (`trainer.result.result_checks`).
HIGH_RATE = 20
LEAST_FACTOR = 0.01  # for optimizers that find the rate; less was meant for another optimizer

MOST_SAMPLE_PROMPTS = 64
MOST_RESOLUTIONS = 8  # all images are encoded at each of them


def faults(settings: "Settings") -> list[str]:
    """One line for each setting that conflicts with another one or with the base model."""
    return [
        *_controls(settings),
        *_wrong_prompts(settings),
        *wrong_prompts(settings),
        *_too_large(settings),
        *_unknown_adapter(settings),
        *_form(settings),
        *_conflicts(settings),
        *(conflicts_with_full(settings) if settings.full else ()),
    ]


def _controls(settings: "Settings") -> Iterator[str]:
    folders, dataset = settings.controls, Path(settings.dataset).absolute()
    most = settings.base.most_references
    if folders and not most:
        yield (
            f"controls are given, but {settings.base.name} does not edit images; remove them, or "
            f"set base_model to one of {', '.join(editing())}"
        )
    elif len(folders) > most:
        yield (
            f"controls names {len(folders)} folders; {settings.base.name} takes at most {most} "
            "control images"
        )
    if dataset in map(Path.absolute, settings.control_folders):
        yield "controls is the dataset itself; name the folder of the images before the edit"


def _wrong_prompts(settings: "Settings") -> Iterator[str]:
    prompt = Request.inputs()["prompt"]
    for number, each in enumerate(settings.sample_prompts, start=1):
        if fault := prompt.fault(f"sample prompt {number}", each):
            yield fault
    for name, value in settings.sample_options.items():
        known = Request.inputs().get(name)
        if known is not None and (fault := known.fault(f"sample.{name}", value)):
            yield fault
    if "apply_lora" in settings.sample_options:
        yield "sample.apply_lora: preview images always apply the LoRA; remove it"
    if len(settings.sample_prompts) > MOST_SAMPLE_PROMPTS:
        yield (
            f"sample_prompts has {len(settings.sample_prompts):,} prompts; at most "
            f"{MOST_SAMPLE_PROMPTS} are accepted"
        )


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
    """A request with the options of a preview image. Raises ValueError."""
    if ("width" in options) != ("height" in options):  # the other one may be set per prompt
        options = {k: v for k, v in options.items() if k not in ("width", "height")}
    return Request(prompt="-", **options)


def _unknown_adapter(settings: "Settings") -> Iterator[str]:
    wanted, versions = settings.turbo_adapter, settings.base.training_adapters
    if wanted not in ("auto", "none", *versions) and not _is_file(wanted):
        known = ", ".join(("auto", "none", *versions))
        yield (
            f"turbo_adapter is {wanted[:80]!r}; for {settings.base.name} it must be one of {known} "
            "or a LoRA file"
        )


def _is_file(path: str) -> bool:
    try:
        return Path(path).expanduser().is_file()
    except (OSError, RuntimeError):  # too long for a file system, or "~" of an unknown user
        return False


def _form(settings: "Settings") -> Iterator[str]:
    """The form of the LoRA and its size."""
    kind = settings.adapter
    if kind != "lokr" and settings.lokr_factor != FACTOR:
        yield f"lokr_factor is {settings.lokr_factor}, and adapter {kind} has none; remove it"
    if kind == "loha" and settings.rank > MOST_RANK:
        yield (
            f"rank is {settings.rank}, and a LoHa's change has up to the square of it; at most "
            f"{MOST_RANK} is accepted"
        )


def _conflicts(settings: "Settings") -> Iterator[str]:
    if settings.validation_images and settings.validation_every == 0:
        yield (
            f"validation_images is {settings.validation_images}, but validation_every is 0, so "
            "they would never be measured; remove one of the two"
        )
    for name in settings.by_validation:
        for other in ("validation_images", "validation_every"):
            if getattr(settings, other) == 0:
                yield (
                    f"{name} needs the loss on held-out images, but {other} is 0; remove {other}, "
                    f"or set {name} to false"
                )
    if settings.shard and settings.low_memory:
        yield (
            "shard and low_memory are both on: weights are either split over the GPUs or in CPU "
            "memory; remove one of the two"
        )
    name = settings.optimizer
    if OPTIMIZERS[name].finds_rate and settings.learning_rate < LEAST_FACTOR:
        yield (
            f"learning_rate is {settings.learning_rate:g}, but {name} finds the learning rate by "
            "itself and uses this as a factor; remove it for the default of 1"
        )
    taken = own_tokens(settings.base) & {*settings.tokens}
    if taken and not settings.full:
        yield (
            f"the token {' and '.join(sorted(taken))} is part of base_model {settings.base.name}, "
            "and the new one could not be used together with it; choose another placeholder_token"
        )
    warmup, steps = settings.lr_warmup_steps, settings.steps
    if warmup is not None and 0 < steps < warmup:
        yield f"lr_warmup_steps is {warmup}, more than the {steps} steps of the run"
    if settings.train_placeholder_token and settings.trigger_word is not None:
        yield (
            f"trigger_word is {settings.trigger_word[:80]!r}, but a placeholder token is trained "
            f"({', '.join(settings.tokens)}), and TOK can be replaced by only one of them; remove "
            "trigger_word, or set train_placeholder_token to false"
        )
    if settings.keep_transparency and not settings.base.alpha_channel:
        able = [name for name, each in trainable().items() if each.alpha_channel]
        yield (
            f"keep_transparency is on, but {settings.base.name} generates no alpha channel; switch "
            f"it off, or train on {' or '.join(able)}"
        )
    if settings.keep_transparency and settings.masks == "alpha":
        yield (
            "masks is alpha, so what is transparent is hardly trained on, but keep_transparency is "
            "on, to learn it; remove one of the two"
        )
    if settings.autocaption and not settings.tokens and settings.trigger_word is None:
        yield (
            f"autocaption is {settings.autocaption}, which writes captions with TOK, but there is "
            "neither a placeholder token nor a trigger_word; set one of them"
        )
    if settings.autocaption and settings.subjects:
        yield (
            f"autocaption is {settings.autocaption}, but the captions of several subjects cannot "
            "be written in one go; write them for each subject's folder with `zeroprior caption`"
        )
    if settings.timestep_sampling == SCHEDULED and settings.training_shift != 1:
        yield (
            f"training_shift is {settings.training_shift:g}, but timestep_sampling {SCHEDULED} "
            "uses the shift of the base model's schedule; remove training_shift"
        )


def high_rates(settings: "Settings") -> list[str]:
    """One line for each learning rate that is far above the base model's default."""
    found = []
    for name in ("learning_rate", "placeholder_learning_rate"):
        rate, default = getattr(settings, name), getattr(settings.base, name)
        default *= FULL_RATE if settings.full and name == "learning_rate" else 1
        trained = name == "learning_rate" or settings.subject is not None
        # For optimizers that find the rate, it is a factor.
        is_factor = name == "learning_rate" and OPTIMIZERS[settings.optimizer].finds_rate
        if trained and not is_factor and rate > HIGH_RATE * default:
            found.append(
                f"{name} is {rate:g}, {rate / default:,.0f} times the default of "
                f"{settings.base.name} ({default:g}); training will most likely fail"
            )
    return found


def missing_here(settings: "Settings") -> list[str]:
    """One line for each setting that needs a GPU or a package that this machine lacks.

    Checked before a run, not for a plan, which may be for another machine.
    """
    # These import PyTorch, which takes a second; other mistakes are reported before.
    from families.loading import default_device
    from families.quantization import QuantizationUnavailable, check_available

    lacking = missing_for_optimizer(settings.optimizer, default_device().type == "cuda")
    if settings.quantize != "auto":
        try:
            check_available(settings.quantize, default_device())
        except QuantizationUnavailable as error:
            lacking.append(str(error))
    return lacking


def missing_for_optimizer(name: str, has_gpu: bool) -> list[str]:
    """The part of `missing_here` that needs no PyTorch."""
    kind, lacking = OPTIMIZERS[name], []
    if kind.needs_gpu and not has_gpu:
        lacking.append(
            f"optimizer {name} needs a GPU, and this machine has none; adamw is faster on a CPU"
        )
    if not is_installed(name):
        lacking.append(f"optimizer {name} needs a package: pip install {kind.package}")
    return lacking
