"""The images of a batch: lines of a file of prompts, combined with grids of values.

An image's file name has a hash of all its inputs, so an image that is already there is recognized.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from inference.input_fields import number_of
from inference.inputs import GenerationInputs

MOST = 1_000_000  # images of one batch
SHOWN = 10  # errors of a file that a message lists
_MOST_BYTES = 256 << 20  # of a file of prompts
_NOT_READ = (".json", ".csv", ".tsv", ".yaml", ".yml", ".toml")  # not prompts, line by line
_WEIGHTS = ("weights", "lora_weights")  # other names of `replicate_weights`
PATHS = ("replicate_weights", "extra_lora", "image", "mask", "reference_images")
# The order of images: weights and base change as seldom as possible.
_SLOW = ("base_model", "replicate_weights", "extra_lora")
_RANGE = re.compile(r"(-?\d+)-(\d+)")


@dataclass(frozen=True)
class Item:
    """One image of a batch."""

    inputs: GenerationInputs
    given: Mapping[str, Any] = field(repr=False)  # the inputs that are not defaults

    @property
    def file(self) -> str:
        """The name of the image's file: some words of the prompt, the seed, and the hash."""
        words = re.sub(r"[^a-z0-9]+", "-", self.inputs.prompt.lower())[:40].strip("-")
        parts = (words, str(self.inputs.seed), _hash_of(self.given))
        return f"{'-'.join(filter(None, parts))}.{self.inputs.output_format}"


def read_batch(
    given: Mapping[str, Any], prompts: Path | None = None, grid: Sequence[str] = ()
) -> list[Item]:
    """The images of a file of prompts and a grid, without duplicates.

    given: inputs by name, for all images. prompts: a `.jsonl` file with an object of inputs per
    line, where paths are relative to the file; or a text file with a prompt per line; without it,
    the prompt is in `given`. grid: `NAME=VALUES`, such as `seed=0-99` or `lora_scale=0.6,1`;
    every line is generated with every combination. The seed is 0 unless it is given. Raises
    ValueError that lists the faults.
    """
    axes = dict(map(_axis, grid))
    if len(axes) < len(grid):
        raise ValueError("--grid has an input twice; put all its values into one --grid")
    lines = [(None, dict(given))] if prompts is None else [*_lines(prompts, given)]
    count = len(lines) * math.prod(map(len, axes.values()))
    if count > MOST:
        raise ValueError(f"{count:,} images; at most {MOST:,} can be in one batch")
    cells = [*itertools.product(*axes.values())]
    items: dict[str, Item] = {}
    faults: list[str] = []
    for number, line in lines:
        try:
            for cell in cells:
                item = _item(line | dict(zip(axes, cell, strict=True)))
                items.setdefault(item.file, item)
        except (ValueError, OSError) as error:
            faults.append(str(error) if number is None else f"line {number}: {error}")
    if faults:
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        where = "" if prompts is None else f"{prompts}: "
        raise ValueError(f"{where}{'; '.join(faults[:SHOWN])}{more}")
    if not items:
        raise ValueError(f"{prompts} has no prompts; write one per line")
    order = {key: rank for rank, key in enumerate(dict.fromkeys(map(_slow, items.values())))}
    return sorted(items.values(), key=lambda item: order[_slow(item)])


def _slow(item: Item) -> tuple[str, ...]:
    return tuple(str(getattr(item.inputs, name)) for name in _SLOW)


def _axis(text: str) -> tuple[str, list[Any]]:
    """The name and the values of `NAME=VALUES`."""
    name, mark, values = text.partition("=")
    name = "replicate_weights" if name in _WEIGHTS else name.replace("-", "_")
    if not mark or not values.strip(", "):
        raise ValueError(f"--grid {text!r} must be NAME=VALUES, such as seed=0-99")
    if name not in GenerationInputs.model_fields:
        unknown: dict[str, Any] = {name: values}
        GenerationInputs(prompt="-", **unknown)  # refused, with the nearest name
    if name == "num_outputs" or name.startswith("output_") or "prompt" in name.split("_")[-1:]:
        raise ValueError(f"--grid cannot vary {name}; put prompts into a file for --prompts")
    wanted = GenerationInputs.types(name)
    found: list[Any] = []
    for part in filter(None, map(str.strip, values.split(","))):
        if int in wanted and (match := _RANGE.fullmatch(part)):
            first, last = int(match[1]), int(match[2])
            if not first <= last < first + MOST:
                raise ValueError(f"--grid {name}: {part} is not a range from low to high")
            found += range(first, last + 1)
        elif bool in wanted:
            found.append({"true": True, "false": False}.get(part.lower(), part))
        else:
            number = number_of(part, wanted)
            found.append(part if number is None else number)
    return name, list(dict.fromkeys(found))


def _lines(path: Path, given: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and inputs of a file of prompts. Raises ValueError with all faults."""
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise ValueError(f"--prompts {path} {what}; give a text file with a prompt per line")
    if path.suffix.lower() in _NOT_READ:
        raise ValueError(
            f"--prompts {path} must be a text file with a prompt per line, or a .jsonl file with a "
            "JSON object per line"
        )
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"--prompts {path} has more than {_MOST_BYTES:,} bytes; divide it")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {path} is not UTF-8 text ({error.reason})") from None
    faults: list[str] = []
    # Not splitlines(), which also divides at characters that JSON allows in a text, such as U+2028.
    for number, line in enumerate(re.split("\r\n?|\n", text), start=1):
        if not line.strip():
            continue
        if path.suffix.lower() not in (".jsonl", ".ndjson"):
            yield number, dict(given) | {"prompt": line.strip()}
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            faults.append(f"line {number} is not JSON ({error})")
            continue
        if not isinstance(values, dict):
            faults.append(f'line {number} is not an object such as {{"prompt": "…"}}')
            continue
        named = [name for name in (*_WEIGHTS, "replicate_weights") if name in values]
        if len(named) > 1:
            faults.append(f"line {number} has {' and '.join(named)}; give one of them")
        for name in named:
            values["replicate_weights"] = values.pop(name)
        for name in PATHS:
            if name in values:
                values[name] = _beside(path.parent, values[name])
        yield number, dict(given) | values
    if faults:
        raise ValueError(f"--prompts {path}: {'; '.join(faults[:SHOWN])}")


def _beside(folder: Path, value: Any) -> Any:
    """A path, or each of a list, relative to the folder if there is such a file."""
    if isinstance(value, list):
        return [_beside(folder, each) for each in value]
    if isinstance(value, str) and _exists(folder / value):
        return str(folder / value)
    return value


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # such as a URL that is too long for a file name
        return False


def _item(values: Mapping[str, Any]) -> Item:
    """Raises ValueError for invalid inputs."""
    inputs = GenerationInputs(**{"seed": 0} | {k: v for k, v in values.items() if v is not None})
    if inputs.num_outputs != 1:
        raise ValueError("num_outputs must be 1 in a batch; use --grid seed=0-3")
    given = inputs.model_dump(mode="json", exclude_defaults=True)
    for name in PATHS:
        if name in given:
            given[name] = _hashed(given[name])  # a changed file is another image
    return Item(inputs, given)


def _hashed(value: Any) -> Any:
    """The hash of a file's content, or of each in a list; other values as they are."""
    if isinstance(value, list):
        return [_hashed(each) for each in value]
    if not _exists(path := Path(str(value))):
        return value
    files = [path]
    if path.is_dir():  # that of a full training has a file that differs for each run
        meta = path / "meta.json"
        files = [meta] if meta.is_file() else sorted(path.glob("*.safetensors"))
    return " ".join(map(_content_hash, files)) or value


@cache
def _content_hash(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _hash_of(given: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:12]
