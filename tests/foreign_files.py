"""Files that a person keeps where runs write, with names that are nearly those of a run's files."""

import os
from pathlib import Path

NAMES = (
    "notes.txt",
    "weights-of-my-dog.zip",
    "weights-fox-good.zip",
    "weights.zip.bak",
    "my weights.zip",
    "report-for-my-boss.html",
    "report (1).html",
    "hub-notes/keep.txt",
    "hub-pictures/README.md",
    ".weights-draft.part",
    ".weights.zip.part",
    ".report.html.my-draft.part",
    "checkpoints/step-000006-good.safetensors",
    "checkpoints/step-000007.safetensors.bak",
    "checkpoints/step-mine.safetensors",
    "checkpoints/step-1.safetensors",
    "checkpoints/.step-mine.part",
    "samples/step-by-step-guide/01.png",
    "samples/step-1/00.png",
    "samples/contact sheet.png",
    "before/0.png",
    "after/0.png",
    "run.json.old",
    "run.lock.old",
)


class Foreign:
    """Such files in a folder, and a photo behind a link in it."""

    def __init__(self, folder: Path, behind: Path) -> None:
        """`behind` is a new folder elsewhere, which `folder`/linked leads to."""
        self.files = [folder / name for name in NAMES]
        self.files += [behind / "step-000001" / "00.png", behind / "step-000003.safetensors"]
        for file in self.files:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(f"of a person: {file}".encode())
        self.link = folder / "linked"
        self.link.symlink_to(behind)

    def assert_untouched(self) -> None:
        """Raises AssertionError if one of them is not what it was."""
        for file in self.files:
            assert file.is_file(), f"{file} was removed"
            assert file.read_bytes() == f"of a person: {file}".encode(), f"{file} was overwritten"
        assert os.path.islink(self.link)
