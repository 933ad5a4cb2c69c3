"""Which layers a LoRA adapts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from families.loading import load_family
from families.registry import BASES
from trainer.run import train
from trainer.settings.fields import Settings


def test_lora_targets_are_named_by_group_by_name_or_by_pattern(use_vault: Path) -> None:
    family = load_family(BASES["z-image"])
    attention, feed_forward = family.lora_targets("attention"), family.lora_targets("feed_forward")
    assert set(family.lora_targets()) == {*attention, *feed_forward}
    assert {name.split(".")[2] for name in attention} == {"attention"}
    ends = {name.rpartition(".")[2] for name in family.lora_targets("to_q, feed_forward.w2")}
    assert ends == {"to_q", "w2"}
    assert family.lora_targets("layers.1.*.to_?") == [
        f"layers.1.attention.to_{each}" for each in "qkv"
    ]
    everything = family.lora_targets("all")
    assert set(everything) > set(family.lora_targets())
    assert any("adaLN" in name for name in everything)


def test_every_layer_of_all_can_learn(use_vault: Path) -> None:
    for name in ("z-image", "qwen-image"):
        family = load_family(BASES[name])
        layers = dict(family.transformer.named_modules())
        targets = family.lora_targets("all")
        for target in targets:
            layers[target].weight.requires_grad_(True)
        with torch.no_grad():
            text = family.encode_prompts(["a cat"])
        shape = (1, family.latent_channels, 8, 8)
        family.velocity(torch.randn(shape), torch.tensor([0.5]), text).square().sum().backward()
        assert [each for each in targets if layers[each].weight.grad is None] == []


def test_lora_targets_that_fit_no_layer_are_refused_before_the_pictures_are_encoded(
    small: Callable[..., Settings],
) -> None:
    with pytest.raises(
        ValueError, match="'atention.to_q' matches no.*did you mean 'attention.to_q'"
    ):
        train(small(lora_targets="atention.to_q"))
