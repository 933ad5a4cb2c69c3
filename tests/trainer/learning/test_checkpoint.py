"""A checkpoint that is damaged or of another model is refused by file and part, before a model."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import make_loop
from safetensors import safe_open
from safetensors.torch import save_file

from adapters.archive import Archive, write_archive
from adapters.placeholder import Placeholder
from trainer import reading, run
from trainer.data.dataset import read_dataset
from trainer.learning.checkpoint import BrokenCheckpoint, read_checkpoint, write_checkpoint
from trainer.learning.resume import read_resume, with_seed
from trainer.learning.saving import state_of
from trainer.settings.fields import Settings, SettingsError, resolve
from trainer.settings.inputs import TrainingInputs

KEY = "zeroprior.checkpoint"
NAN = float("nan")


@pytest.fixture(scope="module")
def whole(photos: Path, vault: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """Settings, header and tensors of a real checkpoint, and the loop that it is of."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODEL_VAULT", str(vault))
        folder = tmp_path_factory.mktemp("checkpoint")
        settings = resolve(TrainingInputs(
            dataset=photos, base_model="z-image", resolution="64", rank=2, steps=3, seed=5,
            ema_decay=0.5, caption_dropout=0.0,
        ))  # fmt: skip
        loop = make_loop(settings, 1)
        loop.step(0)
        path = write_checkpoint(state_of(loop), folder)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()[KEY]
        return settings, header, {name: file.get_tensor(name) for name in file.keys()}, loop


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def at(*path: Any, value: Any) -> Callable[[Any, Any], None]:
    """Puts a value somewhere into the header; without a value takes it out."""

    def change(header: Any, _: Any) -> None:
        for part in path[:-1]:
            header = header[part]
        if value is GONE:
            del header[path[-1]]
        else:
            header[path[-1]] = value

    return change


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any, Any], None]:
    """Changes a tensor."""

    def changed(_: Any, tensors: Any) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return changed


GONE = object()
PAIRS = ("state", "optimizers", "pairs", 0, 1, "pairs")  # of the LoRA's: state, param_groups
STATE, GROUPS = (*PAIRS, 0, 1, "pairs"), (*PAIRS, 1, 1)
MOMENT = "optimizers.lora.state.0.exp_avg"

CASES: dict[str, tuple[Callable[[Any, Any], None], str]] = {
    "no format": (at("format_version", value=GONE), "format version None is unknown"),
    "text format": (at("format_version", value="2"), "format version '2' is unknown"),
    "no step": (at("step", value=GONE), "step is None, not a whole number between 0"),
    "negative step": (at("step", value=-5), "step is -5"),
    "huge step": (at("step", value=10**9), "step is 1000000000"),
    "text step": (at("step", value="1"), "step is '1'"),
    "true step": (at("step", value=True), "step is True"),
    "float step": (at("step", value=1.0), "step is 1.0"),
    "another step": (at("step", value=2), "history.losses has 1 values for 2 steps"),
    "no identity": (at("identity", value=GONE), "identity is missing"),
    "list identity": (at("identity", value=[1]), "identity is missing or not a JSON object"),
    "text settings": (at("identity", "settings", value="x"), "identity.settings is not"),
    "text seed": (at("identity", "settings", "seed", value="x"), "identity.settings.seed is 'x'"),
    "list data": (at("identity", "data", value=[1]), "identity.data is not"),
    "number data": (at("identity", "data", value={"a.png": 3}), r"identity.data\['a.png'\] is"),
    "one hash": (at("identity", "data", value={"a.png": ["0"]}), "has 1 hashes, not 2"),
    "no history": (at("history", value=GONE), "history is missing"),
    "no losses": (at("history", "losses", value=GONE), "history.losses is missing"),
    "text loss": (at("history", "losses", value=["x"]), r"history.losses\[0\] is 'x'"),
    "huge loss": (at("history", "losses", value=[10**400]), r"history.losses\[0\] is 1000"),
    "many norms": (at("history", "row_norms", value=[1.0] * 9), "row_norms has 9 values for 1"),
    "bad validation": (at("history", "validation", value=[3]), r"history.validation\[0\] is 3"),
    "empty validation": (at("history", "validation", value=[[]]), "contains no loss"),
    "text average": (at("averaged_steps", value="x"), "averaged_steps is 'x'"),
    "no state": (at("state", value=GONE), "state is missing"),
    "list state": (at("state", value=[]), "state is missing or not a JSON object"),
    "no parameters": (at("state", "parameters", value=GONE), "state of parameters is damaged"),
    "parameters as a list": (at("state", "parameters", value=[]), "parameters is not a table"),
    "parameters as a text": (at("state", "parameters", value="x"), "parameters is not a table"),
    "empty parameters": (at("state", "parameters", value={"pairs": []}), "contains no tensors"),
    "unknown tensor": (
        at("state", "parameters", "pairs", 0, 1, value={"tensor": "x"}),
        "state of parameters is damaged .KeyError",
    ),
    "number for a tensor": (
        at("state", "parameters", "pairs", 0, 1, value=3),
        "parameters 'lora.0' is not a float32 tensor",
    ),
    "three in a pair": (
        at("state", "parameters", "pairs", 0, value=[1, 2, 3]),
        "state of parameters is damaged",
    ),
    "a list for a name": (
        at("state", "parameters", "pairs", 0, 0, value=[1]),
        "state of parameters is damaged .TypeError",
    ),
    "deep": (at("state", "parameters", value=deep(900)), "damaged|not a whole checkpoint"),
    "no optimizers": (at("state", "optimizers", value={"pairs": []}), "optimizers are not those"),
    "text for an optimizer": (
        at("state", "optimizers", "pairs", 0, 1, value="x"),
        "optimizers.lora has no state",
    ),
    "no groups": (at(*GROUPS, value=[]), "optimizers.lora.param_groups is not a list of one"),
    "other parameters": (
        at(*GROUPS, 0, "pairs", value=[["params", [0]]]),
        "param_groups does not name",
    ),
    "text options": (
        at(*GROUPS, 0, "pairs", 0, 1, value="x"),
        r"optimizers.lora.param_groups\[0\].lr is not like 0.001",
    ),
    "state of no parameter": (
        at(*STATE, 0, 0, value=10**6),
        r"state\[1000000\] does not belong to",
    ),
    "state as a number": (at(*STATE, 0, 1, value=3), r"state\[0\] does not belong to a parameter"),
    "empty state": (
        at(*STATE, 0, 1, value={"pairs": []}),
        r"state\[0\] does not contain step, exp",
    ),
    "text in a state": (
        at(*STATE, 0, 1, "pairs", 1, 1, value="x"),
        r"optimizers.lora.state\[0\].exp_avg is not a tensor",
    ),
    "wrong shape": (
        tensor("parameters.lora.0", lambda value: value[:, :-1]),
        r"parameters lora.0 has shape|has other names or shapes",
    ),
    "wrong type": (
        tensor("parameters.lora.0", torch.Tensor.half),
        "parameters 'lora.0' is not a float32 tensor",
    ),
    "wrong moment": (
        tensor(MOMENT, lambda value: value[:1]),
        r"optimizers.lora.state\[0\].exp_avg has shape",
    ),
    "NaN": (tensor("parameters.lora.0", lambda value: value * NAN), "'lora.0' contains NaN"),
    "NaN moment": (tensor(MOMENT, lambda value: value * NAN), r"lora.state\[0\] contains NaN"),
    "infinite average": (
        tensor("averages.lora.1", lambda value: value + float("inf")),
        "averages 'lora.1' contains NaN or infinity",
    ),
    "exotic type": (
        tensor(MOMENT, lambda value: value.to(torch.float8_e4m3fn)),
        "contains NaN, infinity or an unknown type",
    ),
    "averages of fewer": (
        at("state", "averages", "pairs", value=[]),
        "",  # of a run without averages
    ),
    "averages of others": (
        at("state", "averages", "pairs", 0, 0, value="lora.99"),
        "averages has other names or shapes",
    ),
    "subject weights of others": (
        at("state", "subject_weights", value={"pairs": [["x", {"tensor": "parameters.lora.0"}]]}),
        "subject_weights has other names or shapes",
    ),
    "no subject weights": (at("state", "subject_weights", value=GONE), ""),  # of an older version
}


@pytest.mark.parametrize("case", CASES)
def test_a_malformed_checkpoint_is_refused_by_file_and_part_before_a_model_is_loaded(
    case: str, whole: Any, tmp_path: Path, use_vault: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, text, tensors, _ = whole
    change, said = CASES[case]
    header, tensors = json.loads(text), dict(tensors)
    change(header, tensors)
    path = tmp_path / "step-000001.safetensors"
    save_file(tensors, path, {KEY: json.dumps(header)})
    monkeypatch.setattr(reading, "load_family", lambda *_: pytest.fail("a model was asked for"))
    resumed = settings.replace(resume_from=path)
    if not said:
        assert read_resume(resumed, []) is not None
        return
    with pytest.raises(SettingsError, match=said) as error:
        read_resume(resumed, [])
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 500 and str(error.value).isprintable()


@pytest.mark.parametrize("header", ["[1]", "3", '"x"', "null", "{", "[" * 3000, ""])
def test_a_header_that_is_no_object_is_refused(
    header: str, photos: Path, tmp_path: Path, use_vault: Path
) -> None:
    """By whoever reads it: the seed is looked up before anything else."""
    path = tmp_path / "step-000001.safetensors"
    save_file({"a": torch.zeros(1)}, path, {KEY: header})
    with pytest.raises(BrokenCheckpoint, match=f"{path}.*(header|not a whole checkpoint)"):
        read_checkpoint(path)
    with pytest.raises(SettingsError, match="resume_from: .*step-000001"):
        with_seed(resolve(TrainingInputs(dataset=photos, base_model="z-image", resume_from=path)))


def test_what_is_written_is_read_back_and_needs_no_second_copy(
    whole: Any, tmp_path: Path, use_vault: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU not a tensor is copied; those that share memory are, since the format wants it."""
    state = state_of(whole[-1])
    copies: list[int] = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda self: copies.append(1) or clone(self))
    read = read_checkpoint(write_checkpoint(state, tmp_path))
    assert copies == []
    assert read.history == state.history and read.identity == state.identity
    for name, value in state.parameters.items():
        assert torch.equal(value, read.parameters[name])
    shared = replace(state, averages=dict(state.parameters))
    assert len(read_checkpoint(write_checkpoint(shared, tmp_path)).averages) == len(copies)


# ---- Weights of another model --------------------------------------------------------------------


def weights(loop: Any, folder: Path, **changes: Any) -> Path:
    factors, placeholders = loop.final_weights()
    values = {"deltas": factors, "placeholders": placeholders, "meta": {}} | changes
    return write_archive(Archive(**values), folder / "weights.zip")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: {"deltas": dict([*f.items()][1:])}, "other layers than lora_targets 'auto'"),
        (
            lambda f: {"deltas": f | {"layers.0.other": next(iter(f.values()))}},
            r"1 that this run does not train \(layers.0.other",
        ),
        (
            lambda f: {"deltas": {k: (a[:, :-1], b) for k, (a, b) in f.items()}},
            r"has lora_A 2x63, .* needs lora_A 2x64",
        ),
        (
            lambda f: {"placeholders": (Placeholder("<zwx>", torch.ones(1, 5)),)},
            r"a placeholder of shape \(1, 5\)",
        ),
        (lambda f: {"meta": {"base_model": "unheard/of"}}, "'unheard/of' is not one of"),
        (lambda f: {"meta": {"base_model": "~nobody/x"}}, "'~nobody/x' is not one of"),
        (lambda f: {"meta": {"base_model": "Qwen/Qwen-Image"}}, "was trained on Qwen/Qwen-Image"),
    ],
)
def test_weights_of_another_model_are_refused_before_a_model_is_loaded(
    change: Callable[[Any], dict[str, Any]],
    said: str,
    whole: Any,
    tmp_path: Path,
    use_vault: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings, *_, loop = whole
    path = weights(loop, tmp_path, **change(loop.final_weights()[0]))
    monkeypatch.setattr(reading, "load_family", lambda *_: pytest.fail("a model was asked for"))
    with pytest.raises(SettingsError, match=said):
        run.train(settings.replace(resume_from=path))


@pytest.mark.parametrize("base", ["z-image", "qwen-image"])
def test_weights_of_the_same_model_are_continued(
    base: str, small: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = small(base_model=base)
    loop = make_loop(settings, 1)
    path = weights(loop, tmp_path, meta={"base_model": settings.base.hub_id})
    examples = read_dataset(settings.dataset, settings.default_caption, settings.subject)
    assert read_resume(settings.replace(resume_from=path), examples) is not None


@pytest.mark.parametrize(
    ("changes", "variables", "said"),
    [
        (
            {"lora_targets": "nonsense"},
            {},
            "lora_targets: 'nonsense' matches no trainable linear layer",
        ),
        ({}, {"DTYPE": "float16"}, r"\$DTYPE is 'float16'"),
    ],
)
def test_what_no_model_has_is_an_error_in_the_settings(
    changes: dict[str, Any],
    variables: dict[str, str],
    said: str,
    small: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(run, "encode_images", lambda *_: pytest.fail("images were encoded"))
    with pytest.raises(SettingsError, match=said):
        run.train(small(**changes))
