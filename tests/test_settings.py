"""Settings: what is left out suits the base, and what makes no sense is named."""

from collections.abc import Callable
from typing import Any

import pytest

from families.bases import BASES
from trainer.presets import PRESETS, find_preset, steps_for
from trainer.settings import Settings, SettingsError


def test_steps_grow_with_the_pictures_between_two_bounds() -> None:
    base, plain = BASES["z-image-turbo"], find_preset(None)
    found = [steps_for(base, plain, pictures) for pictures in (1, 10, 20, 30, 500)]
    assert found == [1000, 1000, 2000, 3000, 3000]
    quick = [steps_for(base, PRESETS["quick_test"], pictures) for pictures in (10, 20)]
    assert quick == [200, 400]


def test_steps_that_are_given_stay(small: Callable[..., Settings]) -> None:
    assert small(steps=7).for_pictures(40).steps == 7
    assert small(steps=None).for_pictures(20).steps == 2000


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("base", BASES)
def test_every_preset_suits_every_base_and_yields_to_what_is_given(
    base: str, preset: str, small: Callable[..., Settings]
) -> None:
    row, values = BASES[base], PRESETS[preset]
    given = {"base_model": base, "preset": preset, "rank": None, "steps": None}
    settings = small(**given, resolution=None)
    assert settings.rank == row.rank * values.rank
    assert settings.learning_rate == row.learning_rate * values.learning_rate
    assert settings.resolutions[0] <= row.training_resolution
    assert small(**{**given, "rank": 3}, learning_rate=1e-5).rank == 3


def test_the_shift_of_the_base_belongs_to_its_own_sampling(small: Callable[..., Settings]) -> None:
    shift = BASES["z-image"].training_shift
    assert small().training_shift == shift != 1
    assert small(timestep_sampling="uniform").training_shift == 1
    assert small(timestep_sampling="uniform", training_shift=2.5).training_shift == 2.5


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"dataset": None}, "dataset is missing"),
        ({"rank": 0}, "rank is 0; it lies between 1 and 256"),
        ({"steps": -1, "caption_dropout": 2.0}, "steps is -1.*; caption_dropout is 2"),
        ({"resolution": "64,big"}, "resolution"),
        ({"lr_scheduler": "cosin"}, "lr_scheduler 'cosin' is not one of.*did you mean 'cosine'"),
        ({"preset": "charcter"}, "preset 'charcter' is not one of.*did you mean 'character'"),
        ({"optimizer": "adam"}, "optimizer 'adam' is not one of.*did you mean 'adamw'"),
        ({"optimizer": "adamw8bit"}, "adamw8bit is for a GPU.*use adamw"),
        (
            {"optimizer": "prodigy", "learning_rate": 1e-4},
            "learning_rate is 0.0001, but prodigy finds the rate by itself.*leave it out",
        ),
        ({"timestep_sampling": "sigmoidal"}, "did you mean 'sigmoid'"),
        ({"timestep_sampling": "shift", "training_shift": 3.0}, "leave training_shift out"),
        ({"gradient_accumulation": 0}, "gradient_accumulation is 0; it lies between 1 and"),
        ({"ema_decay": 1.0}, "ema_decay is 1; it lies between 0 and"),
        ({"quantize": "int4"}, "quantize 'int4' is not one of auto, none, fp8, int8, nf4"),
        ({"trackers": "wandb,tensorbord"}, "trackers 'tensorbord'.*did you mean 'tensorboard'"),
        ({"steps": 0}, "steps is 0; leave it out"),
        ({"placeholder_token": "a b"}, "white space"),
        ({"base_model": "z-image-trubo"}, "did you mean 'z-image-turbo'"),
    ],
)
def test_a_setting_out_of_range_is_named(
    given: dict[str, Any], said: str, small: Callable[..., Settings]
) -> None:
    with pytest.raises(ValueError, match=said):
        small(**given)
    assert issubclass(SettingsError, ValueError)
