"""What a newcomer sees: the first line at once, nothing of the libraries, errors in one line."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from root import ROOT

from families.registry import NO_GPU
from inference import __main__ as inference
from trainer import __main__ as trainer

TOO_SLOW = "no GPU: this run would be extremely slow, since the transformer of z-image-turbo has 6"


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name in ("MODEL_VAULT", "BASE_MODEL"):
        monkeypatch.delenv(name, raising=False)
    ours = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return os.environ | ours


def run(
    folder: Path, env: dict[str, str], *arguments: str, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout
    )


# ---- The first line ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (
            ["trainer", "my.yaml", "--name", "fox"],
            [
                "train my.yaml: base model z-image, dataset imgs.zip, output in a new folder in "
                "outputs/",
                "loading libraries \u2026",
            ],
        ),
        (
            ["trainer", "my.yaml", "--output_dir", "fox", "--base_model", "miniature"],
            [
                "train my.yaml: base model miniature, dataset imgs.zip, output in fox",
                "loading libraries \u2026",
            ],
        ),
        (["trainer", "plan", "my.yaml"], ["plan of my.yaml: base model z-image"]),
        (
            ["inference", "--prompt", "x", "--weights", "w.zip", "--output_dir", "fox"],
            ["generate: base model of the weights, weights w.zip, images in fox/"],
        ),
        (["inference", "--prompt", "x"], ["generate: base model auto, images in outputs/images/"]),
        (["demo"], ["demo: trains a LoRA on a few images with the miniature test model"]),
    ],
)
def test_the_first_line_says_what_is_about_to_run_before_any_library_is_imported(
    arguments: list[str], lines: list[str], env: dict[str, str], tmp_path: Path
) -> None:
    """`torch` cannot be imported here, so whatever is printed comes before it."""
    (tmp_path / "my.yaml").write_text("base_model: z-image\ndataset: imgs.zip\n")
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')\n")
    env = env | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = run(tmp_path, env, "-m", *arguments)
    assert done.stderr == "torch is imported\n"
    printed = done.stdout.splitlines()
    assert len(printed) == 2
    for line, wanted in zip(printed, lines, strict=False):
        assert line.startswith(wanted)


def test_a_key_in_the_first_line_is_not_shown(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')\n")
    env = env | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    for url in ("https://a.example/b?token=SECRET", "a.example/b?token=SECRET"):
        done = run(tmp_path, env, "-m", "inference", "--prompt", "x", "--weights", url)
        assert "a.example/b" in done.stdout
        assert "SECRET" not in done.stdout + done.stderr


# ---- Plain Python --------------------------------------------------------------------------------

SCRIPT = """\
from pathlib import Path
from train import train
from predict import Predictor

weights = train(
    dataset=Path({dataset!r}), steps=1, rank=1, batch_size=1, validation_every=0, seed=1,
    caption_dropout=0, preserve="off",
    sample_prompts="",
).weights
predictor = Predictor()
predictor.setup()
print(*predictor.predict(prompt="a <zwx>", replicate_weights=weights, seed=1))
predictor.predict(prompt="")
"""
OURS = re.compile(
    r"^(warning: only 6 pictures"
    r"|encoding |drawing|training|memory: |check |gate |wrote |LoRA|training on |the run's folder "
    r"|6 pictures|<zwx> is token|zero prior: |zeroprior/|miniature-turbo|outputs/|  |stopped|error"
    r"|No GPU: )"
)


def test_a_script_prints_our_own_lines_only_and_its_mistake_in_one(
    photos: Path, env: dict[str, str], tmp_path: Path
) -> None:
    """Training and generation in a fresh process, where the libraries are imported by our code."""
    (tmp_path / "script.py").write_text(SCRIPT.format(dataset=str(photos)))
    done = run(tmp_path, env, "script.py")
    assert done.returncode == 1
    bars = re.compile(r"\d+%\||it/s|\?(it|step|picture)/s|^\s*$")
    lines = [line for line in re.split(r"[\n\r]", done.stderr) if not bars.search(line)]
    assert lines == ["error: prompt is empty; describe the image (script.py, line 13)"]
    lines = done.stdout.splitlines()
    assert lines[0].startswith(NO_GPU)
    assert "outputs/images/image-0.webp" in lines
    foreign = re.compile(r"Failed to load|triton|Traceback|site-packages|W\d{4} |Warning|deprecat")
    assert [line for line in lines if foreign.search(line)] == []


def test_an_unexpected_error_keeps_its_traceback_and_a_caught_one_is_not_shown(
    env: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(
        "from serving.inputs import logged\n"
        "def fail(error):\n"
        "    with logged({}):\n"
        "        raise error\n"
        "try:\n"
        "    fail(OSError('caught'))\n"
        "except OSError:\n"
        "    pass\n"
        "fail(KeyError('ours'))\n"
    )
    done = run(tmp_path, env, "script.py")
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.endswith("KeyError: 'ours'\n")
    assert "caught" not in done.stderr


# ---- Without a GPU -------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_gpu: None) -> Path:
    """The working folder of a command, with a config in it; no models are on this machine."""
    (tmp_path / "my.yaml").write_text("dataset: imgs.zip\nbase_model: z-image-turbo\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MODEL_VAULT", raising=False)
    monkeypatch.setattr("families.repository.download", lambda *_: pytest.fail("a download"))
    return tmp_path


@pytest.mark.parametrize(
    ("main", "arguments"),
    [(trainer, ["my.yaml"]), (inference, ["--prompt", "x", "--base_model", "z-image-turbo"])],
)
def test_a_large_model_without_a_gpu_is_refused_before_any_download(
    main: ModuleType, arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert str(ended.value).startswith(f"error: {TOO_SLOW}")
    assert str(ended.value).endswith("add --cpu to run it anyway")
    assert not [*folder.glob("outputs/20*")]


def test_with_cpu_a_large_model_is_tried(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["command", "my.yaml", "--cpu"])
    with pytest.raises(SystemExit, match="imgs.zip: does not exist"):
        trainer.main()
    assert TOO_SLOW in caplog.text


def test_plain_python_warns_of_a_large_model_without_a_gpu(
    no_gpu: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from families.repository import MissingModel
    from inference.engine import Engine
    from inference.inputs import GenerationInputs

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("MODEL_VAULT", raising=False)
    with pytest.raises(MissingModel):
        Engine().predict(GenerationInputs(prompt="x", base_model="z-image-turbo"), output_dir=None)
    assert TOO_SLOW in caplog.text


def test_a_small_model_of_the_same_family_is_not_refused(use_vault: Path) -> None:
    import torch

    from families.no_gpu import why_too_slow
    from families.registry import find_base

    assert why_too_slow(find_base("z-image-turbo"), torch.device("cpu")) is None
    assert why_too_slow(find_base("miniature"), torch.device("cpu")) is None
