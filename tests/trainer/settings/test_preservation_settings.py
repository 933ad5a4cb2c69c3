"""Preservation: its settings, how much of it a run has, and its prompts."""

from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
from root import ROOT

from families.registry import BASES, trainable
from families.tokens import mentions
from trainer.learning.preservation import (
    Prompts,
    preservation_prompts,
    shipped_prompts,
)
from trainer.settings import BEGINS, extent_of, sort_prompts
from trainer.settings.fields import Settings, SettingsError, resolve
from trainer.settings.inputs import TrainingInputs
from trainer.settings.preservation import row_size
from trainer.settings.request_cost import too_much


def settings_of(base: str = "miniature-turbo", **given: Any) -> Settings:
    return resolve(TrainingInputs(**{"dataset": "imgs.zip", "base_model": base, "seed": 1} | given))


# ---- Settings ------------------------------------------------------------------------------------


def test_auto_is_the_bases_weight_and_off_without_a_subject() -> None:
    assert settings_of().preserve == BASES["miniature-turbo"].preservation
    for off in ("off", " OFF ", False):
        assert settings_of(preserve=off).preserve == 0
    style = {"train_placeholder_token": False}
    assert settings_of(**style).preserve == 0
    assert settings_of(**style, trigger_word="fox").preserve > 0
    assert (
        settings_of(**style, preserve=0.5).preserve == settings_of(preserve="0.5").preserve == 0.5
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"preserve": 0}, "preserve is 0; it must be between 1e-06 and 10; off switches it off"),
        ({"preserve": 11}, "preserve is 11; it must be between"),
        ({"preserve": "nan"}, "preserve is nan; it must be between"),
        ({"preserve": "strong"}, "preserve is 'strong'; it must be auto, off, or a number above"),
        ({"preserve": True}, "preserve is True; it must be auto, off, or a number"),
        ({"preserve_prompts": []}, "preserve_prompts is empty; remove it.*or set preserve to off"),
        ({"preserve_prompts": " \n"}, "preserve_prompts is empty"),
        ({"preserve_prompts": "prompts.txt"}, "looks like a file; give the prompts themselves"),
        ({"preserve_prompts": "/data/my.yaml"}, "looks like a file"),
        ({"preserve_prompts": ["a"] * 1001}, "has 1,001 prompts; at most 1,000 are accepted"),
        ({"preserve_prompts": ["a", "b" * 1001]}, "prompt 2 has 1,001 characters; at most 1,000"),
        (
            {
                "preserve_prompts": ["a", "TOK at night"],
                **{"train_placeholder_token": False, "preserve": 0.5},
            },
            "prompt 2 'TOK at night': TOK stands for the subject, but no placeholder token",
        ),
        ({"preserve_prompts": "a", "preserve": "off"}, "preserve is off; remove them, or set"),
        (
            {"preserve_prompts": "a", "train_placeholder_token": False},
            "auto, which is off without a placeholder token or trigger_word",
        ),
    ],
)
def test_a_wrong_setting_is_named_with_what_to_do(given: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        settings_of(**given)


def test_a_yaml_file_may_say_off_as_yaml_reads_it(tmp_path: Path) -> None:
    from trainer.settings.config import read_config

    file = tmp_path / "run.yaml"
    for text, weight in (("off", 0), ("0.5", 0.5), ("2", 2), ("auto", 0.5)):
        file.write_text(f"base_model: miniature\ndataset: a.zip\ntrain:\n  preserve: {text}\n")
        assert read_config(file).preserve == weight
    file.write_text("base_model: miniature\ndataset: a.zip\ntrain:\n  preserve_prompts: [a b, c]\n")
    assert read_config(file).preserve_prompts == ("a b", "c")


@pytest.mark.parametrize(
    ("given", "wanted"),  # side, images, of the subject, steps, rows, every, edits
    [
        ({"base": "z-image-turbo", "steps": 1000}, (512, 128, 48, 8, 1, 1, 0)),
        ({"base": "z-image-turbo", "steps": 1000, "resolution": 512}, (512, 36, 14, 8, 1, 2, 0)),
        ({"base": "qwen-image", "steps": 1000}, (512, 64, 24, 12, 1, 1, 0)),
        ({"base": "miniature-turbo", "steps": 500}, (64, 128, 48, 8, 4, 1, 0)),
        ({"base": "miniature-turbo", "steps": 1, "batch_size": 1}, (64, 8, 3, 8, 1, 2, 0)),
        ({"base": "miniature-turbo", "preserve_prompts": "a\nb"}, (64, 2, 48, 8, 4, 1, 0)),
        ({"base": "miniature-turbo", "preserve_prompts": "a\nTOK"}, (64, 1, 1, 8, 4, 1, 0)),
        (
            {
                "base": "miniature-turbo",
                "steps": 500,
                "preserve": 1,
                "train_placeholder_token": False,
            },
            (64, 128, 0, 8, 4, 1, 0),
        ),
        ({"base": "qwen-image-edit-2511", "steps": 2000}, (512, 64, 0, 12, 1, 2, 64)),
        ({"base": "qwen-image-2.1", "steps": 2000, "controls": "x"}, (512, 64, 0, 12, 1, 1, 32)),
    ],
    ids=str,
)
def test_a_run_takes_at_most_six_tenths_longer(
    given: dict[str, Any], wanted: tuple[int, ...]
) -> None:
    """But for the least number of images. Measured by the plan's FLOPs in `docs/memory.md`."""
    settings = settings_of(**given)
    extent = extent_of(settings)
    assert astuple(extent) == wanted
    size = row_size(settings)
    rows = extent.rows * size / extent.every / settings.batch_size
    trained = settings.steps * settings.batch_size
    assert rows <= 0.5
    if trained and extent.images > 8:  # nine tenths of a step are the transformer's
        images = (extent.images + extent.subject_images) * extent.steps * size / 2 / trained
        assert 0.9 * ((1 - BEGINS) * rows + images) <= 0.6


def test_the_rows_count_in_what_a_request_may_cost() -> None:
    given: dict[str, Any] = {"base": "z-image", "steps": 93_000, "batch_size": 2}
    given |= {"checkpoint_every": 93_000}
    assert too_much(settings_of(**given, preserve="off")) == []
    (said,) = too_much(settings_of(**given))
    assert "186,000 images, which is too much" in said and "at most 181,818 are accepted" in said


# ---- Prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", trainable())
def test_every_base_has_varied_prompts_without_and_with_the_subject(base: str) -> None:
    prompts = shipped_prompts(BASES[base].preservation_prompts)
    assert len(set(prompts)) == len(prompts)
    assert all(each.strip() == each != "" for each in prompts)
    others, of_subject = sort_prompts(prompts, settings_of(base))
    assert (len(others), len(of_subject)) == (128, 48)
    assert not any(word in each for each in others for word in ("TOK", "<", "["))
    assert all(each.count("<zwx>") == 1 and "TOK" not in each for each in of_subject)
    if BASES[base].most_references:
        edits = shipped_prompts(f"{BASES[base].preservation_prompts}_edits")
        assert len({*edits}) == len(edits) >= 64  # as many as a run uses
        assert sort_prompts(edits, settings_of(base)) == (edits, [])


def test_the_prompts_are_in_the_wheel() -> None:
    from setuptools import find_namespace_packages

    assert "trainer.learning.preservation_prompts" in find_namespace_packages(
        str(ROOT), include=["trainer*"]
    )


def test_prompts_with_the_trigger_word_are_prompts_of_the_subject() -> None:
    given: dict[str, Any] = {"train_placeholder_token": False, "trigger_word": "Triangle"}
    shipped = [each for each in shipped_prompts("shapes") if "TOK" not in each]
    assert any(mentions(each, "triangle") for each in shipped)
    prompts = preservation_prompts(settings_of(**given))
    assert list(prompts.others) == [each for each in shipped if not mentions(each, "triangle")]
    assert len(prompts.subject) == 48
    assert all(mentions(each.lower(), "triangle") for each in prompts.subject)


def test_own_prompts_replace_the_shipped_ones_of_their_kind_and_spread_over_the_list() -> None:
    own = [f"number {n}" for n in range(100)]
    few: dict[str, Any] = {"steps": 1, "batch_size": 1}
    prompts = preservation_prompts(settings_of(preserve_prompts=own, **few))
    assert prompts.others == tuple(f"number {n}" for n in (0, 12, 25, 37, 50, 62, 75, 87))
    assert len(prompts.subject) == 3 and "at sea, a yellow <zwx> on the left" in prompts.subject
    prompts = preservation_prompts(settings_of(preserve_prompts=["a blue TOK"], **few))
    assert len(prompts.others) == 8 and prompts.subject == ("a blue <zwx>",)
    assert preservation_prompts(settings_of(preserve="off")) == Prompts()


def test_of_several_subjects_each_is_in_its_share_of_the_prompts() -> None:
    prompts = preservation_prompts(settings_of(subjects="<a>,<b>,<c>"))
    for token in ("<a>", "<b>", "<c>"):
        assert sum(token in each for each in prompts.subject) == 16
