"""The benchmarks run on this machine, and say what they would run on another."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lab.benchmarks import gpu_check, quantization_drift
from lab.benchmarks.__main__ import SUITES, commands
from lab.benchmarks.gpu import Case, cases, main, measure
from lab.benchmarks.gpu_check_parts import PARTS, chosen
from lab.benchmarks.growth import QUICK, Shape, Shapes, draw_plot, loras, training_steps
from lab.benchmarks.preparation import OWN, PLACEHOLDER, SAME, prepare, write_dataset
from lab.benchmarks.training_step import SIZES, Ways
from lab.benchmarks.whole_run import our_command
from miniature.models import write_random
from trainer.settings.config import read_config


def test_every_suite_of_make_bench_is_a_module() -> None:
    for suite in SUITES:
        assert importlib.util.find_spec(f"lab.benchmarks.{suite.module}") is not None
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


def test_without_a_gpu_the_check_says_what_it_would_run(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--quick"])
    gpu_check.main()
    said = capsys.readouterr().out
    parts = chosen(gpu_check.Check(torch.device("cuda"), True, Path()))
    assert all(f"  {part}: " in said for part in parts) and len(parts) < len(PARTS)


@pytest.mark.slow
def test_the_check_for_a_gpu_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "check.json"
    options = ["--full", "--cpu", "--seconds", "3000", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["gpu_check", *options])
    gpu_check.main()
    rows = json.loads(file.read_text())["rows"]
    states = {(row["part"], row["what"]): row["state"] for row in rows}
    assert {part for part in PARTS if (part, "in all") in states} == set(PARTS)
    for family in ("z-image-turbo", "qwen-image"):
        assert states[family, "resumed weights differ by"] == "passed"
        assert states[family, "predict again"] == "passed"
        assert states[family, "check: the last preview can be reproduced"] == "passed"
    assert "failed" not in states.values()


def test_a_part_that_dies_or_hangs_ends_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes that stand for parts: one dies, one hangs, one works."""
    script = (
        "import json, os, pathlib, sys, time\n"
        "name, folder = sys.argv[sys.argv.index('--part') + 1], sys.argv[-2]\n"
        "row = {'part': name, 'what': 'begun', 'state': 'passed'}\n"
        "pathlib.Path(folder, name + '.jsonl').write_text(json.dumps(row) + '\\n')\n"
        "print('the last words', flush=True)\n"
        "{'rows': os.abort, 'memory': lambda: time.sleep(600)}.get(name, int)()\n"
    )
    program = tmp_path / "part.py"
    program.write_text(script)
    popen = gpu_check.subprocess.Popen

    def instead(command: list[str], **options: Any) -> Any:
        return popen([sys.executable, str(program), *command[3:]], **options)

    monkeypatch.setattr(gpu_check.subprocess, "Popen", instead)
    check = gpu_check.Check(torch.device("cpu"), False, tmp_path)
    found = {}
    for name, seconds in (("rows", 60), ("memory", 3), ("speed", 60)):
        rows = list(gpu_check.run_part(name, check, seconds))
        assert (rows[0].what, rows[-1].what) == ("begun", "in all")
        found[name] = [row.note for row in rows if row.what == "did not finish"]
    assert found["rows"][0].endswith("the last words") and "exit code -6" in found["rows"][0]
    assert found["memory"] == ["stopped after 3 s"] and found["speed"] == []


@pytest.mark.parametrize("work", ["step", "draw", "swap"])
def test_the_gpu_suite_measures_each_kind_of_work(work: str) -> None:
    """On a CPU, at the miniature's size."""
    case = Case("miniature-turbo", work, edge=32, steps=1, checkpointing=True)
    cells = measure(case, torch.device("cpu"), rate=1e12, repeats=1)
    assert cells[0] == str(case) and len(cells) == 5


@pytest.mark.slow
def test_the_drift_of_a_quantized_base_is_ordered_by_the_error_of_its_weights() -> None:
    drift = {kind: cells for _, kind, *cells in quantization_drift.rows("miniature-turbo", 1, 32)}
    velocity = {kind: float(cells[1].removesuffix(" %")) for kind, cells in drift.items()}
    assert 0 < velocity["rounding"] < velocity["int8"] < velocity["fp8"] < velocity["fp8 products"]
    assert velocity["fp8 products"] < 6


def test_all_ways_to_take_a_step_take_one(tmp_path: Path) -> None:
    ways = Ways(SIZES["miniature"], tmp_path / "base")
    for make in ways.all(compiled=False).values():
        make()()


def test_the_training_that_is_measured_is_one_that_can_be_asked_for(tmp_path: Path) -> None:
    config = our_command(tmp_path, Path("miniature-turbo"), tmp_path, steps=30)[-1]
    settings = read_config(config)
    assert (settings.steps, settings.batch_size, settings.subject) == (30, 1, None)


def test_preparing_pictures_keeps_the_text_that_the_steps_do_not_make(tmp_path: Path) -> None:
    write_random(tmp_path / "base", dtype=torch.float32)
    text = {}
    for captions in (SAME, OWN, PLACEHOLDER):
        dataset = write_dataset(tmp_path / "pictures.zip", 4, captions)
        row = prepare(dataset, tmp_path / "base", captions)
        assert row["pictures"] == 4 and float(row["peak, MB"]) > 0
        text[captions] = float(row["text, kB each"])
    assert text[OWN] > 3 * text[SAME] > 0 and text[PLACEHOLDER] == 0


def test_a_step_keeps_more_with_rank_and_batch(tmp_path: Path) -> None:
    for axis in ("rank", "batch"):
        few, many = training_steps(axis, QUICK, tmp_path)
        assert float(many["kept, MB"]) > float(few["kept, MB"])


def test_the_training_whose_growth_is_measured_has_the_shape_that_is_named(tmp_path: Path) -> None:
    shapes = Shapes(QUICK.size, tmp_path / "base")
    loop = shapes.training(Shape(rank=3, side=6, batch=2))
    latents_BCHW, _, _, captions = loop.batch(0)
    assert latents_BCHW.shape[0] == len(captions) == 2
    assert latents_BCHW.shape[2] == 6 * loop.family.patch_size
    assert min(min(each.shape) for each in loop.parameters) == 3


def test_loras_laid_at_once_are_measured_and_drawn(tmp_path: Path) -> None:
    rows = loras(QUICK, tmp_path)
    assert [row["LoRAs"] for row in rows] == list(QUICK.loras) == [1, 2]
    assert float(rows[1]["factors, MB"]) == 2 * float(rows[0]["factors, MB"]) > 0
    draw_plot({"loras": rows}, tmp_path / "growth.png")
    with Image.open(tmp_path / "growth.png") as plot:
        assert len(plot.getcolors()) > 2  # not an empty page
