"""Job files of other programs mean here what they mean there: ten jobs, and their translation."""

import json
import logging
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from dataset_files import make_folder, picture
from job_cases import CASES, copied, keys_of

from families.family import Family
from families.registry import FAMILIES
from families.without_weights import family_without_weights
from trainer.__main__ import main
from trainer.checking import dataset_of, summary
from trainer.data import bucket_sizes, members_of_any, read_dataset
from trainer.settings.choices import LR_SCHEDULERS, OPTIMIZERS, QUANTIZATIONS
from trainer.settings.config import read_config
from trainer.settings.epochs import in_steps, steps_of_epoch
from trainer.settings.fields import SettingsError, resolve
from trainer.settings.inputs import TrainingInputs
from trainer.settings.jobs.reading import PROGRAMS, program_of
from trainer.settings.jobs.translation import DEFAULTS, Translation, translate
from trainer.settings.parsing import parse

EXPECTED: dict[str, dict[str, Any]] = json.loads((CASES / "expected.json").read_text())
SIZES = [(900, 600)] * 3 + [(600, 600)] * 2  # of the images that the expected steps are for


def translated(name: str) -> Translation:
    path = CASES / name
    content = parse(path)
    program = program_of(content)
    assert program is not None
    return translate(program, content, path)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_job_becomes_the_same_training(name: str) -> None:
    found, expected = translated(name), EXPECTED[name]
    given = found.settings | {"sample_options": found.sample}
    if "://" in given["dataset"]:  # Cog downloads it; the command line needs a file
        with pytest.raises(SettingsError, match="download the file first"):
            TrainingInputs(**given)
        assert given["dataset"] == expected["settings"]["dataset"]
        given["dataset"] = "lantern.zip"
    settings = resolve(TrainingInputs(**given))
    multiple = settings.base.size_multiple
    settings = settings.for_images(5, bucket_sizes(SIZES, settings.resolutions, multiple))
    for setting, value in expected["settings"].items():
        if "://" in str(value):
            continue
        ours = getattr(settings, setting)
        ours = str(ours) if isinstance(ours, Path) else ours
        assert (list(ours) if isinstance(ours, tuple) else ours) == value, setting
    assert keys_of(found.near) == sorted(expected["near"])
    assert keys_of(found.refused) == sorted(expected["refused"])


def leaves(value: Any) -> list[str]:
    """The keys with a value in parsed content; of lists of sections those of the sections."""
    if isinstance(value, list):
        return [key for each in value for key in leaves(each)]
    if not isinstance(value, dict):
        return []
    found = []
    for key, inner in value.items():
        below = leaves(inner)
        found += below or [key]
    return found


@pytest.mark.parametrize("name", EXPECTED)
def test_every_key_of_a_job_is_named(name: str) -> None:
    found, folder = translated(name), (CASES / name).parent
    said = "\n".join(found.translated + found.near + found.without_effect + found.refused)
    words = set(re.findall(r"[\w-]+", said))
    files = [each for each in folder.iterdir() if each.suffix != ".jsonl"]
    for file in [CASES / name] if folder == CASES else files:
        content = parse(file)
        keys = re.findall(r"--(\w+)", content.split(".py", 1)[1]) if type(content) is str else []
        renamed = {"repeats": "balancing", "prompt": "samples"}
        lost = [key for key in keys or leaves(content) if not {key, renamed.get(key, key)} & words]
        assert lost == []


@pytest.mark.parametrize(
    ("epochs", "buckets", "steps"),
    [
        # 2 passes of 3 and of 2 images: 6 and 4, in batches of 4.
        ({"passes": 2, "batch": 4, "accumulation": 1, "drop_last": 0}, [3, 2], 2 + 1),
        ({"passes": 2, "batch": 4, "accumulation": 1, "drop_last": 1}, [3, 2], 1 + 1),
        ({"passes": 2, "batch": 4, "accumulation": 2, "drop_last": 0}, [3, 2], 2),
        ({"passes": 2, "batch": 4, "accumulation": 4, "drop_last": 1}, [3, 2], 0.5),
    ],
)
def test_steps_of_an_epoch_are_counted_by_bucket_and_batch(
    epochs: dict[str, float], buckets: list[int], steps: float
) -> None:
    assert steps_of_epoch(epochs, buckets) == steps
    assert in_steps({"steps": 10, **epochs}, buckets) == {"steps": 10 * steps}
    assert steps_of_epoch(epochs, [40, 40], processes=5) == steps_of_epoch(epochs, [40, 40]) / 5


def test_four_repeats_of_simpletuner_are_five_passes(tmp_path: Path) -> None:
    change = {'"max_train_steps": 1400,': "", '"num_train_epochs": 0': '"num_train_epochs": 3'}
    job = copied(tmp_path, "simpletuner-z-image/config.json", **change)
    # 15 and 10 images in batches of 2: 8 and 5, of which 3 are a step.
    assert read_config(job).for_images(5, [3, 2]).steps == 3 * 5


@pytest.mark.parametrize("epochs", ["-1", "NaN", "1e308"])
def test_epochs_that_cannot_be_counted_are_refused(epochs: str, tmp_path: Path) -> None:
    job = copied(tmp_path, "onetrainer-qwen.json", **{'"epochs": 30': f'"epochs": {epochs}'})
    with pytest.raises(SettingsError, match=r"steps is counted in epochs, .* between 0 and"):
        read_config(job)


def test_images_that_fill_no_batch_are_an_error_with_the_way_out() -> None:
    inputs = TrainingInputs(
        dataset=Path("x"),
        base_model="z-image",
        epochs={"steps": 3, "passes": 1, "batch": 4, "accumulation": 1, "drop_last": 1},
    )
    with pytest.raises(SettingsError, match="no bucket has enough images for one batch of 4"):
        resolve(inputs).for_images(3, [2, 1])


@cache
def model_of(family: str) -> Family:
    return family_without_weights(FAMILIES[family].bases[0])


@pytest.mark.parametrize(
    ("program", "family", "count"),
    [
        ("musubi-tuner", "z_image", 210),
        ("musubi-tuner", "qwen_image", 836),  # of 840, four of which have no effect
        ("SimpleTuner", "z_image", 136),
        ("SimpleTuner", "qwen_image", 240),
        ("diffusion-pipe", "z_image", 270),
        ("diffusion-pipe", "qwen_image", 836),
    ],
)
def test_the_layers_are_those_of_the_program(program: str, family: str, count: int) -> None:
    model = model_of(family)
    assert len(model.lora_targets(FAMILIES[family].job_names[program].lora_targets)) == count


def test_the_tables_name_settings_of_ours() -> None:
    names = set(TrainingInputs.model_fields)
    families = {name for family in FAMILIES.values() for name in family.job_names}
    assert {program.name for program in PROGRAMS} == families
    for program in PROGRAMS:
        assert set(program.settings.values()) | set(program.defaults) | set(DEFAULTS) <= names
        module = __import__(program.keys_of.__module__, fromlist=["x"])
        tables = [vars(module).get(f"_{each}", {}) for each in ("SCHEDULES", "QUANTIZATIONS")]
        values = [row[0] if type(row) is tuple else row for each in tables for row in each.values()]
        assert set(values) <= {*LR_SCHEDULERS, *QUANTIZATIONS, "none"}
        assert {row[0] for row in vars(module).get("_OPTIMIZERS", {}).values()} <= set(OPTIMIZERS)


def small_job(folder: Path, images: int = 5) -> Path:
    """A musubi-tuner job of one epoch on images that a table names."""
    make_folder(
        folder / "harbour",
        {f"{k}.png": picture(60, 40 if k < 3 else 60) for k in range(images)}
        | {"not_named.png": picture(), "not_named.txt": b"a boat"},
    )
    rows = [{"image_path": f"harbour/{k}.png", "caption": f"boat {k}"} for k in range(images)]
    (folder / "harbour" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    job = folder / "job.sh"
    (folder / "dataset.toml").write_text(
        'datasets = [{image_jsonl_file = "harbour/metadata.jsonl", resolution = 64, batch_size = 2,'
        " enable_bucket = true, num_repeats = 1}]"
    )
    job.write_text(
        "accelerate launch zimage_train_network.py --dit z_image.safetensors \\\n"
        "  --dataset_config dataset.toml --network_module networks.lora_zimage \\\n"
        "  --network_dim 2 --network_alpha 2 --learning_rate 1e-3 --max_train_epochs 1 \\\n"
        "  --timestep_sampling sigmoid --mixed_precision bf16 --seed 1 --output_dir runs/harbour\n"
    )
    return job


def test_a_job_trains_the_images_that_its_table_names_for_its_epochs(
    tmp_path: Path, miniature_vault: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapters.archive import read_archive

    monkeypatch.setenv("MODEL_VAULT", str(miniature_vault))
    monkeypatch.chdir(tmp_path)
    main([str(small_job(tmp_path)), "--base-model", "miniature"])
    meta = read_archive(tmp_path / "runs" / "harbour" / "weights.zip").meta
    # 3 images of 3:2 and 2 squares, in batches of 2.
    assert meta["steps"] == 2 + 1
    captions = {each["name"]: each["caption"] for each in meta["dataset"]["pictures"]}
    assert captions == {f"{k}.png": f"boat {k}" for k in range(5)}


def test_a_plan_counts_the_steps_where_the_images_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    job = small_job(tmp_path)
    main(["plan", str(job), "--base-model", "miniature"])
    said = capsys.readouterr().out
    assert said.startswith(f"plan of {job}, a job of musubi-tuner")
    assert "metadata.jsonl: 5 images, 3 steps" in said
    shutil.rmtree(tmp_path / "harbour")
    settings = read_config(job, base_model="miniature")
    said = summary(settings, dataset_of(settings))
    assert said.startswith("harbour/metadata.jsonl does not exist here")
    # A job whose dataset is a URL can be planned.
    read_config(CASES / "replicate-qwen-image.json", {"dataset": "imgs.zip"})


def test_options_replace_values_of_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    job = small_job(tmp_path)
    with caplog.at_level(logging.INFO):
        settings = read_config(job, steps=7, output_dir="here")
    assert (settings.for_images(5, [3, 2]).steps, settings.output_dir) == (7, Path("here"))
    assert "is a job of musubi-tuner, read as in its version 30c658c" in caplog.text
    (tmp_path / "prompts.txt").write_text("# the harbour\na boat --w 64 --h 96 --d 3\n")
    job.write_text(job.read_text().strip() + " --sample_prompts prompts.txt")
    settings = read_config(job)
    assert settings.sample_prompts == ("a boat",)
    assert settings.sample_overrides == ({"width": 64, "height": 96, "seed": 3},)


def test_a_table_is_a_dataset_of_this_machine_only(tmp_path: Path) -> None:
    from trainer.reading import read_examples

    small_job(tmp_path)
    table = tmp_path / "harbour" / "metadata.jsonl"
    assert len(read_dataset(table, "", opened=members_of_any)) == 5
    settings = resolve(TrainingInputs(dataset=table, base_model="miniature", seed=1))
    with pytest.raises(SettingsError, match="dataset is a table"):
        read_examples(settings, None, None, served=True)  # type: ignore[arg-type]


def test_patterns_for_classes_of_modules_find_their_linear_layers() -> None:
    for family in FAMILIES.values():
        names = family.job_names.get("SimpleTuner")
        for group, pattern in (names.modules if names else {}).items():
            key = {"Attention": "attention", "FeedForward": "feed_forward"}[group]
            model = model_of(family.name)
            found = model.lora_targets(pattern)
            assert set(found) >= set(model.lora_groups()[key]), pattern
            others = {each.split(".", 2)[-1] for each in found}
            assert others == {each.split(".", 2)[-1] for each in model.lora_groups()[key]}
