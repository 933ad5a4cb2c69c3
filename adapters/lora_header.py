"""alpha in the header of a LoRA file: the settings that diffusers and PEFT write about it all."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adapters.bounded_json import loads

MAX_VALUES = 100_000  # four for each of the 20,000 tensors that a file may have
_NAME = "lora_adapter_metadata"
_PLAIN = {"\\.": ".", "\\-": "-"}


class BadHeader(ValueError):
    """Settings that cannot be followed."""


@dataclass(frozen=True)
class Header:
    """Rank and alpha of the layers, and whether they are DoRA.

    `rank_pattern` and `alpha_pattern` name layers by their last parts (`to_q`, `attn.to_q` or the
    whole name), as PEFT matches them; the longest name counts. The names have to be plain: a
    regular expression from a stranger's file is refused.
    """

    rank: float | None = None
    alpha: float | None = None
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False  # alpha / sqrt(rank), Kalajdzievski 2023, arXiv 2312.03732
    dora: bool = False

    @classmethod
    def read(cls, metadata: Mapping[str, str]) -> "Header":
        """From a safetensors file's metadata. Raises `BadHeader`."""
        written = metadata.get(_NAME)
        if not written:
            return cls()
        try:
            settings = loads(written.encode(), MAX_VALUES)
        except ValueError as error:
            raise BadHeader(f"header {_NAME} is not JSON that can be read ({error})") from error
        if not isinstance(settings, dict):
            raise BadHeader(f"header {_NAME} is not a JSON object")

        def setting(name: str) -> Any:
            return settings.get(f"transformer.{name}", settings.get(name))

        kind = setting("peft_type")
        if kind not in (None, "LORA"):  # PEFT scales LoKr and LoHa by settings of other names
            raise BadHeader(f"header {_NAME} is about {kind!r}, not LoRA; save it with `.alpha`")
        rank, alpha = setting("r"), setting("lora_alpha")
        if not all(value is None or _positive(value) for value in (rank, alpha)):
            raise BadHeader(f"header {_NAME} has r {rank!r} and lora_alpha {alpha!r}")
        patterns = {
            name: _pattern(name, setting(name)) for name in ("rank_pattern", "alpha_pattern")
        }
        rslora, dora = bool(setting("use_rslora")), bool(setting("use_dora"))
        return cls(rank, alpha, **patterns, rslora=rslora, dora=dora)

    def scale(self, layer: str, rank: int) -> float | None:
        """alpha / rank of a layer that has this rank in the file; None where it does not say.

        Raises `BadHeader` where the header means another rank.
        """
        expected = _match(self.rank_pattern, layer, self.rank)
        alpha = _match(self.alpha_pattern, layer, self.alpha)
        if expected is None or alpha is None:
            return None
        if expected != rank:
            raise BadHeader(f"has rank {rank}, the file's header says {expected:g}")
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _pattern(name: str, written: Any) -> dict[str, float]:
    if not written:
        return {}
    if not isinstance(written, dict) or not all(map(_positive, written.values())):
        raise BadHeader(f"header {_NAME} has a {name} that is not a table of positive numbers")
    plain = {}
    for key, value in written.items():
        layer = key.removeprefix("^").removesuffix("$")
        for escaped, character in _PLAIN.items():
            layer = layer.replace(escaped, character)
        if any(character in layer for character in "\\*+?[](){}|^$"):
            raise BadHeader(f"header {_NAME} has the {name} {key[:80]!r}, not a layer's plain name")
        plain[layer.removeprefix("transformer.")] = value
    return plain


def _match(pattern: Mapping[str, float], layer: str, otherwise: float | None) -> float | None:
    while pattern:
        if layer in pattern:
            return pattern[layer]
        _, dot, layer = layer.partition(".")
        if not dot:
            break
    return otherwise


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf
