"""Reference images, start images and masks: kept, checked before anything runs, and used."""

import io
import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from families.registry import BASES
from studio import generator_process
from studio.folder import Studio
from studio.image_plans import planned
from studio.replies import Problem

EDIT = {"prompt": "a red cup", "base_model": "qwen-image-edit-2511"}


def png(width: int, height: int, color: str = "white") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), color).save(file, "png")
    return file.getvalue()


def put(client: TestClient, content: bytes) -> str:
    answer = client.put("/api/input_images/a.png", content=content)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def test_an_image_is_kept_once_with_a_thumbnail(client: TestClient, studio: Studio) -> None:
    identity = put(client, png(60, 40))
    assert put(client, png(60, 40)) == identity != put(client, png(40, 60))
    assert (studio.input_images / identity).read_bytes() == png(60, 40)
    with Image.open(io.BytesIO(client.get(f"/api/input_images/{identity}").content)) as small:
        assert (small.format, small.size) == ("WEBP", (60, 40))
    before = sorted(studio.input_images.rglob("*"))
    refused = client.put("/api/input_images/a.svg", content=b"<svg/>")
    assert refused.status_code == 422 and "image a.svg is not a JPEG" in refused.text
    assert sorted(studio.input_images.rglob("*")) == before
    for each in ("0" * 32, "job", identity[:-1] + "g"):
        assert client.get(f"/api/input_images/{each}").status_code == 404


def test_images_that_cannot_be_used_are_refused_at_their_field(
    client: TestClient, studio: Studio
) -> None:
    one, thin, black = (
        put(client, each) for each in (png(60, 40), png(400, 20), png(9, 9, "black"))
    )
    os.symlink("/etc/hostname", studio.input_images / ("a" * 32))
    references, start = "reference_images", {"prompt": "x", "image": one}
    for body, field, words in (
        (EDIT, references, "edits images: give 1 to 3"),
        (EDIT | {references: [one] * 4}, references, "takes at most 3"),
        (EDIT | {references: [one] * 11}, references, "no model takes more than 10"),
        (EDIT | {references: [one, thin]}, references, "reference image 2 is 400x20; crop it"),
        (start | {"width": 512, "height": 512}, "width", "512x512 is too large"),
        ({"prompt": "x", references: [one]}, references, "miniature-turbo takes no reference"),
        (EDIT | {references: ["../lock"]}, references, "is no longer in input_images/"),
        (EDIT | {references: ["a" * 32]}, references, "is no longer in input_images/"),
        (EDIT | {references: [one], "when": "by_run"}, "when", "without reference or start images"),
        ({"prompt": "x", "mask": one}, "mask", "mask needs an image"),
        (start | {"mask": thin}, "mask", "mask is 400x20, but image is 60x40"),
        (start | {"image": black, "mask": black}, "mask", "mask is black everywhere"),
        ({"prompt": "x", "prompt_strength": 0.5}, "prompt_strength", "needs an image"),
        (start | {"prompt_strength": 2}, "prompt_strength", "must be between 0 and 1"),
    ):
        with pytest.raises(Problem, match=words) as raised:
            planned(studio, body)
        assert raised.value.content["field"] == field, body
    assert not studio.images.exists()


def test_the_base_of_a_lora_decides_how_many_it_takes(client: TestClient, studio: Studio) -> None:
    one = put(client, png(60, 40))
    for name in ("qwen-image-2.1", "qwen-image"):
        with zipfile.ZipFile(studio.weights / f"{name}.zip", "w") as file:
            file.writestr("meta.json", json.dumps({"base_model": BASES[name].hub_id}))
    body = {"prompt": "x", "seed": 1, "reference_images": [one] * 4}
    [image], _ = planned(studio, body | {"weights": [{"id": "uploads/qwen-image-2.1.zip"}]})
    assert image["inputs"] == {"reference_images": [str(studio.input_images / one)] * 4}
    shown = {name: image["settings"][name] for name in ("reference_images", "width", "height")}
    assert shown == {"reference_images": [one] * 4, "width": 1216, "height": 800}  # 992 x 992, 3:2
    with pytest.raises(Problem, match="qwen-image takes no reference_images"):
        planned(studio, body | {"weights": [{"id": "uploads/qwen-image.zip"}]})


def test_a_small_model_gets_the_images_in_their_order(
    client: TestClient, studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from vault.models import write_qwen_image_edit

    from families.base import Base
    from families.models.qwen_image import QwenImage
    from inference.engine import Engine

    monkeypatch.setenv("MODEL_VAULT", str(write_qwen_image_edit(tmp_path / "vault")))
    monkeypatch.setattr(Base, "reference_resolution", 64)
    small = replace(QwenImage.reference_format, seen_pixels=64 * 64)
    monkeypatch.setattr(QwenImage, "reference_format", small)
    engine = Engine(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(generator_process, "_engine", lambda: engine)
    red, blue, mask = (put(client, png(64, 64, each)) for each in ("red", "blue", "white"))

    def made(**given: Any) -> bytes:
        body = EDIT | {"seed": 1, "steps": 1, "guidance": 1} | given
        [image], _ = planned(studio, body)
        file = tmp_path / "made.png"
        settings = generator_process._generate(image | {"file": str(file), "weights": []})
        assert settings["settings"]["used"]["width"] == image["settings"]["width"] == 64
        with Image.open(file) as found:
            return found.tobytes()

    one = made(reference_images=[red, blue])
    assert one == made(reference_images=[red, blue]) != made(reference_images=[blue, red])
    kept = made(reference_images=[red], image=blue, mask=mask, prompt_strength=0)
    assert kept == made(reference_images=[blue], image=blue, prompt_strength=0) != one
