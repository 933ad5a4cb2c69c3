"""weights.zip holds what a training left behind, whole or not at all, and other tools read it."""

import io
import json
import os
import resource
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from archives import LAYERS, META_VALUES, Members, assert_same, pack, some_factors
from safetensors import safe_open
from safetensors.torch import load

from adapters.archive import (
    LORA,
    META,
    PLACEHOLDER,
    Archive,
    BrokenArchive,
    read_archive,
    read_loose,
    write_archive,
)
from families.loading import load_family
from families.registry import BASES
from inference.engine import Engine
from inference.request import Request

# What is written.


def test_what_is_written_is_what_is_read(archive: Archive, weights: Path) -> None:
    found = read_archive(weights)
    assert_same(found, archive)
    assert found.meta == {"format_version": 1, **META_VALUES}
    assert found.base_model == "Tongyi-MAI/Z-Image-Turbo"


def test_the_layout_is_the_contract(archive: Archive, weights: Path) -> None:
    with zipfile.ZipFile(weights) as zipped:
        comfyui = ("comfyui/README.txt", "comfyui/zwx.safetensors")
        assert sorted(zipped.namelist()) == sorted((LORA, PLACEHOLDER, META, *comfyui))
        embedding = load(zipped.read("comfyui/zwx.safetensors"))["emb_params"]
        assert b"embedding:zwx," in zipped.read("comfyui/README.txt")
        assert all(info.compress_type == zipfile.ZIP_STORED for info in zipped.infolist())
        lora, placeholder = load(zipped.read(LORA)), load(zipped.read(PLACEHOLDER))
        file = weights.with_name("lora.safetensors")
        file.write_bytes(zipped.read(LORA))
        meta = json.loads(zipped.read(META))
    assert lora.keys() == {
        f"diffusion_model.{layer}.lora_{m}.weight" for layer in LAYERS for m in "AB"
    }
    assert {tensor.dtype for tensor in lora.values()} == {torch.bfloat16}
    assert {len(t) for key, t in lora.items() if "lora_A" in key} == {4}
    assert {key: tuple(t.shape) for key, t in placeholder.items()} == {"<zwx>": (2, 64)}
    assert placeholder["<zwx>"].dtype == torch.float32
    assert torch.equal(placeholder["<zwx>"], embedding)
    assert meta == {"format_version": 1, **META_VALUES}
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    peft = json.loads(header["lora_adapter_metadata"])
    assert peft["transformer.r"] == peft["transformer.lora_alpha"] == 4
    assert peft["transformer.target_modules"] == sorted(LAYERS)
    assert header["format"] == "pt"
    assert header["zeroprior.base_model"] == "Tongyi-MAI/Z-Image-Turbo"


def test_without_a_placeholder_there_is_no_embedding(tmp_path: Path) -> None:
    meta = {"base_model": "Qwen/Qwen-Image", "train_placeholder_token": False}
    file = write_archive(Archive(some_factors(), (), meta), tmp_path / "weights.zip")
    assert sorted(zipfile.ZipFile(file).namelist()) == [LORA, META]
    assert read_archive(file).placeholder is None


def test_layers_of_unequal_rank_are_written_with_one(tmp_path: Path) -> None:
    low, high = some_factors(2), some_factors(4)
    mixed = {LAYERS[0]: low[LAYERS[0]], LAYERS[1]: high[LAYERS[1]]}
    found = read_archive(write_archive(Archive(mixed, (), {}), tmp_path / "weights.zip"))
    for layer, (down, up) in mixed.items():
        down_found, up_found = found.factors[layer]
        assert len(down_found) == 4
        assert torch.equal(up_found @ down_found, up @ down)


def test_a_failure_while_writing_leaves_what_was_there(archive: Archive, weights: Path) -> None:
    before = weights.read_bytes()
    unwritable = Archive(archive.factors, archive.placeholders, {"settings": object()})
    with pytest.raises(TypeError):
        write_archive(unwritable, weights)
    # A disk that is full in the middle of the LoRA, as far as this process can tell.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 3, limits[1]))
    try:
        with pytest.raises(OSError):
            write_archive(archive, weights)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert weights.read_bytes() == before
    assert os.listdir(weights.parent) == ["weights.zip"]


# What is read.


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_of_the_same_is_the_same(
    mode: str, archive: Archive, members: Members, tmp_path: Path
) -> None:
    folder = tmp_path / "unpacked"
    for name, content in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    file = tmp_path / "weights"  # the name says nothing
    with tarfile.open(file, mode) as tarred:  # type: ignore[call-overload]
        tarred.add(folder, ".")
    assert_same(read_archive(file), archive)


def test_a_deflated_zip_is_the_same(archive: Archive, members: Members, tmp_path: Path) -> None:
    assert_same(read_archive(pack(members, tmp_path / "x.zip", zipfile.ZIP_DEFLATED)), archive)


def test_a_bare_lora_says_what_it_was_trained_on(
    archive: Archive, members: Members, tmp_path: Path
) -> None:
    file = tmp_path / "anything.bin"
    file.write_bytes(members[LORA])
    found = read_archive(file)
    assert found.factors.keys() == archive.factors.keys()
    assert found.placeholder is None
    assert found.base_model == "Tongyi-MAI/Z-Image-Turbo"
    # The archive holds values of its own: the file may change afterwards.
    values = {layer: down.clone() for layer, (down, _) in found.factors.items()}
    file.write_bytes(bytes(len(members[LORA])))
    assert all(torch.equal(found.factors[layer][0], down) for layer, down in values.items())


def test_a_lone_lora_is_found_wherever_it_lies(members: Members, tmp_path: Path) -> None:
    elsewhere = {"output/flux/my lora.safetensors": members[LORA], "config.yaml": b"x: 1"}
    found = read_archive(pack(elsewhere, tmp_path / "weights.zip"))
    assert set(found.factors) == set(LAYERS)
    assert found.base_model == "Tongyi-MAI/Z-Image-Turbo"  # by its header


def test_an_unpacked_archive_keeps_its_placeholder(
    archive: Archive, members: Members, tmp_path: Path
) -> None:
    for name, content in members.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert_same(read_loose(tmp_path / LORA, "<zwx>"), archive)
    with pytest.raises(BrokenArchive, match="contains the placeholder '<zwx>', not '<abc>'"):
        read_loose(tmp_path / LORA, "<abc>")
    (tmp_path / PLACEHOLDER).unlink()
    with pytest.raises(BrokenArchive, match="embedding of <zwx> was not found: neither"):
        read_loose(tmp_path / LORA, "<zwx>")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_large_meta_is_read_however_it_is_packed(
    compression: int, members: Members, tmp_path: Path
) -> None:
    captions = [os.urandom(500).hex() for _ in range(12_000)]
    members[META] = json.dumps(META_VALUES | {"captions": captions}).encode()
    assert 12 << 20 > len(members[META]) > 8 << 20
    found = read_archive(pack(members, tmp_path / "w.zip", compression))
    assert found.meta["captions"] == captions


# What other tools make of it.


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("z-image-turbo", 64, {"num_inference_steps": 2, "guidance_scale": 0.0}),
        ("qwen-image", 32, {"num_inference_steps": 2, "true_cfg_scale": 1.0}),
    ],
)
def test_diffusers_loads_our_lora_and_draws_our_picture(
    name: str, size: int, options: dict, use_vault: Path, tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = BASES[name]
    family = load_family(base)
    weight = dict(family.transformer.named_modules())
    torch.manual_seed(0)
    factors = {}
    for target in family.lora_targets():
        out_size, in_size = weight[target].weight.shape
        factors[target] = (torch.randn(4, in_size) / in_size**0.5, torch.randn(out_size, 4) * 0.2)
    file = write_archive(Archive(factors, (), {"base_model": base.hub_id}), tmp_path / "w.zip")

    def ours(archive: Archive | None) -> np.ndarray:
        steps = options["num_inference_steps"]
        asked = Request(
            prompt="a red fox",
            width=size,
            height=size,
            num_inference_steps=steps,
            guidance_scale=1,
            seed=3,
        )
        return np.asarray(engine.generate(asked, archive, name)[0], np.int16)

    engine = Engine(torch.device("cpu"), torch.float32)
    with zipfile.ZipFile(file) as zipped:
        zipped.extract(LORA, tmp_path)
    stock = DiffusionPipeline.from_pretrained(
        use_vault / base.hub_id, torch_dtype=torch.float32, tokenizer=family.prompts.tokenizer
    )
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(tmp_path / "lora", weight_name=Path(LORA).name)
    adapted = [m for m in stock.transformer.modules() if isinstance(m, BaseTunerLayer)]
    generator = torch.Generator().manual_seed(3)
    theirs = stock("a red fox", width=size, height=size, generator=generator, **options).images[0]

    picture = ours(read_archive(file))
    assert len(adapted) == len(factors) + len(family.idle_layers())
    assert np.abs(picture - np.asarray(theirs, np.int16)).max() <= 1
    assert np.abs(picture - ours(None)).max() > 8  # the LoRA shows


def test_a_tar_from_memory_is_a_tar(archive: Archive, members: Members, tmp_path: Path) -> None:
    """Members in any order, with other files between them."""
    file = tmp_path / "trained_model.tar"
    with tarfile.open(file, "w") as tarred:
        for name in (META, "log.txt", PLACEHOLDER, LORA):
            content = members.get(name, b"steps")
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tarred.addfile(info, io.BytesIO(content))
    assert_same(read_archive(file), archive)
