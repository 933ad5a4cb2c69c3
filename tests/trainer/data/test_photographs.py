"""The zero-prior study on photographs: its judge sees, and it runs on the published classes."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from vault.clip import write_clip

from lab.experiments.clip import Clip, has_lpips, lpips
from lab.experiments.zero_prior import __main__ as command
from lab.experiments.zero_prior.photographs import class_of, subjects_of
from lab.experiments.zero_prior.study import RESULTS


@pytest.fixture
def judged(vault: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `$MODEL_VAULT` of the small models with a small CLIP beside them."""
    folder = tmp_path / "vault"
    folder.mkdir()
    for owner in vault.iterdir():
        (folder / owner.name).symlink_to(owner)
    write_clip(folder)
    monkeypatch.setenv("MODEL_VAULT", str(folder))
    return folder


def test_clip_tells_pictures_and_texts_apart(judged: Path) -> None:
    clip = Clip()
    red, blue = (Image.new("RGB", (40, 30), colour) for colour in ("red", "blue"))
    seen = clip.images([red, blue, red])
    assert seen.shape == (3, 16) and torch.allclose(seen.norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.equal(seen[0], seen[2]) and not torch.allclose(seen[0], seen[1])
    read = clip.texts(["a dog", "a much longer text about a dog " * 20])
    assert torch.allclose(read.norm(dim=1), torch.ones(2), atol=1e-5)
    # Padding is not read.
    assert torch.allclose(clip.texts(["a dog"])[0], read[0], atol=1e-5)


@pytest.mark.skipif(not has_lpips(), reason="lpips and torchvision are not among the pins")
def test_lpips_is_zero_for_the_same_picture() -> None:
    red, noise = Image.new("RGB", (64, 64), "red"), Image.effect_noise((64, 64), 90).convert("RGB")
    same, other = lpips([red, red], [red, noise])
    assert same == 0 and other > 0.1


def test_a_subject_has_a_class(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no folder of pictures"):
        subjects_of(tmp_path)
    (tmp_path / "old_man-pablo").mkdir()
    assert [class_of(each) for each in subjects_of(tmp_path)] == ["an old man"]
    (tmp_path / "rex").mkdir()
    with pytest.raises(ValueError, match="name the folder CLASS-NAME"):
        subjects_of(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["z-image-turbo", "qwen-image"])
def test_the_study_runs_on_photographs(
    base: str,
    judged: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    subject = tmp_path / "photographs" / "dog-rex"
    subject.mkdir(parents=True)
    shutil.unpack_archive(photos, subject, "zip")
    folder = tmp_path / "out"
    ask = ["zero_prior", "run_experiment", "--small", "--base", base, "--folder", str(folder)]
    monkeypatch.setattr(sys, "argv", [*ask, "--photographs", str(subject.parent)])
    command.main()
    rows = [json.loads(line) for line in (folder / RESULTS).read_text().splitlines()]
    assert [row["point"] for row in rows] == ["untrained"] * 4 + ["converged"] * 4 + ["rate 2e-3"]
    untrained = {row["condition"]: row for row in rows[:4]}
    assert max(untrained["zero_prior"]["free_apart"]) == 0
    assert all(max(row["free_apart"]) > 0 for row in rows[4:])
    for name in ("metrics", "compare"):
        monkeypatch.setattr(sys, "argv", ["zero_prior", name, "--folder", str(folder)])
        command.main()
    said = capsys.readouterr().out
    assert "| likeness to the prompt | " in said and "| rate 2e-3 | " in said
