"""A record of inputs takes what is right, and says everything that is wrong in one error."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from inference.__main__ import arguments_parser
from inference.inputs import GenerationInputs
from trainer.__main__ import arguments_parser as trainer_parser
from trainer.settings.fields import resolve
from trainer.settings.inputs import SettingsError, TrainingInputs


def inputs(**given: Any) -> TrainingInputs:
    return TrainingInputs(dataset=Path("imgs.zip"), base_model="miniature", **given)


def test_every_fault_is_in_one_error() -> None:
    with pytest.raises(SettingsError) as refused:
        inputs(rank=0, optimizer="adam", low_memory="yes", stesp=3, name="a/b")
    assert str(refused.value).split("; ") == [
        "rank is 0",
        "it must be between 1 and 256",
        "optimizer 'adam' is not one of adamw, adamw8bit, prodigy, adafactor",
        "did you mean 'adamw'?",
        "low_memory is 'yes'",
        "it must be true or false",
        "name 'a/b' contains a slash, a backslash or a colon",
        "use a plain name such as red-fox",
        "unknown input 'stesp'",
        "did you mean 'steps'?",
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rank": 2.5}, "rank is 2.5; it must be a whole number"),
        ({"rank": True}, "rank is True; it must be a whole number"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; it must be between 0 and 1"),
        ({"default_caption": 7}, "default_caption is 7; it must be text"),
        ({"resolution": {}}, "resolution is {}; it must be a whole number or text or a list"),
        ({"trackers": ["wandb", "tensorbord"]}, "trackers 'tensorbord' is not one of"),
        ({"sample_prompts": ["a", "\ud800"]}, "sample prompt 2 contains half a character"),
    ],
)
def test_a_value_that_an_input_does_not_take_is_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=f"^{said}"):
        inputs(**given)


def test_large_whole_numbers_stay_exact() -> None:
    given = ["--seed", str(2**63 - 1)]
    for parser in (arguments_parser(), trainer_parser()):
        assert inputs(seed=parser.read(given)["seed"]).seed == 2**63 - 1


def test_none_is_what_was_not_given() -> None:
    assert inputs(rank=None, optimizer=None) == inputs()
    given = inputs(rank=None, steps=5).model_dump(exclude_unset=True)
    assert given == {"dataset": Path("imgs.zip"), "base_model": "miniature", "steps": 5}


def test_a_record_does_not_change_and_a_changed_copy_is_checked() -> None:
    settings = resolve(inputs(seed=1))
    with pytest.raises(ValidationError, match="frozen"):
        settings.rank = 3  # type: ignore[misc]
    assert settings.replace(rank=3).rank == 3 != settings.rank
    with pytest.raises(SettingsError, match="unknown input 'rnak'; did you mean 'rank'"):
        settings.replace(rnak=3)
    assert settings.given == inputs(seed=1)


def test_several_are_a_list_or_a_text() -> None:
    for several in ([512, 768], "768, 512", ["512", "768"]):
        base = TrainingInputs(dataset=Path("x"), base_model="z-image", resolution=several)
        assert resolve(base).resolutions == (512, 768)
    assert resolve(inputs(trackers="wandb, trackio")).trackers == ("wandb", "trackio")
    assert resolve(inputs(lora_targets=["to_q", "to_v"])).lora_targets == "to_q,to_v"
    assert resolve(inputs(sample_prompts="a\n\nb")).sample_prompts == ("a", "b")


def test_options_are_read_by_the_types_of_the_record() -> None:
    words = "run.yaml --steps 1e3 --learning_rate 1e-4 --no-low-memory --validation-images auto"
    given = trainer_parser().read(words.split())
    assert (given.pop("files"), given.pop("cpu")) == (["run.yaml"], False)
    assert given == {
        "steps": 1000,
        "learning_rate": 1e-4,
        "low_memory": False,
        "validation_images": "auto",
    }
    with pytest.raises(SettingsError, match="steps is 'many'; it must be a whole number"):
        inputs(**{"steps": trainer_parser().read(["--steps", "many"])["steps"]})
    assert arguments_parser().read(["--go-fast"])["go_fast"] is True


def test_an_empty_prompt_and_half_a_size_are_refused() -> None:
    with pytest.raises(ValueError, match="^prompt is missing; describe the image$"):
        GenerationInputs(**{})
    with pytest.raises(ValueError, match="^prompt is empty"):
        GenerationInputs(prompt=" ")
    with pytest.raises(ValueError, match="width and height go together"):
        GenerationInputs(prompt="a cat", width=64)
