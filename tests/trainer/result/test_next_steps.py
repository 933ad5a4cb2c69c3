"""The last lines of a run are commands that work with the file just written."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from families.registry import BASES
from inference.__main__ import arguments_parser
from inference.fetch.sources import allowed_file
from trainer.result.next_steps import MAX_UPLOAD, describe_next_steps


def commands(weights: Path, size: int, word: str | None = "<zwx>") -> tuple[list[list[str]], str]:
    """The commands as a shell reads them, and the whole text."""
    weights.parent.mkdir(parents=True, exist_ok=True)
    with weights.open("wb") as file:
        file.truncate(size)
    text = describe_next_steps(weights, word)
    lines = [line for line in text.splitlines() if line.startswith(("  python", "  cog"))]
    return [shlex.split(line) for line in lines], text


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("folder", ["outputs/2026-11-26-fox-01", "outputs/my fox $HOME"])
def test_a_small_file_is_sent(folder: str) -> None:
    weights = Path(folder, "weights.zip")
    (python, cog), _ = commands(weights, MAX_UPLOAD)
    given = arguments_parser().parse_args(python[3:])
    assert (given.weights, given.prompt) == (str(weights), "a photo of <zwx>")
    assert cog == [
        *("cog", "run", "-i", f"replicate_weights=@{weights}", "-i", "prompt=a photo of <zwx>")
    ]


def test_a_large_file_is_named_by_a_path_that_the_server_may_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = Path("outputs/2026-11-26-fox-01/weights.zip")
    (_, cog), text = commands(weights, MAX_UPLOAD + 1)
    assert "@ sends at most 74 MB, and weights.zip has 74.0 MB" in text
    _, _, _, environment, _, source, *_ = cog
    # The container's /src is this folder.
    name, _, folder = environment.replace("/src", str(tmp_path)).partition("=")
    monkeypatch.setenv(name, folder)
    path = source.removeprefix("replicate_weights=").replace("/src", str(tmp_path))
    assert allowed_file(path) == weights.absolute()


def test_a_large_file_outside_of_the_project_has_to_be_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    (python,), text = commands(tmp_path / "elsewhere" / "weights.zip", MAX_UPLOAD + 1)
    assert str(tmp_path / "elsewhere" / "weights.zip") in python
    assert text.endswith("; for Cog, copy it into this folder)")


def test_a_base_in_a_folder_is_named_again() -> None:
    weights, base = Path("weights.zip"), BASES["miniature-turbo"]
    weights.write_bytes(b"1")
    assert "--base-model" not in describe_next_steps(weights, "<zwx>", base)
    mine = replace(base, name="my base", hub_id="my base", folder=Path("/models/my base"))
    text = describe_next_steps(weights, "<zwx>", mine)
    assert "--base-model '/models/my base' --prompt" in text
    assert "cog run" not in text
