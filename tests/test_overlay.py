"""LoRAs are merged exactly as they say, and are gone without a trace afterwards."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters.deltas import Dense
from adapters.factors import Factors, LoraMismatch
from adapters.layout import Layout
from adapters.overlay import Overlay
from adapters.slots import SlotLinear
from benchmarks.models import MODELS, block_linears
from families.bases import BASES
from families.loading import load_family
from families.quantization import quantize_transformer

TARGETS = [
    f"layers.{layer}.{linear}"
    for layer in (0, 1)
    for linear in ("attention.to_q", "attention.to_out.0", "feed_forward.w1", "feed_forward.w2")
]


@pytest.fixture(scope="module")
def loaded(vault: Path) -> nn.Module:
    """Z-Image-Turbo's transformer in bfloat16, where every rounding shows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODEL_VAULT", str(vault))
        base = BASES["z-image-turbo"]
        return load_family(base, torch.device("cpu"), torch.bfloat16).transformer


@pytest.fixture
def transformer(loaded: nn.Module) -> Iterator[nn.Module]:
    before = copy_of(loaded)
    yield loaded
    loaded.load_state_dict(before)


def copy_of(transformer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in transformer.state_dict().items()}


def differing(transformer: nn.Module, before: dict[str, Tensor]) -> set[str]:
    state = transformer.state_dict()
    assert state.keys() == before.keys()
    return {
        name.removesuffix(".weight")
        for name, tensor in state.items()
        if not torch.equal(tensor, before[name])
    }


def lora(transformer: nn.Module, targets: list[str], rank: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for target in targets:
        rows, columns = transformer.get_submodule(target).weight.shape
        down = torch.randn(rank, columns, generator=generator) / columns**0.5
        factors[target] = (down, torch.randn(rows, rank, generator=generator) * 0.05)
    return factors


def test_merging_is_the_sum_in_float32_rounded_once(transformer: nn.Module) -> None:
    before = copy_of(transformer)
    first, second = lora(transformer, TARGETS, 4, 0), lora(transformer, TARGETS[:3], 2, 1)
    assert Overlay(transformer).apply([(first, 0.75), (second, -1.5)]) == len(TARGETS)
    for target in TARGETS:
        wanted = before[f"{target}.weight"].float()
        wanted = wanted + 0.75 * (first[target][1] @ first[target][0])
        if target in second:
            wanted = wanted + -1.5 * (second[target][1] @ second[target][0])
        found = transformer.get_submodule(target).weight
        # The order of a float32 sum may move a value across a rounding boundary, never further.
        rounded = wanted.bfloat16()
        assert (found == rounded).float().mean() > 0.999
        torch.testing.assert_close(found, rounded, rtol=2**-7, atol=1e-6)
    assert differing(transformer, before) == set(TARGETS)


def test_float32_weights_are_merged_to_float32_precision() -> None:
    linear = nn.Linear(32, 48)
    before = linear.weight.detach().double()
    down, up = torch.randn(4, 32), torch.randn(48, 4)
    Overlay(nn.ModuleDict({"x": linear})).apply([({"x": (down, up)}, 0.3)])
    wanted = before + 0.3 * (up.double() @ down.double())
    torch.testing.assert_close(linear.weight.double(), wanted, rtol=0, atol=2e-6)


def test_any_sequence_ends_in_the_pristine_bits_and_depends_on_its_last_step_alone(
    transformer: nn.Module,
) -> None:
    before = copy_of(transformer)
    places = {name: tensor.data_ptr() for name, tensor in transformer.state_dict().items()}
    chance = random.Random(0)
    loras = [
        lora(transformer, chance.sample(TARGETS, chance.randint(1, 8)), chance.choice((1, 4, 8)), n)
        for n in range(6)
    ]
    overlay = Overlay(transformer)
    for _ in range(60):
        chosen = [(each, chance.uniform(-2, 2)) for each in chance.sample(loras, 2)]
        overlay.apply(chosen)
        if chance.random() < 0.3:
            overlay.restore()
            assert differing(transformer, before) == set()
    overlay.apply([(loras[0], -1.0)])
    after_all = copy_of(transformer)
    assert differing(transformer, before) == set(loras[0])
    overlay.restore()
    assert differing(transformer, before) == set()
    Overlay(transformer).apply([(loras[0], -1.0)])
    assert differing(transformer, after_all) == set()
    assert places == {name: t.data_ptr() for name, t in transformer.state_dict().items()}


@pytest.mark.parametrize("there_before", [True, False])
def test_a_failure_in_the_middle_leaves_pristine_weights(
    there_before: bool, transformer: nn.Module
) -> None:
    before = copy_of(transformer)
    overlay = Overlay(transformer)
    good = lora(transformer, TARGETS, 4, 0)
    if there_before:
        overlay.apply([(good, 1.0)])
    bad = dict(good)
    down, up = bad[TARGETS[5]]
    bad[TARGETS[5]] = (down[:, :-1], up)  # as if it had slipped past the check
    with pytest.raises(RuntimeError):
        overlay.apply([(good, 0.5), (bad, 1.0)])
    assert differing(transformer, before) == set()
    with pytest.raises(KeyError):
        overlay.apply([(good | {"layers.9.attention.to_q": good[TARGETS[0]]}, 1.0)])
    assert differing(transformer, before) == set()
    overlay.apply([(good, 1.0)])
    assert differing(transformer, before) == set(TARGETS)
    overlay.restore()
    assert differing(transformer, before) == set()


def test_scale_zero_touches_nothing(transformer: nn.Module) -> None:
    before = copy_of(transformer)
    overlay = Overlay(transformer)
    some = lora(transformer, TARGETS, 4, 0)
    assert overlay.apply([(some, 0.0)]) == 0
    assert differing(transformer, before) == set()
    overlay.apply([(some, 1.0)])
    overlay.apply([(some, 0.0)])
    assert differing(transformer, before) == set()


def test_a_lora_and_its_negative_cancel_out(transformer: nn.Module) -> None:
    """To the last bit of float32, which bfloat16 does not see."""
    before = copy_of(transformer)
    some = lora(transformer, TARGETS, 4, 0)
    Overlay(transformer).apply([(some, 1.0), (some, -1.0)])
    for target in TARGETS:
        weight = before[f"{target}.weight"]
        torch.testing.assert_close(
            transformer.get_submodule(target).weight, weight, rtol=2**-7, atol=1e-6
        )


# What a swap does not do.


def versions(transformer: nn.Module) -> dict[str, int]:
    """How often each weight was written."""
    return {name: parameter._version for name, parameter in transformer.named_parameters()}


def written(transformer: nn.Module, before: dict[str, int]) -> set[str]:
    return {
        name.removesuffix(".weight")
        for name, version in versions(transformer).items()
        if version != before[name]
    }


def test_the_same_again_writes_nothing_and_a_change_only_what_it_touches(
    transformer: nn.Module,
) -> None:
    overlay = Overlay(transformer)
    first, second = lora(transformer, TARGETS, 4, 0), lora(transformer, TARGETS[:3], 2, 1)
    assert overlay.apply([(first, 1.0), (second, 0.5)]) == len(TARGETS)
    before = versions(transformer)
    assert overlay.apply([(first, 1.0), (second, 0.5)]) == len(TARGETS)
    assert written(transformer, before) == set()
    overlay.apply([(first, 1.0), (second, -0.5)])
    assert written(transformer, before) == set(TARGETS[:3])
    before = versions(transformer)
    overlay.apply([(second, -0.5)])
    assert written(transformer, before) == set(TARGETS)
    overlay.restore()
    before = versions(transformer)
    overlay.restore()
    overlay.apply([])
    assert written(transformer, before) == set()


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_refused(scale: float, transformer: nn.Module) -> None:
    before = copy_of(transformer)
    overlay = Overlay(transformer)
    some = lora(transformer, TARGETS, 4, 0)
    overlay.apply([(some, 1.0)])
    laid = copy_of(transformer)
    with pytest.raises(ValueError, match="is not a number to multiply by"):
        overlay.apply([(some, scale)])
    assert differing(transformer, laid) == set()
    overlay.restore()
    assert differing(transformer, before) == set()


# Where the pristine weights lie.


def test_without_memory_for_copies_the_checkpoint_is_read_again(
    transformer: nn.Module, vault: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vault's Z-Image-Turbo lies there in float32 and several files, as other than loaded."""
    monkeypatch.setattr("adapters.pristine._host_memory", lambda: (1 << 20, 1 << 30))
    before = copy_of(transformer)
    overlay = Overlay(transformer, None, vault / "Tongyi-MAI/Z-Image-Turbo/transformer")
    some = lora(transformer, TARGETS, 4, 0)
    overlay.apply([(some, 1.0)])
    assert overlay._pristine._kept == {}
    laid = copy_of(transformer)
    assert differing(transformer, before) == set(TARGETS)
    overlay.apply([(some, -2.0)])
    overlay.apply([(some, 1.0)])
    assert differing(transformer, laid) == set()
    overlay.restore()
    assert differing(transformer, before) == set()


def test_a_checkpoint_that_holds_other_weights_is_not_believed(
    transformer: nn.Module, vault: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters.pristine._host_memory", lambda: (1 << 20, 1 << 30))
    before = copy_of(transformer)
    overlay = Overlay(transformer, checkpoint=vault / "Tongyi-MAI/Z-Image/transformer")
    overlay.apply([(lora(transformer, TARGETS, 4, 0), 1.0)])
    overlay.restore()
    assert differing(transformer, before) == set()


# Beside quantised layers.


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
    """Two quantised layers and one that is left as it is, as quantisers leave some."""

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


ALL = ("first", "second", "last")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_slot_is_the_quantised_layer_bit_for_bit(dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 32, dtype=dtype)
    alone, model = Blocks(dtype)(x), Blocks(dtype)
    packed = model.first.weight.clone()
    overlay = Overlay(model)
    assert torch.equal(model(x), alone)
    overlay.apply([(pairs(ALL, 4, 0), 1.0)])
    assert not torch.equal(model(x), alone)
    assert torch.equal(model.first.weight, packed)
    overlay.restore()
    assert torch.equal(model(x), alone)


def test_beside_a_quantised_layer_lora_adds_what_it_says() -> None:
    model, x = Blocks(), torch.randn(3, 32)
    base = model.first(x)
    one, other = pairs(("first",), 4, 0), pairs(("first",), 7, 1)
    assert Overlay(model).apply([(one, 0.5), (other, -2.0)]) == 1
    wanted = base
    for factors, scale in ((one, 0.5), (other, -2.0)):
        down, up = factors["first"]
        wanted = wanted + scale * (x @ down.T @ up.T)
    torch.testing.assert_close(model.first(x), wanted, rtol=1e-5, atol=1e-5)


def test_more_rank_than_a_slot_has_makes_it_larger() -> None:
    model, x = Blocks(), torch.randn(3, 32)
    base = model.first(x)
    overlay = Overlay(model)
    large = pairs(("first",), 200, 0)
    overlay.apply([(large, 1.0)])
    down, up = large["first"]
    torch.testing.assert_close(model.first(x), base + x @ down.T @ up.T, rtol=1e-4, atol=1e-4)
    overlay.restore()
    assert torch.equal(model.first(x), base)


def test_only_plain_lora_lies_beside_a_quantised_layer() -> None:
    model, x = Blocks(), torch.randn(3, 32)
    overlay = Overlay(model)
    before = model(x)
    delta = {"last": Dense(torch.ones(16, 32)), "first": Dense(torch.ones(48, 32))}
    with pytest.raises(LoraMismatch, match="1 layers are quantised, and only plain LoRA .*: first"):
        overlay.apply([(delta, 1.0)])
    assert torch.equal(model(x), before)
    assert overlay.apply([({"last": delta["last"], "first.bias": Dense(torch.ones(48))}, 1.0)]) == 2
    assert not torch.equal(model(x), before)
    overlay.restore()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_over_a_base_that_a_library_quantised_lora_is_what_it_is_over_its_rounded_weights(
    kind: str,
) -> None:
    plain = MODELS["Z-Image"]()
    names = Layout.of(plain, "small").shapes
    targets = list(block_linears(plain))
    quantised = quantize_transformer(plain, kind, torch.device("cpu"), torch.float32)
    draw = torch.Generator().manual_seed(0)
    inputs = ([torch.randn(16, 1, 8, 8, generator=draw)], torch.tensor([0.5]))
    text = [torch.randn(7, 64, generator=draw)]

    def step(model: Any) -> Tensor:
        with torch.inference_mode():
            return model(*inputs, text, return_dict=False)[0][0]

    alone = step(quantised)
    with torch.inference_mode():  # where an engine makes it; it is used outside as well
        overlay = Overlay(quantised)
    assert Layout.of(quantised, "small").shapes == names
    assert torch.equal(step(quantised), alone)
    some = lora(plain, targets, 4, 0)
    assert overlay.apply([(some, 1.5)]) == len(targets)
    for name, module in quantised.named_modules():
        if isinstance(module, SlotLinear):
            plain.get_submodule(name).weight.copy_(module.base.weight.dequantize())
    assert any(isinstance(module, SlotLinear) for module in quantised.modules())
    Overlay(plain).apply([(some, 1.5)])
    torch.testing.assert_close(step(quantised), step(plain), rtol=1e-4, atol=1e-5)
    assert (step(quantised) - alone).abs().max() > 0.01
    overlay.restore()
    assert torch.equal(step(quantised), alone)


def test_slots_keep_the_model_s_names_and_are_put_once() -> None:
    names = Layout.of(Blocks(), "small").shapes
    model = Blocks()
    Overlay(model)
    first = model.first
    Overlay(model)
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
    Overlay(model)
    assert isinstance(model["x"], SlotLinear) == slots
    assert not isinstance(model["y"], SlotLinear)


@pytest.mark.parametrize("quantised", [False, True])
def test_no_swap_compiles_anew_or_takes_new_storage(quantised: bool) -> None:
    model = Blocks()
    if not quantised:
        model.first, model.second = nn.Linear(32, 48), nn.Linear(48, 32)
        model.requires_grad_(False)
    overlay = Overlay(model)
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
            overlay.apply(loras)
            assert torch.equal(compiled(x), model(x))
            assert torch.equal(compiled(x), bare) == (not loras)
        overlay.restore()
        assert torch.equal(compiled(x), bare)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.data_ptr() == places[name], name
