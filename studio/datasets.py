"""Datasets: list, create, rename, delete, and one with all that the trainer says about it."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from families.registry import UnknownBase, find_base
from inference.input_fields import parts_of
from studio import packing, thumbnails
from studio.captioner import caption_writer_of
from studio.dataset_files import (
    OWN,
    Files,
    captions_beside,
    check_image,
    contents_of,
    dataset_names,
    find,
    image_parts,
    images_of,
    known_images,
    new_name,
    not_supported,
    place_of,
    texts_of,
    version_of,
)
from studio.dataset_rows import DEFAULT_CAPTION, TOKEN, Wanted, described, names_subject
from studio.folder import Studio, open_file, to_trash
from studio.replies import Problem, is_shown, read_json, reply, send_file
from studio.tasks import Task
from trainer.data import choose_captions, nearest_bucket, roles_of, stem_of

# ---- The list ------------------------------------------------------------------------------------


def _list(request: Request) -> Response:
    studio: Studio = request.app.state.studio
    rows = []
    for name in dataset_names(studio):
        with suppress(OSError, Problem):  # not readable, or removed meanwhile
            rows.append(_summary(place_of(studio, name)))
    return reply({"datasets": rows})


def _summary(root: Path) -> dict[str, Any]:
    files = find(root)
    contents, known = contents_of(root, files, texts_of(root, files)), known_images(root)
    roles = roles_of(contents)
    images = roles.trained
    captions = choose_captions(contents, images, roles.besides, names_subject)
    changed = max((each.st_mtime for each in files.values()), default=root.stat().st_mtime)
    good = [n for n in images if not isinstance(known.get(version_of(n, files[n])), str)]
    return {
        "name": root.name,
        "images": len(images),
        "captions": sum(bool(each.text) for each in captions.of.values()),
        "problems": len(images) - len(good),
        "bytes": sum(each.st_size for each in files.values()),
        "changed": changed,
        "thumb": next(iter(good), next(iter(images), None)),
    }


async def _create(request: Request) -> Response:
    studio: Studio = request.app.state.studio
    name = new_name(str((await read_json(request)).get("name", "")))
    if name in dataset_names(studio):
        raise _exists(name)
    try:
        (studio.datasets / name).mkdir(parents=True)
    except FileExistsError:
        raise _exists(name) from None
    return reply({"name": name}, 201)


async def _rename(request: Request) -> Response:
    studio: Studio = request.app.state.studio
    root = place_of(studio, request.path_params["dataset"])
    name = new_name(str((await read_json(request)).get("name", "")))
    caption_writer_of(studio).check_idle(root.name)
    return await run_in_threadpool(_renamed, studio, root, name)


def _renamed(studio: Studio, root: Path, name: str) -> Response:
    with studio.writing:
        if name in dataset_names(studio) or os.path.lexists(root.parent / name):
            raise _exists(name)
        if studio.tasks.running("archive", root.name):
            raise Problem(409, "an archive is being added", None, "wait until it is done")
        root.rename(root.parent / name)
    return reply({"name": name})


def _exists(name: str) -> Problem:
    return Problem(409, f"there is a dataset {name} already", "name", "choose another name")


def _delete(request: Request) -> Response:
    studio: Studio = request.app.state.studio
    root = place_of(studio, request.path_params["dataset"])
    caption_writer_of(studio).check_idle(root.name)
    if studio.tasks.running("archive", root.name):
        raise Problem(409, "an archive is being added", None, "wait until it is done")
    return reply({"trash": to_trash(studio, root)})


# ---- One dataset ---------------------------------------------------------------------------------


def _one(request: Request) -> Response:
    studio: Studio = request.app.state.studio
    root = place_of(studio, request.path_params["dataset"])
    asked = request.query_params
    named, resolution = asked.get("base"), asked.get("resolution")
    try:
        base = find_base(named) if named else None
        default = base.training_resolution if base else 0
        wanted = Wanted(
            asked.get("token", TOKEN) or None,
            base,
            int(resolution or default) if named or resolution else None,
            parts_of(asked.get("controls"), ","),
            asked.get("default_caption", DEFAULT_CAPTION),
        )
        if wanted.size is not None:
            nearest_bucket(1, 1, *wanted.size)
    except (UnknownBase, ValueError, OverflowError) as error:
        raise Problem(400, str(error), "resolution") from None
    with studio.writing:  # all captions from before or from after a change
        files = find(root)
        texts = texts_of(root, files)
        images = images_of(root, files)
        thumbnails.prune(root, images)
    rows, problems = described(root, files, texts, wanted)
    _check_unknown(studio, root, images)
    return reply({"name": root.name, "images": rows, "problems": problems})


def _check_unknown(studio: Studio, root: Path, images: Files) -> None:
    """Checks images that others put into the folder, and makes their thumbnails."""
    known = known_images(root)
    unknown = {n: f for n, f in images.items() if version_of(n, f) not in known}
    if unknown and not studio.tasks.running("images", root.name):

        def work(task: Task) -> None:
            for done, (name, facts) in enumerate(unknown.items()):
                task.at(done, len(unknown))
                add_image(root, name, facts)
            task.at(len(unknown), len(unknown))

        studio.tasks.start(Task("images", root.name, of=len(unknown)), work)


def add_image(root: Path, name: str, facts: os.stat_result) -> None:
    """Checks an image and makes its thumbnail; skips one that was removed meanwhile."""
    try:
        if not isinstance(check_image(root, name, facts), str):
            thumbnails.make(root, name, facts)
    except Problem:
        pass


# ---- Files ---------------------------------------------------------------------------------------


def _image(request: Request) -> Response:
    root = place_of(request.app.state.studio, request.path_params["dataset"])
    parts = image_parts(request.path_params["name"])
    fd = open_file(root, parts)
    if is_shown(parts[-1]):
        return send_file(fd, parts[-1])
    with open(fd, "rb"):
        path = thumbnails.make(root, "/".join(parts), os.fstat(fd), thumbnails.LARGE)
    return send_file(open_file(root, [OWN, "thumbs", path.name]), path.name)


def _remove(request: Request) -> Response:
    studio: Studio = request.app.state.studio
    root = place_of(studio, request.path_params["dataset"])
    parts = image_parts(request.path_params["name"])
    os.close(open_file(root, parts))
    with studio.writing:
        files = find(root)
        name, images = "/".join(parts), images_of(root, files)
        if name not in images:
            raise not_supported(name)
        shared = any(stem_of(each) == stem_of(name) for each in images if each != name)
        gone = [root / each for each in (name, *captions_beside(name, files) * (not shared))]
        return reply({"trash": to_trash(studio, *gone)})


ROUTES = [
    Route("/api/datasets", _list),
    Route("/api/datasets", _create, methods=["POST"]),
    *packing.ROUTES,
    Route("/api/datasets/{dataset}", _one),
    Route("/api/datasets/{dataset}", _rename, methods=["PATCH"]),
    Route("/api/datasets/{dataset}", _delete, methods=["DELETE"]),
    Route("/api/datasets/{dataset}/images/{name:path}", _image),
    Route("/api/datasets/{dataset}/images/{name:path}", _remove, methods=["DELETE"]),
]
