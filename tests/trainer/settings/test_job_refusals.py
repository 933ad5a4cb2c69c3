"""What a job of another program asks for and is not here is refused by name, or translated."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from job_cases import copied, keys_of

from adapters.forms import Form
from trainer.settings.config import read_config
from trainer.settings.fields import SettingsError
from trainer.settings.jobs.reading import PROGRAMS
from trainer.settings.jobs.translation import translate
from trainer.settings.parsing import parse


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("job.toml", 'pretrained_model = "x"', "not a job file of a known program (ai-toolkit"),
        ("run.sh", "python train.py --lr 1", "is not a job file of a known program"),
        ("job.toml", "steps = = 3", "is not a TOML file: Invalid value (at line 1, column 9)"),
        ("job.json", '{"model_family": "z_image",}', "is not a JSON file"),
        ("job.json", '{"model_family": "z_image"}', "data_backend_config is missing"),
        ("job.json", '{"training_method": "LORA", "model_type": "FLUX_DEV_1", "concepts": [{}]}',
         "a job of OneTrainer: model_type is 'FLUX_DEV_1'; supported: QWEN, Z_IMAGE"),
        ("job.json", '{"training_method": "LORA", "model_type": "QWEN", "concepts": [{}, {}]}',
         "concepts must list exactly one dataset"),
        ("run.txt", "qwen_image_train_network.py --dataset_config no.toml",
         "dataset_config: there is no file no.toml, neither here nor in"),
        ("run.txt", f"qwen_image_train_network.py --dataset_config {'x' * 300}",
         f"dataset_config: {'x' * 80} is not a path"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_says_why(
    name: str, text: str, complaint: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(SettingsError) as error:
        read_config(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert complaint in str(error.value)


@pytest.mark.parametrize(
    ("file", "base", "near"),
    [
        ("a/z_image_bf16.safetensors", "z-image", False),
        ("a/Z-Image-Turbo_fp8_e4m3fn.safetensors", "z-image-turbo", True),
        ("z_image_de_turbo_v1_bf16.safetensors", "z-image-de-turbo", True),
        ("my_z_image_of_boats.safetensors", "z-image", True),  # a fine-tune, maybe
        ("z_image_edit_bf16.safetensors", None, False),
        ("somebody/Z-Image-of-boats", None, False),
        ("dit.safetensors", None, False),
    ],
)
def test_a_base_model_is_known_by_the_name_of_its_file(
    file: str, base: str | None, near: bool, tmp_path: Path
) -> None:
    change = {"models/z_image_bf16.safetensors": file}
    job = copied(tmp_path, "diffusion-pipe-z-image/train.toml", **change)
    if base is None:
        with pytest.raises(SettingsError, match="or give --base-model"):
            read_config(job)
        assert read_config(job, base_model="z-image").base.name == "z-image"
        return
    content = parse(job)
    found = translate(PROGRAMS[4], content, job)
    assert found.settings["base_model"] == base
    assert ("model.diffusion_model" in keys_of(found.near)) is near


@pytest.mark.parametrize(
    ("case", "change", "refused"),
    [
        ("musubi-qwen-image/command.txt", {"--max_grad_norm 0": "--max_timestep 500"},
         "max_timestep: 500 (only 1000 is supported)"),
        ("musubi-qwen-image/command.txt", {"relative_step=False": "betas=0.9,0.99"},
         "optimizer_args: relative_step=True"),
        ("musubi-qwen-image/command.txt", {"--network_alpha 24": "--network_args x=1"},
         "network_args: x=1"),
        ("musubi-qwen-image/command.txt", {"qwen_shift": "logsnr"}, "timestep_sampling: logsnr"),
        ("musubi-qwen-image/command.txt", {"--seed 31": "--sample_prompts dataset.toml"},
         "sample_prompts: dataset.toml (only a text file is supported)"),
        ("simpletuner-z-image/config.json", {'"constant_with_warmup"': '"cosine"'},
         "lr_scheduler: cosine: a wave whose length is lr_warmup_steps"),
        ("simpletuner-z-image/config.json", {'"standard"': '"glora"'}, "lora_type: glora"),
        ("simpletuner-z-image/config.json", {'"crop": false': '"crop": true'},
         "crop: True (images are not cropped to another aspect ratio here; crop them"),
        ("onetrainer-qwen.json", {'"enable_random_flip": false': '"enable_fixed_flip": true'},
         "concepts.image.enable_fixed_flip: True"),
        ("onetrainer-qwen.json", {'"lora_alpha": 32.0,': ""},
         "lora_alpha (missing): 1 in OneTrainer, so the LoRA counts 1/32"),
        ("onetrainer-qwen.json", {'"COSINE"': '"REX"'}, "learning_rate_scheduler: REX (supported"),
        ("diffusion-pipe-z-image/train.toml", {"rank = 28": "rank = 28\nrank_dropout = 0.5"},
         "adapter.rank_dropout: 0.5"),
        ("diffusion-pipe-z-image/train.toml", {"shift = 1.5": "pseudo_huber_c = 0.5"},
         "model.pseudo_huber_c: 0.5"),
    ],
)  # fmt: skip
def test_what_would_train_something_else_is_refused_by_name(
    case: str, change: dict[str, str], refused: str, tmp_path: Path
) -> None:
    job = copied(tmp_path, case, **change)
    with pytest.raises(SettingsError, match="are not supported") as error:
        read_config(job)
    assert f"\n  {refused}" in str(error.value)


def test_layers_of_a_regular_expression_can_be_named_instead(tmp_path: Path) -> None:
    changes = {'"attn-mlp"': '"custom", "layer_filter_regex": true'}
    changes |= {'"enable_random_flip": false': '"enable_random_flip": true'}
    job = copied(tmp_path, "onetrainer-qwen.json", **changes)
    with pytest.raises(SettingsError, match="layer_filter: .*name the layers with --lora-targets"):
        read_config(job)
    settings = read_config(job, lora_targets="attention")
    assert (settings.lora_targets, settings.horizontal_flip) == ("attention", True)


def test_all_refused_keys_are_in_one_message_and_no_secret_is(tmp_path: Path) -> None:
    changes = {'"lora_type": "standard"': '"lora_type": "glora", "my_token": "hf_abc"'}
    job = copied(tmp_path, "simpletuner-z-image/config.json", **changes, **{'"textfile"': '"csv"'})
    with pytest.raises(SettingsError) as error:
        read_config(job)
    said = str(error.value)
    for key in ("lora_type: glora", "my_token: a secret", "caption_strategy: csv"):
        assert key in said
    assert "hf_abc" not in said and "remove them to train without them" in said


@pytest.mark.parametrize(
    ("case", "change", "form"),
    [
        ("musubi-qwen-image/command.txt", {"networks.lora_qwen_image": "networks.loha"},
         Form("loha", 24)),
        ("musubi-qwen-image/command.txt",
         {"networks.lora_qwen_image": "networks.lokr --network_args factor=4"},
         Form("lokr", 24, 4)),
        ("onetrainer-qwen.json", {'"lora_rank": 32': '"lora_decompose": true, "lora_rank": 32'},
         Form("dora", 32)),
        ("onetrainer-qwen.json", {'"lora_rank": 32': '"peft_type": "LOHA", "lora_rank": 32'},
         Form("loha", 32)),
        ("onetrainer-qwen.json",
         {'"lora_rank": 32': '"peft_type": "LOKR", "lokr_dim": 10000, "lora_rank": 32'},
         Form("lokr", 0, 256)),
        ("simpletuner-z-image/config.json", {'"lora_type"': '"use_dora": true, "lora_type"'},
         Form("dora", 20)),
        ("diffusion-pipe-z-image/train.toml",
         {"type = 'lora'": "type = 'lokr'", "rank = 28": "rank = 1e6\ndecompose_factor = 4"},
         Form("lokr", 0, 4)),
    ],
)  # fmt: skip
def test_other_forms_of_lora_are_translated(
    case: str, change: dict[str, str], form: Form, tmp_path: Path
) -> None:
    assert read_config(copied(tmp_path, case, **change)).form == form


LOKR = {"algo": "lokr", "multiplier": 1.0, "full_matrix": True, "linear_alpha": 1, "factor": 16}
BOTH = ["Attention", "FeedForward"]


@pytest.mark.parametrize(
    ("adapter", "form", "targets"),
    [
        (LOKR, Form("lokr", 0, 16), "*"),
        (LOKR | {"bypass_mode": True, "apply_preset": {"target_module": ["Attention"]}},
         Form("lokr", 0, 16), "*.attention.*"),
        (LOKR | {"apply_preset": {"target_module": BOTH, "module_algo_map": {
            "Attention": {"factor": 4}, "FeedForward": {"factor": 4}}}},
         Form("lokr", 0, 4), "*.attention.*,*.feed_forward.*"),
        ({"algo": "lokr", "linear_dim": 12, "linear_alpha": 12, "factor": 4},
         Form("lokr", 12, 4), "*"),
        ({"algo": "loha", "linear_dim": 12, "linear_alpha": 12}, Form("loha", 12), "*"),
        (LOKR | {"linear_dim": 10000, "apply_preset": {"target_module": BOTH, "module_algo_map": {
            "Attention": {"factor": 16}, "FeedForward": {"factor": 8}}}},
         "module_algo_map: factor 8, factor 16 (one factor for all layers here)", ""),
        (LOKR | {"apply_preset": {"target_module": ["FinalLayer"], "name_algo_map": {"x": {}}}},
         "target_module: FinalLayer (supported: Attention, FeedForward)", ""),
        (LOKR | {"apply_preset": {"target_module": BOTH, "exclude_name": ["*refiner*"]}},
         "lycoris.apply_preset.exclude_name", ""),
        ({"algo": "lokr", "linear_dim": 12}, "lycoris.linear_alpha (missing): 1 in Simple", ""),
        (LOKR | {"dora_wd": True}, "lycoris.dora_wd: True", ""),
        (LOKR | {"multiplier": 2}, "lycoris.multiplier: 2 (only 1", ""),
        ({"algo": "boft", "linear_dim": 4, "linear_alpha": 4}, "lycoris.algo: boft", ""),
    ],
)  # fmt: skip
def test_lycoris_jobs_of_simpletuner_are_translated_or_refused_by_name(
    adapter: dict[str, Any], form: Form | str, targets: str, tmp_path: Path
) -> None:
    change = {'"standard"': '"lycoris", "lycoris_config": "lycoris.json"'}
    job = copied(tmp_path, "simpletuner-z-image/config.json", **change)
    with pytest.raises(SettingsError, match=r"lycoris_config: there is no file lycoris.json"):
        read_config(job)
    (job.parent / "lycoris.json").write_text(json.dumps(adapter))
    if isinstance(form, str):
        with pytest.raises(SettingsError, match=re.escape(form)):
            read_config(job)
        return
    settings = read_config(job)
    assert (settings.form, settings.lora_targets) == (form, targets)
