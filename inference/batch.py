"""Many images by one command: prompts from a file, and grids of values.

An image's file name has a hash of all its inputs. So an image that is already there is not
generated again, an interrupted batch goes on where it stopped, and several processes, such as one
for each GPU, can share a folder: each locks the image that it generates.
"""

import fcntl
import hashlib
import itertools
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference.input_fields import number_of
from inference.inputs import GenerationInputs
from inference.progress import Progress

if TYPE_CHECKING:
    from PIL import Image

    from adapters.archive import Archive
    from inference.request import Request

    Read = Callable[[GenerationInputs], tuple[Request, Archive | None, Archive | None]]

log = logging.getLogger(__name__)

RECORDS = "images.jsonl"
MOST = 1_000_000  # images of one batch
_SHOWN = 10  # errors of a file that a message lists
_MOST_BYTES = 256 << 20  # of a file of prompts
_NOT_READ = (".json", ".csv", ".tsv", ".yaml", ".yml", ".toml")  # not prompts, line by line
_WEIGHTS = ("weights", "lora_weights")  # other names of `replicate_weights`
_PATHS = ("replicate_weights", "extra_lora", "image", "mask", "reference_images")
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
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        where = "" if prompts is None else f"{prompts}: "
        raise ValueError(f"{where}{'; '.join(faults[:_SHOWN])}{more}")
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
        for name in _PATHS:
            if name in values:
                values[name] = _beside(path.parent, values[name])
        yield number, dict(given) | values
    if faults:
        raise ValueError(f"--prompts {path}: {'; '.join(faults[:_SHOWN])}")


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
    for name in _PATHS:
        if name in given:
            given[name] = _hashed(given[name])  # a changed file is another image
    return Item(inputs, given)


def _hashed(value: Any) -> Any:
    """The hash of a file's content, or of each in a list; other values as they are."""
    if isinstance(value, list):
        return [_hashed(each) for each in value]
    if not _exists(path := Path(str(value))):
        return value
    # The folder of a full training has a file that differs for each run.
    path = path / "meta.json" if path.is_dir() else path
    return _content_hash(path) if path.is_file() else value


@cache
def _content_hash(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _hash_of(given: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:12]


def generate_batch(items: Sequence[Item], folder: Path, read: "Read", cpu: bool) -> Path:
    """Generates the images that the folder lacks; returns its `images.jsonl`.

    `read` reads the files of inputs: it is called for all of them before the first image. `cpu`:
    whether a large model may run without a GPU. Raises ValueError that names refused images.
    """
    seen = set()
    faults = []
    for item in items:
        files = tuple(str(getattr(item.inputs, name)) for name in ("base_model", *_PATHS))
        if files not in seen:
            seen.add(files)
            try:
                read(item.inputs)
            except ValueError as error:
                faults.append(f"the image of {item.inputs.prompt[:80]!r}: {error}")
    if faults:
        raise ValueError("; ".join(faults[:_SHOWN]))

    # The model libraries take seconds to import; errors in the inputs are reported before.
    from inference.engine import Engine
    from inference.images import writable_folder

    folder = writable_folder(folder)
    there = len(items) - len(missing(items, folder))
    log.info("%d images, %d of them are already in %s/", len(items), there, folder)
    engine = Engine(cpu=cpu)

    def generate(inputs: GenerationInputs) -> "Image.Image":
        request, archive, second = read(inputs)
        return engine.generate(request, archive, inputs.base_model, second)[0]

    with each_warning_once():
        refused = make(items, folder, generate)
    if refused:
        raise ValueError(f"{len(refused)} images were refused: " + "\n".join(refused[:_SHOWN]))
    return folder / RECORDS


def missing(items: Sequence[Item], folder: Path) -> list[Item]:
    """The images that are not in the folder."""
    there = {entry.name for entry in os.scandir(folder)}
    return [item for item in items if item.file not in there]


def make(
    items: Sequence[Item], folder: Path, generate: "Callable[[GenerationInputs], Image.Image]"
) -> list[str]:
    """Generates the images that the folder lacks; returns a message for each that is refused.

    `generate` raises ValueError to refuse an image; the others are generated. Images that another
    process is generating are waited for at the end, and generated here if that process dies.
    `images.jsonl` in the folder gets a line of settings for each image.
    """
    from inference import image_metadata
    from inference.images import write_image

    _add_missing_records(items, folder)
    todo, refused = missing(items, folder), []
    with Progress(desc="images", total=len(todo), unit="image", lines=True) as bar:
        for wait in (False, True):
            elsewhere = []
            for item in todo:
                path, options = folder / item.file, item.inputs
                with _claimed(path, wait) as claimed:
                    if not claimed:
                        elsewhere.append(item)
                        continue
                    if not path.exists():  # another process may have finished it
                        try:
                            image = generate(options)
                        except ValueError as error:
                            refused.append(f"{item.file}: {error}")
                        else:
                            write_image(
                                image,
                                path,
                                options.output_format,
                                options.output_quality,
                                options.output_metadata,
                            )
                            _record(folder, [_settings(item, image.info.get(image_metadata.JSON))])
                bar.update()
            todo = elsewhere
    _add_missing_records(items, folder)  # of processes that were killed meanwhile
    return refused


@contextmanager
def _claimed(path: Path, wait: bool) -> Iterator[bool]:
    """Whether this process has the image to itself in the context.

    The lock is `flock` on a hidden file, which the system releases if the process is killed.
    """
    lock = path.with_name(f".{path.name}.lock")
    with lock.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
        if path.exists():  # else the next process takes this lock instead of a new one
            lock.unlink(missing_ok=True)


@contextmanager
def each_warning_once() -> Iterator[None]:
    """Hides warnings that were shown, and what the engine logs for every image."""
    shown: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        if record.levelno <= logging.INFO:
            return record.name != "inference.engine"
        message = record.getMessage()
        is_first = message not in shown
        shown.add(message)
        return is_first

    handlers = [*logging.root.handlers]
    for each in handlers:
        each.addFilter(is_new)
    try:
        yield
    finally:
        for each in handlers:
            each.removeFilter(is_new)


def _settings(item: Item, resolved: str | None) -> dict[str, Any]:
    """The line of an image: its file, and the settings in its metadata or else its inputs."""
    return {"file": item.file} | (json.loads(resolved) if resolved else dict(item.given))


def _add_missing_records(items: Sequence[Item], folder: Path) -> None:
    """Records images whose process was killed before it did, and removes a partial last line."""
    with (folder / RECORDS).open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        file.truncate(len(whole))
    from PIL import Image

    from inference import image_metadata

    recorded = set(map(_recorded, whole.split(b"\n")))
    lost = []
    for item in items:
        if item.file not in recorded and (path := folder / item.file).is_file():
            with Image.open(path) as image:
                lost.append(_settings(item, image_metadata.read(image).get(image_metadata.JSON)))
    _record(folder, lost)


def _recorded(line: bytes) -> str | None:
    """The file of a line; None for a line that was damaged or edited."""
    try:
        return str(json.loads(line)["file"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _record(folder: Path, settings: Sequence[Mapping[str, Any]]) -> None:
    with (folder / RECORDS).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(b"".join(json.dumps(each).encode() + b"\n" for each in settings))
