"""Which word stands for the subject where no placeholder token is trained."""

import logging
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.data.dataset import DatasetError, read_dataset
from trainer.data.trigger import name_trigger
from trainer.run import train
from trainer.settings.fields import Settings, SettingsError, resolve
from trainer.settings.inputs import TrainingInputs

BASE: dict[str, Any] = {"dataset": "imgs.zip", "base_model": "miniature-turbo"}
OFF: dict[str, Any] = {**BASE, "train_placeholder_token": False}


def test_tok_in_captions_without_token_and_trigger_word_is_refused_by_name(
    small: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small(train_placeholder_token=False)
    monkeypatch.setattr("trainer.reading.load_family", lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(DatasetError) as refusal:
        train(settings)
    assert str(refusal.value).startswith(
        "5 captions contain TOK: astronaut.txt, camera.txt, chelsea.txt, default_caption, "
        "coffee.txt. TOK stands for the subject, but no placeholder token is trained"
    )
    assert "set trigger_word" in str(refusal.value)


def test_the_mark_of_a_trigger_word_is_refused_too(photos: Path) -> None:
    with pytest.raises(DatasetError, match=r"contain TOK and \[trigger\]: "):
        name_trigger(read_dataset(photos, "[trigger] by night"), None)


@pytest.mark.parametrize("word", [None, "", "  "])
def test_captions_without_tok_need_no_trigger_word(
    word: str | None, photos: Path, tmp_path: Path
) -> None:
    settings = resolve(TrainingInputs(**OFF, trigger_word=word))
    assert settings.trigger_word is None
    plain = tmp_path / "plain.zip"
    with zipfile.ZipFile(photos) as source, zipfile.ZipFile(plain, "w") as target:
        target.writestr("a.jpg", source.read("rocket.jpg"))
        target.writestr("a.txt", "a rocket by STOCK and TOKYO")
    examples = read_dataset(plain, "a photo of TOK")
    assert name_trigger(examples, settings.trigger_word) == examples


@pytest.mark.parametrize("mark", ["TOK", "[trigger]"])
def test_a_sample_prompt_without_token_and_trigger_word_is_refused(mark: str) -> None:
    with pytest.raises(SettingsError, match="sample prompt 2 .*set trigger_word"):
        resolve(TrainingInputs(**OFF, sample_prompts=["a cat", f"a photo of {mark}"]))
    with pytest.raises(SettingsError, match="sample prompt 1 .*set trigger_word"):
        resolve(
            TrainingInputs(
                **OFF, sample_prompts=["a cat"], sample_options={"negative_prompt": mark}
            )
        )
    settled = resolve(
        TrainingInputs(**OFF, trigger_word="TOK", sample_prompts=[f"a photo of {mark}"])
    )
    assert settled.sample_prompts == ("a photo of TOK",)


def test_a_token_and_a_trigger_word_together_are_refused() -> None:
    with pytest.raises(SettingsError, match="remove trigger_word, or set train_placeholder_token"):
        resolve(TrainingInputs(**BASE, trigger_word="fox"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "token <zwx>, 1 steps"),
        ({"train_placeholder_token": False, "trigger_word": "fox"}, "no token; trigger word: fox,"),
    ],
)
def test_the_log_says_what_stands_for_the_subject(
    given: dict[str, object],
    said: str,
    small: Callable[..., Settings],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        train(small(steps=1, validation_every=0, **given))
    assert f"6 images, {said}" in caplog.text
    assert "zero_prior" not in caplog.text and "baseline" not in caplog.text
