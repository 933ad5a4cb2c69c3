"""Checks what a tool will write, before it reads or computes anything."""

import os
from collections.abc import Sequence
from pathlib import Path

from adapters.tools.opened import ToolError


def check_place(path: Path) -> None:
    """Raises `ToolError` if a file or folder cannot be created at `path`."""
    nearest = next((each for each in path.parents if os.path.lexists(each)), path)
    if not nearest.is_dir():
        raise ToolError(f"{path} cannot be written, since {nearest} is not a folder; name another")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ToolError(f"{path} cannot be written, since {nearest} is read-only; name another")


def check_files(files: Sequence[Path], overwrite: bool) -> None:
    """Raises `ToolError` for files that cannot be written, or exist and may not be replaced."""
    for file in files:
        check_place(file)
        if file.is_dir():
            raise ToolError(f"{file} is a folder, and this tool writes a file; name another")
    if twice := [file for number, file in enumerate(files) if file in files[:number]]:
        raise ToolError(f"{twice[0]} is also the file of a token's embedding; name another")
    existing = [str(file) for file in files if file.exists()]
    if existing and not overwrite:
        raise ToolError(
            f"{', '.join(existing)} exists already; name another with --output, or add --overwrite"
        )
