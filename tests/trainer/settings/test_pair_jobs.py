"""Job files of other programs that name control images train on the same pairs here."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.settings import SettingsError, read_config
from trainer.settings.jobs.reading import program_of
from trainer.settings.jobs.translation import Translation, translate
from trainer.settings.parsing import parse

BASE = "qwen-image-edit-2509"


def translated(path: Path) -> Translation:
    content = parse(path)
    program = program_of(content)
    assert program is not None
    return translate(program, content, path)


def ai_toolkit(folder: Path, dataset: dict[str, Any], model: dict[str, Any]) -> Path:
    hub = {"name_or_path": "Qwen/Qwen-Image-Edit-2509", "arch": "qwen_image_edit_plus"}
    process = {
        "type": "sd_trainer",
        "network": {"type": "lora", "linear": 16, "linear_alpha": 16},
        "datasets": [{"folder_path": "after", "resolution": [512]} | dataset],
        "train": {"steps": 30, "lr": 1e-4, "optimizer": "adamw", "dtype": "bf16"},
        "model": hub | model,
        "sample": {"samples": [{"prompt": "make it night", "ctrl_img_1": "a.png"}]},
    }
    job = {"job": "extension", "config": {"name": "edit", "process": [process]}}
    (path := folder / "job.yaml").write_text(yaml.safe_dump(job))
    return path


@pytest.mark.parametrize(
    ("dataset", "folders"),
    [
        ({"control_path": "before"}, ["before"]),
        ({"control_path": ["before", "other"]}, ["before", "other"]),
        (  # of its web UI
            {"control_path_1": "before", "control_path_2": "other", "control_path_3": None}
            | {"controls": []},
            ["before", "other"],
        ),
    ],
)
def test_ai_toolkit(dataset: dict[str, Any], folders: list[str], tmp_path: Path) -> None:
    path = ai_toolkit(tmp_path, dataset, {"model_kwargs": {"match_target_res": True}})
    found = translated(path)
    assert found.refused == [] and found.settings["controls"] == folders
    near = "\n".join(found.near)
    assert "match_target_res: control images have the size of inference here" in near
    assert "number 1 begins with control images of the dataset, not with its ctrl_img_1" in near
    settings = read_config(path)
    assert settings.base.name == BASE and settings.dataset == Path("after")
    assert [Path(each).name for each in settings.controls] == folders

    text_model = {"name_or_path": "Qwen/Qwen-Image", "arch": "qwen_image"}
    path = ai_toolkit(tmp_path, {"control_path": "before"}, text_model)
    with pytest.raises(SettingsError, match="control_path: before .*qwen-image does not edit"):
        read_config(path)


@pytest.mark.parametrize(
    ("dataset", "options", "controls"),
    [
        ('image_directory = "after"\ncontrol_directory = "before"', "--edit_plus", ["before"]),
        ('image_jsonl_file = "pairs.jsonl"', "--model_version edit-2509", None),
        ('image_jsonl_file = "pairs.jsonl"', "--model_version edit-2511", "refused"),
        ('image_jsonl_file = "pairs.jsonl"', "", "refused"),
    ],
)
def test_musubi_tuner(dataset: str, options: str, controls: Any, tmp_path: Path) -> None:
    (tmp_path / "data.toml").write_text(f"[[datasets]]\n{dataset}\nresolution = 512\n")
    (path := tmp_path / "job.sh").write_text(
        f"accelerate launch qwen_image_train_network.py {options} --dataset_config data.toml "
        "--dit qwen_image_edit_2509_bf16.safetensors --network_module networks.lora_qwen_image "
        "--network_dim 8 --network_alpha 8 --mixed_precision bf16 --learning_rate 1e-4"
    )
    found = translated(path)
    assert found.settings["base_model"] == BASE
    if controls == "refused":
        [why] = found.refused
        assert "model_version" in why and "the model is qwen-image-edit-2509" in why
        return
    assert found.refused == [] and found.settings.get("controls") == controls
    assert any(line.startswith("control_resolution") for line in found.near)


def test_simpletuner(tmp_path: Path) -> None:
    datasets = [
        {"id": "edits", "type": "local", "instance_data_dir": "after"}
        | {"conditioning_data": "refs", "caption_strategy": "textfile", "resolution": 512}
        | {"resolution_type": "pixel_area"},
        {"id": "refs", "type": "local", "dataset_type": "conditioning"}
        | {"instance_data_dir": "before", "conditioning_type": "reference_loose"},
    ]
    (tmp_path / "data.json").write_text(json.dumps(datasets))
    job = {"model_family": "qwen_image", "model_flavour": "edit-v2", "model_type": "lora"}
    job |= {"data_backend_config": "data.json", "max_train_steps": 10, "learning_rate": 1e-4}
    (path := tmp_path / "config.json").write_text(json.dumps(job))
    found = translated(path)
    assert found.settings["base_model"] == BASE and found.settings["controls"] == ["before"]
    assert not any("conditioning" in line for line in found.refused)
    assert any("reference_loose" in line for line in found.near)
