"""Every LoRA file in the wild is applied whole and at its strength, as docs/formats.md says."""

import re
from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest
import torch
from torch import Tensor, nn

from adapters.deltas import Dense, Dora, Hadamard, Kronecker, LowRank
from adapters.factors import LoraMismatch
from adapters.layout import Layout
from adapters.overlay import Overlay
from benchmarks.format_cases import BROKEN, CASES, Case
from benchmarks.formats import ORIGINAL_NAMES, ours, theirs
from benchmarks.models import MODELS

DOCUMENT = (Path(__file__).parent.parent / "docs" / "formats.md").read_text(encoding="utf-8")
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
            "0.img_mlp.proj .the file holds it fused as well, and they differ",
        ),
        (
            {
                "0.img_mlp.proj": Dense(torch.ones(24, 16)),
                "0_img_mlp_proj": Dense(torch.zeros(24, 16)),
            },
            "the file holds 0.img_mlp.proj twice, and they differ",
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


def test_two_layers_that_flatten_to_one_name_are_an_error() -> None:
    model = nn.ModuleDict({"a_b": nn.Linear(2, 2), "a": nn.ModuleDict({"b": nn.Linear(2, 2)})})
    with pytest.raises(ValueError, match="two layers are 'a.b' once flattened"):
        Layout.of(model, "odd")


# Changes that a scale does not simply multiply, and parts of them.


def laid(weight: Tensor, delta: object, scale: float) -> Tensor:
    linear = nn.Linear(*reversed(weight.shape), bias=False)
    linear.weight.data.copy_(weight)
    Overlay(nn.ModuleDict({"x": linear})).apply([({"x": delta}, scale)])  # type: ignore[dict-item]
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
        torch.testing.assert_close(laid(weight, dora, scale).double(), wanted, rtol=0, atol=1e-5)


def test_a_row_of_zeros_under_dora_is_no_nan() -> None:
    dora = Dora(LowRank(torch.zeros(2, 16), torch.zeros(24, 2)), torch.ones(24, 1))
    assert not laid(torch.zeros(24, 16), dora, 1.0).any()


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
    whole = laid(weight, delta, 0.7)
    for start, stop in ((0, 10), (10, 24)):
        part = delta.rows(start, stop)
        assert part.shape == (stop - start, 16)
        torch.testing.assert_close(laid(weight[start:stop], part, 0.7), whole[start:stop])
    nested = delta.rows(6, 20).rows(2, 5)
    torch.testing.assert_close(laid(weight[8:11], nested, 0.7), whole[8:11])
