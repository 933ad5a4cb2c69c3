"""Regularization images are kept as the base model sees them, and never trained on."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dataset_files import make_folder, picture
from loops import make_loop

from adapters.archive import read_archive
from trainer.checking import dataset_of, summary
from trainer.data.dataset import read_dataset
from trainer.data.example import Example
from trainer.learning.features import Captions
from trainer.learning.preservation import Preservation, preservation_prompts
from trainer.learning.regularization import encode_regularization
from trainer.run import train
from trainer.settings.fields import Settings

Make = Callable[..., Settings]
TINY: dict[str, Any] = {"base_model": "miniature-turbo", "batch_size": 4, "preserve": "auto"}
PERSON = {f"reg/1_person/{k}.png": picture(color=(k * 20, 0, 0)) for k in range(12)}


def with_reg(folder: Path, more: dict[str, bytes]) -> Path:
    images = {f"{k}.png": picture(color=(0, k * 60, 0)) for k in range(4)}
    return make_folder(folder, images | more)


def reg_of(settings: Settings) -> tuple[list[Example], list[Example]]:
    kept: list[Example] = []
    return read_dataset(settings.dataset, *settings.caption_rules, regularized=kept), kept


def test_they_are_read_with_their_own_captions_and_are_no_training_images(
    tmp_path: Path, small: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    more = {"reg/a.png": picture(), "reg/a.txt": b"a man", "reg/b.png": picture()[:50]}
    more |= dict.fromkeys(("reg/a_mask.png", "reg/1_person/control/0.png"), picture())
    settings = small(**TINY, dataset=with_reg(tmp_path, PERSON | more), steps=500)
    examples, kept = reg_of(settings)
    assert [each.name for each in examples] == [f"{k}.png" for k in range(4)]
    captions = {each.name: each.caption for each in kept}
    assert captions == dict.fromkeys(PERSON, "person") | {"reg/a.png": "a man"}
    assert "13 of 14 regularization images are used by preserve, and not trained on" in caplog.text
    assert "reg/b.png: is truncated" in caplog.text and "is ignored" not in caplog.text
    assert "4 images, 13 regularization images are used" in summary(settings, dataset_of(settings))
    for off in ({"regularization": "off"}, {"preserve": "off"}):
        caplog.clear()
        assert reg_of(small(**TINY | {"dataset": tmp_path} | off))[1] == []
        assert "reg/ is ignored (16 images)" in caplog.text


def test_the_model_is_asked_for_the_bases_velocities_on_them(
    tmp_path: Path, small: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """They take the place of generated images, so a run costs as much as without."""
    files = {f"reg/{name}.png": picture() for name in ("1_person/0", "1_person/1", "a", "b")}
    files["reg/a.txt"] = b"TOK, a man"
    settings = small(**TINY, dataset=with_reg(tmp_path, files))
    loop, (_, examples) = make_loop(settings, 1), reg_of(settings)
    kept = encode_regularization(loop.family, examples, settings)
    assert len(examples) == 4 and "subject are not used: reg/a.png" in caplog.text
    assert [each.prompt for each in kept] == ["person", "person", ""]
    prompts = preservation_prompts(settings, kept)
    assert len(prompts.others) == 8 - 3
    texts, vectors = [each.caption for each in loop.samples], loop.placeholders[0]
    loop.captions = Captions(loop.family, texts, {vectors.token: vectors.vectors}, [*prompts.all])
    assert loop.lora is not None
    with loop.lora.lifted():
        loop.preservation = Preservation(loop.family, settings, loop.captions, prompts)
    targets = loop.preservation.others
    assert len(targets) == 8 * loop.preservation.extent.steps
    of_images = targets[-3 * loop.preservation.extent.steps :]
    assert {each.prompt for each in of_images} == {"person", ""}
    last = of_images[loop.preservation.extent.steps - 1]  # of the first image: almost no noise
    assert (last.latents_CHW - kept[0].latents_CHW).abs().mean() < (
        of_images[0].latents_CHW - kept[0].latents_CHW
    ).abs().mean()
    loop.preservation.others = of_images
    with torch.no_grad():
        assert max(loop.preservation.loss(number).item() for number in range(4)) < 1e-9


def test_a_run_says_how_many_it_has_used(tmp_path: Path, small: Make) -> None:
    changes = TINY | {"steps": 2, "batch_size": 2, "validation_every": 0}
    dataset = with_reg(tmp_path / "set", PERSON)
    meta = read_archive(train(small(**changes, dataset=dataset))).meta
    assert meta["dataset"]["regularization"] == 4 and len(meta["dataset"]["pictures"]) == 4
    assert meta["training"]["preservation_last"] is not None
