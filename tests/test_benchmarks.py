"""The benchmarks run on this machine, and say what they would run on another."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import SUITES, commands
from benchmarks.gpu import Case, cases, main, measure
from benchmarks.training_step import SIZES, Ways
from benchmarks.whole_run import our_command
from trainer.config import read_config


def test_every_suite_of_make_bench_is_a_module() -> None:
    for suite in SUITES:
        assert importlib.util.find_spec(f"benchmarks.{suite.module}") is not None
    made = commands(quick=False, peer={"--peer-script": "x.py"})
    assert [title for title, command in made.items() if "--peer-script" in command] == [
        suite.title for suite in SUITES if suite.takes_peer
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which would be measured")
def test_without_a_gpu_its_suite_says_what_it_would_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    main()
    said = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert said[1:] == [str(case) for case in cases()]


@pytest.mark.parametrize("work", ["step", "draw", "swap"])
def test_the_gpu_suite_measures_each_kind_of_work(work: str) -> None:
    """On a CPU, at the miniature's size."""
    case = Case("miniature-turbo", work, edge=32, steps=1, checkpointing=True)
    cells = measure(case, torch.device("cpu"), rate=1e12, repeats=1)
    assert cells[0] == str(case) and len(cells) == 5


def test_all_ways_to_take_a_step_take_one(tmp_path: Path) -> None:
    ways = Ways(SIZES["miniature"], tmp_path / "base")
    for make in ways.all(compiled=False).values():
        make()()


def test_the_training_that_is_measured_is_one_that_can_be_asked_for(tmp_path: Path) -> None:
    config = our_command(tmp_path, Path("miniature-turbo"), tmp_path, steps=30)[-1]
    settings = read_config(config)
    assert (settings.steps, settings.batch_size, settings.subject) == (30, 1, None)
