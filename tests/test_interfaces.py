"""Cog, YAML, the command line, plain Python and the documents have the same inputs.

`trainer.settings.inputs` and `inference.inputs` are the source: names, types, defaults, bounds,
choices and descriptions. What cannot be derived from them is compared with them here.
"""

import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from cog import FieldInfo
from root import ROOT

import predict as predict_module
import train as train_module
from families.registry import BASES, trainable
from inference.__main__ import arguments_parser as inference_parser
from inference.engine import Engine
from inference.flags import Parser
from inference.input_fields import Input, Inputs, Interface
from inference.inputs import SECRET_LENGTH, GenerationInputs, SharedInputs
from inference.request import Request
from trainer.__main__ import arguments_parser as trainer_parser
from trainer.run import train_from_inputs
from trainer.settings import config
from trainer.settings.config import read_config
from trainer.settings.fields import Settings, resolve
from trainer.settings.inputs import INPUTS, RANGES, TrainingInputs
from trainer.settings.presets import PRESETS, defaults_of, find_preset

UPLOAD = 100 << 20  # Cog's limit of a request: the length of a data URL
FILES = {"dataset", "resume_from", "image", "mask"}  # in Cog an upload, elsewhere a path
TRAIN_SECRETS, PREDICT_SECRETS = {"wandb_api_key", "hf_token"}, {"hf_api_token"}
# Where Cog differs, each with the reason.
VERSIONS = {version for base in BASES.values() for version in base.training_adapters}
COG_CHOICES = {  # elsewhere a folder or a file, too
    "base_model": {"auto", *BASES},
    "turbo_adapter": {"auto", "none", *VERSIONS},
}
COG_BOUNDS = {
    "seed": (0, None),  # its parser takes no number of 64 bits as a bound
    "guidance_scale": (0, 20),  # below 1 it is our message that says what off is
    "validation_images": (None, None),  # text there, for `auto`
    "preserve": (None, None),
}
# Of several types one.
COG_TYPES = {"resolution": {"str"}, "validation_images": {"str"}, "preserve": {"str"}}


def cog_inputs(function: Callable[..., Any]) -> dict[str, FieldInfo]:
    found = inspect.signature(function).parameters
    return {name: each.default for name, each in found.items() if name != "self"}


TRAIN = cog_inputs(train_module.train)
PREDICT = cog_inputs(predict_module.Predictor.predict)
BOTH = pytest.mark.parametrize(
    ("function", "model", "secrets"),
    [
        (train_module.train, TrainingInputs, TRAIN_SECRETS),
        (predict_module.Predictor.predict, GenerationInputs, PREDICT_SECRETS),
    ],
    ids=["train", "predict"],
)


def inputs_on(model: type[Inputs], interface: Interface) -> dict[str, Input]:
    return {name: each for name, each in model.inputs().items() if interface in each.on}


# ---- Cog -----------------------------------------------------------------------------------------


@BOTH
def test_cog_has_every_input(
    function: Callable[..., Any], model: type[Inputs], secrets: set[str]
) -> None:
    assert cog_inputs(function).keys() == inputs_on(model, Interface.COG).keys() | secrets


@BOTH
def test_cog_describes_and_bounds_every_input_as_the_record_does(
    function: Callable[..., Any], model: type[Inputs], secrets: set[str]
) -> None:
    cog = cog_inputs(function)
    for name, each in inputs_on(model, Interface.COG).items():
        shown = cog[name]
        assert shown.description == each.description, name
        bounds = COG_BOUNDS.get(name, (each.ge, each.le))
        assert (shown.ge, shown.le) == bounds, name
        assert set(shown.choices or ()) == COG_CHOICES.get(name, listed(each)), name
        if not shown.choices:
            most = UPLOAD if name in FILES else each.max_length
            assert shown.max_length == most, name
    for name in secrets:
        assert (cog[name].default, cog[name].max_length) == (None, SECRET_LENGTH)


def listed(each: Input) -> set[str]:
    """The choices of an input that is one of them; several are a text in Cog."""
    return set() if each.separator else set(each.choices)


@BOTH
def test_cog_has_the_defaults_and_types_of_the_record(
    function: Callable[..., Any], model: type[Inputs], secrets: set[str]
) -> None:
    hints = typing.get_type_hints(function)
    cog = cog_inputs(function)
    for name in inputs_on(model, Interface.COG):
        assert cog[name].default == model.default(name), name
        names = {"str" if each is Path else each.__name__ for each in model.types(name)}
        taken = {each.__name__.replace("Path", "str") for each in kinds(hints[name])}
        assert taken <= names and (taken == names or name in COG_TYPES or "Sequence" in names), name


def kinds(annotation: Any) -> set[type]:
    if typing.get_origin(annotation) is list:
        return {Sequence}  # type: ignore[type-abstract]
    return {each for each in typing.get_args(annotation) or (annotation,) if each is not type(None)}


# ---- YAML ----------------------------------------------------------------------------------------


def test_yaml_has_every_input_of_a_training_run() -> None:
    keys = {(section, key) for section, known in config._SECTIONS.items() for key in known}
    keys |= {("", key) for key in config._TOP}
    shared = {("sample", name) for name in SharedInputs.inputs() if name != "prompt"}
    named = {
        (each.section, each.key or n)
        for n, each in inputs_on(TrainingInputs, Interface.YAML).items()
    }
    assert keys == named | shared


@pytest.mark.parametrize("preset", [None, *PRESETS])
@pytest.mark.parametrize("base", trainable())
def test_a_run_has_the_same_defaults_everywhere(
    base: str, preset: str | None, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"dataset": "imgs.zip", "base_model": base, "seed": 1}
    given |= {"preset": preset} if preset else {}
    cog = {name: each.default for name, each in TRAIN.items() if name not in TRAIN_SECRETS}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    options = trainer_parser().read(words)
    assert (options.pop("files"), options.pop("cpu")) == ([], False)
    train = {name: given[name] for name in ("seed", "preset") if name in given}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.dump({"base_model": base, "dataset": "imgs.zip", "train": train}))

    def known(settings: Settings) -> Settings:
        return settings.replace(given=TrainingInputs(dataset="imgs.zip"))

    python = known(resolve(TrainingInputs(**given)))
    assert known(resolve(TrainingInputs(**cog | given))) == python
    assert known(resolve(TrainingInputs(**options))) == python
    assert known(read_config(file)) == python


@pytest.mark.parametrize(("name", "bounds"), RANGES.items())
def test_python_yaml_and_the_command_line_refuse_what_cog_refuses(
    name: str, bounds: tuple[float, float], tmp_path: Path
) -> None:
    low, high = bounds
    each, whole = INPUTS[name], float not in TrainingInputs.types(name)
    step = 1 if whole else 1e-9
    given: dict[str, Any] = {"dataset": "imgs.zip", "base_model": "miniature"}
    file = tmp_path / "run.yaml"
    for value in (low - step, high * 2 + step):
        file.write_text(yaml.dump(given | {each.section: {each.key or name: value}}))
        with pytest.raises(
            ValueError, match=rf"{name} is .*; it must be|more than 64|it must be au"
        ):
            read_config(file)
        with pytest.raises(ValueError, match=rf"{name} is .*; it must be"):
            TrainingInputs(**given, **{name: value})
        options = trainer_parser().read([f"--{name.replace('_', '-')}={value!r}"])
        with pytest.raises(ValueError, match=rf"{name} is .*; it must be"):
            resolve(TrainingInputs(**given, **{name: options[name]}))


# ---- The command line ----------------------------------------------------------------------------

TRAINER_ONLY = {"files", "help", "cpu", "debug"}
INFERENCE_ONLY = {
    "weights",  # shorter than replicate_weights, the name that Replicate needs
    "lora_path",  # a LoRA whose token is in a file of its own; others send weights.zip
    "placeholder_token",  # the token of --lora-path
    "prompts",  # a server gets a request for each
    "grid",
    "output_dir",  # a server sends images, and plain Python returns their paths
    "debug",
    "cpu",  # a server's operator decides what it loads
    "help",
}


def options_of(parser: Parser) -> set[str]:
    return {action.dest for action in parser._actions}


def test_the_command_lines_have_every_input() -> None:
    local = inputs_on(TrainingInputs, Interface.COMMAND_LINE).keys()
    assert options_of(trainer_parser()) - TRAINER_ONLY == local
    inputs = inputs_on(GenerationInputs, Interface.COMMAND_LINE).keys()
    others = {"replicate_weights", "lora_weights"}  # --weights
    assert options_of(inference_parser()) - INFERENCE_ONLY == inputs - others


@pytest.mark.parametrize("parser", [trainer_parser, inference_parser])
def test_an_option_has_two_spellings_and_help_shows_one(parser: Callable[[], Parser]) -> None:
    words, spellings = parser().format_help(), dict[str, set[str]]()
    for action in parser()._actions:
        if "_" in action.dest and action.option_strings:
            shown = re.search(rf"^  {action.option_strings[0]}[ ,]", words, re.M) is not None
            assert shown == (
                "_" not in action.option_strings[0] and "--base" not in action.option_strings
            )
            spellings.setdefault(action.dest, set()).update(action.option_strings)
    assert all(
        {f"--{name}", f"--{name.replace('_', '-')}"} <= found
        for name, found in spellings.items()
        if name != "output_metadata"  # --no-metadata
    )


@pytest.mark.parametrize(
    ("parser", "word", "meant"),
    [
        (trainer_parser, "--lerning-rate", "--learning-rate"),
        (trainer_parser, "--step", "--steps"),
        (inference_parser, "--num_output=2", "--num_outputs"),
    ],
)
def test_a_mistyped_option_is_an_error_with_the_nearest_one(
    parser: Callable[[], Parser], word: str, meant: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parser().read([word])
    assert (
        f"unknown option {word.partition('=')[0]}; did you mean {meant}?" in capsys.readouterr().err
    )


def test_the_base_model_has_a_short_option() -> None:
    for parser in (trainer_parser(), inference_parser()):
        assert parser.read(["--base", "z-image"])["base_model"] == "z-image"


def test_a_mistyped_input_in_python_is_an_error_with_the_nearest_one() -> None:
    mistyped: dict[str, Any] = {"lerning_rate": 1e-3}
    with pytest.raises(TypeError, match="unknown input 'lerning_rate'; did you mean 'learning_r"):
        train_module.train(dataset=Path("imgs.zip"), **mistyped)
    with pytest.raises(ValueError, match="unknown input 'lerning_rate'; did you mean 'learni"):
        TrainingInputs(dataset=Path("imgs.zip"), **{"lerning_rate": 1e-3})
    with pytest.raises(ValueError, match="unknown input 'num_output'; did you mean 'num_outputs'"):
        GenerationInputs(prompt="x", **{"num_output": 1})


# ---- Python --------------------------------------------------------------------------------------


def test_no_input_travels_without_a_type() -> None:
    """From train.py to the loop, and from predict.py to the engine."""
    for function in (train_from_inputs, resolve, Engine.predict, Request.of):
        parameters = inspect.signature(function).parameters.values()
        assert all(each.kind is not each.VAR_KEYWORD for each in parameters)
        assert all(each.annotation is not Any for each in parameters)
    assert Settings.model_fields.keys() > TrainingInputs.model_fields.keys()


# ---- Documents -----------------------------------------------------------------------------------


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


def bounds(each: Input) -> str:
    if each.choices:
        return ", ".join(f"`{choice}`" for choice in each.choices)
    if each.ge is not None and each.le is not None:
        return f"{number(each.ge)} to {number(each.le)}"
    most = each.max_length
    return f"{most:,} characters" if most is not None and most < UPLOAD else ""


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
    documented = rows("docs/settings.md", "setting")
    inputs = inputs_on(TrainingInputs, Interface.YAML)
    names = {
        f"{each.section}.{each.key or n}".removeprefix("train."): n for n, each in inputs.items()
    }
    found = {names.get(name, names.get(f".{name}", name)): c for name, c in documented.items()}
    assert found.keys() == inputs.keys()
    by_base = vars(defaults_of(BASES["miniature"], find_preset(None)))
    for name, (given, limits, *_) in found.items():
        switch = TrainingInputs.types(name) == (bool,) and limits == "on, off"
        assert limits == bounds(inputs[name]) or name in DESCRIBED or switch, name
        if (shown := default(TrainingInputs.default(name))) and name not in by_base:
            assert given == shown, name
        else:
            assert name == "dataset" or given, name


def test_the_documented_inputs_are_those_of_predict() -> None:
    documented: Mapping[str, list[str]] = rows("docs/inference.md", "input")
    assert documented.keys() == PREDICT.keys()
    for name, each in GenerationInputs.inputs().items():
        given, limits, *_ = documented[name]
        described = {
            "base_model",
            "image",
            "mask",
            "reference_images",
            "replicate_weights",
            "lora_weights",
            "extra_lora",
        }
        assert limits == bounds(each) or name in described, name
        if shown := default(GenerationInputs.default(name)):
            assert given == shown, name
