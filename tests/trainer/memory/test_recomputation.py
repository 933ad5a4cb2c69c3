"""A part of the blocks is recomputed: the same numbers, in the planned memory."""

import pytest
import torch
from measured import of_depth, saved_bytes
from torch import Tensor

from adapters.lora import Lora
from families.family import Family
from families.loading import load_family
from families.recomputation import recompute
from families.registry import find_base
from families.without_weights import family_without_weights
from trainer.learning.loss import flow_loss
from trainer.memory.step_cost import Shape, step_loads

BLOCKS = 6
FAMILIES = ["z-image", "qwen-image"]
GB = 10**9


def gradients(family: Family, lora: Lora) -> tuple[Tensor, Tensor]:
    """Loss and gradients of one step; two captions of different lengths."""
    random = torch.Generator().manual_seed(1)
    size = (2, family.latent_channels, *family.latent_size(128, 192))
    latents, noise = (torch.randn(size, generator=random) for _ in range(2))
    text = [torch.randn(tokens, 64, generator=random) for tokens in (20, 31)]
    loss = flow_loss(family, latents, noise, torch.tensor([0.3, 0.7]), text)
    loss.backward()
    found = torch.cat([each.grad.flatten() for each in lora.parameters()])
    for each in lora.parameters():
        each.grad = None
    return loss.detach(), found


@pytest.mark.parametrize("name", FAMILIES)
def test_any_number_of_recomputed_blocks_gives_the_same_step_and_keeps_what_was_planned(
    name: str, use_vault: None
) -> None:
    """Equal bit for bit; and PyTorch's own account says which bytes the next block does not keep,
    to the byte."""
    torch.manual_seed(1)
    base, shape = find_base(name), Shape(4, 1, 128, 128, 40)
    family = of_depth(load_family(base, torch.device("cpu"), torch.float32), BLOCKS)
    generated = of_depth(family_without_weights(base, torch.float32), BLOCKS)
    planned = step_loads(generated, generated.lora_targets(), shape)
    assert len(planned) == BLOCKS + 1
    lora = Lora(family.transformer, family.lora_targets(), shape.form, 0)
    for each in lora.parameters():
        each.data.uniform_(-0.05, 0.05)
    wanted = gradients(family, lora)
    assert wanted[1].norm() > 0
    kept = []
    for recomputed in range(BLOCKS + 1):
        recompute(family, recomputed / BLOCKS)
        assert all(map(torch.equal, gradients(family, lora), wanted)), recomputed
        kept.append(saved_bytes(family, lora, shape))
    recompute(family, 0.0)
    assert saved_bytes(family, lora, shape) == kept[0]
    for n in range(1, BLOCKS - 2):  # from there, the plan has one block's activations and no less
        assert planned[n].bytes - planned[n + 1].bytes == kept[n] - kept[n + 1] > 0
