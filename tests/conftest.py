"""What the tests share: a vault of small models, the real tokenizers, real photographs.

Nothing here or in any test reaches beyond this machine.
"""

import gc
import importlib.util
import io
import os
import resource
import shutil
import signal
import socket
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

    from trainer.settings.fields import Settings

# huggingface_hub reads it once, when it is imported; so fixtures import the libraries late.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tests are about the CPU, where results are equal bit for bit, on a machine with a GPU too; what
# needs one is in `make gpu-check`. Read when CUDA is first used; processes of tests inherit it.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
torch.set_num_threads(1)  # the models are so small that a second thread costs more than it brings

# Photographs inside scikit-image's wheel, all in the public domain (NASA, SpaceX, S. van der Walt)
# or CC0 (L. Varshney, R. Michetti, S. van der Walt), and their captions; None: no .txt beside it.
PHOTOS = {
    "astronaut.png": "a photo of TOK, an astronaut in an orange suit, smiling",
    "camera.png": "a photo of TOK, a man behind a camera on a tripod",  # greyscale
    "chelsea.png": "a photo of TOK, a tabby cat",
    "coffee.png": "a photo of TOK, a cup of coffee on a wooden table",
    "clock_motion.png": None,  # greyscale
    "rocket.jpg": None,
}
SHORT_SIDE = 256  # pixels


def pytest_collection_finish() -> None:
    """Excludes modules and collected tests from garbage collection, which each training asks for.

    They are a million objects: a collection takes half a second with them, a tenth without.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Refuses connections to other machines, so that no test depends on one unnoticed."""
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: Any) -> None:
        internet = self.family in (socket.AF_INET, socket.AF_INET6)
        if internet and address[0] not in ("127.0.0.1", "::1", "localhost", "0.0.0.0"):
            raise ConnectionRefusedError(f"tests use no network, but one connects to {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_here)
        yield


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what is said where there is no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> None:
    """Ctrl-C interrupts even when tests run in the background of a shell that ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def vault(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A `$MODEL_VAULT` of small float32 models, written once. Read it; copy what you change."""
    from vault.models import write_vault
    from vault.tokenizers import read_once

    folder = write_vault(tmp_path_factory.mktemp("vault"))
    with pytest.MonkeyPatch.context() as patch:
        read_once(patch)
        yield folder
    shutil.rmtree(folder)  # 150 MB that pytest would keep for three sessions


@pytest.fixture(scope="session")
def miniature_vault(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `$MODEL_VAULT` that holds a miniature with random weights, and nothing else."""
    from miniature.models import write_random

    folder = tmp_path_factory.mktemp("miniature")
    write_random(folder / "zeroprior" / "miniature-turbo")
    return folder


@pytest.fixture
def use_vault(vault: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The vault, named by `$MODEL_VAULT` for the length of a test."""
    monkeypatch.setenv("MODEL_VAULT", str(vault))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return vault


@pytest.fixture
def small(photos: Path, use_vault: Path, tmp_path: Path) -> "Callable[..., Settings]":
    """Settings of a short training on the vault's models."""

    from trainer.settings.fields import resolve
    from trainer.settings.inputs import TrainingInputs

    def make(**changes: Any) -> "Settings":
        values: dict[str, Any] = {
            "dataset": photos,
            "base_model": "z-image",
            "resolution": "64",
            "rank": 2,
            "steps": 3,
            "seed": 5,
            "sample_prompts": (),  # previews take longer than such a run
            "preserve": "off",  # so do its images
            "validation_every": 0,  # as long as all steps together
            "output_dir": tmp_path / "out",
        }
        return resolve(TrainingInputs(**(values | changes)))

    return make


@pytest.fixture(scope="session")
def qwen25() -> "Qwen2Tokenizer":
    """Qwen-Image's tokenizer. Shared: a test that adds tokens builds its own."""
    from vault.tokenizers import qwen25_tokenizer

    return qwen25_tokenizer()


@pytest.fixture(scope="session")
def qwen3() -> "Qwen2Tokenizer":
    """Z-Image's tokenizer. Shared: a test that adds tokens builds its own."""
    from vault.tokenizers import qwen3_tokenizer

    return qwen3_tokenizer()


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zip of six photographs, 256 pixels at the short side, four of them with a caption."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the tests take their photographs from scikit-image: pip install scikit-image"
        )
    file = tmp_path_factory.mktemp("photos") / "photos.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for name, caption in PHOTOS.items():
            with Image.open(Path(spec.origin).parent / "data" / name) as photo:
                scale = SHORT_SIDE / min(photo.size)
                small = ImageOps.scale(photo, scale, resample=Image.Resampling.LANCZOS)
                encoded = io.BytesIO()
                small.save(encoded, format=photo.format)
            archive.writestr(name, encoded.getvalue())
            if caption is not None:
                archive.writestr(Path(name).stem + ".txt", caption + "\n")
    return file


@pytest.fixture
def fill_the_disk() -> Iterator[Callable[[], None]]:
    """From its call on, until the test ends, no file can grow beyond 100 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
