"""Generates a batch: the images of a file of prompts and grids that a folder lacks.

An image that is already there is not generated again, so an interrupted batch goes on where it
stopped, and several processes, such as one for each GPU, can share a folder: each locks the image
that it generates.
"""

import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from inference.batch_items import PATHS, SHOWN, Item
from inference.inputs import GenerationInputs
from inference.progress import Progress

if TYPE_CHECKING:
    from PIL import Image

    from adapters.archive import Archive
    from inference.request import Request

    Read = Callable[[GenerationInputs], tuple[Request, Archive | None, Archive | None]]

log = logging.getLogger(__name__)

RECORDS = "images.jsonl"


def generate_batch(items: Sequence[Item], folder: Path, read: "Read", cpu: bool) -> Path:
    """Generates the images that the folder lacks; returns its `images.jsonl`.

    `read` reads the files of inputs: it is called for all of them before the first image. `cpu`:
    whether a large model may run without a GPU. Raises ValueError that names refused images.
    """
    seen = set()
    faults = []
    for item in items:
        files = tuple(str(getattr(item.inputs, name)) for name in ("base_model", *PATHS))
        if files not in seen:
            seen.add(files)
            try:
                read(item.inputs)
            except ValueError as error:
                faults.append(f"the image of {item.inputs.prompt[:80]!r}: {error}")
    if faults:
        raise ValueError("; ".join(faults[:SHOWN]))

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
        raise ValueError(f"{len(refused)} images were refused: " + "\n".join(refused[:SHOWN]))
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

    The lock is `flock` on a hidden file, which is removed at the end. If the process is killed, the
    system releases it, and the next one that generates the image removes the empty file.
    """
    lock = path.with_name(f".{path.name}.lock")
    while True:
        with lock.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            if not _is_still(lock, file):  # the process that had it has removed it
                continue
            try:
                yield True
            finally:
                lock.unlink(missing_ok=True)
            return


def _is_still(path: Path, file: IO[bytes]) -> bool:
    """Whether an open file is the one at a path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


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
