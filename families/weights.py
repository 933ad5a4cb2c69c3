"""Loads models from their files. A missing weight is an error, never random values."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors import safe_open
from torch import nn
from transformers.utils import logging as transformers_log

from families.repository import MissingModel


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Context without the library's warnings, which name weights that are missing on purpose."""
    level = transformers_log.get_verbosity()
    transformers_log.set_verbosity_error()
    try:
        yield
    finally:
        transformers_log.set_verbosity(level)


def whole(model_class: Any, folder: Any, dtype: torch.dtype, **options: Any) -> nn.Module:
    """Loads a model with `from_pretrained`.

    Raises `MissingModel` naming missing weights; the libraries would initialize them randomly.
    """
    transformers_log.disable_progress_bar()  # also the Hub's, so it is undone below
    common = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    try:
        with quiet_transformers():
            model, report = model_class.from_pretrained(folder, **common, **options)
    except NotImplementedError:  # a missing weight cannot be moved to its device
        with quiet_transformers():  # without options: names it
            _, report = model_class.from_pretrained(folder, **common)
        _refuse_missing(report["missing_keys"], folder, model_class)
        raise
    finally:
        transformers_log.enable_progress_bar()
    _refuse_missing(report["missing_keys"], folder, type(model))
    return model


def from_one_file(model_class: Any, file: Path, config: Path, dtype: torch.dtype) -> nn.Module:
    """Loads a single checkpoint file in the original key layout.

    Raises `MissingModel` naming all missing weights; the library would fail at the first without
    its name.
    """
    single_file: Any = SINGLE_FILE_LOADABLE_CLASSES[model_class.__name__]
    convert = single_file["checkpoint_mapping_fn"]
    with torch.device("meta"):
        expected = set(model_class.from_config(model_class.load_config(config)).state_dict())
    with torch.device("meta"), safe_open(file, "pt") as opened:
        found = {key: torch.empty(opened.get_slice(key).get_shape()) for key in opened.keys()}
    _refuse_missing(expected - set(convert(checkpoint=found)), file, model_class)
    return model_class.from_single_file(str(file), config=str(config), dtype=dtype)


def _refuse_missing(names: Iterable[str], source: Path, model_class: Any) -> None:
    missing = sorted(names)
    if missing:
        shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise MissingModel(
            f"{source}: {len(missing)} weights of {model_class.__name__} are not in its files "
            f"({shown}); download the model again"
        )
