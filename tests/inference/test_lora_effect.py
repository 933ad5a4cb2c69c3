"""What an engine says about a LoRA: that it changes nothing, or how it has to be used."""

import json
import logging
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from loras import random_lora
from PIL import Image
from safetensors.torch import save, save_file
from torch import Tensor
from web_server import served

from adapters.archive import Archive, BrokenArchive, read_archive
from adapters.cache import AdapterCache
from adapters.formats.lora_header import MAX_CONFIG_BYTES
from adapters.placeholder import Placeholder
from families.family import Family
from families.loading import load_family
from families.registry import BASES
from inference.engine import Engine
from inference.fetch.disk_cache import DiskCache
from inference.fetch.download import DownloadError
from inference.fetch.sources import Sources
from inference.image_metadata import JSON, read
from inference.inputs import GenerationInputs
from inference.request import Request
from inference.weights import Weights, warn_of_other_base

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def engines(bases: None) -> dict[torch.dtype, Engine]:
    return {dtype: Engine(CPU, dtype) for dtype in (torch.float32, torch.bfloat16)}


def asked(**options: Any) -> Request:
    given = {"width": 32, "height": 32, "num_inference_steps": 1, "seed": 7}
    return Request(prompt="a photo of <zwx>", **given | options)


def lora(family: Family, size: float, still: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """A LoRA of the family's layers; the first `still` of them are zero."""
    factors = random_lora(family.transformer, family.lora_targets(), 2, 1, size)
    for name in list(factors)[:still]:
        factors[name] = factors[name][0], torch.zeros_like(factors[name][1])
    return factors


def said(engine: Engine, archive: Archive, caplog: pytest.LogCaptureFixture, **options: Any) -> str:
    """The warnings about the weights, which come with each request."""
    for _ in range(2):
        caplog.clear()
        engine.generate(asked(**options), archive)
    lines = [each.message for each in caplog.records if each.levelno >= logging.WARNING]
    return "\n".join(line for line in lines if line.startswith("the weights"))


def test_a_lora_that_changes_nothing_is_a_warning_with_its_layers(
    turbo: Family, engines: dict, caplog: pytest.LogCaptureFixture
) -> None:
    engine, total = engines[torch.float32], len(turbo.lora_targets())
    nothing = said(engine, Archive(lora(turbo, 0.1, total), (), {}), caplog)
    assert f"all {total} layers are zero" in nothing
    most = said(engine, Archive(lora(turbo, 0.1, total - 1), (), {}), caplog)
    assert f"{total - 1} of {total} layers have no effect" in most
    assert said(engine, Archive(lora(turbo, 0.1, 1), (), {}), caplog) == ""
    off = said(engine, Archive(lora(turbo, 0.1, total), (), {}), caplog, lora_scale=0)
    assert off == ""


@pytest.mark.parametrize(
    ("dtype", "size", "lost"),
    [
        (torch.bfloat16, 1e-7, True),
        (torch.bfloat16, 0.05, False),
        (torch.float32, 1e-12, True),
        (torch.float32, 1e-4, False),
    ],
)
def test_a_change_that_is_lost_in_rounding_is_a_warning(
    dtype: torch.dtype,
    size: float,
    lost: bool,
    turbo: Family,
    engines: dict,
    caplog: pytest.LogCaptureFixture,
) -> None:
    total = len(turbo.lora_targets())
    found = said(engines[dtype], Archive(lora(turbo, size), (), {}), caplog)
    assert (f"in {total} of {total} layers the change at scale 1 is lost" in found) == lost
    assert bool(found) == lost


@pytest.mark.parametrize(
    ("size", "facts", "new"),
    [
        (0.0, {}, True),
        (1.0, {"norm_start": 8.0}, True),
        (1.0, {"norm_start": 0.5, "steps_with_placeholder": 0}, True),
        (1.0, {"norm_start": 0.5, "steps_with_placeholder": 9}, False),
        (1.0, {}, False),
    ],
)
def test_a_token_that_is_as_new_as_before_its_training_is_a_warning(
    size: float,
    facts: dict,
    new: bool,
    turbo: Family,
    engines: dict,
    caplog: pytest.LogCaptureFixture,
) -> None:
    row = torch.full((1, turbo.text_width), size * 8 / turbo.text_width**0.5)
    archive = Archive(lora(turbo, 0.1), (Placeholder("<zwx>", row),), {"zero_prior": facts})
    found = said(engines[torch.float32], archive, caplog)
    assert ("the embedding of <zwx> was not trained" in found) == new


# Few-step LoRAs.


def test_a_few_step_lora_s_schedule_is_used_and_written_into_the_image(
    bases: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZEROPRIOR_FILES", str(tmp_path))
    family = load_family(BASES["qwen-image"], CPU, torch.float32)
    tensors = {
        f"{name}.lora_{part}.weight": value
        for name, pair in lora(family, 0.1).items()
        for part, value in zip(("down", "up"), pair, strict=True)
    }
    for name in ("Qwen-Image-Lightning-8steps-V1.1.safetensors", "style.safetensors"):
        save_file(tensors, name)
    with zipfile.ZipFile("weights.zip", "w") as zipped:
        zipped.write("Qwen-Image-Lightning-8steps-V1.1.safetensors")
    engine, facts = Engine(CPU, torch.float32), {}
    for name, more in {
        "Qwen-Image-Lightning-8steps-V1.1.safetensors": {},
        "weights.zip": {},
        "style.safetensors": {"num_inference_steps": 2},
    }.items():
        (path,) = engine.predict(
            GenerationInputs(
                prompt="a cat",
                lora_weights=name,
                base_model="qwen-image",
                width=32,
                height=32,
                seed=1,
                output_format="png",
                **more,
            )
        )
        with Image.open(path) as image:
            facts[name] = json.loads(read(image)[JSON])
    for name in ("Qwen-Image-Lightning-8steps-V1.1.safetensors", "weights.zip"):
        values = [facts[name][key] for key in ("steps", "guidance_scale", "shift")]
        assert values == [8, 1.0, 3.0]
    assert "shift" not in facts["style.safetensors"]
    assert facts["style.safetensors"]["guidance_scale"] == 4.0
    assert "few-step LoRA Qwen-Image-Lightning: 8 steps, guidance 1, shift 3" in caplog.text


# adapter_config.json beside the weights.

A, B = torch.randn(4, 16), torch.randn(24, 4)
PEFT = {f"base_model.model.x.lora_{part}.weight": each for part, each in (("A", A), ("B", B))}
CONFIG = json.dumps({"r": 4, "lora_alpha": 8})


def scale_of(archive: Archive) -> float:
    down, up = archive.factors["x"]
    return float((up @ down).norm() / (B @ A).norm())


@pytest.mark.parametrize("folder", ["", "lora/"])
@pytest.mark.parametrize("beside", [True, False])
def test_the_config_in_an_archive_is_read(folder: str, beside: bool, tmp_path: Path) -> None:
    file = tmp_path / "peft.zip"
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr(f"{folder}adapter_model.safetensors", save(PEFT))
        zipped.writestr(f"{folder if beside else 'elsewhere/'}adapter_config.json", CONFIG)
    assert scale_of(read_archive(file)) == pytest.approx(2)
    with zipfile.ZipFile(file, "a") as zipped:
        zipped.writestr("third/adapter_config.json", "{}")
    assert scale_of(read_archive(file)) == pytest.approx(2 if beside else 1)


def test_the_config_in_a_folder_is_read_and_a_changed_one_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, config, cache = (
        tmp_path / "adapter_model.safetensors",
        tmp_path / "adapter_config.json",
        AdapterCache(),
    )
    save_file(PEFT, file)
    assert scale_of(cache.get(file)) == pytest.approx(1)
    config.write_text(CONFIG)
    assert scale_of(cache.get(file)) == scale_of(read_archive(file)) == pytest.approx(2)
    config.write_text(CONFIG.replace("8", "16"))
    assert scale_of(cache.get(file)) == pytest.approx(4)
    config.write_text(CONFIG.replace("4", "3"))
    with pytest.raises(BrokenArchive, match=r"x has rank 4, but adapter_config.json says 3"):
        cache.get(file)
    config.write_text(CONFIG)
    other = file.with_name("other.safetensors")
    save_file(PEFT, other)
    assert scale_of(read_archive(file)) == pytest.approx(2)
    assert scale_of(read_archive(other)) == pytest.approx(1)
    assert "adapter_config.json next to it is ignored: the folder contains 1 other" in caplog.text


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "sub/w.safetensors"])
@pytest.mark.parametrize("named", [True, False])
def test_the_config_in_a_repository_of_the_hub_is_read(
    file: str, named: bool, tmp_path: Path
) -> None:
    config = f"{file.rpartition('/')[0]}/adapter_config.json".lstrip("/")
    listing = json.dumps({"siblings": [{"rfilename": name} for name in (file, config)]}).encode()
    with served() as web:
        web.pages["huggingface.co/api/models/a/b/revision/main"] = 200, {}, listing
        web.pages[f"huggingface.co/a/b/resolve/main/{file}"] = 200, {}, save(PEFT)
        web.pages[f"huggingface.co/a/b/resolve/main/{config}"] = 200, {}, CONFIG.encode()
        sources = Sources(web.downloader(), DiskCache(tmp_path))
        source = f"hf:a/b/{file}" if named else "hf:a/b"
        found = read_archive(sources.file(source), config=sources.config(source))
        assert scale_of(found) == pytest.approx(2)
        before = len(web.asked)
        assert sources.config(source) == sources.config(source)
        assert len(web.asked) == before
        assert sources.config("https://weights.example/a.safetensors") is None
        assert sources.config("hf:a/b/weights.zip") is None
        web.pages["huggingface.co/api/models/a/c/revision/main"] = (
            200,
            {},
            json.dumps({"siblings": [{"rfilename": "w.safetensors"}]}).encode(),
        )
        assert sources.config("hf:a/c/w.safetensors") is None
        # Answers and files that are not what they should be.
        web.pages["huggingface.co/api/models/a/d/revision/main"] = 200, {}, b'{"siblings": [1]}'
        assert sources.config("hf:a/d/w.safetensors") is None
        web.pages["huggingface.co/api/models/a/e/revision/main"] = 200, {}, listing
        page = f"huggingface.co/a/e/resolve/main/{config}"
        web.pages[page] = 200, {}, b" " * (MAX_CONFIG_BYTES + 1)
        large = Sources(web.downloader(most=1 << 30), DiskCache(tmp_path))
        with pytest.raises(DownloadError, match="bytes; 4,194,304 is the limit"):
            large.config(f"hf:a/e/{file}")


def test_a_scale_of_a_whole_model_is_named(caplog: pytest.LogCaptureFixture) -> None:
    whole = Archive({}, (), {"base_model": "miniature"}, model=Path("model"))
    warn_of_other_base(BASES["miniature"], [Weights(whole, 1.0)])
    assert not caplog.text
    warn_of_other_base(BASES["miniature"], [Weights(whole, 0.5)])
    assert "the scale 0.5 has no effect: the weights are a whole model" in caplog.text
