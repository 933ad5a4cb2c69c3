"""Writes `.cog/openapi_schema.json`, which `cog build` puts into the image.

Cog's runtime validates requests against this file; without it, it validates nothing. Cog parses the
source text of `train.py` and `predict.py`; here they are imported and their signatures are read.
The results are equal if every default, bound and description in a signature is a plain literal:
`tests/serving/test_cog_schema.py` compares this module with Cog's parser.

    python -m serving.schema            write the file
    python -m serving.schema --check    only check whether the file is up to date
"""

import argparse
import dataclasses
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import cog

from serving import cog_yaml
from serving.cog_yaml import ROOT
from serving.openapi import (
    STATUS_AND_ERRORS,
    Json,
    envelopes,
    mode_routes,
    record,
    ref,
    server_routes,
    title,
)

SCHEMA_FILE = ".cog/openapi_schema.json"  # in the working folder of Cog's runtime

# Types of inputs and outputs -> OpenAPI.
TYPES: dict[Any, Json] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    cog.Path: {"type": "string", "format": "uri"},
    cog.Secret: {
        "type": "string",
        "format": "password",
        "writeOnly": True,
        "x-cog-secret": True,
    },
}

# Keywords of `cog.Input` -> OpenAPI.
KEYWORDS = {
    "description": "description",
    "ge": "minimum",
    "le": "maximum",
    "min_length": "minLength",
    "max_length": "maxLength",
    "regex": "pattern",
    "accept": "x-cog-accept",
}


def document(predict: Callable[..., Any], train: Callable[..., Any], version: str) -> Json:
    """The OpenAPI document of a model with a `predict` method and a `train` function.

    `version` is Cog's. Raises TypeError for a signature that Cog does not support, ValueError if
    two different components of the document have the same name.
    """
    schemas: Json = dict(STATUS_AND_ERRORS)
    paths = server_routes()
    for function, verb, noun, prefix in (
        (predict, "predict", "Prediction", ""),
        (train, "train", "Training", "Training"),
    ):
        inputs, choices = input_schema(function, prefix + "Input")
        components = {
            prefix + "Input": inputs,
            prefix + "Output": output_schema(function),
            **envelopes(noun, prefix + "Input", prefix + "Output"),
        }
        # Cog stores every list of choices as a component with the input's name, so inputs with
        # equal names must have equal choices, in both modes.
        for name, component in [*components.items(), *choices.items()]:
            if schemas.setdefault(name, component) != component:
                raise ValueError(
                    f"{verb}: the schema already has another component named {name!r}; give that "
                    "input another name, or the same choices in train.py and predict.py"
                )
        paths |= mode_routes(verb, noun)
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": version},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def input_schema(function: Callable[..., Any], name: str) -> tuple[Json, Json]:
    """The object schema of a function's parameters, and a component for each list of choices.

    An input is optional if it has a default or is `Optional`. Cog does not distinguish a default of
    None from no default, so None is a default only if the type allows it.
    """
    hints = get_type_hints(function)
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    properties: Json = {}
    components: Json = {}
    required: list[str] = []
    for order, parameter in enumerate(parameters):
        field = _field(parameter)
        shape, nullable = _type(hints.get(parameter.name), f"input {parameter.name!r}")
        if field.choices:
            enumeration = {"title": parameter.name, "description": "An enumeration."}
            components[parameter.name] = enumeration | shape | {"enum": field.choices}
            entry: Json = {"allOf": [ref(parameter.name)]}
        else:
            entry = {"title": title(parameter.name), **shape}
        entry["x-order"] = order
        if nullable:
            entry["nullable"] = True
        if nullable or field.default is not None:
            entry["default"] = field.default
        else:
            required.append(parameter.name)
        for keyword, key in KEYWORDS.items():
            if (value := getattr(field, keyword)) is not None:
                entry[key] = value
        if field.deprecated:
            entry["deprecated"] = True
        properties[parameter.name] = entry
    return record(name, properties, required), components


def output_schema(function: Callable[..., Any]) -> Json:
    """The schema of a function's return type: one of `TYPES`, a list of one, or a BaseModel."""
    returned = get_type_hints(function).get("return")
    if not (isinstance(returned, type) and issubclass(returned, cog.BaseModel)):
        return {**_type(returned, "return type")[0], "title": "Output"}
    hints = get_type_hints(returned)
    properties: Json = {}
    required: list[str] = []
    for field in dataclasses.fields(returned):
        shape, nullable = _type(hints[field.name], f"{returned.__name__}.{field.name}")
        properties[field.name] = {"title": title(field.name), **shape}
        if nullable:
            properties[field.name]["nullable"] = True
        elif field.default is dataclasses.MISSING:
            required.append(field.name)
    return record("Output", properties, required)


def _field(parameter: inspect.Parameter) -> cog.FieldInfo:
    """The `Input(...)` of a parameter, or one with only its default."""
    if isinstance(parameter.default, cog.FieldInfo):
        return parameter.default
    bare = parameter.default is not inspect.Parameter.empty
    return cog.FieldInfo(default=parameter.default if bare else None)


def _type(annotation: Any, where: str) -> tuple[Json, bool]:
    """The OpenAPI schema of a type, and whether it is nullable."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType) and len(arguments) == 2 and NoneType in arguments:
        inner = next(argument for argument in arguments if argument is not NoneType)
        return _type(inner, where)[0], True
    if origin is list and arguments[0] in TYPES:
        return {"type": "array", "items": dict(TYPES[arguments[0]])}, False
    if annotation in TYPES:
        return dict(TYPES[annotation]), False
    raise TypeError(
        f"{where}: Cog does not support {annotation!r}; annotate it as str, int, float, bool, "
        "cog.Path, cog.Secret, a list of one of them, or Optional"
    )


def render() -> str:
    """The OpenAPI document of this repository as JSON text."""
    config = cog_yaml.read()
    predictor, train = _load(config["predict"]), _load(config["train"])
    whole = document(predictor.predict, train, config["build"]["sdk_version"])
    return json.dumps(whole, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def write(folder: Path = ROOT) -> Path:
    """Writes the file atomically below `folder` and returns its path."""
    path = folder / SCHEMA_FILE
    path.parent.mkdir(exist_ok=True)
    # Two servers may start at once in one folder: each needs another temporary name.
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(render(), encoding="utf-8")
    os.replace(unfinished, path)
    return path


def _load(reference: str) -> Any:
    """The object of a reference `file.py:name` in cog.yaml."""
    file, name = reference.split(":")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return getattr(importlib.import_module(file.removesuffix(".py")), name)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m serving.schema",
        description="Write the OpenAPI schema that Cog's runtime validates requests against.",
    )
    parser.add_argument("--check", action="store_true", help="only check; exit 1 if it is stale")
    path = ROOT / SCHEMA_FILE
    if not parser.parse_args().check:
        print(f"wrote {write()}")
    elif not path.exists() or path.read_text(encoding="utf-8") != render():
        sys.exit(f"{path} is missing or stale; run `python -m serving.schema`")
    else:
        print(f"{path} is up to date")


if __name__ == "__main__":
    main()
