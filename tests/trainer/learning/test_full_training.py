"""A full training: the transformer's own weights, written as a folder that generation reads."""

import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from loops import make_loop
from torch import nn

from adapters.formats import LoraMismatch
from adapters.trained_model import read_trained_model, read_weights
from families.components import original_transformer
from families.registry import BASES, family_of, find_base_or_folder, with_transformer
from families.without_weights import config_of
from inference.engine import Engine
from inference.request import Request
from trainer.learning.checkpoint import Checkpoint, write_checkpoint
from trainer.learning.fused import FusedOptimizer, rounded_stochastically
from trainer.learning.optimizers import make_optimizer
from trainer.learning.resume import read_resume
from trainer.learning.saving import Saver, state_of
from trainer.learning.step_weights import write_weights_of_step
from trainer.run import train
from trainer.run_files import SAVED, found_in, remove_parts, remove_run
from trainer.settings.fields import Settings
from trainer.settings.inputs import SettingsError

FULL = {"training": "full", "rank": None, "learning_rate": 1e-3}
SIZE = {"width": 64, "height": 64, "num_inference_steps": 2}


@pytest.mark.parametrize("name", ["z-image-de-turbo", "qwen-image"])
def test_a_full_training_is_read_as_weights_and_as_a_base_model(
    name: str, small: Callable[..., Settings], caplog: pytest.LogCaptureFixture
) -> None:
    """One base is a single file in another layout; the other has layers without an effect."""
    shown = {"sample_prompts": ("a <zwx>",), "sample_options": SIZE}
    folder = train(small(base_model=name, steps=5, preserve=0.5, **shown, **FULL))
    assert (folder.name, folder.parent.name) == ("model", "out")
    archive = read_trained_model(folder)
    assert archive.tokens == ("<zwx>",) and archive.meta["trained"] == "full"
    checks = {each["name"]: each["state"] for each in archive.meta["checks"]}
    exact = ("every layer was trained", "the file can be read back", "<zwx> was trained")
    for check in (*exact, "the last preview can be reproduced"):
        assert checks[check] == "passed", check
    assert not list(folder.parent.glob(".model*"))  # partial folders

    # As any program reads it, without the path of the base model here.
    text = (folder / "transformer" / "config.json").read_text()
    assert "_name_or_path" not in text and str(Path.home()) not in text
    model_class = getattr(diffusers, family_of(BASES[name]).classes.transformer)
    assert len(list(model_class.from_pretrained(folder / "transformer").parameters())) > 10

    engine, asked = Engine(), Request(prompt="a <zwx>", seed=1, **SIZE)
    image = engine.generate(asked, archive)[0].tobytes()
    assert engine.generate(asked, None, str(folder))[0].tobytes() == image
    assert engine.generate(asked, archive, str(folder))[0].tobytes() == image
    assert engine.generate(asked, None, name)[0].tobytes() != image
    with pytest.raises(LoraMismatch, match=f"(whole transformer of|trained on) {name}"):
        engine.generate(asked, archive, "z-image")
    base = find_base_or_folder(str(folder))
    assert base.completed_by == BASES[name]
    for part in ("transformer", "text_encoder", "vae"):  # of whichever model supplies them
        assert config_of(base, part).items() >= config_of(BASES[name], part).items(), part
    with pytest.raises(SettingsError, match="token <zwx> is part of base_model out"):
        small(base_model=str(folder))  # a LoRA
    assert "no preview" not in caplog.text


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [("adafactor", "bfloat16"), ("adamw8bit", "bfloat16"), ("adamw", "float32")],
)
def test_a_full_training_is_resumed_bit_for_bit(
    optimizer: str,
    dtype: str,
    small: Callable[..., Settings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DTYPE", dtype)
    settings = small(optimizer=optimizer, lora_targets="attention", **FULL)
    whole, resumed = make_loop(settings, 2), make_loop(settings, 2)
    for step in range(3):
        if step == 2:
            path = write_checkpoint(state_of(whole), tmp_path)
            kept = read_resume(settings.replace(resume_from=path), [])
            assert isinstance(kept, Checkpoint)
            resumed.restore(kept)
        whole.step(step)
        assert all(parameter.grad is None for parameter in whole.parameters)
    resumed.step(2)
    assert whole.full is not None
    assert {str(each.dtype) for each in whole.full.parameters()} == {f"torch.{dtype}"}
    assert all(change > 0 for change, _ in whole.full.changes().values())
    for name, parameter in whole.named.items():
        assert torch.equal(parameter, resumed.named[name]), name
    with pytest.raises(SettingsError, match="set training to 'full'"):
        read_resume(small(resume_from=path, optimizer=optimizer), [])


def test_weights_of_earlier_steps_are_folders_that_generation_reads(
    small: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    loop = make_loop(small(lora_targets="attention", steps=2, weights_every=1, **FULL), 2)
    saver = Saver(run / "checkpoints", run / "model")
    loop.run(saver=saver)
    saver.release()
    assert [each.name for each in (run / SAVED).iterdir()] == ["step-000001"]
    path = write_weights_of_step(loop, run / SAVED)  # by the command `save`
    archive, base = read_weights(path), loop.family.base
    assert (archive.meta["steps"], archive.meta["trained"], archive.model) == (2, "full", path)
    assert loop.full is not None
    loaded = original_transformer(loop.family, with_transformer(base, path))
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, loop.full.transformer.get_parameter(name)), name

    partial = path.with_name(".step-000003.abcdefgh.part")
    partial.mkdir()
    remove_parts(run)
    assert found_in(run) is not None and not partial.exists()
    remove_run(run)
    assert not path.exists()

    usage = shutil.disk_usage(tmp_path)._replace(free=10 * loop.full.nbytes())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    loop.settings = loop.settings.replace(steps=10_000)
    with pytest.raises(OSError, match="weights_every 1 saves 9997 times 0.00 GB"):
        saver.begin(loop)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match="GB are needed and 0.00 GB are free"):
        write_weights_of_step(loop, run / SAVED)
    assert not (run / SAVED).exists()


def test_steps_in_the_backward_pass_equal_those_after_it_and_hold_one_gradient() -> None:
    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 4))

    plain, fused = network(), network()
    options = {"rate": 0.01, "weight_decay": 0.1}
    after = make_optimizer("adamw", list(plain.parameters()), **options)
    held: list[int] = []

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = make_optimizer("adamw", parameters, **options)
        optimizer.register_step_pre_hook(
            lambda *_: held.append(sum(each.grad is not None for each in fused.parameters()))
        )
        return optimizer

    within = FusedOptimizer(make, list(fused.parameters()), seed=0)
    for step in range(3):
        within.begin(step)
        for model in (plain, fused):
            model(torch.full((2, 8), 0.5 + step)).square().sum().backward()
        total = nn.utils.get_total_norm([each.grad for each in plain.parameters()])
        assert within.norm() == pytest.approx(float(total), rel=1e-5)
        assert within.begun
        after.step()
        after.zero_grad()
        within.step()
        assert not within.begun
    assert max(held) == 1
    for one, other in zip(plain.parameters(), fused.parameters(), strict=True):
        assert torch.equal(one, other)


def test_rounding_by_chance_is_right_on_average_and_keeps_what_is_exact() -> None:
    random = torch.Generator().manual_seed(0)
    steps = torch.tensor([1 + 2**-9, -(1 + 2**-9), 3.0e-8, 250.3])
    rounded = rounded_stochastically(steps.expand(100_000, 4).contiguous(), random)
    assert rounded.dtype == torch.bfloat16
    assert all(len(each.unique()) == 2 for each in rounded.T)  # the neighbours
    errors = (rounded.double().mean(0) / steps.double() - 1).abs()
    assert errors.max() < 1e-4  # rounding to the nearest is wrong by up to 4e-3
    exact = torch.tensor([0.0, -1.5, float("inf"), float("-inf"), 3.0e38]).bfloat16().float()
    assert torch.equal(rounded_stochastically(exact, random).float(), exact)
    assert rounded_stochastically(torch.tensor([float("nan")]), random).isnan().all()


def test_what_does_not_fit_a_full_training_is_named_before_anything_is_loaded(
    small: Callable[..., Settings],
) -> None:
    wrong = {
        "base_model": "z-image-turbo",
        "rank": 8,
        "quantize": "int8",
        "low_memory": True,
        "ema_decay": 0.9,
        "gradient_accumulation": 2,
        "optimizer": "prodigy",
        "sample_options": {"lora_scale": 0.5},
        "hf_repo_id": "me/mine",
    }
    with pytest.raises(SettingsError) as found:
        small(**(FULL | wrong))
    for name in ("turbo_adapter", *wrong.keys() - {"base_model", "sample_options"}):
        assert name in str(found.value), name
    assert "sample.lora_scale" in str(found.value)
    settings = small(
        **FULL | {"learning_rate": None, "base_model": "z-image-turbo"}, turbo_adapter="none"
    )
    assert (settings.optimizer, settings.learning_rate) == ("adafactor", pytest.approx(1e-5))
