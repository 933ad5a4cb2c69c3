"""Presets: other defaults for a purpose.

A preset multiplies a base model's defaults, so that it works for every base; the user's settings
have priority over both. The values follow common practice, not measurements.
"""

from dataclasses import dataclass

from families.base import Base


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Factors of a base's defaults, and settings that replace them; None: the base's default."""

    purpose: str
    rank: float = 1.0  # factor
    steps: float = 1.0  # factor
    learning_rate: float = 1.0  # factor
    most_resolution: int | None = None  # pixels; an upper limit of the base's default
    timestep_sampling: str | None = None
    caption_dropout: float | None = None
    ema_decay: float = 0.0
    masks: str = "auto"
    # Usual numbers of images, for the checks of a dataset: least, most. Common practice as well.
    images: tuple[int, int] = (8, 100)


PRESETS: dict[str, Preset] = {
    "quick_test": Preset(
        purpose="test a dataset in a short run, before a long one",
        rank=0.5,
        steps=0.2,  # a likeness begins to show in the first few hundred steps
        learning_rate=2.0,  # for an effect in few steps
        most_resolution=512,  # a step costs about a fifth of one at 1024
    ),
    "character": Preset(
        purpose="a person, an animal or a character with a fixed identity",
        # The base's defaults: middle timesteps, where features form, and a rank for details.
    ),
    "style": Preset(
        purpose="a style, without the content of the images",
        rank=0.5,  # a style is common to all images; a lower rank memorizes less of their content
        steps=1.5,  # a style is learned from many images and shows late
        timestep_sampling="shift",  # palette and composition are decided at high noise
        caption_dropout=0.1,  # so that the style also works without a matching prompt
        ema_decay=0.99,  # averages over the last hundred steps, so that single images matter less
        masks="off",  # a style is in the whole image
        images=(15, 500),  # few images also teach what is on them
    ),
    "concept": Preset(
        purpose="an object, a garment or a pose, to combine with other concepts",
        rank=0.5,  # a smaller file with less effect on other prompts
        timestep_sampling="shift",  # the layout is decided at high noise
    ),
}


def find_preset(name: str | None) -> Preset:
    """The preset of that name; without a name, one without changes."""
    return Preset(purpose="the base model's defaults") if name is None else PRESETS[name]


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """Defaults of the settings that depend on base model and preset."""

    resolution: int
    rank: int
    batch_size: int
    learning_rate: float
    placeholder_learning_rate: float
    lr_scheduler: str
    timestep_sampling: str
    caption_dropout: float
    ema_decay: float
    masks: str


def defaults_of(base: Base, preset: Preset) -> Defaults:
    """The defaults of a base model, changed by a preset."""
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
        masks=preset.masks,
    )


def steps_for(base: Base, preset: Preset, images: int) -> int:
    """Default optimizer steps for a number of images, rounded to tens."""
    row = base.training_steps
    steps = min(max(row.per_image * images, row.least), row.most) * preset.steps
    return max(10, round(steps / 10) * 10)
