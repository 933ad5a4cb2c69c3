"""Reads `cog.yaml`, which names the entry points and the version of Cog."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "cog.yaml"
ENTRY_POINTS = {"predict": "predict.py:Predictor", "train": "train.py:train"}


def read() -> dict[str, Any]:
    """The parsed file; an installed package has none, and its entry points are the same."""
    if FILE.is_file():
        return yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return {**ENTRY_POINTS, "build": {"sdk_version": version("cog")}}


@contextmanager
def working_folder() -> Iterator[Path]:
    """The folder from which Cog's runtime reads the entry points and `.cog`.

    It is the repository; for an installed package, a temporary folder with copies.
    """
    if FILE.is_file():
        yield ROOT
        return
    with tempfile.TemporaryDirectory(prefix="zeroprior-serve-") as folder:
        for reference in ENTRY_POINTS.values():
            shutil.copy(ROOT / reference.partition(":")[0], folder)
        yield Path(folder)
