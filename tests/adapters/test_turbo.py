"""The turbo adapter: merged for training, exactly gone when pictures are drawn."""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.archive import read_archive
from adapters.formats.factors import LoraMismatch
from adapters.lora import Lora
from adapters.merging import LoraMerger
from adapters.turbo import MergeFailed, TurboAdapter
from families.family import Family
from families.loading import load_family
from families.registry import BASES
from families.repository import MissingModel, adapter_path
from inference.engine import Engine
from inference.request import Request
from trainer import reading, run
from trainer.settings.fields import Settings

TURBO = BASES["z-image-turbo"]


@pytest.fixture
def adapter(use_vault: Path) -> TurboAdapter:
    return TurboAdapter.read(adapter_path(TURBO.training_adapters["v2"]))


@pytest.fixture
def small(small: Callable[..., Settings]) -> Callable[..., Settings]:
    """Settings of a short training on the vault's Turbo."""
    return partial(small, base_model="z-image-turbo")


def weights(family: Family) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in family.transformer.state_dict().items()}


def test_the_published_format_is_merged_layer_by_layer(adapter: TurboAdapter) -> None:
    family = load_family(TURBO)
    before = weights(family)
    tensors = load_file(adapter_path(TURBO.training_adapters["v2"]))
    share = adapter.merge(family.transformer, TURBO.name)
    after = weights(family)

    assert len(adapter.factors) == 16  # two layers of eight linears, adaLN included
    assert 0.01 < share < 1
    touched = {f"{name}.weight" for name in adapter.factors}
    for name in before:
        if name not in touched:
            assert torch.equal(before[name], after[name]), name
            continue
        key = "diffusion_model." + name.removesuffix(".weight")
        down, up = (tensors[f"{key}.lora_{part}.weight"].float() for part in "AB")
        torch.testing.assert_close(after[name], before[name] + up @ down)


def test_v2_is_the_default_and_v1_is_another_file(use_vault: Path) -> None:
    assert list(TURBO.training_adapters)[-1] == "v2"
    first, second = (
        TurboAdapter.read(adapter_path(TURBO.training_adapters[version]))
        for version in ("v1", "v2")
    )
    assert first.sha256 != second.sha256


@torch.inference_mode()
def test_the_pristine_base_is_the_merged_one_minus_the_adapter_without_its_rounding(
    adapter: TurboAdapter,
) -> None:
    """Equal in float32; in bfloat16 the round trip that others take loses what is asserted here."""
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        family = load_family(TURBO, torch.device("cpu"), dtype)
        lora = Lora(family.transformer, family.lora_targets(), 2, seed=0)
        factors = {k: (down, torch.randn_like(up) / 8) for k, (down, up) in lora.deltas().items()}
        lora.remove()
        text = family.encode_prompts(["a cat"])
        latents = torch.randn((1, 16, 8, 8), generator=torch.Generator().manual_seed(0))
        sigma = torch.tensor([0.7])

        LoraMerger(family.transformer).apply([(factors, 1.0)])
        ours = family.velocity(latents, sigma, text)  # pristine base + LoRA

        family = load_family(TURBO, torch.device("cpu"), dtype)
        adapter.merge(family.transformer, TURBO.name)
        LoraMerger(family.transformer).apply([(factors, 1.0)])
        adapter.merge(family.transformer, TURBO.name, weight=-1.0)
        theirs = family.velocity(latents, sigma, text)  # merged base + LoRA - adapter
        errors[dtype] = ((ours - theirs).norm() / ours.norm()).item()
    assert errors[torch.float32] < 1e-5
    assert errors[torch.bfloat16] > 100 * errors[torch.float32]


def test_minus_one_takes_the_adapter_out_of_a_merged_transformer(adapter: TurboAdapter) -> None:
    family = load_family(TURBO)
    before = weights(family)
    adapter.merge(family.transformer, TURBO.name)
    adapter.merge(family.transformer, TURBO.name, weight=-1.0)
    for name, value in weights(family).items():
        torch.testing.assert_close(value, before[name], atol=1e-6, rtol=1e-5)


def test_an_adapter_of_another_model_touches_nothing(adapter: TurboAdapter, tmp_path: Path) -> None:
    tensors = load_file(adapter_path(TURBO.training_adapters["v2"]))
    renamed = {key.replace("layers.1.", "layers.7."): value for key, value in tensors.items()}
    save_file(renamed, tmp_path / "other.safetensors")
    family = load_family(TURBO)
    before = weights(family)
    with pytest.raises(LoraMismatch, match="8 of 16 layers do not exist in z-image-turbo"):
        TurboAdapter.read(tmp_path / "other.safetensors").merge(family.transformer, TURBO.name)
    assert all(torch.equal(before[name], value) for name, value in weights(family).items())


def test_a_merge_that_changes_nothing_is_an_error(adapter: TurboAdapter) -> None:
    """Too small for bfloat16: exactly how merges silently do nothing."""
    faint = TurboAdapter("faint", "", {k: (a, b * 1e-9) for k, (a, b) in adapter.factors.items()})
    family = load_family(TURBO, torch.device("cpu"), torch.bfloat16)
    with pytest.raises(MergeFailed, match="did not change 16 of 16 layers"):
        faint.merge(family.transformer, TURBO.name)


def test_a_training_on_turbo_merges_the_adapter_and_says_so(
    small: Callable[..., Settings], adapter: TurboAdapter, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    archive = read_archive(run.train(small()))
    assert "zimage_turbo_training_adapter_v2.safetensors: merged 16 of 16" in caplog.text
    file = adapter_path(TURBO.training_adapters["v2"])
    assert archive.meta["turbo_adapter"] == {
        "name": file.name,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    # The LoRA carries nothing of it: same layers, same rank, and none that it alone has.
    assert set(archive.factors) == set(load_family(TURBO).lora_targets())
    assert not any("adaLN" in name for name in archive.factors)


def test_what_is_learned_depends_on_the_adapter_and_pictures_are_drawn_without_it(
    small: Callable[..., Settings], tmp_path: Path
) -> None:
    with_adapter, without = (
        read_archive(run.train(small(turbo_adapter=wanted, output_dir=tmp_path / wanted)))
        for wanted in ("v2", "none")
    )
    layer = "layers.0.attention.to_q"
    assert not torch.equal(with_adapter.factors[layer][1], without.factors[layer][1])
    assert without.meta["turbo_adapter"] is None

    request = Request(prompt="a cat", width=64, height=64, num_inference_steps=2, seed=1)
    engine = Engine()
    plain = engine.generate(request, None, "z-image-turbo")[0]
    engine.generate(request, with_adapter)
    assert engine.generate(request, None, "z-image-turbo")[0].tobytes() == plain.tobytes()


def test_a_distilled_base_without_adapter_is_warned_of(
    small: Callable[..., Settings], caplog: pytest.LogCaptureFixture
) -> None:
    run.train(small(turbo_adapter="none"))
    assert "distilled to 8 steps, and turbo_adapter is off" in caplog.text


@pytest.mark.parametrize("name", ["z-image", "z-image-de-turbo", "qwen-image"])
def test_an_undistilled_base_takes_none(name: str, small: Callable[..., Settings]) -> None:
    assert read_archive(run.train(small(base_model=name))).meta["turbo_adapter"] is None
    with pytest.raises(ValueError, match=f"turbo_adapter is 'v2'; for {name} it must be one of"):
        small(base_model=name, turbo_adapter="v2")


def test_any_local_file_is_an_adapter(
    small: Callable[..., Settings], tmp_path: Path, use_vault: Path
) -> None:
    own = tmp_path / "own.safetensors"
    own.write_bytes(adapter_path(TURBO.training_adapters["v1"]).read_bytes())
    meta = read_archive(run.train(small(turbo_adapter=str(own)))).meta
    assert meta["turbo_adapter"]["name"] == "own.safetensors"
    assert meta["settings"]["turbo_adapter"] == "own.safetensors"


def test_a_missing_adapter_stops_the_training_before_a_model_is_loaded(
    small: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("MODEL_VAULT", str(tmp_path / "empty"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(reading, "load_family", lambda *_: pytest.fail("a model was asked for"))
    with pytest.raises(MissingModel, match="zimage_turbo_training_adapter"):
        run.train(small())
