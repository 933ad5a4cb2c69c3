"""A base is stored for generation in the most exact way that fits the GPU, and takes LoRAs."""

import logging
from pathlib import Path

import pytest
import torch
from loras import random_lora

from adapters.archive import Archive
from adapters.slots import SlotLinear
from families import quantization
from families.family import Family, WeightStorage
from families.frozen_linear import FrozenLinear
from families.loading import load_family
from families.quantization import QuantizationUnavailable
from families.registry import BASES
from inference import acceleration, engine, residence
from inference.engine import Engine
from inference.request import Request

GPU, CPU = torch.device("cuda"), torch.device("cpu")
USED = 0.5e9  # bytes that a GPU's own context takes


@pytest.mark.parametrize(
    ("base", "gigabytes", "storage"),
    [
        ("z-image-turbo", 80, WeightStorage()),
        ("z-image-turbo", 24, WeightStorage("none", "int8")),
        ("z-image-turbo", 16, WeightStorage("int8", "int8")),
        ("z-image-turbo", 12, WeightStorage("nf4", "nf4")),
        ("qwen-image", 80, WeightStorage()),
        ("qwen-image", 48, WeightStorage("int8", "int8")),
        ("qwen-image", 24, WeightStorage("nf4", "nf4")),
    ],
)
def test_a_base_fits_the_gpu(
    base: str, gigabytes: int, storage: WeightStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MODEL_VAULT", raising=False)
    monkeypatch.setattr(residence, "free_memory", lambda _: gigabytes * 1e9 - USED)
    assert residence.choose_storage(BASES[base], GPU) == storage


def test_a_gpu_that_is_too_small_gets_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("MODEL_VAULT", raising=False)
    monkeypatch.setattr(residence, "free_memory", lambda _: 4e9)
    assert residence.choose_storage(BASES["qwen-image"], GPU) == residence.LADDER[-1]
    assert "expect an out-of-memory error" in caplog.text
    needs = list(residence.memory_needed(BASES["qwen-image"]).values())
    assert needs == sorted(needs, reverse=True)


@pytest.mark.parametrize(
    ("base", "gigabytes", "quantize", "storage"),
    [
        ("z-image-turbo", 80, "fp8", WeightStorage("fp8")),
        ("z-image-turbo", 16, "fp8", WeightStorage("fp8", "int8")),
        ("qwen-image", 24, "nf4", WeightStorage("nf4", "int8")),
        ("z-image-turbo", 80, "none", WeightStorage()),
    ],
)
def test_the_environment_sets_the_transformer_s_quantization(
    base: str, gigabytes: int, quantize: str, storage: WeightStorage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("MODEL_VAULT", raising=False)
    monkeypatch.setenv("QUANTIZE", quantize)
    monkeypatch.setattr(residence, "free_memory", lambda _: gigabytes * 1e9 - USED)
    assert residence.choose_storage(BASES[base], GPU) == storage
    if quantize != "nf4":
        assert residence.choose_storage(BASES[base], CPU) == WeightStorage(quantize)


@pytest.mark.parametrize("quantize", ["fp16", "nf4"])
def test_a_quantization_from_the_environment_that_cannot_run_is_an_error(
    quantize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTIZE", quantize)
    with pytest.raises(QuantizationUnavailable, match=rf"\$QUANTIZE: quantize '?{quantize}"):
        residence.choose_storage(BASES["z-image-turbo"], CPU)


@pytest.mark.slow
def test_a_base_with_float8_products_is_compiled_and_takes_a_lora(
    use_vault: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, with the compiler's own interpreter in place of Inductor."""
    torch._dynamo.reset()
    plain = load_family(BASES["z-image-turbo"], CPU)
    factors = random_lora(plain.transformer, plain.lora_targets(), 4, 1, 0.2)
    archive = Archive(factors, (), {"base_model": "Tongyi-MAI/Z-Image-Turbo"})
    request = Request(prompt="a cat", width=64, height=48, num_inference_steps=2, seed=7)
    monkeypatch.setenv("BASE_MODEL", "z-image-turbo")
    monkeypatch.setenv("QUANTIZE", "fp8")
    monkeypatch.setattr(quantization, "has_float8_products", lambda _: True)
    compiled = []

    def accelerate(family: Family) -> None:
        assert any(isinstance(each, SlotLinear) for each in family.transformer.modules())
        acceleration.compile_blocks(family.transformer, "eager")
        compiled.append(family.base.name)

    monkeypatch.setattr(acceleration, "accelerate", accelerate)
    images = {}
    for wanted in (False, True):
        monkeypatch.setattr(acceleration, "wanted", lambda _, wanted=wanted: wanted)
        used = Engine(CPU, torch.bfloat16)
        for weights in (None, archive):
            image = used.generate(request, weights)[0]
            images[wanted, weights is None] = torch.tensor(list(image.convert("L").getdata()))
        assert used._family is not None
        layers = [each for each in used._family.transformer.modules() if type(each) is FrozenLinear]
        assert any(each.float8 for each in layers)
    torch._dynamo.reset()
    assert compiled == ["z-image-turbo"]
    for without in (False, True):
        assert torch.equal(images[True, without], images[False, without])
    assert not torch.equal(images[True, True], images[True, False])


def test_a_quantized_base_takes_a_lora_and_gives_it_back(
    use_vault: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Close to the LoRA on the unquantized base, and then the base as before, byte for byte."""
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("BASE_MODEL", "z-image-turbo")
    transformer = load_family(BASES["z-image-turbo"], CPU).transformer
    targets = load_family(BASES["z-image-turbo"], CPU).lora_targets()
    factors = random_lora(transformer, targets, 4, 1, 0.2)
    archive = Archive(factors, (), {"base_model": "Tongyi-MAI/Z-Image-Turbo"})
    request = Request(prompt="a cat", width=64, height=48, num_inference_steps=2, seed=7)

    def images(storage: WeightStorage) -> list[torch.Tensor]:
        monkeypatch.setattr(engine, "choose_storage", lambda *_: storage)
        used = Engine(CPU, torch.float32)
        found = []
        for weights in (None, archive, None):
            pixels = used.generate(request, weights)[0].tobytes()
            found.append(torch.frombuffer(bytearray(pixels), dtype=torch.uint8).float())
        assert used._family is not None
        slots = [each for each in used._family.transformer.modules() if type(each) is SlotLinear]
        assert bool(slots) == (storage.quantize != "none")
        return found

    plain, plain_lora, _ = images(WeightStorage())
    base, with_lora, again = images(WeightStorage("int8", "int8"))
    assert torch.equal(base, again)
    changed = (plain_lora - plain).abs().mean()
    assert changed > 1 and (with_lora - plain_lora).abs().mean() < changed / 4
