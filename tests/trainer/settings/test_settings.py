"""Settings: what is left out suits the base, and what makes no sense is named."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from families.registry import BASES, trainable
from inference.inputs import LENGTHS as PROMPT_LENGTHS
from inference.inputs import SECRET_LENGTH
from trainer.settings.fields import Settings, SettingsError
from trainer.settings.inputs import LENGTHS, NAMES, TrainingInputs
from trainer.settings.names import fault_of_name
from trainer.settings.presets import PRESETS, find_preset, steps_for
from trainer.settings.request_cost import too_many, too_much


def test_steps_grow_with_the_pictures_between_two_bounds() -> None:
    base, plain = BASES["z-image-turbo"], find_preset(None)
    found = [steps_for(base, plain, pictures) for pictures in (1, 10, 20, 30, 500)]
    assert found == [1000, 1000, 2000, 3000, 3000]
    quick = [steps_for(base, PRESETS["quick_test"], pictures) for pictures in (10, 20)]
    assert quick == [200, 400]


def test_steps_that_are_given_stay(small: Callable[..., Settings]) -> None:
    assert small(steps=7).for_images(40).steps == 7
    assert small(steps=None).for_images(20).steps == 2000


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("base", trainable())
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
        ({"rank": 0}, "rank is 0; it must be between 1 and 256"),
        ({"steps": -1, "caption_dropout": 2.0}, "caption_dropout is 2.*; steps is -1"),
        ({"resolution": "64,big"}, "resolution"),
        ({"lr_scheduler": "cosin"}, "lr_scheduler 'cosin' is not one of.*did you mean 'cosine'"),
        ({"preset": "charcter"}, "preset 'charcter' is not one of.*did you mean 'character'"),
        ({"optimizer": "adam"}, "optimizer 'adam' is not one of.*did you mean 'adamw'"),
        (
            {"optimizer": "prodigy", "learning_rate": 1e-4},
            "learning_rate is 0.0001, but prodigy finds the learning rate by itself.*remove it",
        ),
        ({"timestep_sampling": "sigmoidal"}, "did you mean 'sigmoid'"),
        ({"timestep_sampling": "shift", "training_shift": 3.0}, "remove training_shift"),
        ({"gradient_accumulation": 0}, "gradient_accumulation is 0; it must be between 1 and"),
        ({"ema_decay": 1.0}, "ema_decay is 1; it must be between 0 and"),
        ({"quantize": "int4"}, "quantize 'int4' is not one of auto, none, fp8, int8, nf4"),
        ({"trackers": "wandb,tensorbord"}, "trackers 'tensorbord'.*did you mean 'tensorboard'"),
        ({"steps": 0}, "steps is 0; .*; leave it out"),
        ({"rank": 2.5}, "rank is 2.5; it must be a whole number"),
        ({"steps": 100.0}, "steps is 100.0; it must be a whole number"),
        ({"seed": True}, "seed is True; it must be a whole number"),
        ({"learning_rate": "1e-4"}, "learning_rate is '1e-4'; it must be a number"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; it must be between 0 and 1"),
        ({"train_placeholder_token": "false"}, "'false'; it must be true or false"),
        ({"default_caption": 5}, "default_caption is 5; it must be text"),
        ({"validation_images": 1.5}, "validation_images is 1.5; it must be auto or a number"),
        ({"validation_images": True}, "validation_images is True; it must be auto or"),
        ({"quantize": "NF4"}, "quantize 'NF4' is not one of.*did you mean 'nf4'"),
        ({"sample_options": {"num_inference_steps": 2.5}}, "2.5; it must be a whole number"),
        ({"placeholder_token": "a b"}, "white space"),
        ({"base_model": "z-image-trubo"}, "did you mean 'z-image-turbo'"),
    ],
)
def test_a_setting_out_of_range_is_named(
    given: dict[str, Any], said: str, small: Callable[..., Settings], no_gpu: None
) -> None:
    with pytest.raises(ValueError, match=said):
        small(**given)
    assert issubclass(SettingsError, ValueError)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"optimizer": "adamw8bit"}, "optimizer adamw8bit needs a GPU, and this machine has none"),
        ({"quantize": "nf4"}, "quantize nf4 needs a GPU, and this machine has none"),
    ],
)
def test_what_needs_a_gpu_can_be_planned_without_one_and_is_refused_before_the_dataset_is_read(
    given: dict[str, Any],
    said: str,
    small: Callable[..., Settings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from trainer.memory.plan_table import describe_plan
    from trainer.run import train

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = small(**given, dataset=tmp_path / "nowhere.zip")
    table = describe_plan(settings)
    assert "chosen on an empty GPU" in table
    assert f"This run cannot start here: {said}" in table
    with pytest.raises(SettingsError, match=said):
        train(settings)
    assert "cannot start here" not in describe_plan(small())


# ---- Texts ---------------------------------------------------------------------------------------


def text_inputs(component: str) -> dict[str, dict[str, Any]]:
    """The inputs of a Cog entry point that are texts without a list of choices."""
    from serving import schema

    inputs = json.loads(schema.render())["components"]["schemas"][component]["properties"]
    return {name: each for name, each in inputs.items() if each.get("type") == "string"}


# A file arrives as a path, an address, or a data URL as long as Cog takes a request: 100 MiB.
FILE = 100 * 2**20


def test_every_text_input_has_a_bound_which_is_that_of_plain_python() -> None:
    for component, lengths in (("TrainingInput", LENGTHS), ("Input", PROMPT_LENGTHS)):
        inputs = text_inputs(component)
        for name, each in inputs.items():
            if each.get("format") == "uri":
                assert each.get("maxLength", FILE) == FILE
            else:
                known = lengths.get(name, SECRET_LENGTH if each.get("x-cog-secret") else None)
                assert each["maxLength"] == known, name


SECRETS = dict.fromkeys(("wandb_api_key", "hf_token"), SECRET_LENGTH)


@pytest.mark.parametrize("name", [*LENGTHS, *SECRETS])
def test_a_text_beyond_its_bound_is_refused_by_name(name: str, tmp_path: Path) -> None:
    from trainer.run import train_from_inputs

    text = "x" * ((LENGTHS | SECRETS)[name] + 1)
    given: dict[str, Any] = {"dataset": tmp_path / "none.zip", "base_model": "z-image"}
    with pytest.raises(ValueError, match=rf"{name}.* has [0-9,]+ ") as refusal:
        if name in SECRETS:
            train_from_inputs(TrainingInputs(**given), **{name: text})
        else:
            TrainingInputs(**given, **{name: text})
    assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize("prompts", [65, 2000])
def test_sample_prompts_are_counted(prompts: int, small: Callable[..., Settings]) -> None:
    with pytest.raises(SettingsError, match=f"has {prompts:,} prompts; at most 64 are"):
        small(sample_prompts=["a"] * prompts)


# What could lead out of a folder, or be no file name somewhere.
WAYS_OUT = (
    *("../../x", "..", ".", "/tmp/x", "a/b", "a\\b", "\\\\host\\x", "C:x", "c:\\x", "x\0y", "\0"),
    *(
        "a\nb",
        "a\rb",
        "a\u2028b",
        "a\x1b[31mb",
        "a\u202eb",
        ".hidden",
        "~",
        "~root",
        "",
        " x",
        "x ",
    ),
    *("CON", "nul", "Com1", "LPT9.txt", "aux.zip", "x.", "x" * 129, "\U0001f98a" * 60, "\ud800"),
)


@pytest.mark.parametrize("text", WAYS_OUT, ids=ascii)
def test_a_text_that_is_no_plain_file_name_is_refused(
    text: str, small: Callable[..., Settings]
) -> None:
    assert fault_of_name(text) is not None
    for name in NAMES:
        if name in Settings.model_fields:
            with pytest.raises(SettingsError, match=name) as refusal:
                small(**{name: text})
            assert str(refusal.value).isprintable()


@pytest.mark.parametrize(
    "text", ["red-fox", "Fox 2", "x", "a..b", "console", "füchse, die 2.", "狐狸"]
)
def test_a_plain_name_is_accepted(text: str, small: Callable[..., Settings]) -> None:
    text = text.rstrip(".")
    assert small(wandb_run=text).wandb_run == text


def below(folder: Path) -> set[str]:
    found = (Path(parent, name) for parent, *names in os.walk(folder) for name in sum(names, []))
    return {str(path.relative_to(folder)) for path in found}


@pytest.mark.parametrize(
    "text",
    [
        "../../x",
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ("/tmp/zeroprior-was-here/x", "..", "x\0y")
        ),
    ],
)
def test_no_text_of_a_request_leads_out_of_its_folder(
    text: str, photos: Path, use_vault: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each text is tried alone; those that are accepted are trained with, all together."""
    from trainer.run import train_from_inputs
    from trainer.settings.fields import resolve

    pytest.importorskip("tensorboard")
    work = tmp_path / "a" / "b"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    given: dict[str, Any] = {
        **{"dataset": photos, "base_model": "z-image", "resolution": "64", "rank": 2, "steps": 2},
        **{"batch_size": 6, "caption_dropout": 0, "seed": 5, "validation_every": 0},
        **{"trackers": "tensorboard", "output_dir": "out"},
    }
    accepted: dict[str, str] = {}
    for name in text_inputs("TrainingInput"):
        if name in LENGTHS and name not in ("hf_token", "wandb_api_key", "hf_repo_id"):
            try:
                resolve(TrainingInputs(**given | {name: text}))
            except ValueError:
                continue
            accepted[name] = text
    assert "default_caption" in accepted and not accepted.keys() & {*NAMES, "turbo_adapter"}
    accepted.pop("lora_targets", None)  # names layers, which are looked up
    if text == "..":
        accepted.pop("placeholder_token")  # which the tokenizer knows
    accepted["preserve_prompts"] += "y"  # else it would contain the token
    if "sample_prompts" in accepted:
        given["sample_options"] = {"width": 64, "height": 64, "num_inference_steps": 1}
    given["wandb_run"] = "a-plain-name"
    train_from_inputs(TrainingInputs(**given | accepted), served=True)
    found = below(tmp_path)
    assert {"a/b/out/weights.zip", "a/b/out/trackers/a-plain-name"} <= found
    outside = {name for name in found if not name.startswith("a/b/out/")}
    assert outside == {"a", "a/b", "a/b/out"}
    assert not Path("/tmp/zeroprior-was-here").exists()


# ---- Costs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", trainable())
def test_the_largest_resolution_is_accepted_and_the_next_is_not(
    base: str, small: Callable[..., Settings]
) -> None:
    most = BASES[base].largest_resolution
    assert small(base_model=base, resolution=most).resolutions == (most,)
    said = f"resolution {most + 1} is too large for {base}; at most {most} is accepted"
    with pytest.raises(SettingsError, match=said):
        small(base_model=base, resolution=most + 1)


def test_previews_are_no_larger_than_the_base_generates(small: Callable[..., Settings]) -> None:
    options = {"width": 2048, "height": 2048}
    assert small(sample_prompts="a", sample_options=options).sample_options == options
    with pytest.raises(SettingsError, match="2048x2048 is too large for miniature-turbo"):
        small(base_model="miniature-turbo", sample_prompts="a", sample_options=options)


def test_resolutions_are_counted(small: Callable[..., Settings]) -> None:
    edges = [64 + 16 * n for n in range(9)]
    with pytest.raises(SettingsError, match="resolution has 9 edge lengths; at most 8"):
        small(resolution=",".join(map(str, edges)))


def test_the_options_of_a_sample_prompt_are_bounded_as_those_of_all(
    small: Callable[..., Settings],
) -> None:
    with pytest.raises(SettingsError, match="sample prompt 2: 2048x64 is too large for miniature"):
        small(base_model="miniature-turbo", sample_prompts=["a --w 64 --h 64", "a --w 2048 --h 64"])


def test_the_images_of_a_request_are_bounded(small: Callable[..., Settings]) -> None:
    settings = small(base_model="z-image", resolution="512,1024,1536,2048")
    assert too_many(settings, 40) is None
    assert "at most 2,666 are accepted on z-image" in str(too_many(settings, 10_000))


COSTLY = "--s 200 --w 2048 --h 2048 --l 5"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": 20_000, "batch_size": 64}, "train on 1,280,000 images.*at most 200,000 are"),
        ({"steps": 1000, "gradient_accumulation": 1000}, "train on 1,000,000 images"),
        ({"steps": 20_000, "batch_size": 4, "resolution": 2048}, "at most 50,000 are accepted at"),
        (
            {"steps": 1000, "sample_every": 1, "sample_prompts": ["a"] * 64},
            "64 sample_prompts every 1 of 1,000 steps are 64,128 images.* at most 500 of",
        ),
        (  # each prompt costs 32 times as much as one of the model's own size and steps
            {"steps": 1000, "sample_every": 100, "sample_prompts": [f"a {COSTLY}"] * 20},
            "20 sample_prompts every 100 of 1,000 steps are 240 images.* at most 31 of",
        ),
        (  # the default previews
            {"steps": 20_000, "sample_every": 1, "sample_prompts": None},
            "2 sample_prompts every 1 of 20,000 steps are 40,004 images",
        ),
        (
            {"steps": 90_000, "validation_every": 1},
            "validation_every 1 is 90,000 times in 90,000 steps.*at most 10,000 times",
        ),
        (
            {"steps": 20_000, "checkpoint_every": 3},
            "checkpoint_every 3 is 6,666 times in 20,000 steps.*at most 1,000 times",
        ),
    ],
)
def test_the_product_of_what_a_request_enlarges_is_bounded(
    given: dict[str, Any], said: str, photos: Path, tmp_path: Path
) -> None:
    from trainer.run import train_from_inputs

    inputs: dict[str, Any] = {"base_model": "z-image", "resolution": "1024", "rank": 2} | given
    inputs |= {"preserve": "off"}  # its rows cost, too
    missing = tmp_path / "none.zip"  # what is refused is refused before this is looked for
    with pytest.raises(SettingsError, match=said):
        train_from_inputs(
            TrainingInputs(dataset=missing, output_dir=tmp_path / "out", **inputs), served=True
        )


@pytest.mark.parametrize("preset", [None, *PRESETS])
@pytest.mark.parametrize("base", trainable())
def test_usual_trainings_are_far_below_the_bounds(
    base: str, preset: str | None, small: Callable[..., Settings]
) -> None:
    settings = small(base_model=base, preset=preset, steps=None, rank=None, resolution=None)
    assert too_much(settings) == []
    steps = settings.for_images(40).steps
    previewed = small(
        **{"base_model": base, "steps": steps, "sample_every": steps // 20},
        sample_prompts=["a"] * 8,
    )
    assert too_much(previewed) == []


@pytest.mark.parametrize("name", ["dataset", "output_dir", "resume_from"])
def test_a_text_that_is_no_path_is_refused_by_its_setting(
    small: Callable[..., Settings], name: str
) -> None:
    for text, said in (
        ("a\0b", "contains a NUL character"),
        ("a\ud800b", "contains half a character"),
        ("~nobody-is-called-so/x", "there is no user nobody-is-called-so"),
    ):
        with pytest.raises(SettingsError, match=f"{name}.*{said}"):
            small(**{name: text})


@pytest.mark.parametrize(
    "name", ["steps", "rank", "batch_size", "seed", "sample_every", "checkpoint_every"]
)
def test_a_fraction_is_refused_where_something_is_counted(
    small: Callable[..., Settings], name: str
) -> None:
    for value in (2.5, 2.0, float("nan")):
        with pytest.raises(SettingsError, match=f"{name} is {value}; it must be a whole number"):
            small(**{name: value})


def test_an_empty_path_is_none(small: Callable[..., Settings]) -> None:
    assert small(output_dir="").output_dir is None
    assert small(resume_from="").resume_from is None


def test_whole_numbers_in_messages_have_all_their_digits(small: Callable[..., Settings]) -> None:
    with pytest.raises(SettingsError) as refusal:
        small(seed=2**63, steps=12_345_678)
    for number in (2**63, 2**63 - 1, 12_345_678, 100_000):
        assert str(number) in str(refusal.value)
