"""Validation measures the same thing from the base to the end."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from adapters.archive import read_archive
from trainer import run as run_module
from trainer.learning.samples import Sample
from trainer.monitor.validation import ENOUGH, MOST, QUANTILES, Curves, hold_out, split
from trainer.run import train
from trainer.settings.fields import Settings, SettingsError, resolve
from trainer.settings.inputs import TrainingInputs


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Settings]:
    """Settings of a training on the embedded miniature and its own pictures."""

    def make(**changes: Any) -> Settings:
        values: dict[str, Any] = {
            "dataset": "demo/subject.zip",
            "base_model": "miniature-turbo",
            "steps": 15,
            "batch_size": 1,
            "seed": 3,
            "sample_prompts": (),
            "preserve": "off",
            "output_dir": tmp_path / "out",
        }
        return resolve(TrainingInputs(**(values | changes)))

    return make


def samples(count: int) -> list[Sample]:
    """Two of every picture, as two resolutions give them."""
    empty = torch.zeros(1, 1, 1)
    return [Sample(f"{k:03d}.png", "", empty, empty) for k in range(count) for _ in range(2)]


def curves(weights: Path) -> Curves:
    meta = read_archive(weights).meta
    measured = Curves(**meta["fit" if "fit" in meta else "validation"])
    assert measured.kind in meta and ("fit" in meta) != ("validation" in meta)
    return measured


@pytest.mark.parametrize(
    ("count", "wanted", "held"),
    [
        *((ENOUGH - 1, "auto", 0), (ENOUGH, "auto", 2), (59, None, 5), (500, "auto", MOST)),
        *((6, 1, 1), (6, "3", 3), (2, 1, 1), (500, 0, 0), (500, "250", 250)),
    ],
)
def test_auto_holds_out_a_tenth_of_many_images_and_a_number_exactly_so_many(
    count: int,
    wanted: str | int | None,
    held: int,
    settings: Callable[..., Settings],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    asked = settings(validation_images=wanted)
    names = hold_out(samples(count), asked)
    training, held_out = split(samples(count), names)
    assert len({sample.name for sample in held_out}) == held
    assert len(training) + len(held_out) == 2 * count
    assert not {sample.name for sample in training} & {sample.name for sample in held_out}
    said = f"{held} of {count} images are held out" if held else "measured on training images: fit"
    assert said in caplog.text
    assert hold_out(samples(count), asked) == names  # the seed's choice


def test_nothing_is_held_out_where_nothing_is_measured(settings: Callable[..., Settings]) -> None:
    assert hold_out(samples(500), settings(validation_every=0)) == frozenset()


@pytest.mark.parametrize(("count", "wanted"), [(1, 1), (2, 2), (6, 4), (500, 251)])
def test_at_least_half_of_the_images_are_trained_on(
    count: int, wanted: int, settings: Callable[..., Settings]
) -> None:
    with pytest.raises(SettingsError, match=f"validation_images is {wanted}, but the dataset has"):
        hold_out(samples(count), settings(validation_images=wanted))


def test_of_several_subjects_each_keeps_an_image_to_train_on(
    settings: Callable[..., Settings], caplog: pytest.LogCaptureFixture
) -> None:
    empty = torch.zeros(1, 1, 1)
    captions = ("a <a>", "a <b>", "another <b>")
    images = [Sample(f"{number}.png", text, empty, empty) for number, text in enumerate(captions)]
    asked: dict[str, Any] = {"subjects": "<a>,<b>", "validation_images": 1}
    assert hold_out(images, settings(**asked)) <= {"1.png", "2.png"}
    assert hold_out(images[:2], settings(**asked)) == frozenset()
    assert "0 of 1 images for validation can be held out: each of <a>, <b> needs" in caplog.text
    with pytest.raises(SettingsError, match="keep_best: 0 of 1 images.*add images"):
        hold_out(images[:2], settings(**asked, keep_best=True))


def test_the_loss_is_measured_about_ten_times_from_the_base_on(
    settings: Callable[..., Settings],
) -> None:
    measured = curves(train(settings()))
    assert measured.steps == [0, 2, 4, 6, 8, 10, 12, 14, 15]
    assert measured.held_out == []
    assert measured.sigmas == sorted(measured.sigmas)
    assert 0 < measured.sigmas[0] < measured.sigmas[-1] < 1
    assert all(len(losses) == len(QUANTILES) for losses in measured.losses)
    # What is measured is fixed, so that even fifteen steps show in every one of its parts.
    falls = [
        last < first for first, last in zip(measured.losses[0], measured.losses[-1], strict=True)
    ]
    assert all(falls)


def test_a_training_that_learns_nothing_measures_the_same_loss_every_time(
    settings: Callable[..., Settings],
) -> None:
    """The base is measured without the adapter, so a start that learns nothing equals it."""
    rates = {"learning_rate": 1e-30, "placeholder_learning_rate": 0.0, "placeholder_init_std": 0.0}
    path = settings(steps=2, validation_every=1, **rates)
    try:
        weights = train(path)
    except RuntimeError:  # nothing was learned, which a check refuses; what is written is kept
        assert path.output_dir is not None
        weights = path.output_dir / "weights-failed.zip"
    measured = curves(weights)
    assert measured.steps == [0, 1, 2]
    assert measured.losses[0] == measured.losses[1] == measured.losses[2]


def test_a_resumed_run_keeps_the_curve_of_its_first_part(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    common = {"lr_scheduler": "constant", "validation_every": 2}
    whole = curves(train(settings(steps=6, **common)))
    first = settings(steps=4, checkpoint_every=4, output_dir=tmp_path / "first", **common)
    train(first)
    resumed = first.replace(steps=6, resume_from=tmp_path / "first" / "checkpoints")
    assert curves(train(resumed)) == whole


def test_pictures_that_are_held_out_are_not_trained_on(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = tmp_path / "many.zip"
    with zipfile.ZipFile(dataset, "w") as archive:
        for number in range(ENOUGH):
            encoded = io.BytesIO()
            Image.new("RGB", (64, 64), (10 * number, 90, 90)).save(encoded, format="png")
            archive.writestr(f"{number:02d}.png", encoded.getvalue())

    trained_on: set[str] = set()

    class Watched(run_module.Loop):  # type: ignore[name-defined, misc]
        def step(self, step: int) -> None:
            trained_on.update(sample.name for sample in self.samples)
            super().step(step)

    monkeypatch.setattr(run_module, "Loop", Watched)
    weights = train(settings(dataset=dataset, steps=1))
    measured = curves(weights)
    assert len(measured.held_out) == 2
    assert len(trained_on) == ENOUGH - 2
    assert not trained_on & set(measured.held_out)
    text = json.dumps(read_archive(weights).meta["checks"])
    assert "on 2 held-out images" in text
