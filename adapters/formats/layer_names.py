"""Matches the layer names in LoRA files to the layers of a model.

A name is accepted if it matches exactly one layer: with dots or flattened with underscores, with a
program's prefix, and with the parts that compiled or distributed training adds.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

# Added by torch.compile, DataParallel, FSDP and activation checkpointing, anywhere in a name.
WRAPPERS = frozenset(
    ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
)
# Prefixes of a dotted name that refer to the whole model, any number of them.
FRONTS = frozenset(
    ("base_model", "model", "transformer", "diffusion_model", "unet", "dit", "net", "pipe")
)
# The same for a flattened name, word by word: lora_unet_, lora_transformer_, lycoris_, …
_FLAT_FRONTS = frozenset("lora lycoris unet transformer diffusion base model dit net".split())
# First parts of names that belong to another model than the transformer.
OTHER_COMPONENTS = re.compile(
    r"(?:lora_)?(?:te\d?|text_encoders?(?:_?\d)?|text_model|clip(?:_[lg])?|t5\w*|llm|language_model"
    r"|cond_stage_model|conditioner|vae|first_stage_model|control\w*|transformer_2|unet_2"
    r"|image_encoder|vision\w*|visual|ip_adapter)(?=[._]|$)"
)
_SEPARATORS = re.compile(r"[._$]+")
_FLAT_WRAPPERS = re.compile(
    r"(?:(?<=_)|^)_*(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module|module)(?=_|$)"
)

Targets = tuple[str, ...]  # layers; several, in the order of rows, for a fused layer


def without_wrappers(parts: Sequence[str]) -> list[str]:
    """The parts of a dotted name without those of wrappers."""
    return [part for part in parts if part not in WRAPPERS]


def without_fronts(parts: Sequence[str]) -> list[str]:
    """The parts of a dotted name after the prefixes for the whole model; at least one."""
    start = 0
    while start < len(parts) - 1 and parts[start] in FRONTS:
        start += 1
    return list(parts[start:])


class Names:
    """Finds layers by the names in files.

    `spellings` maps each dotted name that a file may use to the layers that it means.
    """

    def __init__(self, spellings: Mapping[str, Targets]) -> None:
        self.spellings = dict(spellings)
        self._depth = max((written.count(".") + 1 for written in spellings), default=1)
        self._flat: dict[str, list[Targets]] = {}
        for written, targets in self.spellings.items():
            known = self._flat.setdefault("_".join(_words(written)), [])
            if targets not in known:
                known.append(targets)

    def meant(self, written: str) -> list[Targets]:
        """All matches of a name: none, one, or several if it is ambiguous."""
        exact = self.spellings.get(written)
        if exact is not None:
            return [exact]
        dotted = self._dotted(written)
        return [dotted] if dotted is not None else self._flattened(written)

    def _dotted(self, written: str) -> Targets | None:
        parts = without_wrappers(written.split("."))
        for start in range(max(0, len(parts) - self._depth), len(parts)):
            name = ".".join(parts[start:])
            found = self.spellings.get(name)
            if found is not None and (
                all(part in FRONTS for part in parts[:start]) or _is_wrapping(parts[:start], name)
            ):
                return found
        return None

    def _flattened(self, written: str) -> list[Targets]:
        found: list[Targets] = []
        for spelled in dict.fromkeys((written, _FLAT_WRAPPERS.sub("", written))):
            words = _words(spelled)
            for start in range(len(words)):
                for targets in self._flat.get("_".join(words[start:]), ()):
                    if targets not in found:
                        found.append(targets)
                if words[start] not in _FLAT_FRONTS:
                    break
            if found:
                break
        return found

    def obstacle(self, written: str) -> str:
        """The part of an unknown name that does not match, for a message."""
        if OTHER_COMPONENTS.match(written):
            return f"{written.split('.')[0]} is not part of the transformer"
        parts = without_fronts(without_wrappers(written.split(".")))
        for start in range(1, len(parts)):
            if ".".join(parts[start:]) in self.spellings:
                return f"unknown prefix {'.'.join(parts[:start])} of {'.'.join(parts[start:])}"
        if len(parts) > 1:
            return self._missing_child(parts)
        words = _words(_FLAT_WRAPPERS.sub("", written))
        if words[:1] and words[0] not in _FLAT_FRONTS and not self._begins(words[:2]):
            return f"the model has no layer {parts[0]}"
        while len(words) > 1 and words[0] in _FLAT_FRONTS and not self._begins(words[:1]):
            words = words[1:]
        known = 0
        while known < len(words) and self._begins(words[: known + 1]):
            known += 1
        if known == len(words):
            return f"{'_'.join(words)} is a group of layers"
        after = f" after {'_'.join(words[:known])}" if known else ""
        return f"no layer has {words[known]}{after}"

    def _begins(self, words: Sequence[str]) -> bool:
        start = "_".join(words)
        return any(name == start or name.startswith(f"{start}_") for name in self._flat)

    def _missing_child(self, parts: Sequence[str]) -> str:
        above: list[str] = []
        for part in parts:
            children = self._children(above)
            if part not in children:
                where = f"{'.'.join(above)} has" if above else "the model has"
                return f"{where} no {part}, only {_listed(children)}"
            above.append(part)
        return f"{'.'.join(above)} is a group of layers"

    def _children(self, above: Sequence[str]) -> list[str]:
        start = "".join(f"{part}." for part in above)
        found = (n[len(start) :].split(".")[0] for n in self.spellings if n.startswith(start))
        return list(dict.fromkeys(found))


def _is_wrapping(front: Sequence[str], name: str) -> bool:
    """Whether an unknown prefix of a block's layer name can only refer to the whole model."""
    number = name.split(".")[1:2]
    in_block = bool(number) and number[0].isdigit()
    return in_block and not any(
        any(character.isdigit() for character in part) or OTHER_COMPONENTS.match(part)
        for part in front
    )


def _words(name: str) -> list[str]:
    return [word for word in _SEPARATORS.split(name) if word]


def _listed(children: Iterable[str]) -> str:
    names = list(children)
    if len(names) > 1 and all(name.isdigit() for name in names):
        return f"{min(map(int, names))} to {max(map(int, names))}"
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
