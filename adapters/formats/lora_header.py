"""Reads rank and alpha of a LoRA from the file's header or PEFT's adapter_config.json."""

import logging
import math
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapters.files.bounded_json import loads
from adapters.files.containers import printable

log = logging.getLogger(__name__)

CONFIG = "adapter_config.json"  # PEFT's, next to the weights
MAX_CONFIG_BYTES = 4 << 20
MAX_VALUES = 100_000  # five for each of the 20,000 tensors that a file may have
_NAME = "lora_adapter_metadata"
_PLAIN = {"\\.": ".", "\\-": "-"}
# Settings of PEFT that are read here, and those without effect on a trained LoRA.
_READ = frozenset(("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"))
_HARMLESS = frozenset(
    (
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
        *("revision", "inference_mode", "target_modules", "exclude_modules", "lora_dropout"),
        *("layers_to_transform", "layers_pattern", "megatron_config", "megatron_core"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"),
        *("qalora_group_size", "lora_bias", "ensure_weight_tying", "init_lora_weights", "bias"),
        *("fan_in_fan_out", "modules_to_save"),
    )
)
# Initializations that change the base model's weights: the LoRA file alone is incomplete.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def titles(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The names of a LoRA in its header, as trainers write them."""
    names = (metadata.get(key, "") for key in ("modelspec.title", "ss_output_name", "name"))
    return tuple(name[:200] for name in names if name)


class BadHeader(ValueError):
    """Invalid or unsupported settings in a header or config."""


@dataclass(frozen=True)
class Header:
    """Rank and alpha of the layers, and whether they are DoRA.

    `rank_pattern` and `alpha_pattern` name layers by their last parts (`to_q`, `attn.to_q` or the
    whole name), as PEFT matches them; the longest match counts. Regular expressions are refused,
    since the file is untrusted.
    """

    rank: float | None = None
    alpha: float | None = None
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False  # alpha / sqrt(rank), Kalajdzievski 2023, arXiv 2312.03732
    dora: bool | None = None  # None: not given
    targets: tuple[str, ...] | None = None  # the layers' names, or their ends; None: not given
    where: str = "the file's header"  # for messages

    @classmethod
    def read(cls, metadata: Mapping[str, str]) -> "Header":
        """From a safetensors file's metadata. Raises `BadHeader`."""
        written = metadata.get(_NAME)
        if not written:
            return cls()
        where = f"header {_NAME}"
        settings = _object(written, where)
        front = "transformer."
        ours = {k.removeprefix(front): v for k, v in settings.items() if k.startswith(front)}
        return cls._of(settings | ours, where)

    @classmethod
    def kohya(cls, metadata: Mapping[str, str]) -> "Header":
        """From ss_network_alpha and ss_network_dim of kohya's scripts and musubi-tuner.

        They also write `.alpha` tensors; this is used for files without them.
        """
        written = metadata.get("ss_network_alpha"), metadata.get("ss_network_dim")
        if not all(written):
            return cls()
        try:
            alpha, rank = (float(str(value)) for value in written)
        except ValueError:
            alpha = rank = math.nan
        if not (_positive(alpha) and _positive(rank)):
            log.warning(
                "the LoRA's header has ss_network_alpha %s and ss_network_dim %s, which are "
                "not positive numbers; the rank is used as alpha",
                *(printable(value[:20]) for value in written if value),
            )
            return cls()
        return cls(rank, alpha, where="the file's header (ss_network_dim)")

    @classmethod
    def config(cls, text: str | bytes) -> "Header":
        """From the text of an adapter_config.json. Raises `BadHeader`; logs ignored settings."""
        settings = _object(text, CONFIG)
        header = cls._of(settings, CONFIG)
        start = settings.get("init_lora_weights")
        if isinstance(start, str) and start.startswith(_CHANGES_BASE):
            raise BadHeader(
                f"{CONFIG} has init_lora_weights {start[:40]!r}, which changes the base model "
                "before the training; convert it to a plain LoRA with PEFT and save it again"
            )
        if settings.get("fan_in_fan_out"):
            raise BadHeader(f"{CONFIG} has fan_in_fan_out, which linear layers do not have")
        known = _READ | _HARMLESS
        odd = sorted(name for name, value in settings.items() if value and name not in known)
        odd += [n for n in ("modules_to_save",) if settings.get(n)]
        if settings.get("bias") not in (None, "none"):
            odd.append("bias")
        if isinstance(settings.get("target_modules"), str):
            odd.append("target_modules (a regular expression)")
        if odd:
            log.warning("%s: ignored: %s", CONFIG, printable(", ".join(n[:60] for n in odd[:8])))
        if header.alpha is None and not header.alpha_pattern:
            log.warning("%s has no lora_alpha; the rank is used as alpha", CONFIG)
        return header

    @classmethod
    def _of(cls, settings: Mapping[str, Any], where: str) -> "Header":
        kind = settings.get("peft_type")
        if (
            kind is not None and str(kind).upper() != "LORA"
        ):  # PEFT's settings of LoKr and LoHa have other names
            raise BadHeader(
                f"{where} has peft_type {_shown(kind)}, not LORA; save the adapter with `.alpha`"
            )
        rank, alpha = settings.get("r"), settings.get("lora_alpha")
        if not all(value is None or _positive(value) for value in (rank, alpha)):
            raise BadHeader(f"{where} has r {_shown(rank)} and lora_alpha {_shown(alpha)}")
        for name in ("use_rslora", "use_dora"):
            if not isinstance(settings.get(name), bool | None):
                raise BadHeader(f"{where} has {name} {_shown(settings[name])}, not true or false")
        patterns = {
            name: _pattern(name, settings.get(name), where)
            for name in ("rank_pattern", "alpha_pattern")
        }
        targets = settings.get("target_modules")
        named = isinstance(targets, list) and all(isinstance(each, str) for each in targets)
        dora = settings.get("use_dora")
        return cls(
            rank,
            alpha,
            **patterns,
            rslora=bool(settings.get("use_rslora")),
            dora=None if dora is None else bool(dora),
            targets=tuple(targets) if targets and named else None,
            where="the file's header" if where != CONFIG else CONFIG,
        )

    def scale(self, layer: str, rank: int) -> float | None:
        """alpha / rank of a layer that has this rank in the file; None if alpha is not given.

        Raises `BadHeader` if the header has another rank.
        """
        expected = _match(self.rank_pattern, layer, self.rank)
        alpha = _match(self.alpha_pattern, layer, self.alpha)
        if expected not in (None, rank) and (alpha is not None or self.where == CONFIG):
            raise BadHeader(f"has rank {rank}, but {self.where} says {expected:g}")
        if alpha is None:
            return None
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def without(self, layers: Iterable[str]) -> list[str]:
        """The layers that are not among its target_modules, if it has any."""
        if self.targets is None or "all-linear" in self.targets:
            return []
        ends = frozenset(map(_flat, self.targets))
        return [layer for layer in layers if ends.isdisjoint(_ends(_flat(layer)))]


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _ends(flat: str) -> Iterator[str]:
    """A flattened name, then without its first word, and so on."""
    yield flat
    while "_" in flat:
        flat = flat.partition("_")[2]
        yield flat


def _shown(value: Any) -> str:
    """A value from an untrusted file for a message."""
    return repr(value)[:80]


def _object(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        content = text.encode() if isinstance(text, str) else text
        settings = loads(content.removeprefix(BOM_UTF8), MAX_VALUES)
    except ValueError as error:
        raise BadHeader(f"{where} is not valid JSON ({error})") from error
    if not isinstance(settings, dict):
        raise BadHeader(f"{where} is not a JSON object")
    return settings


def _pattern(name: str, written: Any, where: str) -> dict[str, float]:
    if not written:
        return {}
    if not isinstance(written, dict) or not all(map(_positive, written.values())):
        raise BadHeader(f"{where} has a {name} that is not a table of positive numbers")
    plain = {}
    for key, value in written.items():
        layer = key.removeprefix("^").removesuffix("$")
        for escaped, character in _PLAIN.items():
            layer = layer.replace(escaped, character)
        if any(character in layer for character in "\\*+?[](){}|^$"):
            raise BadHeader(f"{where} has the {name} {key[:80]!r}, not a layer's plain name")
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
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e300
