"""What the demo ships and shows."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from foreign_files import Foreign
from root import ROOT

from demo import __main__ as demo
from demo.subject import SCENES, draw_scenes, photographs, scenes
from trainer.data.dataset import read_dataset


def test_the_shipped_dataset_is_what_the_world_draws(tmp_path: Path) -> None:
    generated = draw_scenes(tmp_path / "subject.zip")
    ours, shipped = (read_dataset(path, "", "<zwx>") for path in (generated, SCENES))
    assert [(each.name, each.caption) for each in ours] == [
        (each.name, each.caption) for each in shipped
    ]
    for one, other in zip(ours, shipped, strict=True):
        assert one.image().tobytes() == other.image().tobytes(), one.name
    assert 10 <= len(shipped) <= 20
    assert all("<zwx>" in each.caption for each in shipped)


def test_every_prompt_of_the_demo_holds_the_new_word(tmp_path: Path) -> None:
    for subject in (scenes(), photographs(tmp_path)):
        assert all("<zwx>" in prompt for prompt in subject.prompts)
        assert len(read_dataset(subject.dataset, "", "<zwx>")) >= len(subject.prompts)


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [True, False])
def test_the_demo_prints_few_lines_and_one_bar(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal, a bar for the training alone; without one a line for each tenth of it."""
    program = (
        "import sys; from dataclasses import replace; from demo import __main__ as demo, subject; "
        "short = replace(subject.scenes(), steps=20); subject.scenes = lambda: short; "
        f"sys.stderr.isatty = lambda: {terminal}; demo.main([])"
    )
    env = {k: v for k, v in os.environ.items() if k != "MODEL_VAULT"}
    env |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        **{"cwd": tmp_path, "env": env, "capture_output": True, "text": True, "timeout": 300},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    steps = [line for line in lines if line.startswith("training ")]
    assert len(lines) - len(steps) <= 25
    assert len(steps) == (0 if terminal else 11)  # the first step and ten tenths
    assert "warning" not in done.stdout
    bars = {each.partition(":")[0] for each in re.split(r"[\r\n]", done.stderr) if each.strip()}
    assert bars == ({"training"} if terminal else set())
    (log,) = tmp_path.glob("outputs/20*/log.txt")
    assert "check " in log.read_text()


@pytest.mark.slow
def test_the_demo_runs_twice_and_overwrites_nothing_but_its_one_picture(
    miniature_vault: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODEL_VAULT", str(miniature_vault))
    monkeypatch.setenv("BASE_MODEL", "miniature-turbo")
    foreign = Foreign(tmp_path / "outputs", tmp_path / "photos")
    subject = replace(scenes(), prompts=scenes().prompts[:1], steps=1)
    for _ in range(2):
        demo._show(subject, 0.0)
    assert (tmp_path / "outputs" / "demo.png").is_file()
    runs = sorted((tmp_path / "outputs").glob("*-subject-0[12]"))
    assert len(runs) == 2
    for run in runs:
        for name in ("weights.zip", "report.html", "before/0.png", "after/0.png"):
            assert (run / name).is_file()
    foreign.assert_untouched()
