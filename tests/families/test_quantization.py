"""A frozen base in eight or four bits: its error, its gradients, its refusals, its training."""

import importlib.util
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops
from root import ROOT
from torch import nn

from adapters.archive import read_archive
from adapters.lora import Lora
from adapters.turbo import TurboAdapter
from families.family import Family, WeightStorage
from families.frozen_linear import FrozenLinear
from families.loading import load_family
from families.quantization import QUANTIZATIONS, QuantizationUnavailable
from families.registry import find_base
from families.repository import adapter_path
from trainer.learning.loss import flow_loss

CPU = torch.device("cpu")
NAMES = ("z-image", "qwen-image")


@pytest.fixture
def four_bits_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """bitsandbytes as on a GPU: diffusers asks for one, while the library itself does not."""
    from dataclasses import replace

    from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer

    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *a, **k: None)
    monkeypatch.setitem(QUANTIZATIONS, "nf4", replace(QUANTIZATIONS["nf4"], needs_gpu=False))
    yield


def family_in(name: str, storage: WeightStorage, dtype: torch.dtype = torch.float32) -> Family:
    return load_family(find_base(name), CPU, dtype, storage)


def frozen(transformer: nn.Module) -> dict[str, FrozenLinear]:
    modules = transformer.named_modules()
    return {name: each for name, each in modules if isinstance(each, FrozenLinear)}


def unquantized_twin(family: Family, name: str) -> Family:
    """The base in full precision, with the weights that the quantized one stands for."""
    twin = family_in(name, WeightStorage(), family.dtype)
    for layer, module in frozen(family.transformer).items():
        weight = module.dequantized(family.dtype)
        twin.transformer.get_submodule(layer).weight.data.copy_(weight)
    return twin


def gradients(family: Family) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Velocity and LoRA gradients of one fixed step."""
    lora = Lora(family.transformer, family.lora_targets(), 4, seed=0)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in lora.layers.values():
            layer.up.normal_(std=0.02, generator=draw)
    latents = torch.randn(1, family.latent_channels, 8, 8, generator=draw)
    text = [torch.randn(12, 64, generator=draw).to(family.dtype)]
    velocity = family.velocity(latents, torch.tensor([0.5]), text)
    velocity.square().mean().backward()
    found = {f"{name}.up": layer.up.grad for name, layer in lora.layers.items()}
    found |= {f"{name}.down": layer.down.grad for name, layer in lora.layers.items()}
    return velocity.detach(), found


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_a_quantisation_errs_as_much_as_its_table_says(
    name: str, use_vault: Path, four_bits_on_a_cpu: None
) -> None:
    plain = family_in("z-image", WeightStorage()).transformer
    layers = frozen(family_in("z-image", WeightStorage(name)).transformer)
    squares = [0.0, 0.0]
    for layer, module in layers.items():
        before = plain.get_submodule(layer).weight
        squares[0] += (module.dequantized(torch.float32) - before).square().sum()
        squares[1] += before.square().sum()
    error = float((squares[0] / squares[1]) ** 0.5)
    assert error == pytest.approx(QUANTIZATIONS[name].weight_error, rel=0.25)


@pytest.mark.parametrize("base", NAMES)
def test_all_block_linears_are_quantized_and_nothing_else(base: str, use_vault: Path) -> None:
    transformer = family_in(base, WeightStorage("int8")).transformer
    kinds: dict[torch.dtype, set[str]] = {}
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            kinds.setdefault(module.weight.dtype, set()).add(name.split(".")[0])
    blocks = {"layers", "noise_refiner", "context_refiner", "transformer_blocks"}
    assert kinds.keys() == {torch.int8, torch.float32}
    assert kinds[torch.int8] <= blocks
    assert not kinds[torch.float32] & blocks


@pytest.mark.parametrize("base", NAMES)
@pytest.mark.parametrize("name", QUANTIZATIONS)
@pytest.mark.parametrize("offload", [False, True])
def test_a_lora_over_quantized_layers_has_the_gradients_of_their_true_weights(
    base: str, name: str, offload: bool, use_vault: Path, four_bits_on_a_cpu: None
) -> None:
    family = family_in(base, WeightStorage(name, offload=offload))
    twin = unquantized_twin(family, base)
    velocity, found = gradients(family)
    expected_velocity, expected = gradients(twin)
    assert torch.allclose(velocity, expected_velocity, rtol=1e-4, atol=1e-4)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        gradient = found[key]
        assert value is not None and gradient is not None and value.norm() > 0
        assert (gradient - value).norm() < 1e-4 * value.norm(), key


def test_a_frozen_layer_keeps_no_weight_for_the_backward_pass(use_vault: Path) -> None:
    layer = next(iter(frozen(family_in("z-image", WeightStorage("int8")).transformer).values()))
    kept: list[torch.Tensor] = []
    x = torch.randn(4, layer.in_features, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        ours = layer(x)
    stored = {each.data_ptr() for each in layer.parts}
    assert {each.data_ptr() for each in kept} == stored
    ours.sum().backward()
    weight = layer.dequantized(torch.float32)
    assert torch.allclose(x.grad, weight.sum(0).expand_as(x), atol=1e-5)


def test_the_turbo_adapter_is_merged_before_anything_is_rounded(use_vault: Path) -> None:
    base = find_base("z-image-turbo")
    adapter = TurboAdapter.read(adapter_path(base.training_adapters["v2"]))

    family = family_in("z-image-turbo", WeightStorage("int8"))
    merged = family_in("z-image-turbo", WeightStorage()).transformer
    merging = adapter.merging(merged, base.name)
    family.load_transformer(merging)
    assert adapter.merge(merged, base.name) == merging.share()
    for name in adapter.factors:
        layer = family.transformer.get_submodule(name)
        weight = layer.dequantized(torch.float32)
        true = merged.get_submodule(name).weight
        assert (weight - true).norm() / true.norm() < 0.01, name


def test_an_offloaded_base_draws_the_same_bits(use_vault: Path) -> None:
    resident, waiting = (
        family_in("z-image", WeightStorage()),
        family_in("z-image", WeightStorage(offload=True)),
    )
    assert frozen(waiting.transformer) and not frozen(resident.transformer)
    first, second = gradients(resident), gradients(waiting)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][key], second[1][key]) for key in first[1])


def test_a_quantized_text_encoder_reads_nearly_the_same(use_vault: Path) -> None:
    plain = family_in("qwen-image", WeightStorage()).encode_prompts(["a cup of coffee"])[0]
    family = family_in("qwen-image", WeightStorage(quantize_text="int8"))
    rounded = family.encode_prompts(["a cup of coffee"])[0]
    assert 0 < (rounded - plain).norm() / plain.norm() < 0.05


def test_four_bits_without_a_gpu_are_refused() -> None:
    with pytest.raises(QuantizationUnavailable, match="nf4 needs a GPU.*choose fp8, int8"):
        family_in("z-image", WeightStorage("nf4"))


def test_a_missing_package_is_named_with_the_command_that_brings_it(
    use_vault: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torchao" else find(name)
    )
    with pytest.raises(QuantizationUnavailable, match="pip install --no-deps torchao=="):
        family_in("z-image", WeightStorage("int8"))


def test_the_command_brings_the_version_that_the_image_has() -> None:
    pins = (ROOT / "requirements.txt").read_text()
    for quantization in QUANTIZATIONS.values():
        assert f"\n{quantization.requirement}" in pins


def test_a_training_on_a_quantized_base_learns_and_its_weights_fit_the_plain_base(
    small: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    from inference.engine import Engine
    from inference.request import Request
    from trainer.run import train

    options = {"width": 64, "height": 64, "num_inference_steps": 2}
    settings = small(
        base_model="z-image-turbo",
        quantize="int8",
        low_memory=True,
        gradient_checkpointing=True,
        train_placeholder_token=False,
        trigger_word="r3dfox",
        learning_rate=1e-2,
        steps=20,
        sample_prompts=("a photo of TOK",),
        sample_options=options,
    )
    losses: list[float] = []

    def note(metric: str, value: float) -> None:
        if metric == "loss":
            losses.append(value)

    with caplog.at_level(logging.INFO):
        path = train(settings, note)
    assert "int8 base, gradient checkpointing, block weights in CPU memory" in caplog.text
    assert sum(losses[-8:]) < 0.95 * sum(losses[:8])

    # The last preview was drawn on the unquantized base, like a prediction with the archive.
    archive = read_archive(path)
    assert archive.base_model == "Tongyi-MAI/Z-Image-Turbo"
    request = Request(prompt="a photo of r3dfox", seed=settings.seed, **options)
    generated = Engine().generate(request, archive)[0].convert("RGB")
    last = sorted(path.parent.glob("samples/step-*/00.png"))[-1]
    assert ImageChops.difference(generated, Image.open(last).convert("RGB")).getbbox() is None


@pytest.mark.parametrize("name", ["fp8", "nf4"])
def test_a_lora_learns_over_every_quantisation(
    name: str, use_vault: Path, four_bits_on_a_cpu: None
) -> None:
    family = family_in("z-image", WeightStorage(name))
    lora = Lora(family.transformer, family.lora_targets(), 4, seed=0)
    optimizer = torch.optim.AdamW(lora.parameters(), 1e-2)
    draw = torch.Generator().manual_seed(2)
    latents, noise = torch.randn(2, 1, 16, 8, 8, generator=draw)
    text, losses = [torch.randn(12, 64, generator=draw)], []
    for _ in range(12):
        loss = flow_loss(family, latents, noise, torch.tensor([0.5]), text)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_text_encoder_is_not_quantized_while_a_placeholder_is_trained(
    small: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    from trainer.memory.fitting import fit

    settings = small(quantize="int8")
    family = load_family(settings.base)
    with caplog.at_level(logging.INFO):
        choice = fit(settings, family, ["a photo of <zwx>"])
    assert choice.storage == WeightStorage("int8", "none", False)
    assert "the text encoder is not quantized: <zwx> is trained through it" in caplog.text
