"""LoRAs beside quantized layers, which nothing can be merged into."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from loras import random_lora
from torch import Tensor, nn

from adapters.formats.deltas import Dense
from adapters.formats.factors import Factors, LoraMismatch
from adapters.formats.layout import Layout
from adapters.merging import LoraMerger
from adapters.slots import SlotLinear
from families.quantization import quantize_transformer
from lab.benchmarks.models import MODELS, block_linears

ALL = ("first", "second", "last")


class QuantisedLinear(nn.Linear):
    """Multiplies with a weight that was rounded to 8 bits, as libraries' layers do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.step = linear.weight.detach().abs().max() / 127
        packed = (linear.weight.detach() / self.step).round().to(torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        if linear.bias is not None:
            self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.step.to(x.dtype), self.bias)


class Blocks(nn.Module):
    """Two quantized layers and one that is left as it is, as quantizers leave some."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        plain = [nn.Linear(32, 48), nn.Linear(48, 32), nn.Linear(32, 16)]
        self.first, self.second = (QuantisedLinear(each) for each in plain[:2])
        self.last = plain[2]
        for parameter in self.parameters():
            parameter.requires_grad_(False)
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


def pairs(names: tuple[str, ...], rank: int, seed: int) -> Factors:
    sizes = {"first": (48, 32), "second": (32, 48), "last": (16, 32)}
    draw = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(rank, sizes[name][1], generator=draw) / 8,
            torch.randn(sizes[name][0], rank, generator=draw) / 8,
        )
        for name in names
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_slot_is_the_quantized_layer_bit_for_bit(dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 32, dtype=dtype)
    alone, model = Blocks(dtype)(x), Blocks(dtype)
    packed = model.first.weight.clone()
    merger = LoraMerger(model)
    assert torch.equal(model(x), alone)
    merger.apply([(pairs(ALL, 4, 0), 1.0)])
    assert not torch.equal(model(x), alone)
    assert torch.equal(model.first.weight, packed)
    merger.restore()
    assert torch.equal(model(x), alone)


def test_beside_a_quantized_layer_lora_adds_what_it_says() -> None:
    model, x = Blocks(), torch.randn(3, 32)
    base = model.first(x)
    one, other = pairs(("first",), 4, 0), pairs(("first",), 7, 1)
    assert LoraMerger(model).apply([(one, 0.5), (other, -2.0)]) == 1
    wanted = base
    for factors, scale in ((one, 0.5), (other, -2.0)):
        down, up = factors["first"]
        wanted = wanted + scale * (x @ down.T @ up.T)
    torch.testing.assert_close(model.first(x), wanted, rtol=1e-5, atol=1e-5)


def test_more_rank_than_a_slot_has_makes_it_larger() -> None:
    model, x = Blocks(), torch.randn(3, 32)
    base = model.first(x)
    merger = LoraMerger(model)
    large = pairs(("first",), 200, 0)
    merger.apply([(large, 1.0)])
    down, up = large["first"]
    torch.testing.assert_close(model.first(x), base + x @ down.T @ up.T, rtol=1e-4, atol=1e-4)
    merger.restore()
    assert torch.equal(model.first(x), base)


def test_only_plain_lora_lies_beside_a_quantized_layer() -> None:
    model, x = Blocks(), torch.randn(3, 32)
    merger = LoraMerger(model)
    before = model(x)
    delta = {"last": Dense(torch.ones(16, 32)), "first": Dense(torch.ones(48, 32))}
    with pytest.raises(
        LoraMismatch, match="1 layers are quantized and support only plain LoRA: first"
    ):
        merger.apply([(delta, 1.0)])
    assert torch.equal(model(x), before)
    assert merger.apply([({"last": delta["last"], "first.bias": Dense(torch.ones(48))}, 1.0)]) == 2
    assert not torch.equal(model(x), before)
    merger.restore()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_over_a_base_that_a_library_quantized_lora_is_what_it_is_over_its_rounded_weights(
    kind: str,
) -> None:
    plain = MODELS["Z-Image"]()
    names = Layout.of(plain, "small").shapes
    targets = list(block_linears(plain))
    whole = deepcopy(plain)  # loses its weights
    quantized = quantize_transformer(whole, kind, torch.device("cpu"), torch.float32)
    draw = torch.Generator().manual_seed(0)
    inputs = ([torch.randn(16, 1, 8, 8, generator=draw)], torch.tensor([0.5]))
    text = [torch.randn(7, 64, generator=draw)]

    def step(model: Any) -> Tensor:
        with torch.inference_mode():
            return model(*inputs, text, return_dict=False)[0][0]

    alone = step(quantized)
    with torch.inference_mode():  # where an engine makes it; it is used outside as well
        merger = LoraMerger(quantized)
    assert Layout.of(quantized, "small").shapes == names
    assert torch.equal(step(quantized), alone)
    some = random_lora(plain, targets, 4, 0)
    assert merger.apply([(some, 1.5)]) == len(targets)
    for name, module in quantized.named_modules():
        if isinstance(module, SlotLinear):
            plain.get_submodule(name).weight.copy_(module.base.weight.dequantize())
    assert any(isinstance(module, SlotLinear) for module in quantized.modules())
    LoraMerger(plain).apply([(some, 1.5)])
    torch.testing.assert_close(step(quantized), step(plain), rtol=1e-4, atol=1e-5)
    assert (step(quantized) - alone).abs().max() > 0.01
    merger.restore()
    assert torch.equal(step(quantized), alone)


def test_slots_keep_the_model_s_names_and_are_put_once() -> None:
    names = Layout.of(Blocks(), "small").shapes
    model = Blocks()
    LoraMerger(model)
    first = model.first
    LoraMerger(model)
    assert model.first is first
    assert Layout.of(model, "small").shapes == names


@pytest.mark.parametrize(
    ("make", "slots"),
    [
        (lambda linear: linear.to(torch.float8_e4m3fn), True),
        (lambda linear: linear.to(torch.bfloat16), False),
        (QuantisedLinear, True),
    ],
    ids=["float8", "bfloat16", "int8"],
)
def test_what_is_merged_into_is_16_bits_or_more(make: Callable, slots: bool) -> None:
    model = nn.ModuleDict({"x": make(nn.Linear(8, 8)), "y": nn.Linear(8, 8)})
    LoraMerger(model)
    assert isinstance(model["x"], SlotLinear) == slots
    assert not isinstance(model["y"], SlotLinear)


@pytest.mark.parametrize("quantized", [False, True])
def test_no_swap_compiles_anew_or_takes_new_storage(quantized: bool) -> None:
    model = Blocks()
    if not quantized:
        model.first, model.second = nn.Linear(32, 48), nn.Linear(48, 32)
        model.requires_grad_(False)
    merger = LoraMerger(model)
    places = {
        name: tensor.data_ptr()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    x = torch.randn(3, 32)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        bare = compiled(x)
        swaps = [
            [(pairs(ALL, 4, 0), 1.0)],
            [(pairs(ALL, 16, 1), -0.5)],
            [(pairs(("first",), 3, 2), 1.0), (pairs(("first", "last"), 8, 3), 2.0)],
            [],
            [(pairs(ALL, 4, 0), 0.25)],
        ]
        for loras in swaps:
            merger.apply(loras)
            assert torch.equal(compiled(x), model(x))
            assert torch.equal(compiled(x), bare) == (not loras)
        merger.restore()
        assert torch.equal(compiled(x), bare)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.data_ptr() == places[name], name
