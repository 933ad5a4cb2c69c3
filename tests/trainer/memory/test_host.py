"""CPU memory of a run on a GPU: counted, checked before anything is loaded, and logged."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from families.family import WeightStorage
from families.frozen_linear import FrozenLinear
from families.loading import load_family
from families.registry import find_base
from trainer.memory.fitting import TooLarge, _with_host
from trainer.memory.host import host_parts, host_previews, room_of
from trainer.memory.plan import Choice, Figures, Mode
from trainer.memory.step_cost import NOTHING, Load
from trainer.monitor import inference_weights
from trainer.monitor.inference_weights import NoRoom, check_originals_fit
from trainer.settings.fields import Settings, resolve
from trainer.settings.inputs import TrainingInputs

GB = 10**9
QWEN: dict[str, Any] = {
    "block_weights": 20 * GB,
    "other_weights": GB // 20,
    "text_block_weights": 7 * GB,
    "text_other_weights": GB // 2,
    "vae_weights": GB // 8,
    "lora_modules": 716,
    "lora_values": 211 * 10**6,
    "bytes_per_value": 2,
    "optimizer": "adamw",
    "ema": False,
    "accumulates": False,
    "placeholder": False,
    "steps": (NOTHING, NOTHING),
    "placeholder_pass": NOTHING,
    "image": NOTHING,
    "caption": NOTHING,
    "largest_linear": 56_623_104,
}


def settings_of(**changes: Any) -> Settings:
    values = {"dataset": "x", "base_model": "z-image-turbo", "seed": 1}
    return resolve(TrainingInputs(**(values | changes)))


def held_against(mode: Mode, gigabytes: float, **changes: Any) -> Choice:
    """The choice of a mode on a machine with so much free CPU memory."""
    choice, room = Choice(mode, "none", 0, True, ""), room_of(round(gigabytes * GB))
    return _with_host(settings_of(), Figures(**(QWEN | changes)), choice, room)


def test_offloaded_weights_are_counted_in_the_bytes_of_their_quantization() -> None:
    figures = Figures(**QWEN)
    checkpoint = {"checkpoints": 12 * 211 * 10**6}
    loading = {"loading": 14 * 56_623_104}  # one weight, not a model
    assert host_parts(figures, Mode()) == checkpoint
    assert host_parts(figures, Mode("nf4", True)) == checkpoint | loading
    offloaded = {"offloaded weights": 40 * GB}
    assert host_parts(figures, Mode(offload=True)) == checkpoint | offloaded
    int8 = host_parts(figures, Mode("int8", offload=True))
    assert int8["offloaded weights"] == pytest.approx(20 * GB, rel=0.01)
    assert host_parts(figures, Mode(shards=4)) == checkpoint
    sharded = host_parts(figures, Mode("int8", shards=4))  # quantized before it is split
    assert sharded["loading"] == pytest.approx(20 * GB, rel=0.05)


def test_previews_need_the_original_weights_and_twice_with_a_training_adapter() -> None:
    figures = Figures(**QWEN | {"preview": Load(GB, 0)})
    assert host_previews(figures, Mode(), merged=False) == 40 * GB
    assert host_previews(figures, Mode(), merged=True) == 80 * GB
    assert host_previews(figures, Mode("int8"), merged=True) == 40 * GB
    assert host_previews(Figures(**QWEN), Mode(), merged=True) == 0


def test_a_run_that_cpu_memory_does_not_hold_is_refused_with_the_numbers() -> None:
    said = (
        r"needs 42.5 GB \(checkpoints 2.5, offloaded weights 40.0\) of 30.1 GB, which is not "
        "enough with the unquantized base, block weights in CPU memory; set quantize to int8"
    )
    with pytest.raises(TooLarge, match=said):
        held_against(Mode(offload=True), 32)
    with pytest.raises(TooLarge, match="; free some, or use a machine with more"):
        held_against(Mode("int8", offload=True), 16)


def test_a_run_that_it_holds_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert not held_against(Mode("int8", offload=True), 32).no_previews
    parts = "checkpoints 2.5, loading 0.8, offloaded weights 20.0"
    assert caplog.messages == [f"CPU memory: needs 23.3 GB ({parts}) of 30.1 GB"]


def test_previews_that_it_does_not_hold_are_left_to_the_end() -> None:
    preview = {"preview": Load(GB, 0)}
    assert not held_against(Mode("int8"), 64, **preview).no_previews
    choice = held_against(Mode("int8"), 32, **preview)
    assert choice.no_previews == "an image needs 40.0 GB more CPU memory, and 26.8 GB are free"


def test_the_images_of_the_checks_are_skipped_where_a_second_base_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MODEL_VAULT", raising=False)

    class Published:
        base, dtype = find_base("qwen-image"), torch.bfloat16

    monkeypatch.setattr(inference_weights, "free_memory", lambda _: 64 * GB)
    check_originals_fit(Published())
    monkeypatch.setattr(inference_weights, "free_memory", lambda _: 32 * GB)
    said = "images need the original weights, 40.8 GB of CPU memory, and 30.1 GB are free"
    with pytest.raises(NoRoom, match=said):
        check_originals_fit(Published())


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_the_count_of_offloaded_weights_is_that_of_a_loaded_base(
    quantize: str, use_vault: Path
) -> None:
    family = load_family(find_base("z-image"), torch.device("cpu"), torch.bfloat16)
    family.set_storage(WeightStorage(quantize, offload=True))
    held = values = 0
    for layer in family.transformer.modules():
        if isinstance(layer, FrozenLinear):
            held += layer.weight.nbytes
            values += layer.in_features * layer.out_features
    counted = host_parts(Figures(**QWEN | {"block_weights": values}), Mode(quantize, offload=True))
    # The count includes the scales, which stay on the GPU.
    assert held == pytest.approx(counted["offloaded weights"], rel=0.001)
