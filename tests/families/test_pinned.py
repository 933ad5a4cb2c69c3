"""Offloaded weights take the CPU memory that they need, and give it back."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families import pinned as module
from families.family import WeightStorage
from families.frozen_linear import FrozenLinear
from families.loading import load_family
from families.out_of_memory import is_out_of_memory
from families.pinned import pinned
from families.quantization import block_linears
from families.registry import find_base
from families.without_weights import transformer_without_weights


class Driver:
    """The driver's calls, which count what is pinned."""

    def __init__(self, refuses: int = 0) -> None:
        self.pinned: dict[int, int] = {}  # bytes by address
        self.refuses = refuses

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if not self.refuses:
            self.pinned[address] = size
        return self.refuses

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    monkeypatch.setattr(module, "_driver", lambda: found)
    monkeypatch.setattr(module, "_clear_error", lambda: None)
    monkeypatch.setattr(module, "_warned", False)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.uint8])
def test_a_tensor_is_pinned_in_its_exact_size_and_unpinned_with_its_last_view(
    dtype: torch.dtype, driver: Driver
) -> None:
    tensor = torch.arange(3 * 5_000).view(3, 5_000).T.to(dtype)
    copy = pinned(tensor)
    assert torch.equal(copy.view(torch.uint8), tensor.contiguous().view(torch.uint8))
    assert driver.pinned == {copy.data_ptr(): 15_000 * dtype.itemsize}
    assert copy.data_ptr() % 4096 == 0  # ranges of whole pages never overlap
    view = copy[1:]
    del copy
    assert driver.pinned
    del view
    assert not driver.pinned


def test_memory_that_cannot_be_pinned_is_used_all_the_same_with_one_warning(
    driver: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    driver.refuses = 2
    copies = [pinned(torch.ones(10)) for _ in range(3)]
    assert all(torch.equal(each, torch.ones(10)) for each in copies)
    assert caplog.messages == [
        "CPU memory cannot be pinned (CUDA error 2; see `ulimit -l`): copies of weights to the GPU "
        "are slower"
    ]


def test_a_system_without_memory_for_pages_is_out_of_memory(driver: Driver) -> None:
    tensor = torch.empty((), device="cpu").expand(1 << 60)
    with pytest.raises((OSError, OverflowError)) as error:
        pinned(tensor)
    assert is_out_of_memory(error.value)


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_an_offloaded_base_pins_the_bytes_of_its_weights_and_no_more(
    quantize: str, use_vault: Path, driver: Driver
) -> None:
    """With the layers' device set to a GPU after loading, since none is here."""
    family = load_family(find_base("z-image"), torch.device("cpu"), torch.bfloat16)
    family.set_storage(WeightStorage(quantize, offload=True))
    layers = [each for each in family.transformer.modules() if isinstance(each, FrozenLinear)]
    for layer in layers:
        layer.device = torch.device("cuda")
        layer.offload()
    weights = [layer.weight for layer in layers]
    assert sum(driver.pinned.values()) == sum(each.nbytes for each in weights)
    assert {each.data_ptr() for each in weights} == driver.pinned.keys()
    family.release("transformer")
    del layers, layer, weights
    gc.collect()
    assert not driver.pinned


@pytest.mark.parametrize("base", ["z-image", "qwen-image"])
@pytest.mark.parametrize("offload", [False, True])
def test_weights_are_changed_quantized_and_dropped_one_by_one(
    base: str, offload: bool, use_vault: Path
) -> None:
    """So CPU memory holds the quantized model and one weight, not a second model in 16 bits."""
    family = load_family(find_base(base), torch.device("cpu"), torch.bfloat16)
    family.set_storage(WeightStorage("int8", offload=offload))
    changed: list[weakref.ref[Any]] = []
    most = 0

    def change(name: str, weight: Tensor) -> Tensor:
        nonlocal most
        if name not in inside:
            return weight
        new = weight + 0
        changed.append(weakref.ref(new.untyped_storage()))
        most = max(most, sum(each() is not None for each in changed))
        return new

    inside = {f"{n}.weight" for n in block_linears(transformer_without_weights(find_base(base)))}
    family.load_transformer(change)
    assert len(changed) == len(inside) > 20
    assert most <= 2
