"""python -m trainer and python -m inference, as a newcomer types them."""

import io
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from foreign_files import Foreign
from PIL import Image
from root import ROOT

from adapters.archive import read_archive
from trainer.__main__ import arguments_parser, take_files
from trainer.outputs import open_run

CONFIG = """\
train:
  train_placeholder_token: true
  rank: 2
  steps: 2
  batch_size: 1
  learning_rate: 1e-3
  preserve: off
  seed: 1
sample:
  prompts:
    - a photo of <zwx>
    - a watercolour of <zwx>
  num_inference_steps: 2
debug:
  log_prompt_ids: true
"""


@dataclass(frozen=True)
class Shell:
    """A terminal in a working folder, with the miniature as the default base."""

    folder: Path
    env: dict[str, str]

    def run(self, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """python -m MODULE ARGUMENTS…"""
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def draw(self, *arguments: str) -> list[bytes]:
        """The picture files that are drawn: the last lines of what is printed."""
        lossless = ("--output_format", "png")
        done = self.run("inference", "--prompt", "a photo of <zwx>", *lossless, *arguments)
        assert done.returncode == 0, done.stderr
        paths = [line for line in done.stdout.splitlines() if line.endswith(".png")]
        assert paths == done.stdout.splitlines()[-len(paths) :]
        return [(self.folder / path).read_bytes() for path in paths]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory, miniature_vault: Path) -> Shell:
    ours = {
        "PYTHONPATH": str(ROOT),
        "MODEL_VAULT": str(miniature_vault),
        "BASE_MODEL": "miniature-turbo",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return Shell(tmp_path_factory.mktemp("terminal"), os.environ | ours)


@pytest.fixture(scope="module")
def training(shell: Shell, photos: Path) -> str:
    """What a training prints; its weights.zip lies in results/ of the working folder."""
    (shell.folder / "run.yaml").write_text(CONFIG)
    foreign = Foreign(shell.folder / "results", shell.folder / "photos")
    done = shell.run("trainer", "run.yaml", "--dataset", str(photos), "--output-dir", "results")
    assert done.returncode == 0, done.stderr
    foreign.assert_untouched()
    return done.stdout


def test_a_config_becomes_weights(shell: Shell, training: str) -> None:
    archive = read_archive(shell.folder / "results" / "weights.zip")
    assert archive.placeholder is not None
    assert archive.placeholder.token == "<zwx>"
    assert archive.meta["settings"]["learning_rate"] == 1e-3
    assert "wrote results/weights.zip" in training


def test_the_training_shows_where_the_placeholder_sits_in_every_caption(training: str) -> None:
    assert re.search(r"^template around every prompt: .*<\|im_start\|>user", training, re.M)
    prompts = re.findall(r"^prompt: '(.*)'\n  text: .*\n  ids: \[.*\]\n(.*)$", training, re.M)
    assert ("a photo of <zwx>, a tabby cat", "  new tokens: <zwx> at [7]") in prompts
    assert len(prompts) == len(set(prompts)) == 5  # six pictures, two with the default caption


def test_the_sample_prompts_are_drawn(shell: Shell, training: str) -> None:
    for number in ("00", "01"):
        picture = shell.folder / "results" / "samples" / "step-000002" / f"{number}.png"
        assert Image.open(picture).size == (64, 64)
    assert "generated 'a watercolour of <zwx>': results/samples/step-000002/01.png" in training


def test_weights_generate_the_image_of_the_last_preview(shell: Shell, training: str) -> None:
    """Whole or unpacked, from another process, with hyphens or underscores."""
    results = shell.folder / "results"
    sample = pixels((results / "samples" / "step-000002" / "00.png").read_bytes())
    two = ("--seed", "1", "--num_inference_steps", "2", "--num_outputs", "2")
    first, second = shell.draw("--weights", "results/weights.zip", *two)
    assert pixels(first) == sample
    assert pixels(second) != sample
    assert (shell.folder / "outputs" / "images" / "image-1.png").read_bytes() == second

    with zipfile.ZipFile(results / "weights.zip") as archive:
        archive.extractall(shell.folder / "unpacked")
    lora = ("--lora-path", "unpacked/lora/lora_weights.safetensors")
    word = ("--placeholder-token", "<zwx>", "--output-dir", "loose")
    one = ("--seed", "1", "--num-inference-steps", "2", "--width", "64", "--height", "64")
    assert [pixels(each) for each in shell.draw(*lora, *word, *one)] == [sample]


def test_a_folder_in_use_is_refused_in_one_line(shell: Shell, photos: Path) -> None:
    (shell.folder / "held.yaml").write_text("train: {steps: 1}")
    with open_run(photos, shell.folder / "held"):
        arguments = ("held.yaml", "--dataset", str(photos), "--output_dir", "held")
        done = shell.run("trainer", *arguments)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: held is in use by another run (process {os.getpid()} on ")
    assert "pictures" not in done.stdout  # nothing was read


def pixels(file: bytes) -> bytes:
    """A picture's pixels alone; what is written beside them differs."""
    return Image.open(io.BytesIO(file)).tobytes()


@pytest.mark.parametrize("module", ["trainer", "inference"])
def test_help_teaches(shell: Shell, module: str) -> None:
    done = shell.run(module, "--help")
    assert done.returncode == 0
    example = done.stdout[done.stdout.index("Example") :]
    assert f"  python -m {module} " in example
    assert "<zwx>" in example


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("trainer typo.yaml", "typo.yaml: unknown key train.rnk; did you mean train.rank?"),
        ("trainer empty.yaml --dataset nowhere.zip", "nowhere.zip: does not exist; pass the path"),
        ("inference --prompt x --weights nowhere.zip", "nowhere.zip: no such file"),
        ("inference --prompt x --width 64", "width and height go together"),
        ("inference --prompt x --base_model z-imagine", "did you mean 'z-image'?"),
        ("inference --prompt x --output_quality 0", "output_quality is 0; it must be between 1"),
    ],
)
def test_a_mistake_is_answered_in_one_line(shell: Shell, command: str, complaint: str) -> None:
    (shell.folder / "typo.yaml").write_text("train: {rnk: 4}")
    (shell.folder / "empty.yaml").write_text("train: {steps: 1}")
    done = shell.run(*command.split())
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert complaint in line


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("run.yaml --stps 5", "unknown option --stps; did you mean --steps?"),
        ("run.yaml --learning=1", "unknown option --learning; did you mean --learning-rate?"),
        ("train run.yaml", "there is no dataset train; give [plan] [CONFIG.yaml] [DATASET]"),
        ("run.yaml plan", "there is no dataset plan; give [plan] [CONFIG.yaml] [DATASET]"),
        ("a.yaml b.yaml", "give one CONFIG.yaml and one DATASET, not a.yaml b.yaml"),
    ],
)
def test_what_the_command_line_does_not_know_says_what_it_takes(
    words: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = arguments_parser()
    with pytest.raises(SystemExit) as left:
        take_files(parser.read(words.split()), parser)
    assert left.value.code == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]
