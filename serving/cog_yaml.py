"""Reads `cog.yaml`, which names the entry points and the version of Cog."""

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]


def read() -> dict[str, Any]:
    """The parsed file."""
    return yaml.safe_load((ROOT / "cog.yaml").read_text(encoding="utf-8"))
