"""How a job of another program is translated: every key ends in one of four lists.

It is translated; or similar, with a difference that is named; or without effect on the weights; or
refused, because ignoring it would train something else. Most keys are rows of tables (`Program`);
those that depend on each other are handled by rules, which are functions of the `Translation`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from trainer.settings.inputs import SettingsError, TrainingInputs

# What all these programs do without a key, where our defaults differ.
DEFAULTS: dict[str, Any] = {
    "train_placeholder_token": False,
    "foreign_captions": True,
    "default_caption": "",
    "caption_dropout": 0.0,
    "masks": "off",  # they use them by a key of their own
    "preserve": "off",
    "validation_images": 0,  # all images are trained on
    "sample_prompts": (),
    "ema_decay": 0.0,
    "lora_targets": "all",
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "timestep_sampling": "sigmoid",
    "training_shift": 1.0,
    "quantize": "none",
}
UNCLIPPED = 1e6  # as max_grad_norm
_SECRET = re.compile("token|api_key|secret|password", re.IGNORECASE)


@dataclass
class Translation:
    """A job on the way to our inputs, with one line for each of its keys."""

    program: str  # the name of its program
    keys: Mapping[str, Any]  # sections are written with dots: train.lr
    given: Mapping[str, Any] = field(default_factory=dict)  # inputs that replace those of the job
    settings: dict[str, Any] = field(default_factory=dict)  # `TrainingInputs` by their names
    sample: dict[str, Any] = field(default_factory=dict)  # fields of a generation request
    translated: list[str] = field(default_factory=list)
    near: list[str] = field(default_factory=list)
    without_effect: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    named: set[str] = field(default_factory=set)  # keys that are in one of the lists
    asked: str = ""  # the key that was read last, for errors

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or the program's default; text that is a number is a number."""
        self.asked = key
        value = number(self.keys.get(key))
        return default if value is None else value

    def same(self, key: str, text: str = "", **settings: Any) -> None:
        """Reports a key (or several with commas) that is translated to `settings`."""
        self._add(self.translated, key, text, settings)

    def differs(self, key: str, text: str, **settings: Any) -> None:
        """Reports a key with a similar meaning, and the difference."""
        self._add(self.near, key, text, settings)

    def no_effect(self, key: str, text: str = "") -> None:
        """Reports a key that does not change the weights."""
        self._add(self.without_effect, key, text, {})

    def refuse(self, key: str, text: str) -> None:
        """Reports a key that would change the training and is not supported."""
        self._add(self.refused, key, text, {})

    def _add(self, lines: list[str], key: str, text: str, settings: dict[str, Any]) -> None:
        self.settings |= settings
        keys = key.split(", ")
        self.named |= set(keys)
        ours = ", ".join(f"{name} {value}" for name, value in settings.items())
        missing = "" if any(each in self.keys for each in keys) else " (missing)"
        says = ": ".join(filter(None, (text, ours)))
        lines.append(f"{key}{missing}: {says}" if says else f"{key}{missing}")

    def choose(self, key: str, setting: str, default: Any, table: Mapping[str, Any]) -> Any:
        """Translates one of a few values; in `table`, (ours, difference) is a similar one.

        Returns our value; None if it is refused.
        """
        given = self.get(key, default)
        row = table.get(str(given).lower())
        if row is None:
            known = ", ".join(each or "an empty text" for each in table)
            self.refuse(key, f"{given} (supported: {known})")
            return None
        ours, difference = row if isinstance(row, tuple) else (row, None)
        says = (
            f"{given} becomes {setting} {ours}" if str(given) != str(ours) else f"{setting} {ours}"
        )
        self.settings[setting] = ours
        if difference:
            self.differs(key, f"{says}: {difference}")
        else:
            self.same(key, says)
        return ours


Rule = Callable[[Translation], None]


@dataclass(frozen=True)
class Program:
    """The keys of a program's job files. Names may be patterns: `unet.*`."""

    name: str
    source: str  # the version whose source was read
    is_job: Callable[[Any], bool]  # whether the parsed content of a file is one of its jobs
    keys_of: Callable[[Any, Path], Mapping[str, Any]]  # of parsed content and its file's path
    defaults: Mapping[str, Any]  # our settings for its missing keys, besides `DEFAULTS`
    settings: Mapping[str, str]  # keys with the same meaning as a setting
    rules: tuple[Rule, ...]  # in order: some need the results of earlier ones
    sample: Mapping[str, str] = field(default_factory=dict)  # fields of a generation request
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # values, always used here
    near: Mapping[str, str] = field(default_factory=dict)  # keys, and the difference
    no_effect: Iterable[str] = ()
    switches: Mapping[str, str] = field(default_factory=dict)  # no effect while the other is off


def translate(
    program: Program, content: Any, path: Path, given: Mapping[str, Any] | None = None
) -> Translation:
    """Sorts every key of a job into one of the four lists. Raises `SettingsError`."""
    found = Translation(program.name, {}, given or {})
    found.settings = DEFAULTS | dict(program.defaults)
    try:
        found.keys = program.keys_of(content, path)
        for rule in program.rules:
            rule(found)
        for key in found.keys:
            if key not in found.named:
                _place(key, found.keys[key], program, found)
    except SettingsError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as error:
        value = str(found.keys.get(found.asked, ""))[:80]
        where = f"{found.asked}: {value} cannot be used" if value else "a value cannot be used"
        raise SettingsError(f"{where} ({error}); see the documents of {program.name}") from error
    return found


def _place(key: str, value: Any, program: Program, found: Translation) -> None:
    """Sorts one key by the tables of its program."""
    name = program.settings.get(key) or program.sample.get(key)
    value = value if name and _is_text(name) else number(value)
    switch = program.switches.get(key)
    if switch is not None and not found.get(switch):
        found.no_effect(key, f"while {switch} is off")
    elif name is not None:
        if value is None or value == [] or (value is False and name not in _SWITCHES):
            found.no_effect(key, "not given")
        elif _is_text(name) and not isinstance(value, str):
            found.refuse(key, f"{value} (not text; write it in quotes)")
        elif key in program.sample:
            found.sample[name] = value
            found.same(key, f"{name} {value}")
        else:
            found.same(key, **{name: edges(value) if name == "resolution" else value})
    elif key in program.only:
        if value in program.only[key]:
            found.same(key, f"{value}, as always here")
        else:
            known = " or ".join(map(str, program.only[key]))
            found.refuse(key, f"{value} (only {known} is supported)")
    elif any(key == each or fnmatchcase(key, each) for each in program.no_effect):
        found.no_effect(key)
    elif value in (None, False, "", 0) or value == [] or value == {}:
        found.no_effect(key, "switched off")
    elif key in program.near:
        found.differs(key, f"{value}: {program.near[key]}")
    else:
        found.refuse(key, "a secret" if _SECRET.search(key) else str(value)[:200])


_SWITCHES = ("gradient_checkpointing",)  # of ours, where off is not the default


def _is_text(name: str) -> bool:
    """Whether an input takes text only: a trigger word of digits is no number."""
    if name in TrainingInputs.model_fields:
        return set(TrainingInputs.types(name)) <= {str, Path}
    return name == "negative_prompt"


def number(value: Any) -> Any:
    """The value, with text such as 1e-4, as YAML reads it, as a number; 2000.0 is 2000."""
    if isinstance(value, bool) or not isinstance(value, str | float):
        return value
    try:
        read = float(value)
        return int(read) if read.is_integer() else read
    except (ValueError, OverflowError):
        return value


def edges(value: Any) -> Any:
    """A list of edge lengths as text with commas."""
    if not isinstance(value, list):
        return value
    return ",".join(map(str, dict.fromkeys(map(number, value))))


def flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens sections to dotted keys; an empty section is a value."""
    keys: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict) and value:
            keys |= flat(value, f"{prefix}{key}.")
        else:
            keys[f"{prefix}{key}"] = value
    return keys
