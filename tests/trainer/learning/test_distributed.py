"""Several processes under `accelerate launch` train what one would train."""

import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_files import encoded, make_folder
from launching import LAUNCH, launch, run_of, shares, state, train
from PIL import Image
from vault.models import write_qwen_image_21

from adapters.archive import read_archive
from trainer.learning import check_launch
from trainer.settings import Settings, SettingsError, TrainingInputs, resolve


def test_two_processes_train_what_one_does_with_the_doubled_batch(
    tmp_path: Path, photos: Path, vault: Path
) -> None:
    """Each has a half of the base. They agree on a seed, which the run by one process is told."""
    reported = train(LAUNCH, tmp_path / "two", photos, vault, batch_size=1, shard=True)
    assert reported.count("wrote ") == 2  # weights.zip and report.html, by the main process alone
    text_encoder, transformer = shares(reported)
    for here, whole in (text_encoder, transformer):
        assert here == pytest.approx(whole / 2, rel=0.01) and whole > 0.1
    two = state(tmp_path / "two")
    assert two.identity["settings"]["processes"] == 2
    seed = two.identity["settings"]["seed"]
    train((), tmp_path / "one", photos, vault, batch_size=2, seed=seed)
    one = state(tmp_path / "one")
    assert one.history["losses"][0] == pytest.approx(two.history["losses"][0], rel=1e-6)
    assert one.history["losses"] == pytest.approx(two.history["losses"], rel=1e-5)
    for kind in ("parameters", "averages"):
        ours, theirs = getattr(one, kind), getattr(two, kind)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            # Adam divides by the gradient's size, so that rounding shows where it is near zero.
            assert torch.allclose(value, theirs[name], rtol=1e-4, atol=2e-5), name


def test_what_does_not_go_together_is_refused() -> None:
    def settings_of(**changes: Any) -> Settings:
        given = {"dataset": "x", "base_model": "z-image", "rank": None, "quantize": "none"}
        return resolve(TrainingInputs(**(given | changes)))

    with pytest.raises(SettingsError, match="shard and low_memory are both on"):
        settings_of(shard=True, low_memory=True)
    with pytest.raises(SettingsError, match="training is full, but shard is on"):
        settings_of(shard=True, training="full")
    with pytest.raises(SettingsError, match="needs several processes on this machine"):
        check_launch(settings_of(shard=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantize", "adapter"),
    [("none", "lora"), ("none", "dora"), ("int8", "lora"), ("int8", "dora")],
)
def test_sharding_changes_no_bit(
    tmp_path: Path, photos: Path, vault: Path, quantize: str, adapter: str
) -> None:
    """With a training adapter, checkpointing, preservation, previews, and held-out images."""
    changes = {"batch_size": 1, "seed": 7, "quantize": quantize, "gradient_checkpointing": True}
    changes |= {"adapter": adapter}
    changes |= {"preserve": "auto", "validation_every": 1, "validation_images": 2, "ema_decay": 0}
    options = "--sample_prompts", "a <zwx> by the sea", "--sample_every", "2"
    options += "--base_model", "miniature-turbo"
    found = {}
    for shard in (True, False):
        folder = tmp_path / str(shard)
        folder.mkdir()
        done = launch(LAUNCH, folder, photos, vault, *options, **changes, shard=shard)
        assert done.returncode == 0, done.stderr
        assert bool(shares(done.stdout + done.stderr)) == shard
        found[shard] = state(folder)
    sharded, whole = found[True], found[False]
    assert sharded.history["losses"] == whole.history["losses"]
    assert sharded.history["validation"] == whole.history["validation"]
    for name, value in whole.parameters.items():
        assert torch.equal(sharded.parameters[name], value), name
    images = [
        {each.relative_to(run_of(folder)): each.read_bytes() for each in previews}
        for folder in (tmp_path / "True", tmp_path / "False")
        if (previews := list(run_of(folder).glob("samples/step-*/*.png")))
    ]
    assert images[0] == images[1] and len(images[0]) == 3
    checks = [read_archive(run_of(tmp_path / str(k)) / "weights.zip").meta["checks"] for k in found]
    assert checks[0] == checks[1]


@pytest.mark.slow
def test_two_machines_train_what_one_process_does(
    tmp_path: Path, photos: Path, vault: Path
) -> None:
    """Four processes, sharded within each machine; one process takes over from their checkpoint."""
    steps, half = 20, 10
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = {"steps": steps, "checkpoint_every": half, "seed": 11, "gradient_accumulation": 1}
    common["preserve"] = "auto"  # with even batch sizes, its rows are those of the whole batch
    one_of = "--nnodes", "2", "--nproc_per_node", "2", "--rdzv_backend", "c10d"
    launcher = ("-m", "torch.distributed.run", *one_of, "--rdzv_endpoint", address)
    folder = tmp_path / "four"

    def machine(number: int) -> subprocess.CompletedProcess[str]:
        time.sleep(number)  # both write the same run.yaml
        folder.mkdir(exist_ok=True)
        return launch(launcher, folder, photos, vault, **common, batch_size=2, shard=True)

    with ThreadPoolExecutor() as machines:
        done = list(machines.map(machine, range(2)))
    assert [each.returncode for each in done] == [0, 0], done[0].stderr + done[1].stderr
    (here, whole), *_ = shares("".join(each.stdout + each.stderr for each in done))
    assert here == pytest.approx(whole / 2, rel=0.01)
    four = state(folder, steps).history["losses"]
    train((), tmp_path / "one", photos, vault, **common, batch_size=8)
    one = state(tmp_path / "one", steps).history["losses"]
    assert one[0] == pytest.approx(four[0], rel=1e-6)
    assert one == pytest.approx(four, rel=1e-4)
    checkpoint = run_of(folder) / "checkpoints" / f"step-{half:06d}.safetensors"
    changes = {"resume_from": str(checkpoint), "batch_size": 8}
    reported = train((), tmp_path / "resumed", photos, vault, **common, **changes)
    assert "processes 4 -> 1" in reported
    resumed = state(folder, steps)  # in the folder of its run
    assert resumed.identity["settings"]["processes"] == 1
    assert resumed.history["losses"] == pytest.approx(four, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["dora", "lokr", "loha"])
def test_other_forms_are_trained_by_two_processes_as_by_one(
    tmp_path: Path, photos: Path, vault: Path, adapter: str
) -> None:
    common = {"adapter": adapter, "seed": 7}
    train(LAUNCH, tmp_path / "two", photos, vault, batch_size=1, **common)
    train((), tmp_path / "one", photos, vault, batch_size=2, **common)
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    assert one.history["losses"][0] == pytest.approx(two.history["losses"][0], rel=1e-6)
    assert one.history["losses"] == pytest.approx(two.history["losses"], rel=1e-5)
    for name, value in one.parameters.items():
        assert torch.allclose(value, two.parameters[name], rtol=1e-4, atol=2e-5), name


# Runs `python -m trainer` with small reference images.
SMALL_REFERENCES = """
from families.base import Base
from trainer.__main__ import main

Base.reference_resolution = 64
main()
"""


@pytest.mark.slow
def test_two_processes_train_pairs_as_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without sharding, where not every process sees a token in every step, and where rows
    of preservation are edits in one and prompts alone in another."""
    files = {}
    for number in range(4):
        for kind, levels in (("target", number), ("control", number % 2 + 9)):
            pixels = np.random.default_rng(levels).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            files[f"{kind}/{number}.png"] = encoded(Image.fromarray(pixels))
        files[f"target/{number}.txt"] = b"put TOK there" if number % 2 else b"make it night"
    pairs = make_folder(tmp_path / "pairs", files)
    vault = write_qwen_image_21(tmp_path / "vault")
    program = tmp_path / "small.py"
    program.write_text(SMALL_REFERENCES)
    monkeypatch.setattr(sys.modules["launching"], "PROGRAM", (str(program),))
    found = {}
    for name, launcher, size in (("sharded", LAUNCH, 2), ("whole", LAUNCH, 2), ("one", (), 4)):
        folder = tmp_path / name
        folder.mkdir()
        changes = {"batch_size": size, "seed": 5, "validation_every": 1, "caption_dropout": 0}
        changes |= {"preserve": "auto", "turbo_adapter": "none"}
        changes |= {"shard": True} if name == "sharded" else {}
        base = "--base_model", "qwen-image-2.1"
        prompts = "--sample_prompts", "put <zwx> there", "--sample_every", "2"
        done = launch(launcher, folder, pairs, vault, *base, *prompts, **changes)
        assert done.returncode == 0, done.stderr
        assert bool(shares(done.stdout + done.stderr)) == (name == "sharded")
        assert len(list(run_of(folder).glob("samples/step-*/*.png"))) == 3
        found[name] = state(folder)
    one = found.pop("one")
    for two in found.values():
        assert one.history["losses"][0] == pytest.approx(two.history["losses"][0], rel=1e-6)
        assert one.history["losses"] == pytest.approx(two.history["losses"], rel=1e-4)
        for name, value in one.parameters.items():
            assert torch.allclose(value, two.parameters[name], rtol=1e-3, atol=1e-4), name
