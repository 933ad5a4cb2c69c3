"""Job files of other programs, and copies of them with other values."""

import shutil
from pathlib import Path

from root import ROOT

CASES = ROOT / "tests" / "cases" / "jobs"


def copied(tmp_path: Path, case: str, **changes: str) -> Path:
    """A case's folder or file with texts replaced; returns the job's file."""
    if "/" not in case:
        shutil.copy(CASES / case, tmp_path / case)
    else:
        shutil.copytree(CASES / case.split("/")[0], tmp_path, dirs_exist_ok=True)
    job = tmp_path / case.split("/")[-1]
    for file in tmp_path.iterdir():
        text = file.read_text()
        for old, new in changes.items():
            text = text.replace(old, new)
        file.write_text(text)
    return job


def keys_of(lines: list[str]) -> list[str]:
    return sorted({line.split(": ")[0] for line in lines})
