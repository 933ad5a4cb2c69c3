"""Uploads: one raw PUT for each image or archive. Nothing that is not complete stays."""

import asyncio
import os
import secrets
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from adapters.files.containers import is_container
from inference.image_decoding import READABLE
from studio import thumbnails
from studio.dataset_files import (
    TEXTS,
    find,
    image_parts,
    images_of,
    is_safe,
    new_image_parts,
    not_supported,
    note_image,
    own_folder,
    place_of,
    version_of,
)
from studio.dataset_rows import Wanted, described
from studio.datasets import add_image
from studio.folder import Studio, checked_name, folder_fd, to_trash
from studio.replies import FULL, Problem, reply
from studio.tasks import Task
from trainer.data import (
    MAX_MEMBER_BYTES,
    Unusable,
    check,
    is_image,
    listed,
    probe,
    read_members,
    suffix_of,
)

MAX_ARCHIVE_BYTES = 4 << 30
SPARE_BYTES = 64 << 20  # of the disk, that an upload must leave
CHUNK_SECONDS = 60.0  # for the next bytes of a body
_bodies = asyncio.Semaphore(4)
_decoders = asyncio.Semaphore(2)  # each may hold a large photo


@asynccontextmanager
async def received(request: Request, folder: Path, most: int) -> AsyncIterator[Path]:
    """The body in a temporary file in `folder`, which is removed at the end if it is still there.

    Raises `Problem` 413 before and while reading, 408 for a body that stops, and 507.
    """
    announced = request.headers.get("content-length", "0")
    too_large = Problem(413, f"the file is larger than {most:,} bytes")
    if not announced.isdecimal() or int(announced) > most:
        raise too_large
    part = folder / f"{secrets.token_hex(8)}.part"
    async with _bodies:
        _check_space(folder, int(announced))
        try:
            with part.open("xb") as file:
                got, chunks = 0, request.stream().__aiter__()
                while True:
                    try:
                        chunk = await asyncio.wait_for(anext(chunks), CHUNK_SECONDS)
                    except StopAsyncIteration:
                        break
                    except TimeoutError:
                        raise Problem(408, "the upload stopped; send it again") from None
                    got += len(chunk)
                    if got > most:
                        raise too_large
                    file.write(chunk)
            yield part
        except OSError as error:
            if error.errno in FULL:
                raise _full() from None
            raise
        finally:
            part.unlink(missing_ok=True)


def _check_space(folder: Path, size: int) -> None:
    facts = os.statvfs(folder)
    if facts.f_bavail * facts.f_frsize < size + SPARE_BYTES:
        raise _full()


def _full() -> Problem:
    return Problem(507, "the disk is full", None, "free disk space, or empty the trash")


# ---- Images --------------------------------------------------------------------------------------


async def _image(request: Request) -> Response:
    studio: Studio = request.app.state.studio
    root = place_of(studio, request.path_params["dataset"])
    name, replace = request.path_params["name"], request.query_params.get("replace") == "1"
    parts = image_parts(name)
    if not os.path.lexists(root / name):  # exactly this one
        parts = new_image_parts(name)
    name = "/".join(parts)
    if not replace and os.path.lexists(root / name):
        raise _exists(name)
    folder = await run_in_threadpool(own_folder, root, "parts")
    async with received(request, folder, MAX_MEMBER_BYTES) as part:
        async with _decoders:
            row = await run_in_threadpool(_stored, studio, root, parts, part, replace)
    return reply(row, 201)


def _stored(
    studio: Studio, root: Path, parts: list[str], part: Path, replace: bool
) -> dict[str, object]:
    """Checks a received image, and moves it to its name."""
    name, data = "/".join(parts), part.read_bytes()
    if not is_image(name, data):
        raise not_supported(name)
    try:
        probe(data)
        checked = check(data)
    except Unusable as error:
        raise Problem(422, f"{name} {error}", "name") from None
    with studio.writing, folder_fd(root, parts[:-1], create=True) as folder:
        if os.path.lexists(root / name):
            if not replace:
                raise _exists(name)
            to_trash(studio, root / name)
        os.rename(part, parts[-1], dst_dir_fd=folder)
        facts = os.stat(parts[-1], dir_fd=folder, follow_symlinks=False)
    note_image(root, version_of(name, facts), checked)
    with suppress(Problem):
        thumbnails.make(root, name, facts)
    rows, _ = described(root, {name: facts}, {}, Wanted())
    return rows[0]


def _exists(name: str) -> Problem:
    return Problem(409, f"{name} is in the dataset already", "name", "replace it, or rename one")


# ---- Archives ------------------------------------------------------------------------------------


async def _archive(request: Request) -> Response:
    studio: Studio = request.app.state.studio
    root = place_of(studio, request.path_params["dataset"])
    name = checked_name(request.path_params["name"], "archive")
    folder = await run_in_threadpool(own_folder, root, "parts")
    async with received(request, folder, MAX_ARCHIVE_BYTES) as part:
        with part.open("rb") as file:
            if not is_container(file.read(512)):
                raise Problem(415, f"{name} is not a zip or tar file", "name")
        kept = part.rename(part.with_suffix(".archive"))
    task = Task("archive", root.name)

    def work(task: Task) -> None:
        try:
            _unpacked(studio, root, kept, name, task)
        finally:
            kept.unlink(missing_ok=True)

    return reply({"task": studio.tasks.start(task, work).id}, 202)


def _unpacked(studio: Studio, root: Path, archive: Path, name: str, task: Task) -> None:
    """Adds the images and captions of an archive: all of them, or none with an error."""
    staging = archive.with_suffix("")
    staging.mkdir()
    try:
        problems: list[str] = []
        stored: list[str] = []
        for member, data in read_members(archive, problems, problems):
            task.at(len(stored), 0)
            if suffix_of(member) not in TEXTS and not is_image(member, data):
                continue
            if not is_safe(member):
                problems.append(f"{member}: its name cannot be used; rename it")
                continue
            _check_space(staging, len(data))
            (staging / member).parent.mkdir(parents=True, exist_ok=True)
            (staging / member).write_bytes(data)
            stored.append(member)
        if not stored and not problems:
            problems.append(f"contains no image: {READABLE}")
        if problems:
            raise ValueError("\n".join(f"{name}: {each}" for each in problems[:20]))
        with studio.writing:
            added = _moved(root, staging, stored)
        files = find(root)
        images = [each for each in images_of(root, files) if each in added]
        for done, image in enumerate(images):
            task.at(done, len(images))
            add_image(root, image, files[image])
        task.at(len(images), len(images))
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _moved(root: Path, staging: Path, names: list[str]) -> set[str]:
    """Moves unpacked files into the dataset, without the folder that holds all of them."""
    tops = {name.split("/")[0] if "/" in name else "" for name in names}
    cut = len(tops.pop()) + 1 if len(tops) == 1 and "" not in tops else 0
    targets = {name: name[cut:] for name in names}
    there = [target for target in targets.values() if os.path.lexists(root / target)]
    if there:
        raise ValueError(f"in the dataset already: {listed(there)}; rename or remove them")
    moved = []
    try:
        for name, target in targets.items():
            *folders, last = target.split("/")
            with folder_fd(root, folders, create=True) as folder:
                os.rename(staging / name, last, dst_dir_fd=folder)
            moved.append((name, target))
    except BaseException:  # as a whole, or not at all
        for name, target in moved:
            os.rename(root / target, staging / name)
        raise
    return set(targets.values())


ROUTES = [
    Route("/api/datasets/{dataset}/images/{name:path}", _image, methods=["PUT"]),
    Route("/api/datasets/{dataset}/archives/{name}", _archive, methods=["PUT"]),
]
