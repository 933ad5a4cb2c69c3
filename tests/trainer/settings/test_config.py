"""YAML files for `python -m trainer` say what they mean, or are refused with the key's name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from root import ROOT

from trainer.settings import config
from trainer.settings.config import read_config
from trainer.settings.fields import Settings, SettingsError

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

Read = Callable[..., Settings]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """Reads a YAML text as `run.yaml` of the working folder, for the miniature and imgs.zip."""
    monkeypatch.setenv("BASE_MODEL", "miniature-turbo")
    monkeypatch.chdir(tmp_path)

    def read(text: str, **overrides: Any) -> Settings:
        Path("run.yaml").write_text(text, encoding="utf-8")
        return read_config("run.yaml", **{"dataset": "imgs.zip", **overrides})

    return read


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_that_ships_is_read(path: Path) -> None:
    settings = read_config(path, dataset="imgs.zip")
    assert settings.dataset == Path("imgs.zip")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert settings.base.name == content["base_model"]
    assert settings.rank == content["train"].get("rank", settings.base.rank)
    assert settings.learning_rate == settings.base.learning_rate
    word = settings.subject or settings.trigger_word
    assert word and all(word in each for each in settings.sample_prompts)
    assert len(settings.sample_prompts) == len(content["sample"]["prompts"])
    assert "train_placeholder_token" in content["train"]  # a file says which kind of LoRA it is
    assert settings.log_prompt_ids == content.get("debug", {}).get("log_prompt_ids", False)


def test_the_configs_that_the_readme_names_are_there() -> None:
    names = {path.name for path in CONFIGS}
    assert names >= {"qwen_image.yaml", "qwen_image_placeholder.yaml", "z_image_turbo.yaml"}


def test_a_token_is_trained_unless_the_file_switches_it_off(read: Read) -> None:
    assert read("train: {steps: 1}").subject == "<zwx>"
    assert read("train: {train_placeholder_token: }").subject == "<zwx>"
    assert read("train: {placeholder_token: <new>}").subject == "<new>"
    off = read("train: {train_placeholder_token: false, trigger_word: r3dfox}")
    assert (off.subject, off.trigger_word) == (None, "r3dfox")


def test_what_is_left_out_or_left_empty_suits_the_base(read: Read) -> None:
    settings = read("train: {rank: , steps: ~, resolution: null}\nsample:\ndebug:\n")
    assert settings.rank == settings.base.rank
    assert settings.for_images(1).steps == settings.base.training_steps.least
    assert settings.resolutions == (settings.base.training_resolution,)
    assert settings.subject == "<zwx>"


def test_what_is_given_beside_the_file_replaces_it(read: Read) -> None:
    text = "base_model: z-image\ndataset: other.zip\noutput_dir: here"
    settings = read(text, base_model="qwen-image", output_dir="there")
    assert (settings.base.name, str(settings.output_dir)) == ("qwen-image", "there")
    assert settings.dataset == Path("imgs.zip")


@pytest.mark.parametrize("number", ["1e-5", "1.0e-5", "0.00001", '"1e-5"'])
def test_a_rate_is_a_number_however_it_is_written(read: Read, number: str) -> None:
    """YAML 1.1 reads 1e-5, without a point, as text."""
    assert read(f"train: {{learning_rate: {number}}}").learning_rate == 1e-5


def test_a_count_is_a_whole_number_however_it_is_written(read: Read) -> None:
    settings = read("train: {steps: 1e3, batch_size: 2.0, lr_warmup_steps: 0}")
    assert (settings.steps, settings.batch_size, settings.lr_warmup_steps) == (1000, 2, 0)
    assert [type(n) for n in (settings.steps, settings.batch_size)] == [int, int]


@pytest.mark.parametrize(
    "several", ["[512, 768]", "512,768", '"768, 512"', "\n    - 768\n    - 512"]
)
def test_several_resolutions_are_a_list_or_have_commas(read: Read, several: str) -> None:
    assert read(f"base_model: z-image\ntrain:\n  resolution: {several}").resolutions == (512, 768)
    assert read("train: {resolution: 64}").resolutions == (64,)


@pytest.mark.parametrize(
    ("text", "key", "meant"),
    [
        ("train: {learning_rte: 1e-4}", "train.learning_rte", "train.learning_rate"),
        ("train: {placeholder: <x>}", "train.placeholder", "train.placeholder_token"),
        ("train: {dataset: a.zip}", "train.dataset", "dataset"),
        ("train: {log_prompt_ids: true}", "train.log_prompt_ids", "debug.log_prompt_ids"),
        ("sample: {promts: [a cat]}", "sample.promts", "sample.prompts"),
        ("data_set: a.zip", "data_set", "dataset"),
        ("rank: 4", "rank", "train.rank"),
        ("train: {lr: 1e-4}", "train.lr", "train.learning_rate"),
        ("train: {LEARNING-RATE: 1e-4}", "train.LEARNING-RATE", "train.learning_rate"),
        ("train: {network_dim: 8}", "train.network_dim", "train.rank"),
        ("train: {sample_prompts: [a cat]}", "train.sample_prompts", "sample.prompts"),
        ("sample_every: 5", "sample_every", "sample.every"),
        ("sample: {steps: 5}", "sample.steps", "sample.num_inference_steps"),
        ("resume: a", "resume", "train.resume_from"),
        ("train: {model: z-image}", "train.model", "base_model"),
    ],
)
def test_an_unknown_key_suggests_the_nearest_known_one(
    read: Read, text: str, key: str, meant: str
) -> None:
    with pytest.raises(SettingsError) as refusal:
        read(text)
    assert str(refusal.value) == f"run.yaml: unknown key {key}; did you mean {meant}?"


def test_an_unknown_key_like_no_other_lists_the_known_ones(read: Read) -> None:
    with pytest.raises(SettingsError, match="unknown key debug.xyz; known: log_prompt_ids"):
        read("debug: {xyz: 1}")


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("train: {learning_rate: fast}", "train.learning_rate is 'fast'", "a number"),
        ("train: {rank: 2.5}", "train.rank is 2.5", "a whole number"),
        ("train: {rank: true}", "train.rank is True", "a whole number"),
        ("train: {gradient_checkpointing: 1}", "train.gradient_checkpointing is 1", "true or"),
        (
            "train: {train_placeholder_token: 'y'}",
            "train.train_placeholder_token is 'y'",
            "true or",
        ),
        ("train: {default_caption: 7}", "train.default_caption is 7", "text"),
        ("train: [rank, 4]", "train is ['rank', 4]", "a section of keys"),
        ("dataset: [a.zip, b.zip]", "dataset is ['a.zip', 'b.zip']", "text"),
        ("sample: {width: wide}", "sample.width is 'wide'", "a whole number"),
        ("sample: {prompts: 1}", "sample.prompts is 1", "text"),
        ("debug: {log_prompt_ids: maybe}", "debug.log_prompt_ids is 'maybe'", "true or false"),
    ],
)
def test_a_value_of_another_type_is_named_with_its_key(
    read: Read, text: str, key: str, expected: str
) -> None:
    with pytest.raises(SettingsError) as refusal:
        read(text)
    assert str(refusal.value).startswith(f"run.yaml: {key}; expected {expected}")


def test_every_key_refuses_a_value_that_makes_no_sense(read: Read) -> None:
    """So that a new setting cannot have a type of which this file has never heard."""
    for section, keys in config._SECTIONS.items():
        for key in keys:
            with pytest.raises(SettingsError, match=rf"{section}\.{key} is \{{\}}; expected"):
                read(f"{section}: {{{key}: {{}}}}")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("train: {rank: 0, steps: 0}", "rank is 0.*steps is 0"),
        ("train: {resolution: [512, big]}", "resolution.*'512,big' is invalid"),
        ("train: {train_placeholder_token: true, placeholder_token: my cat}", "white space"),
        ("base_model: z-image-trubo", "did you mean 'z-image-turbo'"),
        ("sample: {prompts: a cat, width: 64}", "width and height go together"),
        ("sample: {prompts: ['']}", "prompt is empty"),
        ("sample: {prompts: [1]}", "sample.prompts: number 1 is 1, not text"),
    ],
)
def test_a_setting_out_of_range_is_named_with_the_file(
    read: Read, text: str, complaint: str
) -> None:
    with pytest.raises(SettingsError, match=f"^run.yaml: .*{complaint}"):
        read(text)


def test_a_file_that_is_none_is_refused_in_one_line(read: Read) -> None:
    for text in ("a: b: c", "- just\n- a list", ""):
        with pytest.raises(SettingsError, match="^run.yaml") as refusal:
            read(text)
        assert "\n" not in str(refusal.value)
    with pytest.raises(
        SettingsError, match="^nowhere.yaml: No such file or directory; pass a YAML"
    ):
        read_config("nowhere.yaml")


def test_a_file_without_a_dataset_says_so(read: Read) -> None:
    with pytest.raises(SettingsError, match="^run.yaml: dataset is missing"):
        read("base_model: z-image", dataset=None)


def test_prompt_ids_are_logged_only_where_the_file_asks(read: Read) -> None:
    assert not read("train: {steps: 1}").log_prompt_ids
    assert not read("debug: {log_prompt_ids: no}").log_prompt_ids
    assert read("debug: {log_prompt_ids: yes}").log_prompt_ids


def test_how_samples_are_drawn_is_part_of_the_settings(read: Read) -> None:
    settings = read("sample: {prompts: a cat, num_inference_steps: 4, guidance_scale: 2, seed: 1}")
    assert settings.sample_prompts == ("a cat",)
    assert settings.sample_options == {"num_inference_steps": 4, "guidance_scale": 2.0, "seed": 1}
