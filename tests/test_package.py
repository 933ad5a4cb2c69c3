"""The command `zeroprior`, and the wheel that brings it."""

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from root import ROOT

from zeroprior.__main__ import COMMANDS, usage

KEPT_OUT = ("lab", "tests", "docs", "outputs", ".venv*", ".git", "build", "__pycache__")


def zeroprior(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zeroprior", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_help_comes_without_pytorch_and_names_every_command() -> None:
    program = (
        "import sys; sys.argv = ['zeroprior', '--help']; import zeroprior.__main__ as z; z.main(); "
        "assert not {'torch', 'pydantic', 'trainer', 'inference'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout == usage()
    assert all(re.search(rf"^  {name} ", done.stdout, re.M) for name in COMMANDS)


@pytest.mark.slow  # a matter of the machine's load
def test_help_comes_within_three_tenths_of_a_second() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        zeroprior("--help")
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.3


def test_an_unknown_command_suggests_the_nearest() -> None:
    done = zeroprior("trian")
    assert done.returncode == 2
    assert done.stderr == "error: unknown command trian; did you mean train?\n"


def test_help_of_a_command_is_typed_as_the_command() -> None:
    done = zeroprior("train", "--help")
    assert done.stdout.startswith("usage: zeroprior train [CONFIG.yaml] [DATASET] [options]")
    assert "zeroprior train imgs.zip --base z-image-turbo --steps 800" in done.stdout
    assert "python -m" not in done.stdout.partition("accelerate")[0]


def test_completion_is_a_script_with_the_commands_and_their_options() -> None:
    script = zeroprior("completion").stdout
    ask = (
        f"{script}\nCOMP_WORDS=(zeroprior train --base-m); COMP_CWORD=2; _zeroprior; "
        'echo "${COMPREPLY[@]}"; COMP_WORDS=(zeroprior gen); COMP_CWORD=1; _zeroprior; '
        'echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("--base-model\ngenerate\n", "")


def test_every_pin_is_in_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = {each.name: each for each in map(Requirement, project["dependencies"])}
    pins: dict[str, str] = {}
    for name in ("requirements.txt", "requirements-dev.txt"):
        lines = (ROOT / name).read_text().splitlines()
        found = {line.split("#")[0].strip().partition("==")[::2] for line in lines}
        pins |= {package: pin for package, pin in found if pin}
        if name == "requirements.txt":
            assert set(pins) <= set(ranges)  # the image has nothing that the package lacks
    assert set(ranges) <= set(pins)
    wrong = {n: pins[n] for n, each in ranges.items() if not each.specifier.contains(pins[n])}
    assert wrong == {}


# ---- The wheel -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, since a build writes beside its source."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*KEPT_OUT))
    build = [*"-m pip wheel -q --no-deps --no-build-isolation --no-index -w".split(), str(folder)]
    done = subprocess.run(
        [sys.executable, *build, str(folder / "source")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("*.whl")
    return made


@pytest.mark.slow
def test_the_wheel_holds_the_product_with_its_data_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tops = {name.partition("/")[0] for name in names}
    packages = {"adapters", "demo", "families", "inference", "miniature", "serving", "trainer"}
    assert tops == packages | {"charts", "fleet", "studio", "zeroprior", "train.py", "predict.py"}
    ours = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *tops],
        **{"cwd": ROOT, "capture_output": True, "text": True, "check": True},
    ).stdout.split()
    assert names == set(ours)


@pytest.mark.slow
def test_the_installed_command_plans_trains_and_generates_from_another_folder(
    wheel: Path, tmp_path: Path, photos: Path
) -> None:
    place = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    (site,) = place.glob("lib/python3*/site-packages")
    installed = subprocess.run(
        [
            *(sys.executable, "-m", "pip", f"--python={place / 'bin' / 'python'}"),
            *("install", "-q", "--no-deps", "--no-index", str(wheel)),
        ],
        **{"capture_output": True, "text": True},
    )
    assert installed.returncode == 0, installed.stderr
    libraries = next(each for each in sys.path if each.endswith("site-packages"))
    (site / "libraries.pth").write_text(libraries)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MODEL_VAULT")}
    env |= {"BASE_MODEL": "miniature-turbo", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    here = tmp_path / "elsewhere"
    here.mkdir()

    def run(*words: str) -> str:
        done = subprocess.run(
            [place / "bin" / "zeroprior", *words],
            **{"cwd": here, "env": env, "capture_output": True, "text": True, "timeout": 300},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert run("--help") == usage()
    assert re.search(r"^zeroprior \d", run("--version"))
    assert "base model miniature" in run("plan", "--base", "miniature-turbo", "--steps", "2")
    small = (
        "--steps",
        "1",
        "--rank",
        "1",
        "--batch-size",
        "1",
        "--seed",
        "1",
        "--caption-dropout",
        "0",
    )
    run("train", str(photos), "--base", "miniature-turbo", *small, "--sample-prompts", "")
    (log,) = here.glob("outputs/20*/log.txt")
    assert "training on zeroprior/miniature-turbo" in log.read_text()
    made = run("generate", "--weights", "outputs/latest/weights.zip", "--prompt", "a <zwx>")
    assert (here / made.splitlines()[-1]).is_file()
