"""The plan: counted without weights, held against real steps, and what it chooses."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from measured import of_depth, saved_bytes
from root import ROOT
from torch import nn

from adapters.lora import Lora
from families.family import Family
from families.loading import load_family
from families.memory import RESERVE, free_memory
from families.quantization import QUANTIZATIONS
from families.recomputation import recompute
from families.registry import find_base
from families.without_weights import family_without_weights
from trainer.__main__ import main
from trainer.memory import fitting
from trainer.memory.fitting import TooLarge, check_cpu_memory
from trainer.memory.meter import Meter, fused_attention
from trainer.memory.plan import LADDER, Choice, Figures, Mode, Wishes, choose, leaner
from trainer.memory.speed import GPUS, UTILIZATION, step_seconds
from trainer.memory.step_cost import Load, Shape, step_load, step_loads
from trainer.settings.fields import Settings, resolve
from trainer.settings.inputs import TrainingInputs

GB = 10**9


# What is counted.


SHAPES = [Shape(2, 1, 128, 128, 40), Shape(16, 2, 128, 192, 20)]


@pytest.mark.parametrize("name", ["z-image", "qwen-image"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_without_weights_counts_the_bytes_of_a_real_step(
    name: str, shape: Shape, dtype: torch.dtype, use_vault: Path
) -> None:
    base, blocks = find_base(name), 6
    generated = of_depth(family_without_weights(base, dtype), blocks)
    planned = step_loads(generated, generated.lora_targets(), shape)
    real = of_depth(load_family(base, torch.device("cpu"), dtype), blocks)
    lora = Lora(real.transformer, real.lora_targets(), shape.form, 0)
    step_load(real, lora, shape)  # the first time, tables are made that are kept
    for recomputed in (0, 3, blocks):
        recompute(real, recomputed / blocks)
        measured = step_load(real, lora, shape)
        assert planned[recomputed].bytes == pytest.approx(measured.bytes, rel=0.03)
        assert planned[recomputed].flops == pytest.approx(measured.flops, rel=0.03)
    assert planned[-1].bytes < planned[3].bytes < planned[0].bytes
    assert planned[-1].flops > planned[3].flops > planned[0].flops


# `lora_targets` that leave some blocks, or all of them, without a LoRA.
PARTS = {
    "z-image": [
        "attention",
        "feed_forward",
        "all",
        "attention.to_q",
        "layers.?.attention.*",
        "layers.[135].*",  # every other block
        "layers.4.*",  # one that a model of two or three blocks lacks
        "layers.0.attention.*",
        "noise_refiner.*",
        "context_refiner.*",
        "all_final_layer.*",
        "*embedder*",
        "noise_refiner.*,layers.5.feed_forward.w2",
    ],
    "qwen-image": [
        "attention",
        "feed_forward",
        "all",
        "attn.to_q",
        "transformer_blocks.[024].*",
        "transformer_blocks.4.attn.*",
        "transformer_blocks.0.img_mlp.*",
        "img_in, txt_in",
        "time_text_embed.*",
        "norm_out.linear, proj_out",
    ],
}


@pytest.mark.parametrize(
    ("name", "wanted"), [(name, wanted) for name, all in PARTS.items() for wanted in all]
)
def test_a_model_without_weights_counts_a_step_whose_lora_is_in_some_blocks_only(
    name: str, wanted: str, use_vault: Path
) -> None:
    """The same bytes as over real tensors, where a part of the blocks is counted, or all."""
    base, shape, blocks = find_base(name), SHAPES[0], 6
    generated = of_depth(family_without_weights(base, torch.float32), blocks)
    targets = generated.lora_targets(wanted)
    planned = step_loads(generated, targets, shape)
    assert all(
        isinstance(each, nn.Linear) for each in map(generated.transformer.get_submodule, targets)
    )
    real = of_depth(load_family(base, torch.device("cpu"), torch.float32), blocks)
    lora = Lora(real.transformer, targets, shape.form, 0)
    step_load(real, lora, shape)
    for recomputed in (0, 5, blocks):
        recompute(real, recomputed / blocks)
        measured = step_load(real, lora, shape)
        assert planned[recomputed].bytes == pytest.approx(measured.bytes, rel=0.03)
        assert planned[recomputed].flops == pytest.approx(measured.flops, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("name", ["z-image", "qwen-image"])
def test_every_layer_that_can_be_named_can_be_counted(
    name: str, depth: int, use_vault: Path
) -> None:
    """In models so shallow that other lists of modules are as long as the trunk."""
    family = of_depth(family_without_weights(find_base(name)), depth)
    kinds = {re.sub(r"\d+", "", each): each for each in family.lora_targets("*")}
    for target in kinds.values():  # in the last block that has it
        loads = step_loads(family, family.lora_targets(target), SHAPES[0])
        assert all(load.bytes > 0 and load.flops > 0 for load in loads), target


@pytest.mark.parametrize("name", ["z-image", "qwen-image"])
def test_the_count_holds_against_what_autograd_says_it_keeps(name: str, use_vault: Path) -> None:
    base, shape = find_base(name), SHAPES[1]
    per_block, counted = [], []
    for blocks in (3, 5):
        real = of_depth(load_family(base, torch.device("cpu")), blocks)
        lora = Lora(real.transformer, real.lora_targets(), shape.form, 0)
        per_block.append(saved_bytes(real, lora, shape))
        counted.append(step_load(real, lora, shape).bytes)
    assert counted[1] - counted[0] == pytest.approx(per_block[1] - per_block[0], rel=0.1)


def test_a_meter_counts_what_is_alive_and_forgets_what_is_gone() -> None:
    weight = torch.ones(10, 10)
    with Meter([weight]) as meter:
        first = torch.zeros(1000)  # 4,000 bytes
        view = first[10:]
        del first
        assert meter.live == 4000
        second = weight @ weight
        assert (meter.live, meter.flops) == (4400, 2000)
        del view, second
        assert (meter.live, meter.peak) == (0, 4400)


def test_published_sizes_are_those_of_the_published_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODEL_VAULT", raising=False)
    # Linear layers in the blocks, 16-bit bytes of them; billions of parameters with all the rest.
    facts = {
        "z-image-turbo": ("layers", 240, 10.9, 6.15, 3.92),
        "qwen-image": ("transformer_blocks", 840, 40.8, 20.43, 7.07),
    }
    for name, (trunk, linears, size, billions, text) in facts.items():
        family = family_without_weights(find_base(name))
        found = [
            module
            for layer, module in family.transformer.named_modules()
            if isinstance(module, nn.Linear) and layer.startswith(f"{trunk}.")
        ]
        assert len(found) == linears
        assert round(sum(m.weight.numel() for m in found) * 2 / GB, 1) == size
        count = lambda model: round(sum(p.numel() for p in model.parameters()) / GB, 2)  # noqa: E731
        assert (count(family.transformer), count(family.text_encoder)) == (billions, text)


def test_a_base_at_hand_is_planned_by_its_own_config(use_vault: Path) -> None:
    assert family_without_weights(find_base("z-image")).transformer_config["dim"] == 64


def test_counting_restores_attention() -> None:
    attention = torch.nn.functional.scaled_dot_product_attention
    with fused_attention():
        assert torch.nn.functional.scaled_dot_product_attention is not attention
    assert torch.nn.functional.scaled_dot_product_attention is attention


# What is chosen. Sizes like Z-Image's at 1024 pixels.


def counts(**changes: Any) -> Figures:
    values: dict[str, Any] = {
        "block_weights": 6 * GB,
        "other_weights": GB // 100,
        "text_block_weights": 3 * GB,
        "text_other_weights": GB // 2,
        "vae_weights": GB // 12,
        "lora_modules": 210,
        "lora_values": 70 * 10**6,
        "bytes_per_value": 2,
        "optimizer": "adamw",
        "ema": False,
        "accumulates": False,
        "placeholder": False,
        "steps": (Load(34 * GB, 3 * 10**12), Load(2 * GB, 4 * 10**12)),
        "placeholder_pass": Load(0, 0),
        "image": Load(3 * GB, 0),
        "caption": Load(GB // 100, 0),
    }
    return Figures(**(values | changes))


def free(gigabytes: float, **changes: Any) -> Callable[..., Choice]:
    return lambda **wishes: choose(counts(**changes), int(gigabytes * GB), Wishes(**wishes))


@pytest.mark.parametrize(
    ("gigabytes", "mode"),
    [
        (80, Mode()),
        (24, Mode("none", True)),
        (12, Mode("int8", True)),
        (7.5, Mode("nf4", True)),
    ],
)
def test_the_truest_mode_that_fits_is_chosen(gigabytes: float, mode: Mode) -> None:
    choice = free(gigabytes)()
    assert (choice.mode, choice.fits) == (mode, True)
    assert choice.peak <= gigabytes * GB * (1 - RESERVE)


def test_weights_wait_in_host_memory_where_four_bits_are_too_many() -> None:
    choice = free(12, block_weights=20 * GB)()
    assert choice.mode == Mode("int8", True, True)
    assert choice.storage.offload


def test_a_base_is_sharded_if_it_does_not_fit_on_each_gpu() -> None:
    blocks = {"block_weights": 20 * GB, "steps": (Load(34 * GB, 3), *[Load(2 * GB, 4)] * 60)}
    two, four = free(24, **blocks)(gpus=2), free(24, **blocks)(gpus=4)
    assert two.mode == Mode("int8", 1 / 60, shards=2)
    assert four.mode == Mode("none", 1 / 60, shards=4)
    assert four.storage.shard and four.quantize_text == "none"
    # A quarter of the blocks in 16 bits, three gathered ones, and the rest.
    held = counts(**blocks).parts(four.mode)["transformer"]
    assert held == 40 * GB // 4 + 3 * 40 * GB // 60 + 2 * GB // 100
    assert free(24, **blocks)(gpus=4, shard=False).mode.shards == 1
    assert free(80, **blocks)(gpus=4).mode == Mode()
    assert free(80, **blocks)(gpus=4, shard=True).mode.shards == 4
    text = counts(**blocks, placeholder=True).parts(four.mode)["text encoder"]
    assert text == 2 * 3 * GB // 4 + 2 * (GB // 2)


@pytest.mark.slow
def test_the_document_has_the_plans_of_small_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODEL_VAULT", raising=False)
    monkeypatch.delenv("COMPILE", raising=False)
    document = (ROOT / "docs" / "several_gpus.md").read_text(encoding="utf-8")
    columns = []
    for token in (False, True):
        given = {"dataset": "x", "base_model": "qwen-image", "train_placeholder_token": token}
        settings = resolve(TrainingInputs(**given, **({} if token else {"trigger_word": "robot"})))
        counted = fitting.figures_of(settings, fitting.TEXT_TOKENS, torch.bfloat16, True)
        columns.append(
            [choose(counted, 24 * GB, fitting.wishes_of(settings, n)) for n in range(1, 5)]
        )
    for number, row in enumerate(zip(*columns, strict=True), start=1):
        cells = []
        for choice in row:
            kind = "16 bits" if choice.mode.quantize == "none" else choice.mode.quantize
            ways = (", sharded", choice.mode.shards > 1), (", offloaded", choice.mode.offload)
            cells.append(kind + "".join(name * on for name, on in ways))
        assert f"| {number} GPU{'s' * (number > 1)} | {' | '.join(cells)} |" in document
    peaks = (", ".join(f"{each.peak / 1e9:.1f}" for each in column) for column in columns)
    assert f"| {' | '.join(peaks)} |" in document
    blocks = (", ".join(f"{60 * each.mode.checkpointing:.0f}" for each in c) for c in columns)
    assert f"| {' | '.join(blocks)} |" in document


@pytest.mark.parametrize("gigabytes", [4, 8, 12, 24, 80])
@pytest.mark.parametrize(
    "wish",
    [
        {"quantize": "none"},
        {"quantize": "fp8"},
        {"checkpointing": False},
        {"checkpointing": True},
        {"offload": False},
        {"offload": True},
        {"quantize": "none", "checkpointing": False, "offload": False},
    ],
    ids=str,
)
def test_no_choice_goes_against_a_wish(gigabytes: float, wish: dict[str, Any]) -> None:
    mode = free(gigabytes)(**wish).mode
    assert all(getattr(mode, name) == value for name, value in wish.items())


# 30 GB of activations, 3 in each of ten blocks; 4 GB if all are recomputed.
TEN_BLOCKS = (*(Load((30 - 3 * n) * GB, 100 + 4 * n) for n in range(9)), *[Load(4 * GB, 140)] * 2)


def test_no_more_blocks_are_recomputed_than_have_to_be() -> None:
    """And all that can be, before weights are quantized. The last one never: its activations are
    needed at once."""
    figures, found = counts(steps=TEN_BLOCKS), {}
    for gigabytes in (50, 36, 18, 14):
        choice = choose(figures, gigabytes * GB, Wishes())
        room = gigabytes * GB * (1 - RESERVE)
        recomputed = figures.recomputed(choice.mode)
        found[gigabytes] = (choice.mode.quantize, recomputed)
        assert choice.fits and choice.peak == figures.peak(choice.mode) <= room
        one_less = replace(choice.mode, checkpointing=(recomputed - 1) / 10)
        assert not recomputed or figures.peak(one_less) > room
    assert found == {50: ("none", 0), 36: ("none", 4), 18: ("none", 9), 14: ("int8", 8)}
    assert choose(figures, 36 * GB, Wishes(checkpointing=True)).mode == Mode(checkpointing=1.0)
    assert choose(figures, 40 * GB, Wishes(checkpointing=False)).mode == Mode("int8")
    part = choose(figures, 36 * GB, Wishes())
    said = "gradient checkpointing of 40% of the blocks: recomputes 4 of 10, needs 30.9 GB of 33.8"
    assert said in part.reason and part.mode.label == "16 bits + 40% checkpointing"
    assert figures.flops(part.mode) == 116
    assert leaner(figures, part.mode, Wishes()) == Mode(checkpointing=1.0)  # how much lacked?
    assert leaner(figures, Mode(checkpointing=0.9), Wishes()) == Mode("int8", 1.0)


def test_what_does_not_fit_is_said_with_the_numbers() -> None:
    choice = free(8)(quantize="none", offload=False)
    assert (choice.mode, choice.fits) == (Mode("none", True), False)
    assert "needs 14.9 GB of 7.5 GB, which is not enough" in choice.reason


def test_a_choice_says_what_the_better_one_would_have_needed() -> None:
    assert "needs 14.9 GB of 22.6 GB; unquantized base would need 46.9 GB" in free(24)().reason


def test_a_text_encoder_is_quantised_only_where_it_does_not_fit_and_trains_no_placeholder() -> None:
    large = {"text_block_weights": 7 * GB}
    assert free(24, **large)().quantize_text == "none"
    assert free(12, **large)().quantize_text == "int8"
    assert free(12, **large, placeholder=True)().quantize_text == "none"
    assert free(12, **large)(quantize="none").quantize_text == "none"


def test_a_machine_that_cannot_run_a_quantisation_is_not_given_it() -> None:
    choice = choose(counts(), int(7.5 * GB), Wishes(), usable=("int8",))
    assert choice.mode == Mode("int8", True, True)
    assert choose(counts(), 12 * GB, Wishes(), usable=()).mode == Mode("none", True, True)


def test_what_is_trained_takes_room_for_its_masters_moments_averages_and_gradients() -> None:
    values = counts().lora_values
    assert counts().trained() == 12 * values  # gradients are in the step's load
    assert counts(ema=True).trained() == 16 * values
    assert counts(optimizer="adamw8bit").trained() == 6 * values
    assert counts(accumulates=True).trained() == 16 * values


def test_every_mode_of_the_ladder_saves_something_over_an_earlier_one() -> None:
    assert len(set(LADDER)) == len(LADDER)
    assert {mode.quantize for mode in LADDER} == {"none", *QUANTIZATIONS} - {"fp8"}


def test_seconds_are_flops_over_a_share_of_the_card() -> None:
    card = GPUS["H100"]
    assert step_seconds(card, card.tflops * 1e12) == pytest.approx(1 / UTILIZATION)
    assert step_seconds(card, 0, 10e9) > 10 / card.host_link


def test_free_memory_is_some_of_the_machines() -> None:
    import psutil

    assert 0 < free_memory(torch.device("cpu")) <= psutil.virtual_memory().total


# What is shown.

CONFIGS = ("z_image_turbo", "qwen_image", "qwen_image_21")


@pytest.fixture(scope="module")
def shown() -> dict[str, str]:
    """The plans of the shipped configs, as the document shows them."""
    from trainer.memory.plan_table import count, table
    from trainer.settings.config import read_config

    plans = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MODEL_VAULT", raising=False)
        patch.delenv("COMPILE", raising=False)
        for name in CONFIGS:
            settings = read_config(ROOT / "configs" / f"{name}.yaml", dataset="imgs.zip")
            plans[name] = table(settings, count(settings))
    return plans


@pytest.mark.parametrize("name", CONFIGS)
def test_the_document_shows_what_the_command_prints(name: str, shown: dict[str, str]) -> None:
    document = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert f"```text\n{shown[name]}\n```" in document, f"python -m trainer plan configs/{name}.yaml"


# On a CPU.


@pytest.mark.parametrize(
    ("given", "free", "said"),
    [
        (
            {"batch_size": 64, "resolution": 256},
            4,
            r"needs about 7\.. GB of memory, but 4.0 GB are free; lower batch_size \(64\) or "
            r"resolution \(256\), or set gradient_checkpointing, which needs about 2\.",
        ),
        pytest.param(
            *({"batch_size": 64, "resolution": 256}, 1, r"resolution \(256\)$"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *({"base_model": "z-image", "resolution": 64}, 30, "but 30.0 GB are free"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_that_a_cpus_memory_does_not_hold_is_refused_before_it_starts(
    given: dict[str, Any], free: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "free_memory", lambda device: free * GB)
    asked: dict[str, Any] = {"dataset": "x", "base_model": "miniature-turbo", "seed": 1} | given
    settings = resolve(TrainingInputs(**asked))
    with pytest.raises(TooLarge, match=said):
        check_cpu_memory(settings, Mode(), torch.float32)


def test_a_run_that_a_cpus_memory_holds_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "free_memory", lambda device: 4 * GB)
    monkeypatch.setattr(fitting, "figures_of", lambda *_: pytest.fail("counted"))
    settings = resolve(TrainingInputs(dataset="x", base_model="miniature-turbo", seed=1))
    check_cpu_memory(settings, Mode(), torch.float32)


def test_a_training_asks_for_the_memory_before_it_loads_weights(
    small: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.run import train

    settings = small(base_model="miniature-turbo", resolution=256, batch_size=64)
    monkeypatch.setattr(fitting, "free_memory", lambda device: GB)
    monkeypatch.setattr(Family, "load_transformer", lambda *_: pytest.fail("weights are loaded"))
    with pytest.raises(TooLarge, match="1.0 GB are free"):
        train(settings)


def test_the_command_prints_a_plan_without_images_and_as_json_with_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)

    def plan(*options: str) -> str:
        main(["plan", "configs/miniature.yaml", *options])
        return capsys.readouterr().out

    text, data = plan(), json.loads(plan("--json"))
    for part in ("transformer", "LoRA (", "peak GB of a step", "H100", "This machine"):
        assert part in text
    assert [each["mode"] for each in data["modes"]] == [mode.label for mode in LADDER]
    for each in data["modes"]:
        assert each["peak_bytes"] == sum(each["bytes"].values())
        gigabytes = [*each["bytes"].values(), each["peak_bytes"]]
        row = "  +".join([re.escape(each["mode"]), *(f"{size / GB:.1f}" for size in gigabytes)])
        assert re.search(f"^{row}$", text, re.MULTILINE), row
    assert set(data["gpus"]) == set(GPUS) == set(data["modes"][0]["seconds_per_step"])
    assert data["parameters"]["lora"] * 2 == data["lora_file_bytes"]
