"""A LoRA file is read at its right strength in every spelling we know; the others are refused."""

import itertools
import json
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from adapters.formats.factors import LoraMismatch, check_fits
from adapters.formats.layout import Layout
from adapters.formats.lora_file import BrokenLora, parse_deltas, parse_lora, read_tensors

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
    ("key", "reason"),
    [
        ("x.lora_A", "is not a known LoRA tensor"),
        ("lora_token_embedding.zwx", "is not a known LoRA tensor"),
        ("x.lora_mid.weight", "is a Tucker factor, which is not supported"),
        ("x.lokr_t2", "is a Tucker factor, which is not supported"),
        ("x.hada_t1", "is a Tucker factor, which is not supported"),
        ("x.oft_diag", "is a part of an OFT adapter, which is not supported"),
        ("x.lora_E", "is a part of an AdaLoRA adapter, which is not supported"),
        ("x.set_weight", "is a weight that replaces the model's, which is not supported"),
        ("x.alpha.weight", "is a whole weight, and the file does not say whether to add it"),
        ("lora_A.weight", "is a whole weight, and the file does not say whether to add it"),
        ("x.norm_q.weight", "is a whole weight, and the file does not say whether to add it"),
    ],
)
def test_an_unknown_key_is_refused_by_name_and_reason(key: str, reason: str) -> None:
    down, up = matrices()
    whole = {"x.lora_A.weight": down, "x.lora_B.weight": up}
    with pytest.raises(BrokenLora, match="file: ") as caught:
        parse_lora({**whole, key: down}, {}, "file")
    assert f"{key} {reason}" in str(caught.value)


def test_two_adapters_in_one_file_are_refused_by_their_names() -> None:
    down, up = matrices()
    names = ("default", "second")
    tensors = {
        f"x.lora_{m}.{name}.weight": t for name in names for m, t in (("A", down), ("B", up))
    }
    with pytest.raises(BrokenLora, match=r"it contains 2 adapters \(default, second\)"):
        parse_lora(tensors, {}, "file")
    one = {key: tensor for key, tensor in tensors.items() if "second" in key}
    assert torch.equal(parse_lora(one, {}, "file")["x"][1], up)


@pytest.mark.parametrize("layer", ["lora_unet_blocks_7", "te.blocks.0", "blocks.7"])
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
        ({"y.alpha": torch.tensor(1.0)}, "y has only alpha"),
        ({"x.alpha": torch.tensor(torch.nan)}, "x has an alpha that is not one positive number"),
        ({"x.alpha": torch.tensor(0.0)}, "x has an alpha that is not one positive number"),
        ({"x.alpha": torch.ones(4)}, "x has an alpha that is not one positive number"),
        ({"x.lora_A.weight": torch.ones(4, 16, dtype=torch.int8)}, "not floating point numbers"),
        ({"x.lora_A.weight": torch.ones(4, 2, 8)}, r"x has the shapes \(4, 2, 8\)"),
        (
            {"x.lora_B.weight": torch.full((24, 4), 3e38), "x.alpha": torch.tensor(9e9)},
            "1e\\+30 is the limit",
        ),
        ({"x.lora_A.weight": torch.ones(1025, 16)}, r"x has the shapes \(1025, 16\) and"),
        ({"x.lokr_w1": torch.ones(4, 4)}, "x has LoRA together with lokr_w1"),
        (
            {"x.diff_b": torch.ones(24), "x.lora_B.bias": torch.ones(24)},
            "x has LoRA together with diff_b, lora_B.bias",
        ),
        ({"x.diff": torch.ones(24, 16)}, "x has LoRA together with diff"),
        ({"x.dora_scale": torch.ones(23, 1)}, r"x has DoRA magnitudes of the shape \(23, 1\)"),
        ({"x.dora_scale": torch.full((24,), torch.nan)}, "x contains NaN or infinity"),
        ({"y.dora_scale": torch.ones(24)}, "y has only magnitude"),
        ({"y.lora_B.bias": torch.ones(24)}, "y has only lora_B.bias"),
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
        ({"lora_adapter_metadata": "{"}, "is not valid JSON"),
        ({"lora_adapter_metadata": "[1]"}, "is not a JSON object"),
        (header(rank=8), "x has rank 4, but the file's header says 8"),
        (header(alpha="much"), "lora_alpha 'much'"),
        (header(rank=0), "has r 0"),
        (header(alpha=float("nan")), "lora_alpha nan"),
        (header(rank_pattern={"x": 2}), "x has rank 4, but the file's header says 2"),
        (header(rank_pattern={"(a+)+": 2}), r"rank_pattern '\(a\+\)\+', not a layer's plain name"),
        (header(alpha_pattern={"x": -2}), "alpha_pattern that is not a table of positive numbers"),
        (header(alpha_pattern=[2]), "alpha_pattern that is not a table of positive numbers"),
        (header(peft_type="LOKR"), "has peft_type 'LOKR', not LORA"),
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
    with pytest.raises(BrokenLora, match="x has rank 1025; 1024 is the limit"):
        parse_lora(tensors, {}, "file")


def test_a_file_above_the_size_limit_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters.formats.lora_file.MAX_BYTES", 1000)
    file = tmp_path / "lora.safetensors"
    file.write_bytes(bytes(1001))
    with pytest.raises(BrokenLora, match="lora has 1,001 bytes; 1,000 is the limit"):
        read_tensors(file, "lora")


def test_what_is_no_plain_lora_is_not_given_as_one() -> None:
    down, up = matrices()
    tensors = {"x.lora_A.weight": down, "x.lora_B.weight": up, "y.diff": up}
    assert parse_deltas(tensors, {}, "file").keys() == {"x", "y"}
    with pytest.raises(BrokenLora, match="file is not a plain LoRA in 1 layers: y"):
        parse_lora(tensors, {}, "file")


# adapter_config.json, and what else is written beside the tensors.


def plain(rank: int = RANK, layer: str = "x") -> dict[str, torch.Tensor]:
    down, up = matrices(rank)
    return {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}


def strength(tensors: dict[str, torch.Tensor], metadata: dict, config: dict | None) -> float:
    """alpha / rank as it was read."""
    text = None if config is None else json.dumps(config)
    deltas = parse_deltas(tensors, metadata, "file", text)
    down, up = deltas["x"].tensors()[:2]
    return float((up @ down).norm() / (matrices()[1] @ matrices()[0]).norm())


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 8, "peft_type": "LORA", "target_modules": ["x"]}, 2.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"r": 16, "lora_alpha": 8, "rank_pattern": {"x": 4}}, 2.0),
        ({"lora_alpha": 8}, 2.0),
        ({"r": None, "lora_alpha": 8, "use_rslora": False}, 2.0),
        ({"r": 4, "lora_alpha": 8, "peft_type": "lora"}, 2.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"x": 2}}, 0.5),
        ({"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}, 2.0),
        ({"r": 4, "lora_alpha": 8, "target_modules": ".*x", "init_lora_weights": "gaussian"}, 2.0),
        (None, 1.0),
    ],
)
def test_the_config_beside_the_weights_says_alpha(config: dict | None, scale: float) -> None:
    assert strength(plain(), {}, config) == pytest.approx(scale)
    if config and not config.get("use_rslora"):
        dotted = {f"base_model.model.{key}": tensor for key, tensor in plain().items()}
        alpha = {"base_model.model.x.alpha": torch.tensor(scale * RANK)}
        assert strength(dotted | alpha, header(alpha=scale * RANK), config) == pytest.approx(scale)


@pytest.mark.parametrize(
    ("config", "tensors", "metadata", "fault"),
    [
        ({"r": 8, "lora_alpha": 8}, {}, {}, "x has rank 4, but adapter_config.json says 8"),
        ({"r": 8}, {}, {}, "x has rank 4, but adapter_config.json says 8"),
        (
            {"r": 4, "lora_alpha": 8},
            {"x.alpha": torch.tensor(4.0)},
            {},
            "x has alpha 4, adapter_config.json says 8",
        ),
        (
            {"r": 4, "lora_alpha": 8},
            {},
            header(alpha=2),
            "x has alpha 2 in the file's header, 8 in adapter_config.json",
        ),
        (
            {"r": 4, "lora_alpha": 8, "peft_type": "LOKR"},
            {},
            {},
            "config.json has peft_type 'LOKR'",
        ),
        (
            {"r": 4, "lora_alpha": 8, "target_modules": ["to_q"]},
            {},
            {},
            "1 layers are not among the target_modules of adapter_config.json: x;",
        ),
        ({"r": 4, "lora_alpha": 8, "use_dora": True}, {}, {}, "adapter_config.json says DoRA"),
        (
            {"r": 4, "lora_alpha": 8, "use_dora": False},
            {"x.dora_scale": torch.ones(24)},
            {},
            "adapter_config.json says that it is not DoRA",
        ),
        ({"r": 4, "lora_alpha": 8, "init_lora_weights": "pissa"}, {}, {}, "changes the base model"),
        ({"r": 4, "lora_alpha": 8, "fan_in_fan_out": True}, {}, {}, "has fan_in_fan_out"),
        ({"r": 4, "lora_alpha": "big"}, {}, {}, "adapter_config.json has r 4 and lora_alpha 'big'"),
        ({"r": 4, "lora_alpha": 8, "use_rslora": "false"}, {}, {}, "use_rslora 'false', not true"),
        ({"r": True, "lora_alpha": 8}, {}, {}, "adapter_config.json has r True"),
        ([4], {}, {}, "adapter_config.json is not a JSON object"),
    ],
)
def test_a_config_that_contradicts_the_file_is_refused(
    config: object, tensors: dict, metadata: dict, fault: str
) -> None:
    with pytest.raises(BrokenLora, match=re.escape(fault)):
        parse_deltas(plain() | tensors, metadata, "file", json.dumps(config))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"r": 4, "lora_alpha": 8, "kasa_config": {"a": 1}}, "ignored: kasa_config"),
        ({"r": 4, "lora_alpha": 8, "modules_to_save": ["norm"]}, "ignored: modules_to_save"),
        ({"r": 4, "lora_alpha": 8, "bias": "all"}, "ignored: bias"),
        ({"r": 4, "lora_alpha": 8, "target_modules": ".*x"}, "target_modules (a regular"),
        ({"r": 4}, "has no lora_alpha"),
    ],
)
def test_what_is_not_read_of_a_config_is_said(
    config: dict, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    parse_deltas(plain(), {}, "file", json.dumps(config))
    assert said in caplog.text


def test_kohya_s_header_speaks_for_kohya_s_names_that_lost_their_alpha(
    caplog: pytest.LogCaptureFixture,
) -> None:
    down, up = matrices()
    kohya = {"x.lora_down.weight": down, "x.lora_up.weight": up}
    said = {"ss_network_alpha": "2.0", "ss_network_dim": "4"}
    assert strength(kohya, said, None) == pytest.approx(0.5)
    assert strength(kohya | {"x.alpha": torch.tensor(4.0)}, said, None) == pytest.approx(1)
    with pytest.raises(
        BrokenLora, match=r"x has rank 4, but the file's header \(ss_network_dim\) says 8"
    ):
        strength(kohya, said | {"ss_network_dim": "8"}, None)
    # musubi-tuner's converter to lora_A and lora_B multiplies alpha in and keeps the header.
    with caplog.at_level("INFO"):
        assert strength(plain(), said, None) == pytest.approx(1)
    assert "ss_network_alpha 2 at rank 4" in caplog.text
    assert strength(kohya, {"ss_network_alpha": "Dynamic", "ss_network_dim": "Dynamic"}, None) == 1
    assert "ss_network_alpha Dynamic" in caplog.text


def test_layers_without_an_alpha_beside_others_with_one_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    both = plain() | plain(layer="y")
    parse_deltas(both, {}, "file")
    parse_deltas(both | {f"{each}.alpha": torch.tensor(2.0) for each in "xy"}, {}, "file")
    assert not caplog.records
    parse_deltas(both | {"x.alpha": torch.tensor(2.0)}, {}, "file")
    assert "1 of 2 layers have no alpha, but the others have" in caplog.text
    assert caplog.text.rstrip().endswith(": y")


# What a file is.


def shapes_of(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.ones(2, 2) for name in names}


@pytest.mark.parametrize(
    ("tensors", "metadata", "what"),
    [
        (
            shapes_of("model.diffusion_model.layers.0.attention.qkv.weight", "a.b.weight"),
            {},
            "is a whole model of Z-Image (2 tensors), not a LoRA",
        ),
        (
            shapes_of("transformer_blocks.0.img_mlp.net.2.weight"),
            {},
            "is a whole model of Qwen-Image (1 tensors), not a LoRA",
        ),
        (
            shapes_of(
                "model.diffusion_model.input_blocks.1.0.in_layers.0.weight",
                "first_stage_model.encoder.conv_in.weight",
            ),
            {},
            "is a whole model of Stable Diffusion 1.5, 2 or XL",
        ),
        (shapes_of("double_blocks.0.img_attn.qkv.weight"), {}, "is a whole model of FLUX"),
        (shapes_of("encoder.down_blocks.0.resnets.0.conv1.weight"), {}, "is a VAE (1 tensors)"),
        (shapes_of("first_stage_model.decoder.conv_in.weight"), {}, "is a VAE"),
        (shapes_of("decoder.middle.0.residual.0.gamma", "encoder.conv1.weight"), {}, "is a VAE"),
        (shapes_of("model.layers.0.self_attn.q_proj.weight"), {}, "is a text encoder (1 tensors)"),
        (shapes_of("encoder.block.0.layer.0.SelfAttention.q.weight"), {}, "is a text encoder"),
        (shapes_of("control_layers.0.attention.to_q.weight"), {}, "is a ControlNet (1 tensors)"),
        (shapes_of("controlnet_cond_embedding.conv_in.weight"), {}, "is a ControlNet"),
        (shapes_of("<zwx>"), {}, "is an embedding (textual inversion), not a LoRA"),
        (shapes_of("emb_params"), {}, "is an embedding (textual inversion)"),
        (shapes_of("clip_g", "clip_l"), {}, "is an embedding (textual inversion)"),
        (shapes_of("image_proj.proj.weight"), {}, "is an IP-Adapter"),
        *(
            (shapes_of(f"base_model.model.layers.0.attention.to_q.{part}"), {}, f"is {what} (1")
            for part, what in {
                "oft_blocks": "an OFT adapter",
                "oft_R.weight": "an OFT adapter",
                "boft_R": "an OFT adapter",
                "ia3_l": "an IA3 adapter",
                "a1.weight": "a GLoRA adapter",
                "vera_lambda_b": "a VeRA adapter",
                "fourierft_spectrum": "a FourierFT adapter",
                "hra_u": "an HRA adapter",
                "bone_block": "a Bone or MiSS adapter",
                "randlora_lambda": "a RandLoRA adapter",
                "shira_weight": "a SHiRA adapter",
            }.items()
        ),
        (
            shapes_of("layers.0.attention.to_q.lora_A.0"),
            {},
            "layers.0.attention.to_q.lora_A.0 is not a known LoRA tensor",
        ),
        (shapes_of("state.0.exp_avg"), {}, "is the state of an optimizer"),
        (
            plain(),
            {"zeroprior.checkpoint": "{}"},
            "is a training checkpoint, not weights; resume from it with resume_from",
        ),
    ],
)
def test_a_refusal_says_what_the_file_is(tensors: dict, metadata: dict, what: str) -> None:
    with pytest.raises(BrokenLora, match=rf"z.safetensors:? {re.escape(what)}"):
        parse_deltas(tensors, metadata, "z.safetensors")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git-LFS pointer"),
        (b"<!DOCTYPE html><title>Sign in</title>", "is a web page"),
        (b"\x80\x02}q\x00.", "is a pickle"),
        (b"GGUF\x03\0\0\0\0\0\0\0", "is a GGUF file"),
        (b'{"error": "gated"}', "is JSON text"),
        (b"\x89PNG\r\n\x1a\n0000", "is an image (PNG)"),
        (b"Access to this model is gated\n", "is a text file"),
    ],
)
def test_a_file_of_another_format_is_refused_as_what_it_is(
    content: bytes, what: str, tmp_path: Path
) -> None:
    file = tmp_path / "lora.safetensors"
    file.write_bytes(content)
    with pytest.raises(BrokenLora, match=re.escape(f"lora {what}")):
        read_tensors(file, "lora")


def test_a_whole_model_above_the_size_limit_is_told_to_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters.formats.lora_file.MAX_BYTES", 100)
    file = tmp_path / "z.safetensors"
    save_file(shapes_of("layers.0.attention.to_q.weight"), file)
    with pytest.raises(BrokenLora, match="is a whole model of Z-Image"):
        read_tensors(file, "z")


def test_every_fault_is_told_at_once() -> None:
    down, up = matrices()
    tensors = {"a.lora_A.weight": down, "b.lora_B.weight": up, "c.scale": up}
    with pytest.raises(BrokenLora) as caught:
        parse_lora(tensors, {}, "file")
    assert str(caught.value) == (
        "file: c.scale is not a known LoRA tensor; a has lora_A but no lora_B; "
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
