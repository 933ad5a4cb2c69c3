"""Presets: what changes against the base's own settings when the purpose is known.

A preset changes a base model's own numbers by shares, so that it suits every base; what the user
gives comes before both. The reasons are the field's practice, not measurements.
"""

from dataclasses import dataclass

from families.base import Base


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Shares of a base's numbers, and settings in the place of its own; None leaves them."""

    purpose: str
    rank: float = 1.0  # share of the base's
    steps: float = 1.0  # share of the base's for the number of pictures
    learning_rate: float = 1.0  # share of the base's
    most_resolution: int | None = None  # pixels; the base's where that is lower
    timestep_sampling: str | None = None
    caption_dropout: float | None = None
    ema_decay: float = 0.0


PRESETS: dict[str, Preset] = {
    "quick_test": Preset(
        purpose="does it work with my pictures, before hours are spent",
        rank=0.5,
        steps=0.2,  # the first hint of a likeness comes in the first few hundred steps
        learning_rate=2.0,  # so that the few steps show something
        most_resolution=512,  # a step costs about a fifth of one at 1024
    ),
    "character": Preset(
        purpose="a person, an animal or a figure that must stay itself",
        # The base's own numbers: middle noise levels, where features form, and room for detail.
    ),
    "style": Preset(
        purpose="a look, without the things that were in the pictures",
        rank=0.5,  # a look is common to all pictures; less room to remember what they show
        steps=1.5,  # it is spread over many pictures and shows late
        timestep_sampling="shift",  # palette and composition are decided at high noise
        caption_dropout=0.1,  # part of the look holds without words
        ema_decay=0.99,  # an average over the last hundred steps evens single pictures out
    ),
    "concept": Preset(
        purpose="an object, a garment, a pose or an idea to combine with others",
        rank=0.5,  # a smaller file that leaves more of the base alone
        timestep_sampling="shift",  # where things stand is decided at high noise
    ),
}


def find_preset(name: str | None) -> Preset:
    """The preset of that name; without a name one that changes nothing."""
    return Preset(purpose="the base's own settings") if name is None else PRESETS[name]


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """The settings that depend on base model and preset, where a user gives none."""

    resolution: int
    rank: int
    batch_size: int
    learning_rate: float
    placeholder_learning_rate: float
    lr_scheduler: str
    timestep_sampling: str
    caption_dropout: float
    ema_decay: float


def defaults_of(base: Base, preset: Preset) -> Defaults:
    """The defaults of a base model with a preset over them."""
    resolution = base.training_resolution
    return Defaults(
        resolution=min(resolution, preset.most_resolution or resolution),
        rank=max(1, round(base.rank * preset.rank)),
        batch_size=base.batch_size,
        learning_rate=base.learning_rate * preset.learning_rate,
        placeholder_learning_rate=base.placeholder_learning_rate * preset.learning_rate,
        lr_scheduler=base.lr_scheduler,
        timestep_sampling=preset.timestep_sampling or base.timestep_sampling,
        caption_dropout=(
            base.caption_dropout if preset.caption_dropout is None else preset.caption_dropout
        ),
        ema_decay=preset.ema_decay,
    )


def steps_for(base: Base, preset: Preset, pictures: int) -> int:
    """Optimiser steps for a dataset of so many pictures, in tens."""
    row = base.training_steps
    steps = min(max(row.per_image * pictures, row.least), row.most) * preset.steps
    return max(10, round(steps / 10) * 10)
