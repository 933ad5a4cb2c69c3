"""Resolves the setting `lora_targets` to names of a transformer's layers."""

import logging
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

log = logging.getLogger(__name__)


def chosen_layers(
    wanted: str, learning: Sequence[str], groups: Mapping[str, list[str]], model: str
) -> list[str]:
    """Names of the layers that `wanted` selects (`families.family.Family.lora_targets`).

    `learning` are all trainable linear layers, `groups` the known sets of them. Raises ValueError
    that names `model` and the pattern that matches no layer.
    """
    groups = {**groups, "auto": [name for names in groups.values() for name in names]}
    if wanted in groups:
        return list(groups[wanted])
    blocks = {name.split(".")[0] for name in groups["auto"]}
    groups["all"] = [name for name in learning if name.split(".")[0] in blocks]
    found: dict[str, None] = {}
    for part in filter(None, (part.strip() for part in wanted.split(","))):
        pattern = part.removeprefix("!").strip()
        fits = groups.get(pattern) or [
            name
            for name in learning
            if name == pattern or name.endswith(f".{pattern}") or fnmatchcase(name, pattern)
        ]
        if not fits and part.startswith("!"):
            log.warning("lora_targets: %s excludes no layer", part)
        elif not fits:
            ends = dict.fromkeys(name.partition(".")[2].partition(".")[2] for name in learning)
            near = get_close_matches(pattern, filter(None, ends), n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"lora_targets: {pattern!r} matches no trainable linear layer of {model}; "
                f"{hint}use one of {', '.join(groups)}, the end of a layer's name such as "
                f"{groups['auto'][0]!r}, or a pattern with *"
            )
        if part.startswith("!"):
            found = {name: None for name in found if name not in set(fits)}
        else:
            found |= dict.fromkeys(fits)
    if not found:
        raise ValueError(f"lora_targets {wanted!r} selects no layer; use auto, or names of layers")
    return list(found)
