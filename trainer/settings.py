"""The settings of one training, checked once when they enter."""

import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.placeholder import check_token
from families.bases import Base, default_base, find_base
from trainer.buckets import parse_resolutions
from trainer.checkpoint import is_checkpoint, latest, read_checkpoint

SCHEDULES = ("constant", "cosine")


class SettingsError(ValueError):
    """A setting that is out of range or does not go with another."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything a training depends on; equal settings and data give equal weights."""

    # Data.
    dataset: Path  # zip, tar or folder
    default_caption: str  # of pictures without their own; TOK stands for the subject
    resolutions: tuple[int, ...]  # pixels, edge of the square with a picture's area
    caption_dropout: float  # share of samples that see an empty caption

    # What is trained.
    base: Base
    rank: int
    train_placeholder_token: bool
    placeholder_token: str
    placeholder_init_std: float  # of its embedding's entries; 0 gives exact zeros
    turbo_adapter: str  # merged while training on a distilled base: auto, none, a version, a file

    # Optimisation: AdamW.
    steps: int
    batch_size: int
    learning_rate: float  # of the LoRA
    placeholder_learning_rate: float  # of the placeholder's rows
    lr_scheduler: str  # constant or cosine, after warm-up
    lr_warmup_steps: int
    weight_decay: float  # of the LoRA; the placeholder has none
    max_grad_norm: float  # LoRA and placeholder are each clipped to it, apart
    training_shift: float  # sigma is shift(sigmoid(normal)); above 1 favours noise
    gradient_checkpointing: bool  # recompute activations in the backward pass, to save memory
    seed: int

    # Going on.
    resume_from: Path | None = None  # a checkpoint, a folder of them, or a weights.zip
    checkpoint_every: int = 0  # steps; 0 writes a checkpoint only where a run is cancelled

    # What is shown and written.
    output_dir: Path | None = None  # None: outputs/ where it can be written
    sample_prompts: tuple[str, ...] = ()  # drawn with the finished weights
    sample_options: dict[str, Any] = field(default_factory=dict)  # fields of inference's Request
    log_prompt_ids: bool = False  # print how every distinct caption is tokenised

    @property
    def subject(self) -> str | None:
        """The word that stands for the subject in captions; None trains without one."""
        return self.placeholder_token if self.train_placeholder_token else None

    @property
    def training_mode(self) -> str:
        """`zero_prior` with a placeholder, `baseline` without."""
        return "zero_prior" if self.train_placeholder_token else "baseline"


def settle(
    *,
    dataset: str | Path | None = None,
    base_model: str = "auto",
    resolution: str | int | None = None,
    seed: int | None = None,
    placeholder_token: str = "<zwx>",
    train_placeholder_token: bool = True,
    output_dir: str | Path | None = None,
    sample_prompts: tuple[str, ...] = (),
    resume_from: str | Path | None = None,
    **given: Any,
) -> Settings:
    """Settings from what a user gave; what is left out or None comes from the base's table.

    Raises `SettingsError`, `PlaceholderError` or `UnknownBase` naming the setting.
    """
    if dataset is None or str(dataset) == "":
        raise SettingsError("dataset is missing; give a zip or tar of pictures")
    base = default_base() if base_model in (None, "auto") else find_base(str(base_model))
    try:
        edge = base.training_resolution if resolution is None else resolution
        resolutions = parse_resolutions(str(edge))
    except ValueError as error:
        raise SettingsError(str(error)) from error
    if train_placeholder_token:
        check_token(placeholder_token)
    values: dict[str, Any] = {
        "default_caption": "a photo of TOK",
        "placeholder_init_std": 1e-5,
        "turbo_adapter": "auto",
        "rank": base.rank,
        "steps": base.training_steps,
        "batch_size": base.batch_size,
        "learning_rate": base.learning_rate,
        "placeholder_learning_rate": base.placeholder_learning_rate,
        "caption_dropout": base.caption_dropout,
        "training_shift": base.training_shift,
        "gradient_checkpointing": base.gradient_checkpointing,
        "lr_scheduler": base.lr_scheduler,
        "lr_warmup_steps": None,
        "weight_decay": 1e-4,
        "max_grad_norm": 1.0,
    }
    values |= {name: value for name, value in given.items() if value is not None}
    if values["lr_warmup_steps"] is None:
        values["lr_warmup_steps"] = min(20, int(values["steps"]) // 10)
    resume = Path(str(resume_from)).expanduser() if resume_from else None
    settings = Settings(
        dataset=Path(str(dataset)).expanduser(),
        base=base,
        resolutions=resolutions,
        seed=_seed(resume) if seed is None else seed,
        resume_from=resume,
        placeholder_token=placeholder_token,
        train_placeholder_token=train_placeholder_token,
        output_dir=None if output_dir is None else Path(output_dir).expanduser(),
        sample_prompts=tuple(sample_prompts or ()),
        **values,
    )
    _check(settings)
    return settings


def _seed(resume: Path | None) -> int:
    """A resumed training keeps its seed; a new one draws one."""
    checkpoint = None
    if resume is not None:
        checkpoint = latest(resume) if resume.is_dir() else resume
    if checkpoint is not None and is_checkpoint(checkpoint):
        return read_checkpoint(checkpoint).identity["settings"]["seed"]
    return secrets.randbelow(2**31)


def _check(settings: Settings) -> None:
    """Raises one `SettingsError` for all settings that are out of range."""
    ranges = {
        "rank": (1, 256),
        "steps": (1, 100_000),
        "batch_size": (1, 256),
        "learning_rate": (0, 1),
        "placeholder_learning_rate": (0, 1),
        "placeholder_init_std": (0, 1),
        "caption_dropout": (0, 1),
        "training_shift": (0.1, 20),
        "weight_decay": (0, 1),
        "max_grad_norm": (1e-6, 1e6),
        "lr_warmup_steps": (0, settings.steps),
        "seed": (0, 2**63 - 1),
        "checkpoint_every": (0, 100_000),
    }
    faults = []
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            faults.append(f"{name} is {value!r}, not a number")
        elif not low <= value <= high:
            faults.append(f"{name} is {value:g}; it lies between {low:g} and {high:g}")
    wanted, versions = settings.turbo_adapter, settings.base.training_adapters
    if wanted not in ("auto", "none", *versions) and not Path(wanted).expanduser().is_file():
        known = ", ".join(("auto", "none", *versions))
        faults.append(
            f"turbo_adapter is {wanted!r}; for {settings.base.name} it is one of {known}, or a "
            "LoRA file"
        )
    if settings.lr_scheduler not in SCHEDULES:
        known = " and ".join(SCHEDULES)
        faults.append(f"lr_scheduler is {settings.lr_scheduler!r}; {known} are known")
    if faults:
        raise SettingsError("; ".join(faults))
