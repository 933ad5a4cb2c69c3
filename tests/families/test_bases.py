"""Without a base model named, the largest one that fits the GPU is taken."""

import logging
import time

import pytest
import torch

from families.registry import BASES, default_base
from inference.engine import Engine
from inference.weights import choose_base
from trainer.memory.fitting import TEXT_TOKENS, figures_of
from trainer.memory.plan import Mode
from trainer.settings.fields import resolve
from trainer.settings.inputs import TrainingInputs


@pytest.fixture(autouse=True)
def no_base_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BASE_MODEL", raising=False)
    monkeypatch.delenv("MODEL_VAULT", raising=False)


def pretend(gigabytes: float, monkeypatch: pytest.MonkeyPatch) -> None:
    free = round(gigabytes * 1e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _=None: (free, free))


@pytest.mark.parametrize(
    ("gigabytes", "to_generate", "to_train"),
    [
        (80, "qwen-image", "qwen-image"),
        (48, "z-image-turbo", "qwen-image"),
        (24, "z-image-turbo", "z-image-turbo"),
        (8, "z-image-turbo", "z-image-turbo"),
    ],
)
def test_the_largest_base_that_fits_the_gpu_is_the_default(
    gigabytes: float,
    to_generate: str,
    to_train: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    pretend(gigabytes, monkeypatch)
    assert default_base("generation").name == to_generate
    assert choose_base("auto", []).name == to_generate
    assert resolve(TrainingInputs(dataset="x", seed=1)).base.name == to_train
    why = [each for each in caplog.messages if each.startswith("base_model auto: ")]
    assert len(why) == 3
    assert f"{to_train} ({gigabytes * 0.94:.1f} GB free; training needs: qwen-image" in why[2]
    assert ("none fits" in why[2]) == (gigabytes == 8)


def test_the_default_is_decided_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(24, monkeypatch)
    start = time.process_time()
    default_base("training")
    assert time.process_time() - start < 0.2


def test_a_base_that_is_named_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(80, monkeypatch)
    monkeypatch.setenv("BASE_MODEL", "z-image")
    assert (
        default_base().name == resolve(TrainingInputs(dataset="x", seed=1)).base.name == "z-image"
    )


def test_without_a_gpu_the_miniature_is_the_default(no_gpu: None) -> None:
    assert default_base("generation").name == default_base("training").name == "miniature-turbo"


def test_an_engine_does_not_change_its_mind_when_its_base_takes_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(80, monkeypatch)
    engine = Engine(torch.device("cpu"), torch.float32)
    assert engine._automatic().name == "qwen-image"
    pretend(20, monkeypatch)
    assert engine._automatic().name == "qwen-image"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen-image", "qwen-image-2.1", "z-image-turbo"])
def test_the_tables_memory_is_the_plans(name: str) -> None:
    base = BASES[name]
    settings = resolve(TrainingInputs(dataset="x", base_model=name, seed=1, sample_prompts="x"))
    counted = figures_of(settings, TEXT_TOKENS, torch.bfloat16)
    generation = counted.weights("none") + counted.text_weights("none")
    generation += 4 * counted.vae_weights + counted.preview.bytes
    assert base.generation_memory == pytest.approx(generation / 1e9, rel=0.01)
    training = counted.peak(Mode("int8", checkpointing=True))
    assert base.training_memory == pytest.approx(training / 1e9, rel=0.01)
