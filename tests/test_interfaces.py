"""Cog, YAML, the command line, plain Python and the documents have the same inputs.

They have the same names, defaults, bounds and choices, unless a table below has a reason.
`trainer.settings.fields` and `inference.request` hold the defaults, `trainer.settings.checks` and
`inference.request` the bounds.
"""

import argparse
import dataclasses
import inspect
import re
import typing
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any

import pytest
import yaml
from cog import FieldInfo
from root import ROOT

import predict as predict_face
import train as train_face
from families.registry import BASES
from inference.__main__ import arguments_parser as inference_parser
from inference.engine import Engine
from inference.request import ASPECT_RATIOS, CUSTOM, FORMATS, QUALITIES, QUALITY, Request
from inference.request import LENGTHS as REQUEST_LENGTHS
from inference.request import RANGES as REQUEST_RANGES
from serving.inputs import plain
from trainer.__main__ import arguments_parser as trainer_parser
from trainer.settings.checks import CHOICES, LENGTHS, RANGES
from trainer.settings.config import _SECTIONS, _TOP, read_config
from trainer.settings.fields import Settings, settle
from trainer.settings.presets import PRESETS, find_preset, left_out

# Training. Names that an interface lacks, each with the reason.
NOT_SETTINGS = {
    "wandb_api_key": "a secret is no setting: on the command line it comes from the environment",
    "hf_token": "the same",
}
NOT_INPUTS = {
    "output_dir": "a server chooses the folder; `name` is in its name",
    "log_prompt_ids": "$LOG_PROMPT_IDS does it, and the log of a server is not the customer's",
    "sample_options": "options behind a prompt (--w, --s, …) do it; Cog has no nested inputs",
    "sample_overrides": "derived from the options behind the prompts",
    "sample_defaults": "derived: whether sample_prompts was given",
    "allow_failed_checks": "what a server publishes has passed its checks",
    "foreign_captions": "set for job files of ai-toolkit only",
    "given": "the record of what was given",
    "seed_is_random": "derived: whether a seed was given",
}
NOT_KEYS = {
    "sample_overrides": "derived from the options behind the prompts",
    "sample_defaults": "derived: whether sample_prompts was given",
    "foreign_captions": "set for job files of ai-toolkit only",
    "given": "the record of what was given",
    "seed_is_random": "derived: whether a seed was given",
}
RENAMED = {"base": "base_model", "resolutions": "resolution"}  # a parsed value: what is given
KEYS = {"prompts": "sample_prompts", "every": "sample_every"}  # of the section `sample`
# The rest is in the YAML file.
OPTIONS = {"dataset", "output_dir", "name", "base_model", "allow_failed_checks"}
TRAINER_ONLY = {"config", "help", "cpu"}  # of this machine, not of the run

# Inference.
NOT_IN_REQUEST = {"replicate_weights", "lora_weights", "extra_lora", "hf_api_token", "base_model"}
FILES = {"output_format", "output_quality", "output_metadata"}  # how images are written
CLI_NAMES = {
    "weights": "replicate_weights",  # shorter; Replicate needs the other name
    "no_metadata": "output_metadata",  # a switch that is on by default
}
CLI_ONLY = {
    "lora_path": "a LoRA whose token is in a file of its own; others send weights.zip",
    "placeholder_token": "the token of --lora_path",
    "output_dir": "a server sends images, and plain Python returns their paths",
    "cpu": "a server's operator decides what it loads",
    "help": "the command line's own",
}
CLI_LACKS = {
    "lora_weights": "the name for clients of other models on Replicate",
    "hf_api_token": "$HF_TOKEN does it: a secret is not for a command line",
}
UPLOAD = 100 << 20  # Cog's limit of a request: the length of a data URL


def inputs_of(function: Callable[..., Any]) -> dict[str, FieldInfo]:
    found = inspect.signature(function).parameters
    return {name: each.default for name, each in found.items() if name != "self"}


TRAIN = inputs_of(train_face.train)
PREDICT = inputs_of(predict_face.Predictor.predict)
SETTINGS = {RENAMED.get(each.name, each.name) for each in dataclasses.fields(Settings)}
REQUEST = {each.name: each for each in dataclasses.fields(Request)}


def kinds(annotation: Any) -> set[str]:
    """The names of the types that a value may have, a path and a secret being text."""
    union = typing.get_origin(annotation) in (typing.Union, UnionType)
    parts = typing.get_args(annotation) if union else (annotation,)
    names = {typing.get_origin(each) or each for each in parts}
    text = {"Path": "str", "Secret": "str", "tuple": "str", "Base": "str", "list": "str"}
    return {text.get(each.__name__, each.__name__) for each in names} - {"NoneType"}


def test_cog_has_every_setting_of_a_training() -> None:
    assert SETTINGS - NOT_INPUTS.keys() == TRAIN.keys() - NOT_SETTINGS.keys()


def test_yaml_has_every_setting_of_a_training() -> None:
    keys = {*_TOP, *_SECTIONS["train"], *_SECTIONS["debug"]}
    sample = set(_SECTIONS["sample"])
    assert keys | set(KEYS.values()) == SETTINGS - NOT_KEYS.keys() - {"sample_options"}
    assert sample - KEYS.keys() == REQUEST.keys() - {"prompt", "image"}


def test_the_command_line_of_a_training_has_settings_only() -> None:
    assert options_of(trainer_parser()) - TRAINER_ONLY == OPTIONS
    assert OPTIONS < SETTINGS


def test_cog_and_yaml_take_the_same_types() -> None:
    hints = typing.get_type_hints(train_face.train)
    known = typing.get_type_hints(Settings) | {"base_model": str, "resolution": str}
    hints["validation_images"] = int  # `auto` or a number, as text; YAML takes either
    given = {name: kinds(hints[name]) for name in TRAIN if name in SETTINGS}
    assert given == {name: kinds(known[name]) for name in given}
    requests = typing.get_type_hints(Request)
    hints = typing.get_type_hints(predict_face.Predictor.predict)
    shared = REQUEST.keys() - {"image"}
    assert {n: kinds(hints[n]) for n in shared} == {n: kinds(requests[n]) for n in shared}


@pytest.mark.parametrize("preset", [None, *PRESETS])
@pytest.mark.parametrize("base", BASES)
def test_a_training_has_the_same_defaults_everywhere(
    base: str, preset: str | None, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"dataset": "imgs.zip", "base_model": base, "seed": 1}
    given |= {"preset": preset} if preset else {}
    inputs = plain(TRAIN) | given
    for secret in NOT_SETTINGS:
        assert inputs.pop(secret) is None
    train = {"seed": 1} | ({"preset": preset} if preset else {})
    file = tmp_path / "run.yaml"
    file.write_text(yaml.dump({"base_model": base, "dataset": "imgs.zip", "train": train}))

    def known(settings: Settings) -> Settings:
        return dataclasses.replace(settings, given={})

    python = known(settle(**given))
    assert known(settle(**inputs)) == python
    assert known(read_config(file)) == python
    # Every default that does not depend on the base stands in `Settings` itself.
    depends = {*left_out(BASES[base], find_preset(preset)), "training_shift", *given}
    for each in dataclasses.fields(Settings):
        name = RENAMED.get(each.name, each.name)
        if name in depends | {"given", "sample_defaults"} or each.default is dataclasses.MISSING:
            continue
        assert getattr(python, each.name) == each.default, name


def test_cog_and_the_checks_have_the_same_bounds_of_a_training() -> None:
    numbers = {n: (f.ge, f.le) for n, f in TRAIN.items() if f.ge is not None or f.le is not None}
    expected = RANGES | {"seed": (0, None)}  # Cog's parser takes no number of 64 bits as a bound
    del expected["validation_images"]  # text there, for `auto`
    assert numbers == expected
    choices = {name: set(f.choices) for name, f in TRAIN.items() if f.choices}
    versions = {version for base in BASES.values() for version in base.training_adapters}
    assert choices == {
        name: set(known) for name, known in CHOICES.items() if name != "trackers"
    } | {
        "base_model": {"auto", *BASES},
        "turbo_adapter": {"auto", "none", *versions},
    }
    lengths = {name: f.max_length for name, f in TRAIN.items() if f.max_length is not None}
    chosen_from_a_list, files = {"turbo_adapter"}, {"dataset": UPLOAD, "resume_from": UPLOAD}
    assert lengths == {n: LENGTHS[n] for n in LENGTHS if n not in chosen_from_a_list} | files


@pytest.mark.parametrize(("name", "bounds"), RANGES.items())
def test_python_and_yaml_refuse_what_cog_refuses(
    name: str, bounds: tuple[float, float], tmp_path: Path
) -> None:
    low, high = bounds
    step = 1 if isinstance(low, int) and isinstance(high, int) and "std" not in name else 1e-9
    file = tmp_path / "run.yaml"
    for value in (low - step, high * 2 + step):
        section = "sample" if name == "sample_every" else "train"
        content = {section: {name.removeprefix("sample_"): value}}
        file.write_text(yaml.dump({"dataset": "imgs.zip", "base_model": "miniature", **content}))
        with pytest.raises(
            ValueError, match=rf"{name} is .*; it must be between|beyond 64 bits|steps is 0"
        ):
            read_config(file)
        with pytest.raises(ValueError, match=rf"{name} is .*; it must be between|steps is 0"):
            given: dict[str, Any] = {name: value}
            settle(dataset="imgs.zip", base_model="miniature", **given)


def test_cog_has_every_part_of_a_request() -> None:
    assert PREDICT.keys() == REQUEST.keys() | NOT_IN_REQUEST | FILES
    engine = inspect.signature(Engine.predict).parameters
    assert NOT_IN_REQUEST | FILES < engine.keys()


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {action.dest for action in parser._actions}


def test_the_command_line_has_every_part_of_a_request() -> None:
    options = {CLI_NAMES.get(name, name) for name in options_of(inference_parser())}
    assert options - CLI_ONLY.keys() == PREDICT.keys() - CLI_LACKS.keys()


def test_a_request_has_the_same_defaults_everywhere() -> None:
    cog = plain(PREDICT)
    for name, each in REQUEST.items():
        if name != "prompt":
            assert cog[name] == each.default, name
    parser = inference_parser()
    command_line = vars(parser.parse_args(["--prompt", "x"]))
    assert command_line.pop("no_metadata") is not cog["output_metadata"]
    for name in command_line.keys() - CLI_ONLY.keys() - {"prompt"}:
        assert command_line[name] == cog[CLI_NAMES.get(name, name)], name
    engine = inspect.signature(Engine.predict).parameters
    for name in NOT_IN_REQUEST | FILES:
        assert engine[name].default == cog[name], name
    assert (cog["output_format"], cog["output_quality"]) == (FORMATS[0], QUALITY)


def test_cog_and_a_request_have_the_same_bounds() -> None:
    numbers = {n: (f.ge, f.le) for n, f in PREDICT.items() if f.ge is not None or f.le is not None}
    own = {"seed": (0, None), "output_quality": QUALITIES}
    own["guidance_scale"] = (0, 20)  # below 1 it is our message that says what off is
    assert numbers == REQUEST_RANGES | own
    choices = {name: list(f.choices) for name, f in PREDICT.items() if f.choices}
    assert choices == {
        "base_model": ["auto", *BASES],
        "aspect_ratio": [*ASPECT_RATIOS, CUSTOM],
        "output_format": list(FORMATS),
    }
    lengths = {name: f.max_length for name, f in PREDICT.items() if f.max_length is not None}
    assert lengths == REQUEST_LENGTHS | {"image": UPLOAD}
    for action in inference_parser()._actions:
        if action.choices:
            assert list(action.choices) == choices[action.dest]


def rows(document: str, first: str) -> dict[str, list[str]]:
    """The cells of a table whose first column is headed `first`, by the first code of a row."""
    lines = (ROOT / document).read_text(encoding="utf-8").splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(f"| {first} |"))
    found: dict[str, list[str]] = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        names = re.findall(r"`([^`]+)`", cells[0])
        found |= dict.fromkeys(names, cells[1:])
    return found


def bounds(name: str, ranges: Any, choices: Any, lengths: Any) -> str:
    if name in choices:
        return ", ".join(f"`{each}`" for each in choices[name])
    if name in ranges:
        low, high = ranges[name]
        return f"{number(low)} to {number(high)}"
    return f"{lengths[name]:,} characters" if lengths.get(name, UPLOAD) < UPLOAD else ""


def number(value: float) -> str:
    if value == 2**63 - 1:
        return "2^63 - 1"
    return f"{value:,}" if value == int(value) else f"{value:g}".replace("e-0", "e-")


def default(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, str):
        return f"`{value}`" if value else "empty"
    return f"{value:g}".replace("e-0", "e-") if isinstance(value, int | float) else ""


# Ranges that words describe better than numbers.
DESCRIBED = {"base_model", "dataset", "output_dir", "resolution", "resume_from", "turbo_adapter"}


def test_the_documented_settings_are_those_of_the_code() -> None:
    documented = rows("docs/training.md", "setting")
    sample = {f"sample.{key}": name for key, name in KEYS.items()}
    found = {sample.get(name, name.rpartition(".")[2]): cells for name, cells in documented.items()}
    assert found.keys() == SETTINGS - NOT_KEYS.keys() - {"sample_options"}
    for name, (given, limits, *_) in found.items():
        expected = bounds(name, RANGES, CHOICES, LENGTHS)
        assert limits == expected or name in DESCRIBED or limits == "on, off", name
        field = Settings.__dataclass_fields__.get(name)
        value = None if field is None or field.default is dataclasses.MISSING else field.default
        by_base = {"steps", *left_out(BASES["miniature"], find_preset(None))}
        if default(value) and name not in by_base:
            assert given == default(value), name
        else:
            assert name in {"dataset"} or given, name


def test_the_documented_inputs_are_those_of_predict() -> None:
    documented = rows("docs/inference.md", "input")
    assert documented.keys() == PREDICT.keys()
    choices = {"output_format": FORMATS, "aspect_ratio": (*ASPECT_RATIOS, CUSTOM)}
    for name, (given, limits, *_) in documented.items():
        expected = bounds(
            name, REQUEST_RANGES | {"output_quality": QUALITIES}, choices, REQUEST_LENGTHS
        )
        assert limits == expected or name in NOT_IN_REQUEST | {"image"}, name
        if default(PREDICT[name].default):
            assert given == default(PREDICT[name].default), name
