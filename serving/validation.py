"""Checks the inputs of a request against the schema, before anything is started for it."""

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from jsonschema import Draft202012Validator

from inference.console import clean
from serving.openapi import Json

LONGEST_MESSAGE = 500  # characters; a message of the validator repeats the value
LARGEST_INTEGER = 2**63 - 1
HIDDEN = "**********"


class Refused(ValueError):
    """Why a request was refused: one entry for each wrong part of it, as in FastAPI's replies."""

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
    """The body of a request. Raises `Refused` for what is not a JSON object in UTF-8."""

    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        body = json.loads(content, parse_constant=no_constant)
        json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        said = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise Refused(detail([], f"the body is not valid JSON: {said}")) from None
    if not isinstance(body, dict):
        raise Refused(detail([], "the body must be a JSON object with the key 'input'"))
    return body


@dataclass(frozen=True)
class Inputs:
    """The inputs that a mode takes, from Cog's OpenAPI document."""

    document: Json
    component: str  # "Input" or "TrainingInput"
    addresses: frozenset[str] = field(init=False)  # the inputs that may hold an address
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
        """The inputs, if they are right. Raises `Refused` with every fault."""
        if not isinstance(inputs, dict):
            raise Refused(detail(["input"], "must be a JSON object"))
        if faults := [*self._unknown(inputs), *self._wrong(inputs)]:
            raise Refused(*faults)
        return inputs

    def hidden(self, inputs: Json) -> Json:
        """The inputs as they may be shown: without keys and tokens."""
        return {name: HIDDEN if name in self.secrets else value for name, value in inputs.items()}

    def _unknown(self, inputs: Json) -> Iterator[Json]:
        for name in inputs:
            if name not in self.shapes:
                (near,) = difflib.get_close_matches(name, self.shapes, n=1, cutoff=0)
                message = f"there is no input {name[:100]!r}; the most similar one is {near!r}"
                yield detail(["input", name[:100]], message, "value_error.extra")

    def _wrong(self, inputs: Json) -> Iterator[Json]:
        ref = {"$ref": f"#/components/schemas/{self.component}"}
        validator = Draft202012Validator(ref | {"components": self.document["components"]})
        for fault in validator.iter_errors(inputs):
            if fault.validator == "required":
                for name in fault.validator_value:
                    if name not in inputs:
                        yield detail(["input", name], "Field required", "value_error.missing")
                return
            yield detail(["input", *fault.absolute_path], fault.message)
        for name, value in inputs.items():
            if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
                least = self.shapes[name].get("minimum", -LARGEST_INTEGER)
                message = f"{name} is {value}; it must be between {least} and {LARGEST_INTEGER}"
                yield detail(["input", name], message)


def _holds(shape: Any, key: str, value: Any) -> bool:
    """Whether a schema, or one inside it, has this value under the key."""
    if isinstance(shape, dict):
        return shape.get(key) == value or any(_holds(each, key, value) for each in shape.values())
    return isinstance(shape, list) and any(_holds(each, key, value) for each in shape)
