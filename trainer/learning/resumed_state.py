"""The shapes of trained weights and optimizer states, which a checkpoint must have."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from adapters.full_weights import trained_names
from families.without_weights import family_without_weights
from trainer.learning.checkpoint import Checkpoint
from trainer.learning.optimizers import fresh_state, rows_optimizer
from trainer.settings import Settings, SettingsError


@dataclass(frozen=True)
class Shapes:
    """The shapes of a run's trained weights, computed without loading its base model."""

    lora: dict[str, dict[str, tuple[int, int]]]  # of each layer's parts, in order
    rows: tuple[int, int]  # of a placeholder
    full: list[tuple[int, ...]] = field(default_factory=list)  # of a full training's, in order


def trained_shapes(settings: Settings) -> Shapes:
    """By the model's structure only. Raises `SettingsError` for wrong `lora_targets`."""
    family = family_without_weights(settings.base)
    width = family.text_encoder.get_input_embeddings().weight.shape[1]
    if settings.full:
        parameters = map(
            family.transformer.get_parameter, trained_names(family, settings.lora_targets)
        )
        return Shapes({}, (1, width), [tuple(each.shape) for each in parameters])
    try:
        targets = set(family.lora_targets(settings.lora_targets))
    except ValueError as error:
        raise SettingsError(str(error)) from error
    lora = {
        name: settings.form.shapes(module.out_features, module.in_features)
        for name, module in family.transformer.named_modules()
        if name in targets
    }
    return Shapes(lora, (1, width))


def check_state(checkpoint: Checkpoint, settings: Settings, path: Path) -> None:
    """Checks the tensors' shapes against this run's LoRA, placeholder and optimizer."""
    shapes = trained_shapes(settings)
    wanted: dict[str, tuple[int, ...]] = {}
    parts = (shape for layer in shapes.lora.values() for shape in layer.values())
    wanted |= {f"lora.{number}": shape for number, shape in enumerate(parts)}
    wanted |= {f"transformer.{number}": shape for number, shape in enumerate(shapes.full)}
    wanted |= {f"placeholder.{number}": shapes.rows for number in range(len(settings.tokens))}
    found = {name: tuple(value.shape) for name, value in checkpoint.parameters.items()}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            shape = found.get(name, "nothing")
            raise SettingsError(
                f"resume_from: {path} is of another model: parameters {name} has shape {shape}, "
                f"and {settings.base.name} needs {wanted.get(name, 'nothing')}"
            )
    kinds = dict.fromkeys(("lora", "transformer"), settings.optimizer)
    kinds["placeholder"] = rows_optimizer(settings.optimizer)
    for name, state in checkpoint.optimizers.items():
        options = state["param_groups"][0] | {"params": []}
        right = fresh_state(kinds[name], shapes.rows)["param_groups"][0] | {"params": []}
        faults = [unlike(options, right, f"optimizers.{name}.param_groups[0]")]
        for number, values in state["state"].items():
            shape, part = found[f"{name}.{number}"], f"optimizers.{name}.state[{number}]"
            rights = [fresh_state(kinds[name], shape, start)["state"][0] for start in (0.0, 1.0)]
            unlikes = [unlike(values, right, part) for right in rights]
            faults.append(unlikes[1] if all(unlikes) else None)
        fault = next(filter(None, faults), None)
        if fault is not None:
            raise SettingsError(f"resume_from: {path} is damaged: {fault}")


def unlike(found: Any, right: Any, part: str) -> str | None:
    """How a part of an optimizer's state differs in structure from a valid one, or None.

    Tensors must have equal shapes and dtypes, dictionaries equal keys, other values equal types.
    """
    if isinstance(right, Tensor):
        if not isinstance(found, Tensor):
            return f"{part} is not a tensor"
        if (found.shape, found.dtype) != (right.shape, right.dtype):
            shapes = [f"{tuple(each.shape)} of {each.dtype}" for each in (found, right)]
            return f"{part} has shape {shapes[0]}, not {shapes[1]}"
        return None
    if isinstance(right, dict):
        if not isinstance(found, dict) or found.keys() != right.keys():
            return f"{part} does not contain {', '.join(map(str, right))}"
        parts = ((found[key], right[key], f"{part}.{key}") for key in right)
    elif isinstance(right, (list, tuple)):
        if not isinstance(found, list) or len(found) != len(right):
            return f"{part} is not a list of {len(right)} values"
        parts = ((found[k], each, f"{part}[{k}]") for k, each in enumerate(right))
    else:
        numbers = [isinstance(each, (int, float)) for each in (found, right)]
        same = all(numbers) or type(found) is type(right)
        return None if same else f"{part} is not like {right!r}"
    return next((fault for each in parts if (fault := unlike(*each))), None)
