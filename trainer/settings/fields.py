"""The settings of one training, checked once when they enter."""

import os
import re
import secrets
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adapters.placeholder_token import check_token
from families.base import Base
from families.redact import looks_like_address, safe_name
from families.registry import default_base, find_base_or_folder
from families.tokens import check_unicode
from inference.request import check_length
from trainer.settings.checks import LENGTHS, faults, mistyped
from trainer.settings.choices import OPTIMIZERS
from trainer.settings.presets import find_preset, left_out, steps_for
from trainer.settings.sample_prompts import read_prompts

MIN_RESOLUTION, MAX_RESOLUTION = 16, 4096  # pixels


class SettingsError(ValueError):
    """A setting that is out of range or does not go with another."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything a training depends on; equal settings and data give equal weights."""

    # Data.
    dataset: Path  # zip, tar or folder
    default_caption: str = "a photo of TOK"  # of images without their own; TOK is the subject
    resolutions: tuple[int, ...]  # pixels, edge of the square with a picture's area
    caption_dropout: float  # share of samples that see an empty caption

    # What is trained.
    base: Base
    rank: int
    train_placeholder_token: bool = True
    placeholder_token: str = "<zwx>"
    placeholder_init_std: float = 1e-5  # of its embedding's entries; 0 gives exact zeros
    turbo_adapter: str = (
        "auto"  # merged while training on a distilled base: or none, a version, a file
    )

    # Optimisation.
    steps: int = 0  # 0: by the number of images, once they are read (`for_pictures`)
    batch_size: int
    learning_rate: float  # of the LoRA
    placeholder_learning_rate: float  # of the placeholder's rows
    lr_scheduler: str  # constant, linear or cosine, after the warm-up
    lr_warmup_steps: int | None = None  # None: a tenth, at most 20; prodigy has none
    weight_decay: float = 1e-4  # of the LoRA; the placeholder has none
    max_grad_norm: float = 1.0  # LoRA and placeholder are each clipped to it, separately
    training_shift: float  # of the drawn sigma; above 1 favours noise
    gradient_checkpointing: bool | None = None  # recompute activations; None: by free memory
    seed: int
    seed_is_random: bool = False  # none was given; a resumed run takes its checkpoint's

    preset: str | None = (
        None  # a row of `trainer.settings.presets` under the values that were left out
    )
    optimizer: str = "adamw"  # adamw, adamw8bit, prodigy, adafactor
    gradient_accumulation: int = 1  # batches per optimiser step
    timestep_sampling: str = "sigmoid"  # how sigma is drawn: see `trainer.learning.timesteps`
    ema_decay: float = 0.0  # of the averaged weights that are shipped; 0 ships the last ones
    lora_targets: str = "auto"  # which layers a LoRA adapts: see `Family.lora_targets`
    caption_prefix: str = ""  # put before every caption, as written
    caption_suffix: str = ""
    skip_bad_images: bool = False  # else one broken image refuses the dataset
    trigger_word: str | None = None  # only without a placeholder token: see `trainer.data.trigger`
    # Captions of an ai-toolkit job: without a trigger word TOK is text and [trigger] is removed.
    foreign_captions: bool = False

    # Memory.
    quantize: str = "auto"  # of the frozen base: auto, none, fp8, int8, nf4
    low_memory: bool | None = None  # offload what is not in use; None decides by free memory

    # Going on.
    resume_from: Path | None = None  # a checkpoint, a folder of them, or a weights.zip
    # Steps. None: ten times in a run and at least every 10 minutes; 0: only when it ends or stops.
    checkpoint_every: int | None = None

    # What is shown and written.
    output_dir: Path | None = None  # the run's own folder; None: a new one (`trainer.outputs`)
    name: str | None = None  # in the new folder's name; None: the dataset's
    sample_prompts: tuple[str, ...] = ()  # drawn while training, and with the finished weights
    sample_every: int = 0  # steps; 0: only at the end
    sample_defaults: bool = False  # no prompts were given: see `trainer.monitor.default_previews`
    validation_every: int | None = None  # steps; None for about ten times in a run, 0 for never
    validation_images: int | None = (
        None  # to hold out; None: auto, see `trainer.monitor.validation`
    )
    trackers: tuple[str, ...] = ()  # tensorboard, wandb, trackio
    wandb_project: str | None = None  # of wandb and trackio; None: zeroprior
    wandb_run: str | None = None
    wandb_entity: str | None = None
    hf_repo_id: str | None = None  # on the Hub, where the result is uploaded
    allow_failed_checks: bool = False  # upload to hf_repo_id even if a check fails
    sample_options: dict[str, Any] = field(default_factory=dict)  # fields of inference's Request
    sample_overrides: tuple[dict[str, Any], ...] = ()  # the same, of each sample prompt by itself
    log_prompt_ids: bool = False  # print how every distinct caption is tokenised
    given: dict[str, Any] = field(default_factory=dict, repr=False)  # to `settle`, for the record

    @property
    def subject(self) -> str | None:
        """The word that stands for the subject in captions; None trains without one."""
        return self.placeholder_token if self.train_placeholder_token else None

    @property
    def subject_in_words(self) -> str:
        """What stands for the subject, for the log."""
        if self.subject is not None:
            return f"token {self.subject}"
        return f"no token; trigger word: {self.trigger_word or 'none'}"

    @property
    def training_mode(self) -> str:
        """`zero_prior` with a placeholder, `baseline` without."""
        return "zero_prior" if self.train_placeholder_token else "baseline"

    @property
    def warmup(self) -> int:
        """Steps of the learning rate's linear warm-up."""
        if self.lr_warmup_steps is not None:
            return self.lr_warmup_steps
        return 0 if OPTIMIZERS[self.optimizer].finds_rate else min(20, self.steps // 10)

    def for_pictures(self, count: int) -> "Settings":
        """The same with the steps that suit so many pictures, where none were given."""
        if self.steps:
            return self
        return replace(self, steps=steps_for(self.base, find_preset(self.preset), count))


def settle(
    *,
    dataset: str | Path | None = None,
    base_model: str = "auto",
    preset: str | None = None,
    resolution: str | int | None = None,
    seed: int | None = None,
    output_dir: str | Path | None = None,
    sample_prompts: str | Sequence[str] | None = None,
    validation_images: str | int | None = None,
    trackers: str | Sequence[str] | None = None,
    resume_from: str | Path | None = None,
    **given: Any,
) -> Settings:
    """Settings from what a user gave; what is left out or None comes from preset and base.

    `sample_prompts` may be text with one prompt per line, each with options behind it
    (`trainer.settings.sample_prompts`); None stands for the default previews, "" for none.
    `trackers` may be text with commas. Raises `SettingsError`, `PlaceholderError` or `UnknownBase`
    naming the setting.
    """
    named = {name: value for name, value in locals().items() if name != "given"}
    entered = {name: value for name, value in (named | given).items() if value is not None}
    if dataset is None or str(dataset) == "":
        raise SettingsError("dataset is missing; give a zip or tar of pictures")
    base = (
        default_base("training")
        if base_model in (None, "auto")
        else find_base_or_folder(str(base_model))
    )
    try:
        for name, text in (
            ("resolution", resolution),
            ("trackers", trackers),
            ("validation_images", validation_images),
        ):
            check_length(name, text if isinstance(text, str) else "", LENGTHS[name])
        values: dict[str, Any] = left_out(base, find_preset(preset))
        edge = values.pop("resolution")
        resolutions = parse_resolutions(str(edge if resolution in (None, "") else resolution))
    except ValueError as error:
        raise SettingsError(str(error)) from error
    given = {name: value for name, value in given.items() if value is not None}
    if not str(given.get("trigger_word", "-")).strip():
        del given["trigger_word"]  # empty is none
    wrong = mistyped(given | {"seed": seed}, typing.get_type_hints(Settings))
    if wrong:
        raise SettingsError("; ".join(wrong))
    values |= given
    token = str(given.get("placeholder_token", Settings.placeholder_token))
    on = given.get("train_placeholder_token", Settings.train_placeholder_token)
    if on:
        check_token(token)

    # What depends on another setting.
    kind = OPTIMIZERS.get(values.get("optimizer", "adamw"))
    if kind is not None and kind.finds_rate and "learning_rate" not in given:
        values["learning_rate"] = 1.0
    # The base's shift belongs to its sampling; another one is drawn plain.
    own = values["timestep_sampling"] == base.timestep_sampling
    values.setdefault("training_shift", base.training_shift if own else 1.0)

    subject = token if on else given.get("trigger_word")
    shared, foreign = given.get("sample_options", {}), given.get("foreign_captions", False)
    try:
        prompts, options = read_prompts(_parts(sample_prompts, "\n"), shared, subject, foreign)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    for name, file in (("dataset", dataset), ("resume_from", resume_from)):
        _check_is_no_address(name, file)
    resume = _path("resume_from", resume_from) if resume_from else None
    settings = Settings(
        dataset=_path("dataset", dataset),
        base=base,
        preset=preset,
        resolutions=resolutions,
        seed=secrets.randbelow(2**31) if seed is None else seed,
        seed_is_random=seed is None,
        resume_from=resume,
        output_dir=_path("output_dir", output_dir) if output_dir not in (None, "") else None,
        sample_prompts=prompts,
        sample_defaults=sample_prompts is None,
        sample_overrides=options,
        validation_images=_images(validation_images),
        trackers=_parts(trackers, ","),
        given=entered,
        **values,
    )
    wrong = faults(settings)
    if given.get("steps") == 0:
        wrong.append("steps is 0; leave it out to have as many as suit the pictures")
    if wrong:
        raise SettingsError("; ".join(wrong))
    return settings


def parse_resolutions(text: str) -> tuple[int, ...]:
    """The edge lengths, in pixels, that a `resolution` setting names: "512" or "512,768,1024".

    Returns them sorted and each once. Raises ValueError for anything else, and for lengths outside
    16 to 4096.
    """
    edges = set()
    for part in text.split(","):
        if not re.fullmatch(r"[0-9]{1,9}", part.strip()):
            raise ValueError(
                f"resolution {text[:80]!r} is not understood; "
                'give an edge length in pixels, like "1024", or several with commas, like "512,768"'
            )
        edge = int(part)
        if not MIN_RESOLUTION <= edge <= MAX_RESOLUTION:
            raise ValueError(
                f"resolution {edge} is out of range; use {MIN_RESOLUTION} to {MAX_RESOLUTION}"
            )
        edges.add(edge)
    return tuple(sorted(edges))


def _images(given: str | int | None) -> int | None:
    """`auto`, which is None, or a number of images."""
    if given is None or (isinstance(given, int) and not isinstance(given, bool)):
        return given
    if not isinstance(given, str):
        raise SettingsError(
            f"validation_images is {given!r}; it must be auto or a number of images"
        )
    check_length("validation_images", given, LENGTHS["validation_images"])
    text = given.strip()
    if text in ("", "auto"):
        return None
    if not (text.isascii() and text.isdecimal()):
        raise SettingsError(
            f"validation_images is {text[:80]!r}; it must be auto or a number of images"
        )
    return int(text)


def _path(name: str, given: Any) -> Path:
    """A path that a user gave. Raises `SettingsError` for what no file can be called."""
    text = str(given)
    try:
        check_unicode(name, text)
        if "\0" in text:
            raise ValueError(f"{name} {text[:200]!r} contains a NUL character; correct the path")
        return Path(text).expanduser()
    except RuntimeError as error:
        user = text.partition("/")[0]
        raise SettingsError(f"{name} {text[:200]}: no user is called {user[1:]}") from error
    except ValueError as error:
        raise SettingsError(str(error)) from error


def _check_is_no_address(name: str, given: str | Path | None) -> None:
    """Refuses an address where a file is wanted; its query, which may be a key, is not shown."""
    text = "" if given is None else str(given)
    if looks_like_address(text) and not os.path.lexists(text):
        raise SettingsError(
            f"{name} {safe_name(text)[:200]} does not exist; if it is an address, download the "
            "file first"
        )


def _parts(given: str | Sequence[str] | None, separator: str) -> tuple[str, ...]:
    """The parts of a text, or of a sequence as it is; empty ones left out."""
    parts = given.split(separator) if isinstance(given, str) else given or ()
    return tuple(stripped for each in parts if (stripped := str(each).strip()))
