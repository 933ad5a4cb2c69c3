"""Many images by one command: files of prompts, grids, and what is already there."""

import fcntl
import json
import logging
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from root import ROOT

from inference import batch
from inference.__main__ import main
from inference.batch_items import read_batch
from inference.inputs import GenerationInputs

SMALL = ["--base", "miniature-turbo", "--width", "32", "--height", "32"]


def test_lines_and_grid_are_combined_without_duplicates(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a fox\n\na dog\na fox\n")
    items = read_batch({"width": 64, "height": 64}, file, ["seed=3-4,9", "lora_scale=0.5"])
    found = [(each.inputs.prompt, each.inputs.seed, each.inputs.lora_scale) for each in items]
    assert found == [(prompt, seed, 0.5) for prompt in ("a fox", "a dog") for seed in (3, 4, 9)]
    assert all(re.fullmatch(r"a-(fox|dog)-\d-[0-9a-f]{12}\.webp", each.file) for each in items)
    assert len({each.file for each in items}) == 6


def test_a_line_has_its_own_inputs_and_files_beside_it_and_weights_stay_together(
    tmp_path: Path,
) -> None:
    (tmp_path / "cat.zip").write_bytes(b"1")
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a", "weights": "cat.zip"}, {"prompt": "b", "seed": 5}]
    lines += [{"prompt": "c", "weights": "cat.zip", "lora_scale": 0.5}]
    file.write_text("".join(json.dumps(each) + "\n" for each in lines))
    items = read_batch({"output_format": "png"}, file)
    assert [each.inputs.prompt for each in items] == ["a", "c", "b"]
    assert items[0].inputs.replicate_weights == str(tmp_path / "cat.zip")
    assert [each.inputs.seed for each in items] == [0, 0, 5]  # a batch is never random


def test_a_changed_file_is_another_image(tmp_path: Path) -> None:
    # Weights are a file, or the folder of a full training or of a LoRA.
    for weights, inside in (
        *(("cat.zip", "cat.zip"), ("model", "model/meta.json")),
        ("comfyui", "comfyui/lora.safetensors"),
    ):
        names = []
        for content in (b"1", b"2"):
            file = tmp_path / content.decode() / inside
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            given = {"prompt": "a", "replicate_weights": str(tmp_path / content.decode() / weights)}
            names.append(read_batch(given)[0].file)
        assert names[0] != names[1]


def test_the_other_name_of_weights_counts_too(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "lora_weights": "cat.zip"}')
    (tmp_path / "cat.zip").write_bytes(b"1")
    [line] = read_batch({}, file)
    [cell] = read_batch({"prompt": "a"}, None, [f"lora_weights={tmp_path / 'cat.zip'}"])
    assert line.inputs.replicate_weights == str(tmp_path / "cat.zip")
    assert cell.file == line.file


@pytest.mark.parametrize(
    ("content", "grid", "message"),
    [
        (
            '{"prompt": "a"}\n[1]\nx\n',
            (),
            r"line 2 is not an object .*; line 3 is not JSON",
        ),
        (
            '{"prompt": "a", "sed": 1}\n{"seed": 2}',
            (),
            r"line 1: .*'seed'\?; line 2: prompt is m",
        ),
        ('{"prompt": "a", "num_outputs": 2}', (), r"line 1: num_outputs must be 1 .* seed=0-3"),
        ("\n", (), "has no prompts"),
        ('{"prompt": "a"}', ["seeds=0-9"], r"unknown input 'seeds'; did you mean 'seed'\?"),
        ('{"prompt": "a"}', ["seed"], "must be NAME=VALUES, such as seed=0-99"),
        ('{"prompt": "a"}', ["seed=9-0"], "9-0 is not a range from low to high"),
        ('{"prompt": "a"}', ["prompt=a,b"], "cannot vary prompt; put prompts into a file"),
        ('{"prompt": "a"}', ["lora_scale=9"], r"line 1: lora_scale is 9; it must be between"),
        ('{"prompt": "a"}', ["seed=1", "seed=2"], "put all its values into one --grid"),
        ('{"prompt": "a"}', ["seed=0-999999", "shift=1,2"], "2,000,000 images; at most 1,000,000"),
        # Counted without listing the combinations.
        ('{"prompt": "a"}', ["seed=0-999999"] + ["width=0-999999"], "1,000,000,000,000 images"),
        ('{"prompt": "a"}', ["seed=,"], "must be NAME=VALUES"),
        ('{"prompt": "a", "weights": "a", "replicate_weights": "b"}', (), "line 1 has weights and"),
    ],
)
def test_faults_name_their_line(
    content: str, grid: list[str], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_batch({}, file, grid)


def test_a_line_ends_at_a_line_feed_only_and_null_is_not_given(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a\u2028b", "seed": null, "weights": "' + "x" * 300 + '"}\r\n')
    (item,) = read_batch({}, file)
    assert (item.inputs.prompt, item.inputs.seed) == ("a\u2028b", 0)


def test_a_file_of_another_kind_is_not_read_as_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"
    file.write_text('[\n{"prompt": "a"}\n]\n')
    with pytest.raises(ValueError, match=r"prompts.json must be .* a .jsonl file"):
        read_batch({}, file)


def make_one(inputs: GenerationInputs) -> Image.Image:
    if inputs.prompt == "too large":
        raise ValueError("4000x4000 is too large")
    return Image.new("RGB", (8, 8), (inputs.seed or 0, 0, 0))


def records(folder: Path) -> list[str]:
    lines = (folder / batch.RECORDS).read_text().splitlines()
    return sorted(json.loads(line)["file"] for line in lines if line.startswith("{"))


def test_what_is_there_stays_and_what_was_lost_is_recorded(tmp_path: Path) -> None:
    items = read_batch({"prompt": "a", "output_format": "png"}, None, ["seed=0-4"])
    assert batch.make(items[:3], tmp_path, make_one) == []
    # A process was killed while it wrote the last line; a user has edited another.
    file = tmp_path / batch.RECORDS
    file.write_bytes(b"note\n[]\n" + file.read_bytes()[:-7])
    made = []

    def generate(inputs: GenerationInputs) -> Image.Image:
        made.append(inputs.seed)
        return make_one(inputs)

    batch.make(items, tmp_path, generate)
    assert made == [3, 4]
    assert records(tmp_path) == sorted(each.file for each in items)
    assert {each.name for each in tmp_path.iterdir()} == {*records(tmp_path), batch.RECORDS}


def test_a_refused_image_is_named_and_the_others_are_made(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("too large\na\n")
    items = read_batch({}, prompts)
    (folder := tmp_path / "images").mkdir()
    [refused] = batch.make(items, folder, make_one)
    assert refused == f"{items[0].file}: 4000x4000 is too large"
    assert records(folder) == [items[1].file]
    assert not list(folder.glob(".*.lock"))


def test_an_image_of_another_process_is_made_last_and_not_twice(tmp_path: Path) -> None:
    items = read_batch({"prompt": "a", "output_format": "png"}, None, ["seed=0-2"])
    first, made = tmp_path / items[0].file, []
    with (tmp_path / f".{first.name}.lock").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        def generate(inputs: GenerationInputs) -> Image.Image:
            made.append(inputs.seed)
            if inputs.seed == 2:  # now the other process finishes
                make_one(items[0].inputs).save(first)
                fcntl.flock(held, fcntl.LOCK_UN)
            return make_one(inputs)

        batch.make(items, tmp_path, generate)
    assert made == [1, 2]
    assert all((tmp_path / each.file).is_file() for each in items)


def test_the_command_makes_a_batch_equal_to_single_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("MODEL_VAULT", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red circle\na blue square\n")
    many = ["--prompts", "prompts.txt", "--grid", "seed=1-2", "--output-dir", "many"]
    main([*SMALL, *many, "--output-format", "png"])
    lines = [json.loads(line) for line in Path("many", batch.RECORDS).read_text().splitlines()]
    assert [(each["prompt"], each["seed"]) for each in lines] == [
        (prompt, seed) for prompt in ("a red circle", "a blue square") for seed in (1, 2)
    ]
    Path("wrong.jsonl").write_text('{"prompt": "a cube", "image": "no.png"}')
    with pytest.raises(SystemExit, match="the image of 'a cube': .*no.png"):
        main([*SMALL, "--prompts", "wrong.jsonl"])
    one = ["--prompt", "a blue square", "--seed", "2", "--output-dir", "one"]
    main([*SMALL, *one, "--output-format", "png"])
    assert Path("many", lines[3]["file"]).read_bytes() == Path("one/image-0.png").read_bytes()
    caplog.set_level(logging.INFO)
    main([*SMALL, *many, "--output-format", "png"])  # nothing is made again
    assert len(Path("many", batch.RECORDS).read_text().splitlines()) == 4
    assert "4 images, 4 of them are already in many/" in caplog.text


@pytest.mark.slow
def test_two_processes_share_a_folder_and_one_survives_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MODEL_VAULT", raising=False)
    many = ["--prompt", "a red circle", "--grid", "seed=0-39", "--output-dir", str(tmp_path)]
    command = [sys.executable, "-m", "inference", *SMALL, *many]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) for _ in range(2)]
    while len(list(tmp_path.glob("*.webp"))) < 10:
        time.sleep(0.02)
    both[0].kill()
    assert [each.wait(timeout=300) for each in both] == [-signal.SIGKILL, 0]
    assert records(tmp_path) == sorted({each.name for each in tmp_path.glob("*.webp")})
    assert len(records(tmp_path)) == 40
