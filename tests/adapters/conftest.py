"""A small archive of weights."""

import zipfile
from pathlib import Path

import pytest
import torch
from archives import META_VALUES, Members, some_factors

from adapters.archive import (
    Archive,
    write_archive,
)
from adapters.placeholder import Placeholder


@pytest.fixture
def archive() -> Archive:
    vectors = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)) * 1e-5
    return Archive(some_factors(), (Placeholder("<zwx>", vectors),), META_VALUES)


@pytest.fixture
def weights(archive: Archive, tmp_path: Path) -> Path:
    return write_archive(archive, tmp_path / "weights.zip")


@pytest.fixture
def members(weights: Path) -> Members:
    with zipfile.ZipFile(weights) as zipped:
        return {name: zipped.read(name) for name in zipped.namelist()}
