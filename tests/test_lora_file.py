"""A LoRA file is read at its right strength in every spelling we know; the others are refused."""

import itertools
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from adapters.factors import LoraMismatch, check_fits
from adapters.layout import Layout
from adapters.lora_file import BrokenLora, parse_deltas, parse_lora, read_tensors

LAYER = "transformer_blocks.0.attn.to_out.0"  # the word "transformer" belongs to the name
RANK, ALPHA = 4, 6.0
PREFIXES = ("transformer.", "diffusion_model.", "")
MATRICES = (
    ("lora_A.weight", "lora_B.weight"),
    ("lora_down.weight", "lora_up.weight"),
    ("lora_A.default.weight", "lora_B.default.weight"),
)


def matrices(rank: int = RANK) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(rank, 16, generator=generator), torch.randn(24, rank, generator=generator)


def header(rank: object = RANK, alpha: object = ALPHA, **more: object) -> dict[str, str]:
    named = {"r": rank, "lora_alpha": alpha, **more}
    peft = {f"transformer.{name}": value for name, value in named.items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(peft)}


@pytest.mark.parametrize("alpha", ["absent", "tensor", "header", "both"])
@pytest.mark.parametrize(("prefix", "names"), list(itertools.product(PREFIXES, MATRICES)))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_known_spelling_is_alpha_over_rank_times_b_times_a(
    prefix: str, names: tuple[str, str], alpha: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    down, up = (matrix.to(dtype) for matrix in matrices())
    tensors = {f"{prefix}{LAYER}.{names[0]}": down, f"{prefix}{LAYER}.{names[1]}": up}
    if alpha in ("tensor", "both"):
        tensors[f"{prefix}{LAYER}.alpha"] = torch.tensor(ALPHA, dtype=dtype)
    metadata = header() if alpha in ("header", "both") else None
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file, metadata)
    factors = parse_lora(*read_tensors(file, "lora"), "lora")

    scale = 1 if alpha == "absent" else ALPHA / RANK
    assert factors.keys() == {LAYER}
    found_down, found_up = factors[LAYER]
    torch.testing.assert_close(found_up @ found_down, scale * (up.float() @ down.float()))


def test_each_layer_has_its_own_rank_and_alpha() -> None:
    tensors = {}
    for layer, rank, alpha in (("a", 2, 1.0), ("b", 4, 8.0), ("c", 3, None)):
        tensors[f"{layer}.lora_down.weight"], tensors[f"{layer}.lora_up.weight"] = matrices(rank)
        if alpha is not None:
            tensors[f"{layer}.alpha"] = torch.tensor([alpha])
    factors = parse_lora(tensors, {}, "lora")
    for layer, rank, scale in (("a", 2, 0.5), ("b", 4, 2.0), ("c", 3, 1.0)):
        down, up = matrices(rank)
        assert torch.equal(factors[layer][0], down)
        assert torch.equal(factors[layer][1], up * scale)


def test_the_header_speaks_for_the_layers_without_an_alpha_of_their_own() -> None:
    down, up = matrices()
    tensors = {f"{layer}.lora_{m}.weight": t for layer in "ab" for m, t in (("A", down), ("B", up))}
    factors = parse_lora(tensors | {"a.alpha": torch.tensor(2.0)}, header(), "lora")
    assert torch.equal(factors["a"][1], up * 0.5)
    assert torch.equal(factors["b"][1], up * 1.5)


@pytest.mark.parametrize(
    "key",
    [
        "x.lora_A",
        "x.lora_A.second.weight",
        "x.lora_mid.weight",
        "x.lokr_t2",
        "x.hada_t1",
        "x.oft_diag",
        "x.alpha.weight",
        "lora_A.weight",
        "lora_token_embedding.zwx",
        "text_model.embeddings.weight",
    ],
)
def test_an_unknown_key_is_refused_by_name(key: str) -> None:
    down, up = matrices()
    whole = {"x.lora_A.weight": down, "x.lora_B.weight": up}
    with pytest.raises(BrokenLora, match="file: ") as caught:
        parse_lora({**whole, key: down}, {}, "file")
    assert f"{key} is not a LoRA tensor this reader knows" in str(caught.value)


@pytest.mark.parametrize("layer", ["lora_unet_blocks_7", "unet.blocks.0", "blocks.7"])
def test_a_layer_the_model_has_not_is_refused_by_name(layer: str) -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(16, 24)])})
    down, up = matrices()
    factors = parse_lora({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, {}, "f")
    for check in (
        lambda: Layout.of(model, "small").fit(factors, "f"),
        lambda: check_fits(factors, model, "f", "small"),
    ):
        with pytest.raises(LoraMismatch, match=f"1 of 1 layers do not exist in small: {layer}"):
            check()


def test_a_layer_of_another_size_is_refused_with_both_sizes() -> None:
    factors = {"0": (torch.zeros(2, 16), torch.zeros(24, 2))}
    model = nn.Sequential(nn.Linear(8, 24))
    with pytest.raises(LoraMismatch, match=r"0 \(LoRA 24x16, model 24x8\)"):
        check_fits(factors, model, "f", "small")
    with pytest.raises(LoraMismatch, match=r"0 \(LoRA 24x16, model 24x8\)"):
        Layout.of(model, "small").fit(factors, "f")


@pytest.mark.parametrize(
    ("extra", "fault"),
    [
        ({"diffusion_model.x.lora_A.weight": torch.ones(4, 16)}, "is the second lora_A of x"),
        ({"x.lora_down.weight": torch.ones(4, 16)}, "x.lora_down.weight is the second lora_A of x"),
        ({"y.alpha": torch.tensor(1.0)}, "y has alpha alone"),
        ({"x.alpha": torch.tensor(torch.nan)}, "x has an alpha that is not one positive number"),
        ({"x.alpha": torch.tensor(0.0)}, "x has an alpha that is not one positive number"),
        ({"x.alpha": torch.ones(4)}, "x has an alpha that is not one positive number"),
        ({"x.lora_A.weight": torch.ones(4, 16, dtype=torch.int8)}, "not floating point numbers"),
        ({"x.lora_A.weight": torch.ones(4, 2, 8)}, r"x has the shapes \(4, 2, 8\)"),
        ({"x.lora_B.weight": torch.full((24, 4), 3e38), "x.alpha": torch.tensor(9e9)}, "infinity"),
        ({"x.lora_A.weight": torch.ones(1025, 16)}, r"x has the shapes \(1025, 16\) and"),
        ({"x.lokr_w1": torch.ones(4, 4)}, "x has LoRA together with lokr_w1"),
        ({"x.diff_b": torch.ones(24)}, "x has LoRA together with diff_b"),
        ({"x.dora_scale": torch.ones(23, 1)}, r"x has DoRA magnitudes of the shape \(23, 1\)"),
        ({"x.dora_scale": torch.full((24,), torch.nan)}, "x holds NaN or infinity"),
        ({"y.dora_scale": torch.ones(24)}, "y has magnitude alone"),
        ({"y.lora_B.bias": torch.ones(24)}, "y has lora_B.bias alone"),
        ({"y.lokr_w1": torch.ones(4, 4)}, "y has lokr_w1 but no lokr_w2"),
        (
            {f"y.lokr_{part}": torch.ones(4, 4) for part in ("w1", "w1_a", "w2")},
            "y has lokr_w1 both whole and as factors",
        ),
        (
            {f"y.lokr_{part}": torch.ones(4, 4) for part in ("w1", "w2_a")},
            "y has lokr_w2_a but no lokr_w2_b",
        ),
        ({"y.hada_w1_a": torch.ones(24, 4)}, "y has hada_w1_a but no hada_w1_b, hada_w2_a"),
        (
            {f"y.hada_w{n}_{p}": torch.ones(4 * n, 4 * n) for n in (1, 2) for p in "ab"},
            r"y has two products of the shapes \(4, 4\) and \(8, 8\)",
        ),
    ],
)
def test_a_layer_with_odd_parts_is_refused(extra: dict[str, torch.Tensor], fault: str) -> None:
    down, up = matrices()
    with pytest.raises(BrokenLora, match=fault):
        parse_lora({"x.lora_A.weight": down, "x.lora_B.weight": up, **extra}, {}, "file")


@pytest.mark.parametrize(
    ("metadata", "fault"),
    [
        ({"lora_adapter_metadata": "{"}, "is not JSON"),
        ({"lora_adapter_metadata": "[1]"}, "is not a JSON object"),
        (header(rank=8), "x has rank 4, the file's header says 8"),
        (header(alpha="much"), "lora_alpha 'much'"),
        (header(rank=0), "has r 0"),
        (header(alpha=float("nan")), "lora_alpha nan"),
        (header(rank_pattern={"x": 2}), "x has rank 4, the file's header says 2"),
        (header(rank_pattern={"(a+)+": 2}), r"rank_pattern '\(a\+\)\+', not a layer's plain name"),
        (header(alpha_pattern={"x": -2}), "alpha_pattern that is not a table of positive numbers"),
        (header(alpha_pattern=[2]), "alpha_pattern that is not a table of positive numbers"),
        (header(peft_type="LOKR"), "is about 'LOKR', not LoRA"),
        (header(use_dora=True), "x has no lora_magnitude_vector, the file's header says DoRA"),
    ],
)
def test_a_header_that_cannot_be_followed_is_refused(metadata: dict[str, str], fault: str) -> None:
    down, up = matrices()
    with pytest.raises(BrokenLora, match=fault):
        parse_lora({"x.lora_A.weight": down, "x.lora_B.weight": up}, metadata, "file")


def test_the_longest_name_in_the_header_s_patterns_counts() -> None:
    down, up = matrices()
    layers = ("b.0.to_q", "b.1.to_q", "b.1.to_k")
    tensors = {f"{n}.lora_{m}.weight": t for n in layers for m, t in (("A", down), ("B", up))}
    alphas = {"to_q": 2.0, "^transformer\\.b\\.1\\.to_q$": 8.0}
    factors = parse_lora(tensors, header(alpha_pattern=alphas), "lora")
    for layer, scale in zip(layers, (0.5, 2.0, 1.5), strict=True):
        assert torch.equal(factors[layer][1], up * scale)


def test_an_alpha_in_every_layer_leaves_a_broken_header_unread() -> None:
    down, up = matrices()
    tensors = {"x.lora_A.weight": down, "x.lora_B.weight": up, "x.alpha": torch.tensor(2.0)}
    factors = parse_lora(tensors, header(rank_pattern={".*": 2}), "lora")
    assert torch.equal(factors["x"][1], up * 0.5)


def test_every_rank_above_the_limit_is_refused() -> None:
    tensors = {"x.lora_A.weight": torch.ones(1025, 2), "x.lora_B.weight": torch.ones(2, 1025)}
    with pytest.raises(BrokenLora, match="x has rank 1025; 1024 is the most"):
        parse_lora(tensors, {}, "file")


def test_a_file_above_the_size_limit_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters.lora_file.MAX_BYTES", 1000)
    file = tmp_path / "lora.safetensors"
    file.write_bytes(bytes(1001))
    with pytest.raises(BrokenLora, match="lora has 1,001 bytes; 1,000 is the most"):
        read_tensors(file, "lora")


def test_what_is_no_plain_lora_is_not_given_as_one() -> None:
    down, up = matrices()
    tensors = {"x.lora_A.weight": down, "x.lora_B.weight": up, "y.diff": up}
    assert parse_deltas(tensors, {}, "file").keys() == {"x", "y"}
    with pytest.raises(BrokenLora, match="file is not plain LoRA in 1 layers: y"):
        parse_lora(tensors, {}, "file")


def test_every_fault_is_told_at_once() -> None:
    down, up = matrices()
    tensors = {"a.lora_A.weight": down, "b.lora_B.weight": up, "c.scale": up}
    with pytest.raises(BrokenLora) as caught:
        parse_lora(tensors, {}, "file")
    assert str(caught.value) == (
        "file: c.scale is not a LoRA tensor this reader knows; a has lora_A but no lora_B; "
        "b has lora_B but no lora_A"
    )


def test_a_file_may_begin_like_a_web_page_by_chance(tmp_path: Path) -> None:
    """The length of its header, 15,392, is a space and a `<` in bytes."""
    described = {"x.lora_A.weight": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}}
    text = json.dumps(described).encode().ljust(15392)
    file = tmp_path / "lora.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + struct.pack("<f", 1.5))
    assert file.read_bytes().startswith(b" <")
    tensors, _ = read_tensors(file, "lora")
    assert tensors["x.lora_A.weight"].item() == 1.5
