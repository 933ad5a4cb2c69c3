"""A training that was stopped goes on as if nothing had happened, or says why it cannot."""

import json
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import make_checkpoint, make_loop

from adapters.archive import Archive, read_archive, write_archive
from trainer import reading, run
from trainer.data.dataset import read_dataset
from trainer.learning.checkpoint import (
    BrokenCheckpoint,
    Checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from trainer.learning.loop import Diverged, Loop
from trainer.learning.resume import data_identity, read_resume, with_seed
from trainer.learning.saving import state_of
from trainer.settings.choices import OPTIMIZERS
from trainer.settings.fields import Settings, SettingsError, resolve
from trainer.settings.inputs import TrainingInputs


def test_weights_that_name_a_folder_as_their_base_are_refused_in_one_line(
    settings: Settings, tmp_path: Path
) -> None:
    examples = read_dataset(settings.dataset, "a photo of TOK")
    factors = {"layers.0.attention.to_q": (torch.ones(2, 8), torch.ones(8, 2))}
    for name in (str(tmp_path), "~nobody/x", "a" * 5000, "\x1b[31m", "elsewhere"):
        file = write_archive(Archive(factors, (), {"base_model": name}), tmp_path / "w.zip")
        with pytest.raises(SettingsError, match="resume_from: .* is not one of") as refused:
            read_resume(settings.replace(resume_from=file), examples)
        assert str(refused.value).isprintable()
    # Trained on a folder of this name, which is the base of this run, too: only the layers differ.
    own = replace(settings.base, name="elsewhere", hub_id="elsewhere", folder=tmp_path)
    with pytest.raises(SettingsError, match="contains other layers than lora_targets"):
        read_resume(settings.replace(base=own, resume_from=file), examples)


SEVERAL = {
    "clock_motion.png": ["TOK, a clock", "a blurred clock", "TOK that moves"],
    "rocket.jpg": ["TOK that starts", "a rocket and TOK"],
}


class Cancelled(BaseException):
    """What the runtime throws into a training that is cancelled."""


@pytest.fixture
def settings(photos: Path, use_vault: Path, tmp_path: Path) -> Settings:
    """With buckets, batches, dropout, warm-up, a falling rate, the placeholder on, and several
    captions of two images."""
    dataset = tmp_path / "photos.zip"
    shutil.copy(photos, dataset)
    with zipfile.ZipFile(dataset, "a") as archive:
        archive.writestr("captions.json", json.dumps(SEVERAL))
    return resolve(
        TrainingInputs(
            dataset=dataset,
            base_model="z-image",
            resolution="64,96",
            rank=2,
            steps=9,
            batch_size=2,
            caption_dropout=0.3,
            lr_scheduler="cosine",
            lr_warmup_steps=2,
            learning_rate=1e-3,
            seed=11,
            validation_every=0,
            sample_prompts=(),
            output_dir=tmp_path / "whole",
            checkpoint_every=0,
        )
    )


def cancel_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Throws a cancellation into the loop once so many steps are done."""
    original: Callable[..., Any] = Loop.step

    def step(self: Loop, number: int) -> Any:
        if number == steps:
            raise Cancelled
        return original(self, number)

    monkeypatch.setattr(Loop, "step", step)


def assert_same(one: Archive, other: Archive) -> None:
    assert one.factors.keys() == other.factors.keys()
    for layer, (down, up) in one.factors.items():
        assert torch.equal(down, other.factors[layer][0]), layer
        assert torch.equal(up, other.factors[layer][1]), layer
    assert one.placeholder is not None and other.placeholder is not None
    assert torch.equal(one.placeholder.vectors, other.placeholder.vectors)


def test_a_cancelled_run_that_is_resumed_equals_an_uninterrupted_one(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_archive(run.train(settings))
    broken_off = settings.replace(output_dir=tmp_path / "parts")
    with monkeypatch.context() as patch:
        cancel_after(patch, 4)
        with pytest.raises(Cancelled):
            run.train(broken_off)
    folder = tmp_path / "parts" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [
        "step-000004.safetensors",
        "step-000004.zip",
    ]
    assert not (tmp_path / "parts" / "weights.zip").exists()

    resumed = read_archive(run.train(broken_off.replace(resume_from=folder)))
    assert_same(resumed, whole)
    assert resumed.meta["training"]["loss_last"] == whole.meta["training"]["loss_last"]


def test_the_captions_of_an_image_take_turns_by_step(settings: Settings) -> None:
    settings = settings.replace(
        resolutions=(64,), batch_size=1, caption_dropout=0.0, train_placeholder_token=False
    )
    loops = [make_loop(settings.replace(seed=seed)) for seed in (11, 11, 12)]
    ones, again, others = ([loop.batch(n)[3][0] for n in range(300)] for loop in loops)
    assert ones == again  # a function of seed and step
    assert ones != others
    seen = Counter(ones)
    for captions in SEVERAL.values():
        assert sum(seen[text] for text in captions) == 50  # of six images
        assert all(seen[text] >= 8 for text in captions)
    assert len(seen) == 4 + 5


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_accumulation_averages_and_every_optimiser_are_resumed_bit_for_bit(
    optimizer: str, settings: Settings, tmp_path: Path
) -> None:
    """8-bit states begin at 4096 entries, so the rank is high."""
    settings = settings.replace(
        optimizer=optimizer,
        learning_rate=1.0 if OPTIMIZERS[optimizer].finds_rate else 1e-3,
        resolutions=(64,),
        batch_size=1,
        steps=3,
        rank=64,
        gradient_accumulation=2,
        ema_decay=0.9,
        timestep_sampling="shift",
    )
    whole, resumed = make_loop(settings), make_loop(settings)
    for step in range(3):
        if step == 2:
            path = write_checkpoint(state_of(whole), tmp_path)
            kept = read_resume(settings.replace(resume_from=path), [])
            assert isinstance(kept, Checkpoint)
            resumed.restore(kept)
        whole.step(step)
    resumed.step(2)
    for name, parameter in whole.named.items():
        assert torch.equal(parameter, resumed.named[name]), name
    ours, theirs = ((*loop.final_weights()[0].values(),) for loop in (whole, resumed))
    assert all(
        torch.equal(a, b)
        for one, other in zip(ours, theirs, strict=True)
        for a, b in zip(one, other, strict=True)
    )
    assert not torch.equal(ours[0][1], whole.lora_parameters[1])  # averages are shipped
    assert resumed.history.plain() == whole.history.plain()


def test_going_on_with_changed_pictures_is_said_and_with_others_refused(
    settings: Settings, tmp_path: Path, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    examples = read_dataset(photos, "a photo of TOK", "<zwx>")
    examples = [examples[0], replace(examples[1], caption="<zwx>, told anew")]
    now = data_identity(examples)
    path = make_checkpoint(settings, tmp_path, now)
    resumed = settings.replace(resume_from=path)

    assert read_resume(resumed, examples) is not None
    assert "changed dataset" not in caplog.text
    changed = read_dataset(photos, "a photo of TOK", "<zwx>")[:3]
    assert read_resume(resumed, changed) is not None
    assert "1 images added, 0 removed, 1 captions changed" in caplog.text
    with pytest.raises(SettingsError, match="trained on other images.*weights.zip"):
        read_resume(resumed, [replace(each, data=b"") for each in examples])


def test_checkpoints_come_every_so_many_steps_and_after_the_last_and_two_stay(
    settings: Settings, tmp_path: Path
) -> None:
    run.train(settings.replace(checkpoint_every=2))
    names = sorted(p.name for p in (tmp_path / "whole" / "checkpoints").iterdir())
    assert [name for name in names if name.endswith(".safetensors")] == [
        "step-000008.safetensors",
        "step-000009.safetensors",
    ]
    weights = [name for name in names if name.endswith(".zip")]
    assert weights == [f"step-00000{step}.zip" for step in (2, 4, 6, 8, 9)]


def test_a_training_that_breaks_leaves_its_last_good_checkpoint(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Loop.step

    def step(self: Loop, number: int) -> None:
        original(self, number)
        if number == 4:
            self.lora_parameters[0].data[0, 0] = float("nan")

    monkeypatch.setattr(Loop, "step", step)
    with pytest.raises(Diverged):
        run.train(settings.replace(checkpoint_every=3))
    (kept,) = (tmp_path / "whole").rglob("*.safetensors")
    assert read_checkpoint(kept).step == 3
    assert not (tmp_path / "whole" / "weights.zip").exists()


def test_a_resumed_run_keeps_its_seed(settings: Settings, tmp_path: Path, photos: Path) -> None:
    make_checkpoint(settings, tmp_path)
    again = resolve(TrainingInputs(dataset=photos, base_model="z-image", resume_from=tmp_path))
    assert with_seed(again).seed == settings.seed


def test_finished_weights_are_continued_with_a_fresh_optimiser(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = run.train(settings)
    caplog.set_level("INFO")
    second = run.train(
        settings.replace(
            steps=1,
            learning_rate=1e-20,
            placeholder_learning_rate=1e-20,
            output_dir=tmp_path / "more",
            # A known few-step LoRA by its name.
            resume_from=Path(shutil.copy(first, tmp_path / "Qwen-Image-Lightning-8steps.zip")),
        )
    )
    assert "fresh optimizer" in caplog.text
    assert "is Qwen-Image-Lightning, a few-step LoRA; training on top of it" in caplog.text
    start, end = read_archive(first), read_archive(second)
    assert_same(start, end)  # one step at a rate below any rounding moves nothing


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": 4}, "has rank 2, but this run has 4; set rank to 2"),
        (
            {"base_model": "qwen-image"},
            "has base_model 'Tongyi-MAI/Z-Image', but this run has 'Qwen",
        ),
        ({"placeholder_token": "<other>"}, "has placeholder_token '<zwx>'"),
        (
            {"train_placeholder_token": False, "trigger_word": "fox"},
            "has placeholder_token '<zwx>'",
        ),
        ({"optimizer": "adafactor"}, "has optimizer 'adamw', but this run has 'adafactor'"),
        ({"lora_targets": "attention"}, "has lora_targets 'auto', but this run has 'attention'"),
        ({"steps": 4}, "has 8 steps done, but this run has 4; set steps to 8 or more"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused_before_a_model_is_loaded(
    changes: dict[str, Any],
    said: str,
    settings: Settings,
    tmp_path: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = make_checkpoint(settings, tmp_path)
    kept = read_checkpoint(path)
    history = {"losses": [1.0] * 8, "row_norms": [1.0]}
    write_checkpoint(replace(kept, step=8, history=history), tmp_path)
    given = {"base_model": "z-image", "rank": 2, "steps": 9, "resolution": "64"} | changes
    wrong = resolve(TrainingInputs(dataset=photos, resume_from=tmp_path, seed=11, **given))
    monkeypatch.setattr(reading, "load_family", lambda *_: pytest.fail("a model was asked for"))
    with pytest.raises(SettingsError, match=said):
        run.train(wrong)


def test_a_damaged_checkpoint_is_refused(settings: Settings, tmp_path: Path) -> None:
    path = make_checkpoint(settings, tmp_path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BrokenCheckpoint, match="not a whole checkpoint"):
        read_checkpoint(path)
    with pytest.raises(SettingsError, match="no checkpoint"):
        (tmp_path / "empty").mkdir()
        run.train(settings.replace(resume_from=tmp_path / "empty"))
