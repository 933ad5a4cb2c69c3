"""The settings of one training run: its inputs with all defaults filled in."""

import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, InstanceOf

from adapters.forms import Form
from adapters.placeholder_token import check_token
from families.base import Base
from families.registry import default_base, find_base_or_folder
from inference.input_fields import parts_of
from trainer.settings.checks import faults
from trainer.settings.choices import FULL, FULL_OPTIMIZER, FULL_RATE, OPTIMIZERS
from trainer.settings.epochs import in_steps
from trainer.settings.inputs import INPUTS, SettingsError, TrainingInputs
from trainer.settings.pairs import for_pairs
from trainer.settings.preservation import most_regularization, weight_of
from trainer.settings.presets import defaults_of, find_preset, steps_for
from trainer.settings.sample_prompts import read_prompts
from trainer.settings.subjects import Subject, read_subjects, wrong_subjects

__all__ = ["Settings", "SettingsError", "parse_resolutions", "resolve"]

MIN_RESOLUTION, MAX_RESOLUTION = 16, 4096  # pixels

T = TypeVar("T")


class Settings(TrainingInputs):
    """All settings of a run; equal settings and data give equal weights.

    The fields are those of `TrainingInputs`; those below are set or narrowed by `resolve`.
    """

    base: InstanceOf[Base]
    given: TrainingInputs  # for the record
    # `base` and `resolutions` as text.
    base_model: Annotated[str, Field(exclude=True)]
    resolution: Annotated[str, Field(exclude=True)]

    resolutions: tuple[int, ...]  # pixels, edges of the squares with an image's area
    controls: tuple[str, ...]  # absolute paths of folders
    caption_dropout: float
    masks: str
    rank: int  # 0: LoKr without one
    lora_targets: str
    steps: int  # 0: by the number of images (`for_images`)
    batch_size: int
    optimizer: str
    learning_rate: float
    placeholder_learning_rate: float
    lr_scheduler: str
    timestep_sampling: str
    training_shift: float
    ema_decay: float
    subjects: tuple[str, ...]  # TOKEN or TOKEN=FOLDER; empty: the usual one, placeholder_token
    preserve: float  # weight of the rows' loss; 0: off
    preserve_prompts: tuple[str, ...]  # the user's own; empty: those that come with the base
    # Control images of each training image, at most; 0: no pairs (`for_pairs`).
    pairs: Annotated[int, Field(exclude=True)] = 0
    seed: int
    seed_is_random: bool  # not given; a resumed run uses its checkpoint's
    sample_prompts: tuple[str, ...]
    sample_defaults: bool  # no prompts were given: see `trainer.monitor.default_previews`
    sample_overrides: tuple[dict[str, Any], ...]  # options of each sample prompt
    validation_images: int | None = None  # None: auto, see `trainer.monitor.validation`
    trackers: tuple[str, ...]

    @property
    def subject(self) -> str | None:
        """The (first) subject's token in captions; None without a placeholder token."""
        return self.placeholder_token if self.train_placeholder_token else None

    @property
    def named_subjects(self) -> tuple[Subject, ...]:
        """The subjects of `subjects`; empty in a run with the usual one."""
        return read_subjects(self.subjects)

    @property
    def caption_rules(
        self,
    ) -> tuple[str, str | None, str, str, bool, tuple[Subject, ...], str, tuple[int, int], int]:
        """The arguments of `trainer.data.read_dataset` and `examine` after the first, in order."""
        return (
            self.default_caption,
            None if self.subjects else self.subject,
            self.caption_prefix,
            self.caption_suffix,
            self.skip_bad_images,
            self.named_subjects,
            self.masks,
            self.control_counts,
            most_regularization(self),
        )

    @property
    def control_counts(self) -> tuple[int, int]:
        """Control images of each image that the base model needs, and takes at most."""
        return self.base.reference_counts

    @property
    def control_folders(self) -> tuple[Path, ...]:
        """Folders of control images outside the dataset."""
        return tuple(map(Path, self.controls))

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens of all subjects; empty without a placeholder token."""
        if self.subjects:
            return tuple(each.token for each in self.named_subjects)
        return (self.subject,) if self.subject is not None else ()

    @property
    def subject_text(self) -> str:
        """Tokens or trigger word of the subject, for the log."""
        if self.tokens:
            return f"token{'s' * (len(self.tokens) > 1)} {', '.join(self.tokens)}"
        return f"no token; trigger word: {self.trigger_word or 'none'}"

    @property
    def full(self) -> bool:
        """Whether the transformer's own weights are trained, not a LoRA."""
        return self.training == FULL

    @property
    def form(self) -> Form:
        """The form of the LoRA."""
        return Form(self.adapter, self.rank, self.lokr_factor)

    @property
    def training_mode(self) -> str:
        """`zero_prior` with a placeholder, `baseline` without."""
        return "zero_prior" if self.train_placeholder_token else "baseline"

    @property
    def by_validation(self) -> tuple[str, ...]:
        """The names of the enabled settings that need held-out images."""
        names = ("keep_best", "early_stopping")
        return tuple(name for name in names if getattr(self, name))

    @property
    def warmup(self) -> int:
        """Steps of the learning rate's linear warmup."""
        if self.lr_warmup_steps is not None:
            return self.lr_warmup_steps
        return 0 if OPTIMIZERS[self.optimizer].finds_rate else min(20, self.steps // 10)

    def weights_saved(self, done: int = 0) -> int:
        """How often `weights_every` saves weights after step `done`; not those of the last step."""
        every = self.weights_every
        return max(0, (self.steps - 1) // every - done // every) if every else 0

    def for_images(self, count: int, buckets: Sequence[int] = (), processes: int = 1) -> "Settings":
        """These settings with default steps for `count` images, if no steps were given.

        buckets: the numbers of images by bucket, at all resolutions (`trainer.data.bucket_sizes`),
        and the number of processes, for settings that a job file counts in epochs. Raises
        `SettingsError` if they have no step.
        """
        if self.epochs:
            try:
                return self.replace(**in_steps(self.epochs, buckets, processes))
            except (ValueError, OverflowError) as error:
                raise SettingsError(str(error)) from error
        if self.steps:
            return self
        return self.replace(steps=steps_for(self.base, find_preset(self.preset), count))


def resolve(inputs: TrainingInputs) -> Settings:
    """The settings of a run, with defaults of the preset and the base model.

    Raises `SettingsError`, `PlaceholderError` or `UnknownBase` naming the setting.
    """
    base = (
        default_base("training")
        if inputs.base_model == "auto"
        else find_base_or_folder(inputs.base_model)
    )
    defaults = defaults_of(base, find_preset(inputs.preset))
    if inputs.train_placeholder_token:
        check_token(inputs.placeholder_token)
    try:
        subjects = read_subjects(parts_of(inputs.subjects, ","))
    except ValueError as error:
        raise SettingsError(str(error)) from error
    if inputs.subjects is not None and (conflict := wrong_subjects(inputs, subjects)):
        raise SettingsError(conflict)

    # Defaults that depend on other settings.
    full = inputs.training == FULL
    optimizer = inputs.optimizer
    if full and "optimizer" not in inputs.model_fields_set:
        optimizer = FULL_OPTIMIZER
    rate = inputs.learning_rate
    if rate is None:
        rate = defaults.learning_rate * (FULL_RATE if full else 1.0)
        rate = 1.0 if OPTIMIZERS[optimizer].finds_rate else rate
    sampling = _either(inputs.timestep_sampling, defaults.timestep_sampling)
    # The base's default shift is for its default sampling.
    shift = base.training_shift if sampling == base.timestep_sampling else 1.0

    token = subjects[0].token if subjects else inputs.placeholder_token
    subject = token if inputs.train_placeholder_token else inputs.trigger_word
    try:
        resolutions = parse_resolutions(inputs.resolution, defaults.resolution)
        prompts, options = read_prompts(
            parts_of(inputs.sample_prompts, "\n"),
            inputs.sample_options,
            subject,
            inputs.foreign_captions,
            [each.token for each in subjects],
        )
        validation_images = _count(inputs.validation_images)
        # Without token and trigger word, the images of all prompts are to change.
        preserve = weight_of(inputs.preserve, base.preservation if subject else 0.0)
        preserve_prompts = parts_of(inputs.preserve_prompts, "\n")
        if inputs.preserve_prompts is not None and not preserve_prompts:
            raise ValueError(
                "preserve_prompts is empty; remove it to use the prompts that come with the model, "
                "or set preserve to off"
            )
    except ValueError as error:
        raise SettingsError(str(error)) from error

    settings = Settings(
        base=base,
        given=inputs,
        base_model=base.name,
        resolution=",".join(map(str, resolutions)),
        resolutions=resolutions,
        caption_dropout=_either(inputs.caption_dropout, defaults.caption_dropout),
        rank=_either(inputs.rank, 0 if inputs.adapter == "lokr" else defaults.rank),
        lora_targets=_text(inputs.lora_targets),
        steps=_either(inputs.steps, 0),
        batch_size=_either(inputs.batch_size, defaults.batch_size),
        optimizer=optimizer,
        learning_rate=rate,
        placeholder_learning_rate=_either(
            inputs.placeholder_learning_rate, defaults.placeholder_learning_rate
        ),
        lr_scheduler=_either(inputs.lr_scheduler, defaults.lr_scheduler),
        timestep_sampling=sampling,
        training_shift=_either(inputs.training_shift, shift),
        ema_decay=_either(inputs.ema_decay, defaults.ema_decay),
        masks=_either(inputs.masks, defaults.masks),
        controls=tuple(
            str(Path(each).expanduser().absolute()) for each in parts_of(inputs.controls, ",")
        ),
        subjects=tuple(map(str, subjects)),
        placeholder_token=token,
        preserve=preserve,
        preserve_prompts=preserve_prompts,
        seed=secrets.randbelow(2**31) if inputs.seed is None else inputs.seed,
        seed_is_random=inputs.seed is None,
        sample_prompts=prompts,
        sample_defaults=inputs.sample_prompts is None,
        sample_overrides=options,
        validation_images=validation_images,
        trackers=parts_of(inputs.trackers, ","),
        **{name: getattr(inputs, name) for name in _UNCHANGED},
    )
    if base.needs_references or (base.most_references and settings.controls):
        settings = for_pairs(settings, max(1, len(settings.controls)))
    if wrong := faults(settings):
        raise SettingsError("; ".join(wrong))
    return settings


_UNCHANGED = TrainingInputs.model_fields.keys() - Settings.__annotations__.keys()
_UNCHANGED -= {"placeholder_token"}


def _either(given: T | None, default: T) -> T:
    return default if given is None else given


def _text(given: str | Sequence[str]) -> str:
    """A list as one text with commas."""
    return given if isinstance(given, str) else ",".join(parts_of(given, ","))


def parse_resolutions(
    given: int | str | Sequence[int | str] | None, default: int
) -> tuple[int, ...]:
    """Parses a `resolution`, edge lengths in pixels: 512, "512,768,1024" or a list of them.

    Returns unique sorted lengths. Raises ValueError for anything else, and for lengths outside 16
    to 4096.
    """
    text = ",".join(parts_of([given] if isinstance(given, int) else given, ",")) or str(default)
    edges = set()
    for part in text.split(","):
        if not re.fullmatch(r"[0-9]{1,9}", part.strip()):
            raise ValueError(
                f"resolution {text[:80]!r} is invalid; "
                'use an edge length in pixels like "1024", or several with commas like "512,768"'
            )
        edge = int(part)
        if not MIN_RESOLUTION <= edge <= MAX_RESOLUTION:
            raise ValueError(
                f"resolution {edge} is out of range; use {MIN_RESOLUTION} to {MAX_RESOLUTION}"
            )
        edges.add(edge)
    return tuple(sorted(edges))


def _count(given: int | str | None) -> int | None:
    """Parses a number of images; `auto` is None."""
    text = "auto" if given is None else str(given).strip()
    if text in ("", "auto"):
        return None
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(
            f"validation_images is {text[:80]!r}; it must be auto or a number of images"
        )
    if fault := INPUTS["validation_images"].fault("validation_images", int(text)):
        raise ValueError(fault)
    return int(text)
