"""The benchmarks run on this machine, and say what they would run on another."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lab.benchmarks import exact_restore, gpu, gpu_check, peers, quantization_drift
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
    quick, full = (chosen(gpu_check.Check(torch.device("cuda"), each, Path())) for each in (1, 0))
    assert all(f"  {part}: " in said for part in quick) and len(quick) < len(full) == len(PARTS)
    assert (sum(quick.values()), sum(full.values())) == (230, 580)  # seconds: 4 and 10 minutes
    asked = gpu_check.Check(torch.device("cuda"), True, Path(), only=("speed", "lora"))
    assert list(chosen(asked)) == ["lora", "speed"]


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
    reserved = {"rows": 2, "memory": 2, "speed": 8}
    monkeypatch.setattr(gpu_check, "chosen", lambda _: reserved)
    monkeypatch.setattr(gpu_check, "LEAST", 0.5)
    check = gpu_check.Check(torch.device("cpu"), False, tmp_path)
    rows: dict[str, list[gpu_check.Row]] = {name: [] for name in reserved}
    for row in gpu_check.run(check, 12.0):
        rows[row.part].append(row)
    found = {}
    for name, each in rows.items():
        assert (each[0].what, each[-1].what) == ("begun", "in all")
        found[name] = [row.note for row in each if row.what == "did not finish"]
    assert found["rows"][0].endswith("the last words") and "exit code -6" in found["rows"][0]
    # It had the time that the first one did not need, and none of the last one's.
    (stopped,) = found["memory"]
    assert 2 < float(stopped.split()[2]) <= 4 and found["speed"] == []


def test_a_list_restores_original_weights_and_grows_with_the_lora() -> None:
    weights = exact_restore.normal_weights(side=256)
    small, large = (exact_restore.need(weights, norm) for norm in (0.01, 0.3))
    assert 0.02 < small.listed < 0.3 < large.listed < 2
    assert 0.5 <= small.four_bits <= large.four_bits < 1 <= large.eight_bits < large.difference
    near = torch.tensor([-1.0, -0.0, 0.0, 1.0, 1.0 + 2**-7], dtype=torch.bfloat16)
    steps = exact_restore.order(near)
    assert steps[1] == steps[2] == 0 and steps[0] == -steps[3] and steps[4] - steps[3] == 1


def test_a_merge_on_a_gpu_is_compared_with_the_plain_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = gpu_check.Check(torch.device("cpu"), True, tmp_path)

    def states() -> dict[str, tuple[str, float | None]]:
        found = list(PARTS["lora"].run(check))
        return {row.what: (row.state, row.value) for row in found}

    what = "one product differs from the float32 sum by"
    right = states()
    state, ulps = right[what]
    assert state == "passed" and ulps is not None and ulps <= 1
    assert right["original weights are restored exactly"][0] == "passed"
    # With the first of three terms of each factor only, as bfloat16 factors would be.
    monkeypatch.setattr("adapters.fused_merge._OF_UP", (0,))
    monkeypatch.setattr("adapters.fused_merge._OF_DOWN", (0,))
    state, ulps = states()[what]
    assert state == "failed" and ulps is not None and ulps > 1


@pytest.mark.parametrize("work", [gpu.STEP, gpu.IMAGE, gpu.LORA])
def test_the_gpu_suite_measures_each_kind_of_work(work: str) -> None:
    """On a CPU, at the miniature's size."""
    case = Case("miniature-turbo", work, edge=32, steps=1, checkpointing=True)
    found = measure(case, torch.device("cpu"), repeats=1)
    assert found.seconds > 0 and (found.flops > 0) == (work != gpu.LORA)
    cells = found.cells(case, rate=1e12)
    assert cells[0] == str(case) and len(cells) == 5


@pytest.mark.slow
def test_the_drift_of_a_quantized_base_is_ordered_by_the_error_of_its_weights() -> None:
    drift = {kind: cells for _, kind, *cells in quantization_drift.rows("miniature-turbo", 1, 32)}
    velocity = {kind: float(cells[1].removesuffix(" %")) for kind, cells in drift.items()}
    assert 0 < velocity["rounding"] < velocity["int8"] < velocity["fp8"] < velocity["fp8 products"]
    assert velocity["fp8 products"] < 6


def test_every_program_takes_a_step_in_every_mode_beside_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two modes of three programs; a program that fails ends no other."""
    chosen = [each for each in peers.VARIANTS if not each.compiled]
    taken = []
    steps = peers.peft_step

    def peft_step(family: Any, case: Case, autocast: bool) -> Any:
        if autocast and not case.checkpointing:
            raise RuntimeError("no autocast | here\nand more")
        step = steps(family, case, autocast)

        def checked() -> None:
            step()
            named = family.transformer.named_parameters()
            ups = [each for name, each in named if "lora_B" in name]
            taken.append((autocast, case.checkpointing, {each.dtype for each in ups}))
            assert ups and all(each.any() for each in ups)

        return checked

    monkeypatch.setattr(peers, "peft_step", peft_step)
    found = list(peers.compared("miniature-turbo", 32, torch.device("cpu"), 1, chosen))
    assert [each.variant for each in found] == chosen and len(chosen) == 6
    assert set(map(str, taken)) == {
        str((False, False, {torch.bfloat16})),
        str((False, True, {torch.bfloat16})),
        str((True, True, {torch.float32})),
    }
    lines = list(peers.table(found))
    assert len(lines) == 4 and all(line.count(" | ") == 3 for line in lines[2:])
    assert sum("RuntimeError: no autocast \\| here" in line for line in lines) == 1
    assert sum(line.count("of it") for line in lines) == 3


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
