"""A small archive of weights, and how its members are packed."""

import zipfile
from pathlib import Path

import torch

from adapters.archive import (
    Archive,
)
from adapters.formats.factors import Factors

LAYERS = ("layers.0.attention.to_q", "layers.1.feed_forward.w1")
META_VALUES = {
    "base_model": "Tongyi-MAI/Z-Image-Turbo",
    "training_mode": "zero_prior",
    "train_placeholder_token": True,
    "placeholder_token": "<zwx>",
    "placeholder_token_id": 151669,
    "placeholder_init_std": 1e-5,
    "rank": 4,
    "steps": 100,
}
Members = dict[str, bytes]


def some_factors(rank: int = 4) -> Factors:
    """Values that bfloat16 holds exactly."""
    generator = torch.Generator().manual_seed(rank)
    return {
        layer: (
            torch.randn(rank, 16, generator=generator).bfloat16().float(),
            torch.randn(24, rank, generator=generator).bfloat16().float(),
        )
        for layer in LAYERS
    }


def pack(members: Members, file: Path, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(file, "w", compression) as zipped:
        for name, content in members.items():
            zipped.writestr(name, content)
    return file


def assert_same(found: Archive, wanted: Archive) -> None:
    assert found.factors.keys() == wanted.factors.keys()
    for layer, matrices in wanted.factors.items():
        for ours, theirs in zip(found.factors[layer], matrices, strict=True):
            assert ours.dtype == torch.float32
            assert torch.equal(ours, theirs)
    assert found.placeholder is not None and wanted.placeholder is not None
    assert found.placeholder.token == wanted.placeholder.token
    assert found.placeholder.vectors.dtype == torch.float32
    assert torch.equal(found.placeholder.vectors, wanted.placeholder.vectors)
