"""Checks the inputs of a request against the schema, before the request is started."""

import codecs
import difflib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from jsonschema import Draft202012Validator

from adapters.files import bounded_json
from inference.console import clean
from serving.openapi import Json

LONGEST_MESSAGE = 500  # characters; a message of the validator repeats the value
MOST_FAULTS = 20  # errors that are reported for one request
LONGEST_NAME = 100  # characters of an unknown input's name that are compared
MOST_VALUES = 100_000  # in a body; the interfaces have fewer than 100 inputs
LARGEST_INTEGER = 2**63 - 1
HIDDEN = "**********"


class Refused(ValueError):
    """A refused request, with one entry for each invalid part, as in FastAPI's replies."""

    def __init__(self, *details: Json) -> None:
        super().__init__("; ".join(str(each["msg"]) for each in details))
        self.details = list(details)


def detail(location: list[str | int], message: str, kind: str = "value_error") -> Json:
    """One entry of a reply with status 422."""
    message = " ".join(clean(message[: 4 * LONGEST_MESSAGE]).split())
    if len(message) > LONGEST_MESSAGE:
        message = f"{message[:LONGEST_MESSAGE]} …"
    return {"loc": ["body", *location], "msg": message, "type": kind}


def parse(content: bytes) -> Json:
    """Parses the body of a request. Raises `Refused` for anything but a JSON object in UTF-8.

    Also refuses numbers that JSON cannot express (NaN, 1e999), lone surrogates, and more values or
    levels than a request needs.
    """
    try:
        body = bounded_json.loads(content.removeprefix(codecs.BOM_UTF8), MOST_VALUES)
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise Refused(detail([], f"the body is not valid JSON: {error}")) from None
    if not isinstance(body, dict):
        raise Refused(detail([], "the body must be a JSON object with the key 'input'"))
    return body


@dataclass(frozen=True)
class Inputs:
    """The inputs of a mode, from Cog's OpenAPI document."""

    document: Json
    component: str  # "Input" or "TrainingInput"
    addresses: frozenset[str] = field(init=False)  # the inputs that may be URLs
    secrets: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        shapes = self.shapes.items()
        addresses = frozenset(name for name, shape in shapes if _holds(shape, "format", "uri"))
        object.__setattr__(self, "addresses", addresses)
        secrets = frozenset(name for name, shape in shapes if _holds(shape, "x-cog-secret", True))
        object.__setattr__(self, "secrets", secrets)

    @property
    def shapes(self) -> Json:
        """The schema of each input."""
        return self.document["components"]["schemas"][self.component]["properties"]

    def check(self, inputs: Any) -> Json:
        """The checked inputs. Raises `Refused` with all errors."""
        if not isinstance(inputs, dict):
            raise Refused(detail(["input"], "must be a JSON object"))
        found = itertools.chain(self._unknown(inputs), self._wrong(inputs))
        if faults := list(itertools.islice(found, MOST_FAULTS)):
            raise Refused(*faults)
        return {name: self._whole(name, value) for name, value in inputs.items()}

    def hidden(self, inputs: Json) -> Json:
        """The inputs with keys and tokens redacted."""
        return {name: HIDDEN if name in self.secrets else value for name, value in inputs.items()}

    def _unknown(self, inputs: Json) -> Iterator[Json]:
        for name in inputs:
            if name not in self.shapes:
                name = name[:LONGEST_NAME]
                (near,) = difflib.get_close_matches(name, self.shapes, n=1, cutoff=0)
                message = f"unknown input {name!r}; did you mean {near!r}?"
                yield detail(["input", name], message, "value_error.extra")

    def _wrong(self, inputs: Json) -> Iterator[Json]:
        ref = {"$ref": f"#/components/schemas/{self.component}"}
        validator = Draft202012Validator(ref | {"components": self.document["components"]})
        for fault in validator.iter_errors(inputs):
            if fault.validator == "required":
                for name in fault.validator_value:
                    if name not in inputs:
                        yield detail(["input", name], "Field required", "value_error.missing")
                return
            path = list(fault.absolute_path)
            message = fault.message
            if self.secrets & set(path[:1]):  # the validator's message repeats the value
                bound = f"{fault.validator} {fault.validator_value}"
                message = f"does not match the schema ({bound})"
            yield detail(["input", *path], ": ".join([*map(str, path[:1]), message]))
        for name, value in inputs.items():
            value = self._whole(name, value)
            if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
                least = self.shapes.get(name, {}).get("minimum", -LARGEST_INTEGER)
                message = f"{name} is {value}; it must be between {least} and {LARGEST_INTEGER}"
                yield detail(["input", name[:LONGEST_NAME]], message)

    def _whole(self, name: str, value: Any) -> Any:
        """The value, with 2.0 as 2 for an integer; JSON Schema accepts both."""
        if isinstance(value, float) and self.shapes.get(name, {}).get("type") == "integer":
            return int(value)
        return value


def _holds(shape: Any, key: str, value: Any) -> bool:
    """Whether a schema, or one inside it, has this value under the key."""
    if isinstance(shape, dict):
        return shape.get(key) == value or any(_holds(each, key, value) for each in shape.values())
    return isinstance(shape, list) and any(_holds(each, key, value) for each in shape)
