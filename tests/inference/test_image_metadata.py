"""A picture's file says how it was made, in the words that other tools read, or says nothing."""

import json
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from adapters.archive import Archive, read_archive, write_archive
from adapters.files.tensor_file import tensors_hash
from adapters.placeholder import Placeholder
from families.loading import load_family
from families.registry import BASES
from inference import image_metadata
from inference.engine import Engine
from inference.images import save_images
from inference.inputs import GenerationInputs
from inference.request import Request, ResolvedRequest

TURBO = "Tongyi-MAI/Z-Image-Turbo"
PROMPT = "a photo of <zwx>, 写真 🦊"  # beyond Latin-1, and beyond 16 bits


@pytest.fixture(scope="module")
def engine(vault: Path) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODEL_VAULT", str(vault))
        patch.setenv("BASE_MODEL", "z-image-turbo")
        yield Engine(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def weights(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = load_family(BASES["z-image-turbo"], torch.device("cpu"), torch.float32)
    shape = family.transformer.get_submodule("layers.0.attention.to_q").weight.shape
    factors = {"layers.0.attention.to_q": (torch.ones(1, shape[1]), torch.ones(shape[0], 1))}
    row = torch.ones(1, family.text_width)
    archive = Archive(factors, (Placeholder("<zwx>", row),), {"base_model": TURBO})
    return write_archive(archive, tmp_path_factory.mktemp("weights") / "weights.zip")


@pytest.mark.parametrize("file_format", ["png", "webp", "jpg"])
def test_a_file_holds_all_that_makes_it_again(
    file_format: str, engine: Engine, weights: Path, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 2, "width": 64, "height": 48}
    paths = engine.predict(
        GenerationInputs(
            replicate_weights=weights,
            lora_scale=0.7,
            num_outputs=2,
            output_format=file_format,
            **asked,
        ),
        output_dir=tmp_path,
    )
    facts = []
    for path in paths:
        with Image.open(path) as image:
            texts = image_metadata.read(image)
        facts.append(json.loads(texts[image_metadata.JSON]))
        assert texts[image_metadata.TEXT].startswith(
            PROMPT + "\nSteps: 2, Sampler: Euler, CFG scale: 1, "
        )
        assert (
            f"Seed: {facts[-1]['seed']}, Size: 64x48, Model: z-image-turbo"
            in texts[image_metadata.TEXT]
        )
    first, second = facts
    assert second["seed"] == first["seed"] + 1
    (applied,) = first["weights"]
    archive = read_archive(weights)
    assert (applied["lora_sha256"], applied["scale"]) == (archive.lora_sha256, 0.7)
    assert applied["placeholder"] == "<zwx>"

    # From the file alone, the second picture again.
    known = {name: second[name] for name in ("prompt", "seed", "guidance_scale", "width", "height")}
    request = Request(
        num_inference_steps=second["steps"], lora_scale=second["weights"][0]["scale"], **known
    )
    (again,) = engine.generate(request, archive, second["base_model"])
    (saved,) = save_images([again], tmp_path, file_format)
    assert saved.read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("file_format", ["png", "webp", "jpg"])
def test_metadata_is_left_out_where_it_is_not_wanted(
    file_format: str, engine: Engine, tmp_path: Path
) -> None:
    small = {"num_inference_steps": 1, "width": 32, "height": 32, "seed": 1}
    wanted, unwanted = (
        engine.predict(
            GenerationInputs(
                prompt="my secret", output_metadata=each, output_format=file_format, **small
            ),
            output_dir=tmp_path,
        )[0]
        for each in (True, False)
    )
    with Image.open(wanted) as first, Image.open(unwanted) as second:
        assert first.tobytes() == second.tobytes()
        assert image_metadata.read(first) and not image_metadata.read(second)
    assert b"zeroprior" not in unwanted.read_bytes()


def test_the_same_tensors_have_the_same_hash_whatever_lies_around_them(
    weights: Path, tmp_path: Path
) -> None:
    archive = read_archive(weights)
    again = replace(archive, meta={**archive.meta, "note": "another header"}, placeholders=())
    other = read_archive(write_archive(again, tmp_path / "other.zip"))
    assert other.lora_sha256 == archive.lora_sha256
    with zipfile.ZipFile(weights) as zipped:
        bare = Path(zipped.extract("lora/lora_weights.safetensors", tmp_path))
    assert tensors_hash(bare) == read_archive(bare).lora_sha256 == archive.lora_sha256


def test_a_making_too_long_for_a_jpg_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    resolved = ResolvedRequest(
        prompt="写" * 20_000,
        negative_prompt="",
        width=8,
        height=8,
        steps=1,
        guidance_scale=1.0,
        seeds=(1,),
    )
    image = Image.new("RGB", (8, 8))
    image.info.update(image_metadata.image_texts(resolved, 1, BASES["miniature"], []))
    jpg, png = (save_images([image], tmp_path, each)[0] for each in ("jpg", "png"))
    with Image.open(jpg) as small, Image.open(png) as whole:
        assert not image_metadata.read(small)
        assert image_metadata.read(whole)[image_metadata.TEXT].startswith("写写")
    assert "too long for a JPEG" in caplog.text
