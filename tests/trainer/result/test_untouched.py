"""A training changes the LoRA and the placeholder's row, and not a bit besides."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import make_loop
from torch.utils._python_dispatch import TorchDispatchMode

from adapters.lora import Lora
from adapters.placeholder import Placeholder
from families.loading import load_family
from families.registry import BASES
from trainer.learning.zero_prior import CHUNKS, ZeroPriorBroken, ZeroPriorProof, fingerprint
from trainer.result.result_checks import Worthless
from trainer.run import train
from trainer.settings.fields import Settings


def test_only_the_placeholders_own_row_changes(small: Callable[..., Settings]) -> None:
    settings = small(steps=4, learning_rate=1e-2, caption_dropout=0.0)
    loop = make_loop(settings, 1)
    family, (placeholder,) = loop.family, loop.placeholders
    before = {name: value.clone() for name, value in family.text_encoder.state_dict().items()}
    row = placeholder.vectors.detach().clone()
    proof = ZeroPriorProof(family, loop.placeholders)
    trained = loop.run()

    after = family.text_encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(row, placeholder.vectors)
    assert not any(p.requires_grad for p in family.text_encoder.parameters())
    (facts,) = proof.results(trained.row_norms)
    assert facts["placeholder_token_id"] == 151669
    assert facts["text_encoder_tensors_unchanged"] == len(before)


def test_a_single_changed_bit_of_the_text_encoder_breaks_the_proof(use_vault: Path) -> None:
    family = load_family(BASES["z-image"])
    proof = ZeroPriorProof(family, [Placeholder.create("<zwx>", family.text_width, 0.0, 0)])
    weight = family.text_encoder.get_input_embeddings().weight
    weight.view(torch.int32)[77777, 3] ^= 1
    with pytest.raises(ZeroPriorBroken, match="text encoder changed in 1 tensors"):
        proof.results([[0.0, 1.0]])
    weight.view(torch.int32)[77777, 3] ^= 1
    with pytest.raises(ZeroPriorBroken, match="zero in every step with it"):
        proof.results([[0.0, 0.0]])
    proof.results([[0.0, 1.0]])


def test_a_training_too_short_to_see_the_placeholder_says_so(
    small: Callable[..., Settings],
) -> None:
    with pytest.raises(Worthless, match="no step used <zwx>; train for more steps"):
        train(small(steps=1, caption_dropout=1.0))


def test_two_swapped_values_change_the_fingerprint() -> None:
    module = torch.nn.Linear(3, 1, bias=False)
    before = fingerprint(module)
    module.weight.data = module.weight.data[:, [1, 0, 2]]
    assert fingerprint(module) != before


def test_the_fingerprint_does_not_depend_on_the_size_of_the_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = torch.nn.Linear(512, 512)
    torch.nn.init.ones_(module.weight)  # the sum wraps around
    whole = fingerprint(module)
    monkeypatch.setitem(CHUNKS, "cpu", 9999)
    assert fingerprint(module) == whole


def test_the_frozen_part_is_one_bfloat16_copy_without_gradients(
    small: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("families.loading.default_dtype", lambda device: torch.bfloat16)
    settings = small(steps=1)
    loop = make_loop(settings, 1)
    family = loop.family
    lora = {id(p) for p in loop.lora_parameters}
    frozen = [p for p in family.transformer.parameters() if id(p) not in lora]
    floor = sum(p.numel() * 2 for p in frozen)
    with Float32Copies({tuple(p.shape) for p in frozen if p.numel() > 4096}) as copies:
        loop.step(0)

    assert copies.found == []
    assert all(p.dtype == torch.bfloat16 and p.grad is None for p in frozen)
    assert sum(p.untyped_storage().nbytes() for p in frozen) == floor
    assert all(p.dtype == torch.float32 for p in loop.lora_parameters)


class Float32Copies(TorchDispatchMode):
    """Notes every tensor that is made in float32 with the shape of a frozen matrix."""

    def __init__(self, shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes, self.found = shapes, list[str]()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple) else (result,):
            if isinstance(each, torch.Tensor) and each.dtype == torch.float32:
                if tuple(each.shape) in self.shapes:
                    self.found.append(f"{func} {tuple(each.shape)}")
        return result


def test_removing_the_lora_leaves_the_transformer_as_it_was(use_vault: Path) -> None:
    family = load_family(BASES["z-image"])
    before = {name: p.detach().clone() for name, p in family.transformer.named_parameters()}
    with torch.no_grad():
        text = family.encode_prompts(["a cat"])
    latents, sigma = torch.randn(1, family.latent_channels, 8, 8), torch.tensor([0.5])
    plain = family.velocity(latents, sigma, text)

    lora = Lora(family.transformer, family.lora_targets(), 2, seed=0)
    assert torch.equal(family.velocity(latents, sigma, text), plain)  # B starts at zero
    family.velocity(latents, sigma, text).square().sum().backward()
    with torch.no_grad():
        for parameter in lora.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    assert not torch.equal(family.velocity(latents, sigma, text), plain)

    lora.remove()
    after = dict(family.transformer.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(family.velocity(latents, sigma, text), plain)
