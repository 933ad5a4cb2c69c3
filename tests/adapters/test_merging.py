"""LoRAs are merged exactly as they say, and are gone without a trace afterwards."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from loras import random_lora
from torch import Tensor, nn

from adapters.merging import LoraMerger
from families.loading import load_family
from families.registry import BASES

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


def test_merging_is_the_sum_in_float32_rounded_once(transformer: nn.Module) -> None:
    before = copy_of(transformer)
    first, second = (
        random_lora(transformer, TARGETS, 4, 0),
        random_lora(transformer, TARGETS[:3], 2, 1),
    )
    assert LoraMerger(transformer).apply([(first, 0.75), (second, -1.5)]) == len(TARGETS)
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
    LoraMerger(nn.ModuleDict({"x": linear})).apply([({"x": (down, up)}, 0.3)])
    wanted = before + 0.3 * (up.double() @ down.double())
    torch.testing.assert_close(linear.weight.double(), wanted, rtol=0, atol=2e-6)


def test_any_sequence_ends_in_the_pristine_bits_and_depends_on_its_last_step_alone(
    transformer: nn.Module,
) -> None:
    before = copy_of(transformer)
    places = {name: tensor.data_ptr() for name, tensor in transformer.state_dict().items()}
    chance = random.Random(0)
    loras = [
        random_lora(
            transformer, chance.sample(TARGETS, chance.randint(1, 8)), chance.choice((1, 4, 8)), n
        )
        for n in range(6)
    ]
    merger = LoraMerger(transformer)
    for _ in range(60):
        chosen = [(each, chance.uniform(-2, 2)) for each in chance.sample(loras, 2)]
        merger.apply(chosen)
        if chance.random() < 0.3:
            merger.restore()
            assert differing(transformer, before) == set()
    merger.apply([(loras[0], -1.0)])
    after_all = copy_of(transformer)
    assert differing(transformer, before) == set(loras[0])
    merger.restore()
    assert differing(transformer, before) == set()
    LoraMerger(transformer).apply([(loras[0], -1.0)])
    assert differing(transformer, after_all) == set()
    assert places == {name: t.data_ptr() for name, t in transformer.state_dict().items()}


@pytest.mark.parametrize("there_before", [True, False])
def test_a_failure_in_the_middle_leaves_pristine_weights(
    there_before: bool, transformer: nn.Module
) -> None:
    before = copy_of(transformer)
    merger = LoraMerger(transformer)
    good = random_lora(transformer, TARGETS, 4, 0)
    if there_before:
        merger.apply([(good, 1.0)])
    bad = dict(good)
    down, up = bad[TARGETS[5]]
    bad[TARGETS[5]] = (down[:, :-1], up)  # as if it had slipped past the check
    with pytest.raises(RuntimeError):
        merger.apply([(good, 0.5), (bad, 1.0)])
    assert differing(transformer, before) == set()
    with pytest.raises(KeyError):
        merger.apply([(good | {"layers.9.attention.to_q": good[TARGETS[0]]}, 1.0)])
    assert differing(transformer, before) == set()
    merger.apply([(good, 1.0)])
    assert differing(transformer, before) == set(TARGETS)
    merger.restore()
    assert differing(transformer, before) == set()


def test_scale_zero_touches_nothing(transformer: nn.Module) -> None:
    before = copy_of(transformer)
    merger = LoraMerger(transformer)
    some = random_lora(transformer, TARGETS, 4, 0)
    assert merger.apply([(some, 0.0)]) == 0
    assert differing(transformer, before) == set()
    merger.apply([(some, 1.0)])
    merger.apply([(some, 0.0)])
    assert differing(transformer, before) == set()


def test_a_lora_and_its_negative_cancel_out(transformer: nn.Module) -> None:
    """To the last bit of float32, which bfloat16 does not see."""
    before = copy_of(transformer)
    some = random_lora(transformer, TARGETS, 4, 0)
    LoraMerger(transformer).apply([(some, 1.0), (some, -1.0)])
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
    merger = LoraMerger(transformer)
    first, second = (
        random_lora(transformer, TARGETS, 4, 0),
        random_lora(transformer, TARGETS[:3], 2, 1),
    )
    assert merger.apply([(first, 1.0), (second, 0.5)]) == len(TARGETS)
    before = versions(transformer)
    assert merger.apply([(first, 1.0), (second, 0.5)]) == len(TARGETS)
    assert written(transformer, before) == set()
    merger.apply([(first, 1.0), (second, -0.5)])
    assert written(transformer, before) == set(TARGETS[:3])
    before = versions(transformer)
    merger.apply([(second, -0.5)])
    assert written(transformer, before) == set(TARGETS)
    merger.restore()
    before = versions(transformer)
    merger.restore()
    merger.apply([])
    assert written(transformer, before) == set()


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_refused(scale: float, transformer: nn.Module) -> None:
    before = copy_of(transformer)
    merger = LoraMerger(transformer)
    some = random_lora(transformer, TARGETS, 4, 0)
    merger.apply([(some, 1.0)])
    applied = copy_of(transformer)
    with pytest.raises(ValueError, match="is not a finite number"):
        merger.apply([(some, scale)])
    assert differing(transformer, applied) == set()
    merger.restore()
    assert differing(transformer, before) == set()


# Where the pristine weights lie.


def test_without_memory_for_copies_the_checkpoint_is_read_again(
    transformer: nn.Module, vault: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vault's Z-Image-Turbo lies there in float32 and several files, as other than loaded."""
    monkeypatch.setattr("adapters.original_weights.free_and_total", lambda _: (1 << 20, 1 << 30))
    before = copy_of(transformer)
    merger = LoraMerger(transformer, None, vault / "Tongyi-MAI/Z-Image-Turbo/transformer")
    some = random_lora(transformer, TARGETS, 4, 0)
    merger.apply([(some, 1.0)])
    assert merger._original._kept == {}
    applied = copy_of(transformer)
    assert differing(transformer, before) == set(TARGETS)
    merger.apply([(some, -2.0)])
    merger.apply([(some, 1.0)])
    assert differing(transformer, applied) == set()
    merger.restore()
    assert differing(transformer, before) == set()


def test_a_checkpoint_that_holds_other_weights_is_not_believed(
    transformer: nn.Module, vault: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters.original_weights.free_and_total", lambda _: (1 << 20, 1 << 30))
    before = copy_of(transformer)
    merger = LoraMerger(transformer, checkpoint=vault / "Tongyi-MAI/Z-Image/transformer")
    merger.apply([(random_lora(transformer, TARGETS, 4, 0), 1.0)])
    merger.restore()
    assert differing(transformer, before) == set()
