"""Weights on the page: list, inspect, download, upload."""

import io
import zipfile
from pathlib import Path

import pytest
import torch
from starlette.testclient import TestClient

from adapters.archive import Archive, write_archive
from adapters.placeholder import Placeholder
from studio import weights, weights_reader
from studio.folder import Studio


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    factors = {"transformer.layers.0.attention.to_q": (torch.ones(2, 8), torch.ones(8, 2))}
    meta = {"base_model": "Tongyi-MAI/Z-Image-Turbo", "placeholder_token": "<zwx>", "rank": 2,
            "result": "good", "settings": {"steps": 10}}  # fmt: skip
    placeholder = Placeholder("<zwx>", torch.ones(1, 16))
    return write_archive(Archive(factors, (placeholder,), meta), path)


def test_results_checkpoints_and_uploads_are_listed(client: TestClient, studio: Studio) -> None:
    run = studio.outputs / "2026-11-26-robot-01"
    write(run / "weights.zip")
    write(run / "checkpoints/step-000100.zip")
    write(run / "saved/step-000150.zip")
    write(studio.weights / "mine.zip")
    found = {row["id"]: row for row in client.get("/api/weights").json()["weights"]}
    name = "runs/2026-11-26-robot-01"
    assert set(found) == {
        f"{name}/final",
        f"{name}/checkpoint-000100",
        f"{name}/saved-000150",
        "uploads/mine.zip",
    }
    row = found[f"{name}/checkpoint-000100"]
    assert (row["step"], row["kind"], row["tokens"]) == (100, "checkpoint", ["<zwx>"])
    assert (row["rank"], row["checked"]) == (2, "passed")


def test_weights_are_inspected_and_downloaded(client: TestClient, studio: Studio) -> None:
    path = write(studio.outputs / "r/weights.zip")
    found = client.get("/api/weights/runs/r/final/inspect").json()
    assert found["modules"] == 1 and found["layers"][0]["norm"] == pytest.approx(16.0)
    assert found["settings"] == {"steps": 10}
    assert {each["program"] for each in found["use"]} == {"diffusers", "ComfyUI"}

    def download(kind: str) -> bytes:
        return client.get(f"/api/weights/runs/r/final/download?as={kind}").content

    assert download("zip") == path.read_bytes()
    with zipfile.ZipFile(path) as zipped:
        assert download("lora") == zipped.read("lora/lora_weights.safetensors")
        assert download("token") == zipped.read("embeddings/placeholder.safetensors")


def test_an_upload_is_read_as_generation_reads_it(
    client: TestClient, studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_answer", weights_reader.answer)  # without another process
    good = write(tmp_path / "good.zip").read_bytes()
    answer = client.put("/api/weights/mine.zip", content=good)
    assert answer.status_code == 201 and answer.json()["id"] == "uploads/mine.zip"
    assert client.put("/api/weights/mine.zip", content=good).status_code == 409
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr("data.pkl", b"x")
    answer = client.put("/api/weights/bad.zip", content=file.getvalue())
    assert answer.status_code == 422 and answer.json()["error"].startswith("bad.zip")
    assert client.put("/api/weights/bad.ckpt", content=b"x").status_code == 415
    assert sorted(e.name for e in studio.weights.rglob("*")) == [".parts", "mine.zip"]
    trash = client.delete("/api/weights/uploads/mine.zip").json()["trash"]
    assert client.get("/api/weights").json() == {"weights": []}
    assert client.post(f"/api/trash/{trash}/restore").status_code == 200
    assert client.get("/api/weights").json()["weights"][0]["id"] == "uploads/mine.zip"
