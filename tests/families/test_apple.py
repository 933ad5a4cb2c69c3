"""Apple silicon: what is chosen for its GPU, which is pretended here; nothing ran on one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops import loop_on_meta
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from families.device import device_name, empty_cache, peak_bytes, widest
from families.loading import default_device, default_dtype, load_family
from families.memory import free_and_total
from families.no_gpu import why_too_slow
from families.quantization import QuantizationUnavailable, check_available, usable
from families.registry import BASES, default_base
from inference.acceleration import wanted_in_training
from inference.residence import choose_storage
from trainer.memory.fitting import fit
from trainer.settings import missing_here
from trainer.settings.fields import Settings


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A Mac with 36 GB for its GPU, of which 6 are in use."""
    done: list[str] = []
    monkeypatch.delenv("BASE_MODEL", raising=False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 36 * 10**9)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 6 * 10**9)
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: done.append("emptied"))
    machine = type("Memory", (), {"available": 64 * 10**9, "total": 64 * 10**9})
    monkeypatch.setattr("families.memory.psutil.virtual_memory", machine)
    return done


def test_a_macs_gpu_is_chosen_with_what_it_can_do(
    mac: list[str], monkeypatch: pytest.MonkeyPatch, small: Callable[..., Settings]
) -> None:
    device = default_device()
    assert (device.type, default_dtype(device)) == ("mps", torch.bfloat16)
    assert free_and_total(device) == (30 * 10**9, 36 * 10**9)
    assert (device_name(device), peak_bytes(device)) == ("Apple GPU", None)
    assert widest(device) == torch.float32 and widest(torch.device("cpu")) == torch.float64
    empty_cache(device)
    assert mac == ["emptied"]
    assert why_too_slow(BASES["z-image-turbo"]) is None
    assert default_base("training").name == default_base("generation").name == "z-image-turbo"
    assert not wanted_in_training(device)
    assert choose_storage(BASES["qwen-image"], device).quantize == "none"
    assert usable(device) == []
    with pytest.raises(QuantizationUnavailable, match="int8 was not made for Apple"):
        check_available("int8", device)
    lacking = missing_here(small(optimizer="adamw8bit", quantize="nf4"))
    assert len(lacking) == 2 and "adamw8bit" in lacking[0] and "nf4" in lacking[1]

    family = load_family(BASES["z-image-turbo"], torch.device("cpu"), torch.bfloat16)
    assert family.prompts
    family.device = device
    monkeypatch.delenv("MODEL_VAULT")  # so the published size is counted
    mode = fit(small(base_model="z-image-turbo", resolution="1024"), family, ["a photo"]).mode
    assert mode.quantize == "none" and not mode.offload and 0 < mode.checkpointing < 1
    with_less = (18 * 10**9).__int__
    monkeypatch.setattr(torch.mps, "recommended_max_memory", with_less)
    mode = fit(small(base_model="z-image-turbo", resolution="1024"), family, ["a photo"]).mode
    assert mode.quantize == "none" and not mode.offload  # the smallest, with a warning

    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_: False)
    assert default_dtype(torch.device("mps:0")) == torch.float32  # another one: it is cached
    monkeypatch.setenv("DEVICE", "cpu")
    assert default_device().type == "cpu"
    monkeypatch.setenv("DEVICE", "npu")
    with pytest.raises(ValueError, match="DEVICE is 'npu'; set it to cuda, mps, cpu"):
        default_device()


class NoFloat64(TorchDispatchMode):
    """As on Apple's GPUs, a tensor of 64-bit floats on the second device is an error."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_iter(result):
            if isinstance(each, torch.Tensor) and each.is_meta:
                assert each.dtype not in (torch.float64, torch.complex128), func
        return result


@pytest.mark.parametrize("name", ["z-image", "qwen-image"])
def test_a_step_makes_no_64_bit_floats_on_the_device(
    name: str, small: Callable[..., Settings]
) -> None:
    loop = loop_on_meta(small(base_model=name))
    for optimizer in loop.optimizers.values():
        optimizer.step = lambda *_: None  # type: ignore[method-assign]  # not on meta
    with NoFloat64():
        loop.step(0)
    assert loop.done == 1
