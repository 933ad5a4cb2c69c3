"""Names and shapes of the transformers' parameters, and the width of their text encoders.

Those of the published configs are in `parameters.json`, since diffusers takes seconds and 260 MB to
import. Those of any other config, and of another version of diffusers, come from the class itself.
`python -m families.parameters` writes the file again, after a change of diffusers or of a config.
"""

import json
import re
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

from families.base import Base
from families.registry import FAMILIES, family_of
from families.repository import local_config

FILE = Path(__file__).with_suffix(".json")

Parameters = dict[str, tuple[int, ...]]


def transformer_parameters(base: Base) -> Parameters:
    """The shapes of the transformer's parameters and buffers, by name."""
    known = json.loads(FILE.read_text(encoding="utf-8"))
    row = known["families"].get(base.family)
    config = local_config(base, "transformer") or family_of(base).published["transformer"]
    if row is not None and known["diffusers"] == version("diffusers"):
        if all(row["config"].get(key) == _listed(value) for key, value in _own(config).items()):
            return _expanded(row["blocks"], row["parameters"])
    from families.without_weights import transformer_without_weights

    return _shapes(transformer_without_weights(base))


def text_width(base: Base) -> int:
    """The dimension of the text encoder's embeddings, by its config; nothing is downloaded."""
    config = local_config(base, "text_encoder") or family_of(base).published["text_encoder"]
    return int(config.get("text_config", config)["hidden_size"])


def published() -> dict[str, Any]:
    """The content of `parameters.json`, from the classes of the families."""
    import torch

    rows = {}
    for name, family in FAMILIES.items():
        with torch.device("meta"):
            model = family.model_class("transformer").from_config(family.published["transformer"])
        blocks, parameters = _shortened(_shapes(model))
        rows[name] = {
            "config": {key: _listed(value) for key, value in _own(model.config).items()},
            "blocks": blocks,
            "parameters": parameters,
        }
    return {"diffusers": version("diffusers"), "families": rows}


def _shapes(model: Any) -> Parameters:
    return {name: tuple(each.shape) for name, each in model.state_dict().items()}


def _own(config: Any) -> dict[str, Any]:
    """The fields of a config without those that libraries add, such as `_class_name`."""
    return {key: value for key, value in dict(config).items() if not key.startswith("_")}


def _listed(value: Any) -> Any:
    """As read back from JSON, which has no tuples."""
    return json.loads(json.dumps(value))


def _shortened(parameters: Parameters) -> tuple[dict[str, int], dict[str, list[int]]]:
    """The number of equal blocks by their list's name, and the parameters of one block of each."""
    blocks: dict[str, int] = {}
    short: dict[str, list[int]] = {}
    for name, shape in parameters.items():
        if match := re.fullmatch(r"(\w+)\.(\d+)\.(\w+\..+)", name):
            trunk, number, rest = match.groups()
            blocks[trunk] = max(blocks.get(trunk, 0), int(number) + 1)
            name = f"{trunk}.*.{rest}"
        short[name] = list(shape)
    if list(_expanded(blocks, short).items()) != list(parameters.items()):
        raise ValueError("the blocks of the transformer differ")
    return blocks, short


def _expanded(blocks: dict[str, int], short: dict[str, list[int]]) -> Parameters:
    full: Parameters = {}
    for trunk, names in groupby(short, lambda name: name.split(".*.")[0] if ".*." in name else ""):
        block = list(names)
        for number in range(blocks[trunk] if trunk else 1):
            full |= {each.replace("*", str(number), 1): tuple(short[each]) for each in block}
    return full


if __name__ == "__main__":
    FILE.write_text(json.dumps(published(), indent=1) + "\n", encoding="utf-8")
