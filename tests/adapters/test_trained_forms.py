"""DoRA, LoKr and LoHa: what a layer computes is what its file says, here and in other programs."""

import io
import json
from typing import Any

import diffusers
import peft
import pytest
import torch
from safetensors.torch import load
from torch import Tensor, nn

from adapters.formats.deltas import as_delta
from adapters.formats.lora_file import as_written, lora_size, parse_deltas, write_lora
from adapters.forms import Form
from adapters.lora import Lora
from families.loading import load_family
from families.registry import BASES

FORMS = {
    "lora": Form("lora", 4),
    "dora": Form("dora", 4),
    "whole lokr": Form("lokr", 0, 4),
    "lokr": Form("lokr", 2, 4),
    "loha": Form("loha", 3),
    "large loha": Form("loha", 6),
}
PEFT: dict[str, Any] = {
    "lora": peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0"]),
    "dora": peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0"], use_dora=True),
    "whole lokr": peft.LoKrConfig(r=99, alpha=99, target_modules=["0"], decompose_factor=4),
    "lokr": peft.LoKrConfig(r=2, alpha=2, target_modules=["0"], decompose_factor=4),
    "loha": peft.LoHaConfig(r=3, alpha=3, target_modules=["0"]),
    "large loha": peft.LoHaConfig(r=6, alpha=6, target_modules=["0"]),
}
X = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(2))


def model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(24, 32)).requires_grad_(False)


def trained(form: Form, network: nn.Module, targets: tuple[str, ...] = ("0",)) -> Lora:
    """A LoRA with values as after some steps."""
    lora, random = Lora(network, list(targets), form, seed=1), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for each in lora.parameters():
            each.add_(torch.randn(each.shape, generator=random), alpha=0.1)
    return lora


def file_of(lora: Lora) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of the LoRA's file."""
    file = io.BytesIO()
    write_lora(file, lora.deltas(), {})
    content = file.getvalue()
    length = int.from_bytes(content[:8], "little")
    assert len(content) - 8 - length == lora_size(lora.deltas())
    return load(content), json.loads(content[8 : 8 + length])["__metadata__"]


def merged(weight: Tensor, lora: Lora, layer: str = "0") -> Tensor:
    """W + dW of the file, as generation computes it."""
    total = weight.float().clone()
    as_delta(as_written(lora.deltas())[layer]).add_to(total, weight, 1.0)
    return total


@pytest.mark.parametrize("name", FORMS)
def test_a_layer_and_its_gradients_are_those_of_the_changed_weight(name: str) -> None:
    network, plain = model(), model()[0]
    lora = Lora(network, ["0"], FORMS[name], seed=1)
    assert torch.allclose(network(X), plain(X), atol=1e-6)  # nothing changes at the start
    lora.remove()
    lora = trained(FORMS[name], network)
    layer, x = lora.layers["0"], X.clone().requires_grad_()
    y = network(x)
    change = torch.zeros(32, 24)
    lora.deltas()["0"].add_to(change, plain.weight, 1.0)
    torch.testing.assert_close(y, X @ (plain.weight + change).T + plain.bias, rtol=0, atol=1e-5)
    towards = torch.randn(y.shape, generator=torch.Generator().manual_seed(4))
    y.backward(towards)
    torch.testing.assert_close(x.grad, towards @ (plain.weight + change), rtol=0, atol=1e-5)
    for part, parameter in layer.parts.items():  # along a random direction
        assert parameter.grad is not None
        step = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 1e-3
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(step, alpha=sign)
                ends.append(float((network(X).double() * towards.double()).sum()))
                parameter.sub_(step, alpha=sign)
        wanted, found = (ends[0] - ends[1]) / 2, float((parameter.grad * step).sum())
        if name == "dora" and part != "magnitude":  # the norm has no gradient
            continue
        assert found == pytest.approx(wanted, rel=0.03, abs=1e-4), part

    size, whole = layer.change()
    assert size == pytest.approx(float(change.norm()), rel=1e-4)
    assert whole == pytest.approx(float(plain.weight.norm()))
    lora.undo()
    assert torch.allclose(network(X), plain(X), atol=1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_peft_computes_the_same_from_the_file(name: str) -> None:
    network = model()
    lora = trained(FORMS[name], network)
    tensors, header = file_of(lora)
    wanted = X @ merged(model()[0].weight, lora).T + model()[0].bias
    found = parse_deltas(tensors, header, "it")
    for part, value in as_written(lora.deltas())["0"].parts().items():
        assert torch.equal(value, as_delta(found["0"]).parts()[part]), part

    theirs = model()
    peft.inject_adapter_in_model(PEFT[name], theirs)
    state = {
        key.removeprefix("transformer."): value
        for key, value in tensors.items()
        if not key.endswith(".alpha")
    }
    result = peft.set_peft_model_state_dict(theirs, state)
    assert not result.unexpected_keys
    torch.testing.assert_close(theirs(X), wanted, rtol=0, atol=1e-5)


def test_files_have_the_names_that_lycoris_and_comfyui_read() -> None:
    for name, parts in (
        ("whole lokr", {"lokr_w1", "lokr_w2", "alpha"}),
        ("lokr", {"lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha"}),
        ("loha", {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"}),
    ):
        tensors, _ = file_of(trained(FORMS[name], model()))
        assert set(tensors) == {f"transformer.0.{part}" for part in parts}
    tensors, header = file_of(trained(FORMS["dora"], model()))
    assert tensors["transformer.0.lora_magnitude_vector"].dtype == torch.float32
    assert json.loads(header["lora_adapter_metadata"])["transformer.use_dora"] is True


@pytest.mark.parametrize("kind", ["dora", "lokr"])
def test_diffusers_reads_the_file_for_z_image(kind: str, use_vault: Any) -> None:
    """LoKr only of Z-Image; LoHa of no model."""
    family = load_family(BASES["z-image"])
    layer = "layers.0.attention.to_q"
    weight = family.transformer.get_parameter(f"{layer}.weight").clone()
    lora = trained(Form(kind, 4 if kind == "dora" else 0, 4), family.transformer, (layer,))
    tensors, header = file_of(lora)
    wanted = merged(weight, lora, layer)
    lora.remove()
    pipeline = diffusers.ZImagePipeline
    state, metadata = pipeline.lora_state_dict(tensors, return_lora_metadata=True)
    metadata = metadata or json.loads(header.get("lora_adapter_metadata", "null"))
    family.transformer.load_lora_adapter(state, prefix="transformer", metadata=metadata)
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0))
    found = family.transformer.get_submodule(layer)(x)
    torch.testing.assert_close(found, x @ wanted.T, rtol=0, atol=1e-5)


def test_dora_on_another_weight_than_that_of_inference_starts_without_a_change() -> None:
    """Quantized, or with a training adapter: the norms in the file are the original's."""
    original, network = model(), model()
    with torch.no_grad():
        network[0].weight.add_(torch.randn(32, 24), alpha=0.3)
        network[0].weight[3] = 0
    before = network(X)
    lora = Lora(network, ["0"], Form("dora", 4), 1, original)
    torch.testing.assert_close(network(X), before, rtol=0, atol=1e-6)
    weight = original[0].weight
    torch.testing.assert_close(merged(weight, lora), weight.data, rtol=0, atol=1e-6)


def test_a_plan_counts_the_values_that_are_trained() -> None:
    for form in FORMS.values():
        lora = Lora(model(), ["0"], form, 0)
        assert form.values([(32, 24)]) == sum(each.numel() for each in lora.parameters())
        assert Form.of(form.facts) in (form, Form(form.kind, form.rank))
