"""What merging a LoRA costs on a GPU: counted on the meta device, not timed."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from adapters import fused_merge
from adapters.merging import LoraMerger

LAYERS, ROWS, COLUMNS, RANK = 3, 96, 64, 4


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
    linears = [nn.Linear(COLUMNS, ROWS, bias=False, dtype=torch.bfloat16) for _ in range(LAYERS)]
    return nn.Sequential(*linears).to(device)


def lora(transformer: nn.Module, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(RANK, COLUMNS, generator=draw), torch.randn(ROWS, RANK, generator=draw))
        for name, _ in transformer.named_children()
    }


def counted(monkeypatch: pytest.MonkeyPatch, layers_at_once: int) -> Operations:
    """The operations of a change from one LoRA to another."""
    monkeypatch.setattr(fused_merge, "GROUP", layers_at_once * RANK * (ROWS + COLUMNS))
    transformer = model("meta")
    merger = LoraMerger(transformer)
    merger.apply([(lora(transformer, 0), 1.0)])  # saves the original weights
    with Operations() as operations:
        merger.apply([(lora(transformer, 1), 1.0)])
    return operations


def test_a_layer_is_a_copy_and_one_product_and_no_float32_sum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    operations = counted(monkeypatch, layers_at_once=3)
    assert operations.count["addmm_"] == operations.count["copy_"] == LAYERS
    assert operations.largest < ROWS * COLUMNS


@pytest.mark.parametrize(("layers_at_once", "groups"), [(3, 1), (2, 2), (1, 3)])
def test_factors_are_copied_for_many_layers_at_once_and_nothing_waits_for_the_device(
    layers_at_once: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    operations = counted(monkeypatch, layers_at_once)
    # For A and for B: one copy to the device, three casts to bfloat16.
    assert operations.count["_to_copy"] == groups * 2 * (1 + 3)
    assert "_local_scalar_dense" not in operations.count


def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merges on the CPU as on a GPU."""
    monkeypatch.setattr("adapters.merging.fuses", lambda weight: True)


@pytest.mark.parametrize("scales", [(0.7,), (0.7, -1.3)])
def test_one_product_is_the_float32_sum_rounded_once(
    scales: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    transformer = model()
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    loras = [(lora(transformer, seed), scale) for seed, scale in enumerate(scales)]
    wanted = {}
    for name, weight in before.items():
        pairs = [(factors[name.removesuffix(".weight")], scale) for factors, scale in loras]
        total = weight.double() + sum(s * (up.double() @ down.double()) for (down, up), s in pairs)
        wanted[name] = total.bfloat16()
    fused(monkeypatch)
    LoraMerger(transformer).apply(loras)
    for name, value in transformer.state_dict().items():
        assert not torch.equal(value, before[name])
        # Sums within 2^-20 of a boundary between two bfloat16 values may be rounded to either.
        assert (value != wanted[name]).sum() <= 2
        # A sum that nearly cancels keeps the error of its terms.
        assert torch.allclose(value.float(), wanted[name].float(), rtol=2**-7, atol=1e-5)


def test_terms_add_up_to_the_factor() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    (terms,) = fused_merge._terms([values], (0, 1, 2), torch.device("cpu"))
    assert torch.equal(terms.double().sum(0), values.double())


def test_a_merge_in_one_product_is_undone_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    fused(monkeypatch)
    transformer = model()
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    merger = LoraMerger(transformer)
    one, other = lora(transformer, 0), lora(transformer, 1)
    merger.apply([(one, 1.0)])
    first = {name: value.clone() for name, value in transformer.state_dict().items()}
    merger.apply([(other, 0.5), (one, 2.0)])
    merger.apply([(one, 1.0)])
    assert all(torch.equal(value, first[name]) for name, value in transformer.state_dict().items())
    merger.restore()
    assert all(torch.equal(value, before[name]) for name, value in transformer.state_dict().items())


def test_sums_of_a_product_are_float32_while_merging_only(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = torch.backends.cuda.matmul
    seen = []
    before = matmul.allow_bf16_reduced_precision_reduction
    monkeypatch.setattr(
        fused_merge,
        "_merge",
        lambda *_: seen.append(matmul.allow_bf16_reduced_precision_reduction),
    )
    fused(monkeypatch)
    transformer = model()
    LoraMerger(transformer).apply([(lora(transformer, 0), 1.0)])
    assert seen == [False] * LAYERS
    assert matmul.allow_bf16_reduced_precision_reduction == before
