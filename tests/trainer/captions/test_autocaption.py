"""`autocaption` and the command, with a loaded model: Qwen-Image's own text encoder, small."""

import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from adapters.archive import read_archive
from families import vision_language
from families.captioners import Answer, Question
from trainer import run
from trainer.captions.__main__ import arguments_parser, main
from trainer.memory import describe_plan, plan_data
from trainer.settings import Settings, SettingsError

WITHOUT_CAPTION = {"clock_motion.png", "rocket.jpg"}


def sayings(questions: Sequence[Question]) -> list[Answer]:
    """What a model with trained weights may answer."""
    found = []
    for each in questions:
        text = f"TOK in a place of {sum(each.images[0].getpixel((0, 0)))} lights, seen from afar"
        features = "kind: thing\nfeatures: grey, round"
        found.append(Answer(features if "features:" in each.text else text, True))
    return found


def test_a_run_writes_missing_captions_once_and_trains_on_them(
    small: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def answer(self: object, questions: Sequence[Question], most_tokens: int = 0) -> list[Answer]:
        asked.append(len(questions))
        return sayings(questions)

    monkeypatch.setattr(vision_language.VisionLanguageModel, "answer", answer)
    settings = small(base_model="qwen-image", autocaption="subject", steps=1, validation_every=0)
    weights = run.train(settings)
    assert asked == [1, 1, 1]  # pass 1, and one for each image
    pictures = read_archive(weights).meta["dataset"]["pictures"]
    written = {each["name"]: each["caption"] for each in pictures}
    assert len(written) == 6 and written["chelsea.png"] == "a photo of <zwx>, a tabby cat"
    assert all(written[name].startswith("<zwx> in a place of") for name in WITHOUT_CAPTION)
    rows = list(map(json.loads, (tmp_path / "out" / "captions.jsonl").read_text().splitlines()))
    assert rows[0]["features"] == ["grey", "round"]
    assert {row["image"] for row in rows[1:]} == WITHOUT_CAPTION
    assert {row["model"] for row in rows} == {"Qwen/Qwen-Image/text_encoder"}
    events = (tmp_path / "out" / "events.jsonl").read_text()
    assert '"name":"writing captions","done":2,"of":2' in events

    run.train(settings.replace(resume_from=tmp_path / "out" / "checkpoints", steps=2))
    assert asked == [1, 1, 1]


def test_autocaption_needs_one_subject_with_a_name(small: Callable[..., Settings]) -> None:
    with pytest.raises(SettingsError, match="neither a placeholder token nor a trigger_word"):
        small(autocaption="style", train_placeholder_token=False)
    with pytest.raises(SettingsError, match="captions of several subjects cannot"):
        small(autocaption="subject", subjects="<zwx>,<kul>")
    with pytest.raises(SettingsError, match="autocaption 'styl' is not one of subject, style"):
        small(autocaption="styl")


def test_the_plan_says_what_writing_captions_takes(small: Callable[..., Settings]) -> None:
    settings = small(base_model="miniature", autocaption="subject")
    sizes = plan_data(settings)["writing_captions_bytes"]
    assert [round(each / 1e9, 1) for each in sizes.values()] == [11.2, 7.6, 5.8]
    text = describe_plan(settings)
    assert "Before that, qwen3-vl-4b writes captions in 11.2 GB in 16 bits" in text
    assert "captions in" not in describe_plan(small(base_model="miniature"))


def test_the_command_asks_the_real_model(
    photos: Path,
    use_vault: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Random weights answer noise, of which nothing is kept, so the new zip has no captions."""
    monkeypatch.setattr(vision_language, "MOST_TOKENS", 3)
    new = tmp_path / "new.zip"
    main([str(photos), "--base", "qwen-image", "--output", str(new), "--avoid", "grey"])
    assert capsys.readouterr().out.splitlines()[-1] == str(new)
    rows = list(map(json.loads, new.with_suffix(".jsonl").read_text().splitlines()))
    assert {row["image"] for row in rows} == WITHOUT_CAPTION
    assert all(row["asked"] == 2 and "it did not end" in row["faults"] for row in rows)
    with zipfile.ZipFile(new) as made, zipfile.ZipFile(photos) as given:
        assert {*made.namelist()} == {*given.namelist()}
        assert all(made.read(name) == given.read(name) for name in given.namelist())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.zip"], "nowhere.zip does not exist; give a folder, a zip or a tar of images"),
        (["x.zip", "--model", "qwen3-vl-4"], "did you mean 'qwen3-vl-4b'"),
        (["x.zip", "--style", "--kind", "robot"], "--kind names a subject"),
        (["x.zip", "--avod", "red"], "unknown option --avod; did you mean --avoid?"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert message in f"{ended.value}{capsys.readouterr().err}"
    assert "--replace" in arguments_parser().format_help()
