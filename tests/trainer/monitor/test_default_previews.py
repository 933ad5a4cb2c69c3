"""Preview images where no sample prompts are given: two prompts, three moments."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.monitor.default_previews import (
    cost,
    default_prompts,
    previews_while_training,
    with_default_previews,
)
from trainer.run import train
from trainer.settings.config import read_config
from trainer.settings.fields import Settings, SettingsError, resolve
from trainer.settings.inputs import TrainingInputs

Small = Callable[..., Settings]
CAPTIONS = ["", "a house", "<zwx> " * 400, "<zwx> in a garden", "<zwx> on a chair"]


def of(base: str, **given: Any) -> Settings:
    return resolve(
        TrainingInputs(dataset="a.zip", base_model=base, seed=1, **{"steps": 2000, **given})
    )


def test_one_prompt_is_close_to_the_dataset_and_one_is_far() -> None:
    assert default_prompts(of("z-image"), CAPTIONS) == (
        "<zwx> in a garden",
        "a photo of <zwx> on a beach",
    )
    assert default_prompts(of("miniature"), CAPTIONS)[1] == "a <zwx> in the desert"
    assert default_prompts(of("z-image"), ["<zwx> " * 400])[0] == "<zwx> " * 400
    assert default_prompts(of("z-image"), [" "]) == ("a photo of <zwx> on a beach",)
    once = default_prompts(of("z-image"), ["a photo of <zwx> on a beach"])
    assert once == ("a photo of <zwx> on a beach",)


def test_a_lora_without_a_token_is_previewed_with_its_trigger_word_or_without() -> None:
    plain = of("z-image", train_placeholder_token=False)
    assert default_prompts(plain, ["a red fox"]) == ("a red fox", "a photo of a dog on a beach")
    trigger = plain.replace(trigger_word="r3dfox")
    assert default_prompts(trigger, ["a hill", "r3dfox on a hill"]) == (
        "r3dfox on a hill",
        "a photo of r3dfox on a beach",
    )


@pytest.mark.parametrize(
    ("base", "given", "every", "edge"),
    [
        ("z-image-turbo", {}, 1000, 768),
        ("z-image-turbo", {"resolution": 512}, 1000, 512),
        ("z-image-turbo", {"resolution": "520,1024"}, 1000, 512),
        ("qwen-image", {}, 2000, 768),  # 50 guided steps: not in the middle
        ("qwen-image", {"resolution": 512, "steps": 10_000}, 5000, 512),
        ("miniature-turbo", {"steps": 501}, 251, 64),
        ("z-image-turbo", {"steps": 2}, 2, 768),
        ("z-image-turbo", {"steps": 1}, 1, 768),
        ("z-image-turbo", {"sample_every": 7}, 7, 768),
    ],
)
def test_the_middle_is_left_out_where_it_would_take_more_than_a_twentieth(
    base: str, given: dict[str, Any], every: int, edge: int
) -> None:
    settings = with_default_previews(of(base, **given), CAPTIONS)
    assert settings.sample_every == every
    assert (settings.sample_options["width"], settings.sample_options["height"]) == (edge, edge)
    if not given.get("sample_every") and settings.steps > 1:
        assert (cost(settings, moments=3) <= 0.05) == (every < settings.steps)


def test_a_size_that_is_given_stays() -> None:
    wide = with_default_previews(of("z-image", sample_options={"aspect_ratio": "16:9"}), CAPTIONS)
    assert wide.sample_options == {"aspect_ratio": "16:9"}


@pytest.mark.parametrize("none", ["", [], (), "\n"])
def test_no_previews_are_generated_where_none_are_wanted(none: Any) -> None:
    settings = with_default_previews(of("z-image", sample_prompts=none), CAPTIONS)
    assert settings.sample_prompts == () and settings.sample_every == 0


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", True),
        ("sample: {width: 512, height: 512}", True),
        ("sample: {prompts: }", True),
        ("sample: {prompts: []}", False),
        ("sample: {prompts: ''}", False),
        ("sample: {prompts: [a cat]}", False),
    ],
)
def test_a_file_without_prompts_has_the_default_previews(
    text: str, wanted: bool, tmp_path: Path
) -> None:
    (tmp_path / "a.yaml").write_text(f"dataset: a.zip\nbase_model: z-image\n{text}\n")
    assert read_config(tmp_path / "a.yaml").sample_defaults is wanted


def test_options_without_prompts_are_checked_too(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "dataset: a.zip\nbase_model: z-image\nsample: {num_inference_steps: 0}\n"
    )
    with pytest.raises(SettingsError, match="num_inference_steps"):
        read_config(tmp_path / "a.yaml")


def test_default_previews_do_not_fill_the_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    settings = with_default_previews(of("miniature"), CAPTIONS)
    assert previews_while_training(settings, second_base=False)
    assert not previews_while_training(settings, second_base=True)
    assert "preview images only at the end: the base is quantized" in caplog.text
    monkeypatch.setattr("trainer.monitor.default_previews.free_memory", lambda _: 1 << 20)
    assert not previews_while_training(settings, second_base=False)
    asked = settings.replace(sample_defaults=False)  # who asks for previews gets them
    assert previews_while_training(asked, second_base=True)


def test_a_run_without_prompts_has_preview_images(small: Small, monkeypatch: Any) -> None:
    monkeypatch.delenv("MODEL_VAULT")
    settings = small(
        **{"base_model": "miniature-turbo", "sample_prompts": None, "steps": 2, "batch_size": 1},
        sample_options={"num_inference_steps": 1},
    )
    folder = train(settings).parent
    for step in ("step-000000", "step-000002"):
        files = sorted(each.name for each in (folder / "samples" / step).iterdir())
        assert files == ["00.png", "01.png"]
