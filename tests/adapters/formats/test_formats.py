"""Every LoRA file in the wild is applied whole and at its strength, as docs/formats.md says."""

import re
from collections.abc import Iterator

import diffusers
import pytest
import torch
from root import ROOT
from torch import Tensor, nn

from adapters.formats.deltas import Dense, Dora, Hadamard, Kronecker, LowRank
from adapters.formats.factors import LoraMismatch
from adapters.formats.layout import Layout
from adapters.merging import LoraMerger
from lab.benchmarks.format_cases import BROKEN, CASES, Case
from lab.benchmarks.formats import ORIGINAL_NAMES, ours, theirs
from lab.benchmarks.models import MODELS

DOCUMENT = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
UNKNOWABLE = "… alpha = 2 · rank, written nowhere"


def documented(title: str) -> Iterator[list[str]]:
    """The rows of one of the document's tables."""
    section = DOCUMENT.split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ") for line in section.splitlines() if line.startswith("|")]
    return (row.split(" | ") for row in rows[2:])


@pytest.mark.parametrize(("title", "cases"), [("Read", CASES), ("Refused", BROKEN)])
def test_the_document_s_rows_are_the_cases(title: str, cases: tuple[Case, ...]) -> None:
    assert [row[0] for row in documented(title)] == [case.layout for case in cases]
    assert f"For diffusers {diffusers.__version__} the same file" in DOCUMENT


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.layout for case in CASES])
def test_a_file_in_the_wild_is_applied_as_documented(number: int, name: str) -> None:
    case, row = CASES[number], list(documented("Read"))[number]
    said = row[2 + list(MODELS).index(name)]
    if case.only not in (None, name):
        assert said == "–"
        return
    found = ours(name, case)
    assert found == said
    if case.layout == UNKNOWABLE:
        assert found == "WRONG ×0.5"
    else:
        applied, whole = re.fullmatch(r"OK (\d+) of (\d+)", found).groups()  # type: ignore[union-attr]
        assert applied == whole


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("number", range(len(BROKEN)), ids=[case.layout for case in BROKEN])
def test_a_broken_file_is_refused_as_documented(number: int, name: str) -> None:
    assert list(documented("Refused"))[number][1 + list(MODELS).index(name)] == "refused"
    assert ours(name, BROKEN[number]) == "refused"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("title", "cases"), [("Read", CASES), ("Refused", BROKEN)])
def test_diffusers_does_with_them_what_the_document_says(
    title: str, cases: tuple[Case, ...], name: str
) -> None:
    column = list(MODELS).index(name) - len(MODELS)
    said = {row[0] + str(n): row[column] for n, row in enumerate(documented(title))}
    found = {
        case.layout + str(n): theirs(name, case) if case.only in (None, name) else "–"
        for n, case in enumerate(cases)
    }
    assert found == said


# Names.


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_layer = nn.Linear(16, 24, bias=False)
        self.proj = nn.Linear(16, 24, bias=False)
        self.norm = nn.LayerNorm(16)


def layout_of(model: nn.Module) -> Layout:
    fused = {"img_mlp.gate_up": ("img_mlp.gate_layer", "img_mlp.proj")}
    return Layout.of(nn.ModuleDict({"0": nn.ModuleDict({"img_mlp": model})}), "small", fused)


def test_a_fused_layer_is_split_in_the_family_s_order() -> None:
    down, up = torch.randn(4, 16), torch.randn(48, 4)
    fitted = layout_of(Block()).fit({"lora_unet_0_img_mlp_gate_up": LowRank(down, up)}, "file")
    for name, rows in (("gate_layer", up[:24]), ("proj", up[24:])):
        assert torch.equal(fitted[f"0.img_mlp.{name}"].tensors()[1], rows)
    assert len(fitted) == 2


def test_names_are_the_same_on_the_meta_device() -> None:
    with torch.device("meta"):
        shapes = MODELS["Z-Image"]().state_dict()
    layout = Layout.of(MODELS["Z-Image"](), "Z-Image", ORIGINAL_NAMES["Z-Image"])
    assert all(
        tuple(shapes[f"{name}.weight"].shape) == shape
        for name, shape in layout.shapes.items()
        if f"{name}.weight" in shapes
    )
    assert layout.find("lora_unet_final_layer_adaLN_modulation_1") == (
        "all_final_layer.2-1.adaLN_modulation.1",
    )


@pytest.mark.parametrize(
    ("deltas", "fault"),
    [
        ({"0.img_mlp.proj.bias": Dense(torch.ones(24))}, "do not exist in small: 0.img_mlp.proj.b"),
        ({"0.img_mlp.norm": Dense(torch.ones(17))}, r"0.img_mlp.norm \(LoRA 17, model 16\)"),
        ({"0.img_mlp.gate_up": Dense(torch.ones(24, 16))}, r"\(LoRA 24x16, model 48x16\)"),
        (
            {
                "0.img_mlp.gate_up": Dense(torch.ones(48, 16)),
                "0.img_mlp.proj": Dense(torch.zeros(24, 16)),
            },
            "0.img_mlp.proj .the file also contains it fused, and they differ",
        ),
        (
            {
                "0.img_mlp.proj": Dense(torch.ones(24, 16)),
                "0_img_mlp_proj": Dense(torch.zeros(24, 16)),
            },
            "the file contains 0.img_mlp.proj twice, and they differ",
        ),
        (
            {"0.img_mlp.gate_up": Dora(Dense(torch.ones(48, 16)), torch.ones(1, 16))},
            "magnitudes by column cannot be split",
        ),
        (
            {
                "0.img_mlp.proj": Kronecker(
                    (torch.ones(9999, 1), torch.ones(1, 9999)), (torch.ones(9999, 9999),)
                )
            },
            "LoRA 99980001x99980001",  # told from the factors: the product would fill every memory
        ),
    ],
)
def test_what_does_not_fit_is_named(deltas: dict, fault: str) -> None:
    with pytest.raises(LoraMismatch, match=fault):
        layout_of(Block()).fit(deltas, "file")


def test_a_name_that_may_mean_two_layers_is_refused_with_both() -> None:
    model = nn.ModuleDict({"a_b": nn.Linear(2, 2), "a": nn.ModuleDict({"b": nn.Linear(2, 2)})})
    layout, change = Layout.of(model, "odd"), Dense(torch.ones(2, 2))
    with pytest.raises(LoraMismatch, match=r"lora_unet_a_b \(it may mean a_b and a\.b\)"):
        layout.fit({"lora_unet_a_b": change}, "file")
    for exact in ("a_b", "a.b"):
        assert layout.fit({exact: change}, "file").keys() == {exact}


FRONTS = (
    *("", "transformer.", "diffusion_model.", "model.diffusion_model.", "base_model.model."),
    *("base_model.model.transformer.", "transformer.base_model.model.", "module.", "_orig_mod."),
    *("unet.", "dit.", "transformer._orig_mod.", "module.module.", "pipe.dit."),
)
FLAT_FRONTS = (
    *("lora_unet_", "lora_unet__", "lora_transformer_", "lycoris_", "lora_unet__orig_mod_"),
    *("lora_unet_module_", "lora_transformer_module_", "lycoris_transformer_", "lora_"),
    "diffusion_model_",
)


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_found_behind_every_known_front_and_no_other(name: str) -> None:
    layout = Layout.of(MODELS[name](), name, ORIGINAL_NAMES[name])
    for layer in layout.shapes:
        if layer.endswith(".bias"):
            continue
        flat = layer.replace(".", "_")
        spelled = [f"{front}{layer}" for front in FRONTS]
        spelled += [f"{front}{flat}" for front in FLAT_FRONTS]
        spelled += [
            layer.replace(".", "._orig_mod.", 1),
            f"{layer}.module",
            layer.replace(".", "$$"),
        ]
        wrong = [each for each in spelled if layout.find(each) != (layer,)]
        assert not wrong


@pytest.mark.parametrize(
    "front", ["text_encoder.", "lora_te1_", "controlnet.", "vae.", "transformer_2.", "blocks.3."]
)
def test_a_layer_of_another_component_is_not_taken_for_the_model_s(front: str) -> None:
    layout = Layout.of(MODELS["Z-Image"](), "Z-Image", ORIGINAL_NAMES["Z-Image"])
    layer = "layers.0.attention.to_q"
    assert layout.find(front + (layer.replace(".", "_") if front.endswith("_") else layer)) is None


def test_unknown_parts_in_front_of_a_block_s_layer_mean_the_whole_model() -> None:
    layout = Layout.of(MODELS["Qwen-Image"](), "Qwen-Image", ORIGINAL_NAMES["Qwen-Image"])
    layer = "transformer_blocks.0.attn.to_q"
    assert layout.find(f"student.backbone.{layer}") == (layer,)
    # kohya's names of FLUX's single blocks end like Qwen-Image's blocks.
    assert layout.find("lora_unet_single_transformer_blocks_0_attn_to_q") is None
    assert layout.find("single_transformer_blocks.0.proj_out") is None


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["layers.77.attention.to_q", "layers.0.attention.to_k"], "layers has no 77, only 0 to 1"),
        (["layers.0.attention.to_x"], "layers.0.attention has no to_x, only norm_q, norm_k, to_q"),
        (["lora_unet_layers_0_attention_to_x"], "no layer has x after layers_0_attention_to"),
        (
            ["blocks.3.layers.0.attention.to_q"],
            "unknown prefix blocks.3 of layers.0.attention.to_q",
        ),
        (["x_pad_token"], "the model has no layer x_pad_token"),
        (["layers.0.attention.to_q.bias"], "layers.0.attention.to_q has no bias"),
        (["lora_te1_text_model_encoder_layers_0_mlp_fc1"], "they belong to a text encoder"),
        (
            ["text_encoder.model.layers.0.self_attn.q_proj", "layers.0.attention.to_q"],
            "1 of 2 layers do not exist .* they belong to a text encoder",
        ),
        (["single_transformer_blocks.3.attn.to_q"], "made for another model: FLUX"),
        (["lora_unet_double_blocks_0_img_attn_qkv"], "made for another model: FLUX"),
        (["transformer_blocks.0.attn.to_q"], "another model: Qwen-Image, Qwen-Image-2.1, FLUX or"),
        (["transformer_blocks.0.img_mlp.net.2"], "made for another model: Qwen-Image$"),
        (["blocks.0.self_attn.q"], "made for another model: Wan"),
        (
            ["lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"],
            "made for another model: Stable Diffusion 1.5, 2 or XL",
        ),
        (
            ["lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", "lora_te2_x"],
            "made for another model: Stable Diffusion XL",
        ),
    ],
)
def test_a_name_that_means_no_layer_is_refused_for_its_true_reason(
    names: list[str], reason: str
) -> None:
    layout = Layout.of(MODELS["Z-Image"](), "Z-Image", ORIGINAL_NAMES["Z-Image"])
    with pytest.raises(LoraMismatch, match=reason) as caught:
        layout.fit(dict.fromkeys(names, Dense(torch.ones(64, 64))), "file")
    assert ("another model" in str(caught.value)) == ("another model" in reason)


# Changes that a scale does not simply multiply, and parts of them.


def applied(weight: Tensor, delta: object, scale: float) -> Tensor:
    linear = nn.Linear(*reversed(weight.shape), bias=False)
    linear.weight.data.copy_(weight)
    LoraMerger(nn.ModuleDict({"x": linear})).apply([({"x": delta}, scale)])  # type: ignore[dict-item]
    return linear.weight.detach()


@pytest.mark.parametrize("by_column", [False, True])
def test_a_scale_leads_straight_from_the_base_through_dora(by_column: bool) -> None:
    weight, down, up = torch.randn(24, 16), torch.randn(4, 16), torch.randn(24, 4)
    magnitude = torch.rand(1, 16) if by_column else torch.rand(24, 1)
    moved = weight.double() + up.double() @ down.double()
    whole = magnitude * moved / moved.norm(dim=0 if by_column else 1, keepdim=True)
    dora = Dora(LowRank(down, up), magnitude)
    for scale in (1.0, 0.3, -0.5):
        wanted = weight.double() + scale * (whole - weight.double())
        torch.testing.assert_close(applied(weight, dora, scale).double(), wanted, rtol=0, atol=1e-5)


def test_a_row_of_zeros_under_dora_is_no_nan() -> None:
    dora = Dora(LowRank(torch.zeros(2, 16), torch.zeros(24, 2)), torch.ones(24, 1))
    assert not applied(torch.zeros(24, 16), dora, 1.0).any()


@pytest.mark.parametrize(
    "delta",
    [
        Dense(torch.randn(24, 16)),
        LowRank(torch.randn(4, 16), torch.randn(24, 4)),
        Kronecker((torch.randn(4, 2),), (torch.randn(6, 3), torch.randn(3, 8))),
        Hadamard(
            (torch.randn(24, 2), torch.randn(2, 16)), (torch.randn(24, 3), torch.randn(3, 16))
        ),
        Dora(LowRank(torch.randn(4, 16), torch.randn(24, 4)), torch.rand(24, 1)),
    ],
    ids=lambda delta: type(delta).__name__,
)
def test_rows_of_a_change_are_those_of_the_whole(delta: Dense) -> None:
    weight = torch.randn(24, 16)
    whole = applied(weight, delta, 0.7)
    for start, stop in ((0, 10), (10, 24)):
        part = delta.rows(start, stop)
        assert part.shape == (stop - start, 16)
        torch.testing.assert_close(applied(weight[start:stop], part, 0.7), whole[start:stop])
    nested = delta.rows(6, 20).rows(2, 5)
    torch.testing.assert_close(applied(weight[8:11], nested, 0.7), whole[8:11])
