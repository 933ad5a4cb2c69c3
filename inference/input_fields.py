"""Records of inputs: settings of a user, with what each interface needs for them.

A record is a frozen pydantic model. Its fields have a type, a default, and an `Input` with the
description, bounds and interfaces:

    rank: Annotated[int | None, Input("LoRA rank.", ge=1, le=256)] = None

pydantic checks names and types; an `Input` checks bounds, lengths and choices, with the same
messages on every interface. Cog, YAML, the command line and the documents are derived from a record
or tested against it.
"""

import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Flag, auto
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError, ValidationInfo
from pydantic_core import CoreSchema, ErrorDetails, core_schema

from families.tokens import check_unicode

_SHOWN = 80  # characters of a value that a message repeats
_DIGITS = re.compile(r"[+-]?[0-9]{1,40}")


class Interface(Flag):
    """Where an input can be set."""

    COG = auto()  # train.py and predict.py, over HTTP too
    YAML = auto()
    COMMAND_LINE = auto()
    PYTHON = auto()
    LOCAL = YAML | COMMAND_LINE | PYTHON  # not by a customer of a server
    ALL = COG | LOCAL


@dataclass(frozen=True)
class Input:
    """Properties of an input besides its type and default. The value None is not checked."""

    description: str  # as in Cog
    group: str = ""  # of --help
    ge: float | None = None  # bounds of a number
    le: float | None = None
    max_length: int | None = None  # characters of a text; of a list, with separators
    choices: Sequence[str] = ()  # of a text, or of each item of a list
    separator: str = ""  # between items, if the text is a list
    one: str = ""  # name of one item in messages
    unit: str = ""
    on: Interface = Interface.ALL
    section: str = "train"  # of a YAML file; "" is the top level
    key: str = ""  # in that section, if it is not the name
    hint: str = ""  # what to do, at the end of a message about a missing or refused value

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.with_info_after_validator_function(self._checked, handler(source))

    def _checked(self, value: Any, info: ValidationInfo) -> Any:
        if value is not None and (fault := self.fault(str(info.field_name), value)):
            raise ValueError(fault)
        return value

    def fault(self, name: str, value: object) -> str | None:
        """An error message for an invalid value of the right type, or None."""
        text = self.separator.join(map(str, value)) if isinstance(value, list | tuple) else value
        text = str(text) if isinstance(text, PurePath) else text
        if isinstance(text, str):
            try:
                if self.one:
                    for number, part in enumerate(parts_of(text, self.separator), start=1):
                        check_unicode(f"{self.one} {number}", part)
                check_unicode(name, text)
                if self.max_length is not None:
                    check_length(name, text, self.max_length)
            except ValueError as error:
                return str(error)
        elif self.ge is not None and self.le is not None:
            fault = out_of_range(name, value, self.ge, self.le)
            return f"{fault}; {self.hint}" if fault and self.hint else fault
        if self.choices and isinstance(text, str):
            parts = parts_of(text, self.separator) if self.separator else (text,)
            for part in parts:
                if part not in self.choices:
                    return not_one_of(name, part, self.choices)
        return None


class Inputs(BaseModel):
    """A frozen record of inputs; None is the default of an input that is not given.

    Raises `refusal` with a sentence for every invalid value, and for unknown names with the nearest
    known one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    refusal: ClassVar[type[ValueError]] = ValueError

    if not TYPE_CHECKING:  # type checkers see the fields as keywords

        def __init__(self, **given: Any) -> None:
            try:
                super().__init__(**{name: v for name, v in given.items() if v is not None})
            except ValidationError as error:
                raise self.refusal("; ".join(_faults(type(self), error))) from None

    def replace(self, **changes: Any) -> Self:
        """A copy with other values, which are checked."""
        return type(self)(**(dict(self) | changes))

    @classmethod
    def inputs(cls) -> dict[str, Input]:
        """The `Input` of every field that has one."""
        return {
            name: each
            for name, field in cls.model_fields.items()
            for each in field.metadata
            if isinstance(each, Input)
        }

    @classmethod
    def default(cls, name: str) -> Any:
        """The default of a field; None if it has none or depends on other inputs."""
        field = cls.model_fields[name]
        return None if field.is_required() else field.get_default(call_default_factory=True)

    @classmethod
    def types(cls, name: str) -> tuple[type, ...]:
        """The types of a field without None: (int, str) of `int | str | None`."""
        return tuple(_types(cls.model_fields[name].annotation))


def _types(annotation: Any) -> Iterator[type]:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        yield from _types(typing.get_args(annotation)[0])
    elif origin in (typing.Union, types.UnionType):
        for each in typing.get_args(annotation):
            yield from _types(each)
    elif annotation is not type(None):
        yield origin or annotation


def _faults(model: type[Inputs], error: ValidationError) -> Iterator[str]:
    """One sentence for each input that pydantic refuses, and for invalid combinations."""
    by_name: dict[str, list[ErrorDetails]] = {}
    for each in error.errors(include_url=False):
        by_name.setdefault(str(each["loc"][0]) if each["loc"] else "", []).append(each)
    for name, errors in by_name.items():
        first = next((each for each in errors if each["type"] == "value_error"), errors[0])
        known = model.inputs().get(name)
        if first["type"] == "value_error":
            yield str(first["ctx"]["error"])
        elif first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, model.model_fields, n=1, cutoff=0)
            yield f"unknown input {name[:_SHOWN]!r}; did you mean {near[0]!r}?"
        elif first["type"] == "missing":
            yield f"{name} is missing" + (f"; {known.hint}" if known and known.hint else "")
        else:
            yield _wrong_type(name, first["input"], model.types(name))


IN_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    Sequence: "a list",
    dict: "a section of keys",
}


def _wrong_type(name: str, value: object, wanted: Sequence[type]) -> str:
    words = dict.fromkeys(IN_WORDS.get(each, "text") for each in wanted)
    return f"{name} is {_shown(value)}; it must be {' or '.join(words)}"


def _shown(value: object) -> str:
    return digits(value) if type(value) is int else repr(value)[:_SHOWN]


def number_of(value: Any, wanted: Sequence[type]) -> int | float | None:
    """A value such as "1e-5" as one of the wanted number types; None if it is not a number."""
    for kind in (int, float):
        if kind in wanted:
            try:
                # Not through a float, which changes numbers of more than 53 bits.
                if kind is int and (type(value) is int or _DIGITS.fullmatch(str(value).strip())):
                    return int(value)
                if kind(float(value)) == float(value):
                    return kind(float(value))
            except (TypeError, ValueError, OverflowError):
                pass
    return None


def parts_of(given: str | Sequence[object] | None, separator: str) -> tuple[str, ...]:
    """The non-empty items of a text with separators, or of a sequence."""
    parts = given.split(separator) if isinstance(given, str) else given or ()
    return tuple(stripped for each in parts if (stripped := str(each).strip()))


def not_one_of(name: str, value: str, known: Sequence[str]) -> str:
    """An error message for an unknown value, with the nearest known one."""
    near = difflib.get_close_matches(value.lower(), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{name} {value[:_SHOWN]!r} is not one of {', '.join(known)}{hint}"


def out_of_range(name: str, value: object, low: float, high: float) -> str | None:
    """An error message for a number out of range, with all digits of integers, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"{name} is {value!r}, not a number"
    if low <= value <= high:
        return None
    return f"{name} is {digits(value)}; it must be between {digits(low)} and {digits(high)}"


def digits(value: float) -> str:
    """A number for a message; integers with all digits."""
    if isinstance(value, int):  # Python refuses to print more than 4,300 digits
        return str(value) if value.bit_length() < 1000 else "a number of more than 1000 bits"
    return f"{value:g}"


def check_length(name: str, text: str, most: int) -> None:
    """Raises ValueError for a text of more than `most` characters."""
    if len(text) > most:
        raise ValueError(f"{name} has {len(text):,} characters; at most {most:,} are accepted")
