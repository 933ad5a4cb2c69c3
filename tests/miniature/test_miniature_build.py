"""The recipe of the miniature runs from its first stage to its last, as one command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from adapters.turbo import TurboAdapter
from miniature.build import main
from miniature.judge import load_judge
from miniature.weights import ADAPTER, JUDGE, TURBO, UNDISTILLED, load_base, load_qwen

# Compiling pays for thousands of steps, not for two.
ENVIRONMENT = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}


def build(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "miniature.build", "--processes", "1", *map(str, options)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    done = build("--quick", "--work", folder / "work", "--weights", folder / "weights")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_one_command_makes_every_part(built: Path) -> None:
    weights = built / "weights"
    undistilled, turbo = load_base(UNDISTILLED, weights), load_base(TURBO, weights)
    moved = [
        not a.equal(b)
        for a, b in zip(
            undistilled.transformer.parameters(), turbo.transformer.parameters(), strict=True
        )
    ]
    assert any(moved), "turbo is the undistilled base"
    load_judge(weights / JUDGE)
    assert load_qwen(weights).transformer.proj_out.weight.any(), "miniature-qwen is not trained"
    adapter = TurboAdapter.read(weights / ADAPTER)
    assert adapter.merge(turbo.transformer, "the built turbo") > 0


@pytest.mark.slow
def test_a_finished_stage_is_not_done_again(built: Path) -> None:
    stages = ["--quick", "--work", built / "work", "--weights", built / "weights"]
    before = (built / "work" / "vae.pt").stat().st_mtime_ns
    assert build(*stages, "--stage", "vae").returncode == 0
    assert (built / "work" / "vae.pt").stat().st_mtime_ns == before


def test_a_quick_recipe_never_overwrites_the_shipped_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["miniature.build", "--quick"])
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 2
    assert "--weights" in capsys.readouterr().err
