"""What merging a LoRA costs on a GPU: counted on the meta device, not timed."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import adapters.merging
from adapters.merging import LoraMerger

ROWS, COLUMNS, RANK = 96, 64, 4
CHUNK = ROWS * COLUMNS // 3


class Operations(TorchDispatchMode):
    """Counts operations, and the values of the largest float32 sum."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count[func._overloadpacket.__name__] += 1
        if isinstance(result, Tensor) and result.dtype == torch.float32:
            self.largest = max(self.largest, result.numel())
        return result


def model(device: str = "cpu") -> nn.Module:
    linears = [nn.Linear(COLUMNS, ROWS, bias=False, dtype=torch.bfloat16) for _ in range(3)]
    return nn.Sequential(*linears).to(device)


def lora(transformer: nn.Module, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(RANK, COLUMNS, generator=draw), torch.randn(ROWS, RANK, generator=draw))
        for name, _ in transformer.named_children()
    }


def counted(monkeypatch: pytest.MonkeyPatch) -> Operations:
    """The operations of a change from one LoRA to another, three chunks a layer."""
    monkeypatch.setattr(adapters.merging, "CHUNK", CHUNK)
    transformer = model("meta")
    merger = LoraMerger(transformer)
    merger.apply([(lora(transformer, 0), 1.0)])  # saves the original weights
    with Operations() as operations:
        merger.apply([(lora(transformer, 1), 1.0)])
    return operations


def test_float32_sums_are_no_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    assert counted(monkeypatch).largest <= CHUNK


def test_each_factor_is_copied_once_and_nothing_waits_for_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    operations = counted(monkeypatch)
    layers, chunks = 3, 3
    assert operations.count["addmm_"] == layers * chunks
    assert operations.count["copy_"] == layers * chunks
    assert operations.count["_to_copy"] == layers * (2 + chunks)
    assert "_local_scalar_dense" not in operations.count


def test_merging_in_chunks_equals_merging_whole_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = model()
    chunked = model()
    chunked.load_state_dict(whole.state_dict())
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    LoraMerger(whole).apply([(lora(whole, 0), 0.7), (lora(whole, 1), -1.3)])
    monkeypatch.setattr(adapters.merging, "_pieces", lambda _: 3)
    merger = LoraMerger(chunked)
    merger.apply([(lora(chunked, 0), 0.7), (lora(chunked, 1), -1.3)])
    for name, value in whole.state_dict().items():
        assert not torch.equal(value, before[name])
        assert torch.equal(chunked.state_dict()[name], value)
    merger.restore()
    assert all(torch.equal(value, before[name]) for name, value in chunked.state_dict().items())
