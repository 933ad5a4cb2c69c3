"""Datasets: list, create, rename, delete, and one with all that the trainer says about it."""

import logging
import os
from collections import defaultdict
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from families.registry import UnknownBase, find_base
from inference.image_decoding import format_of, open_image, upright_size
from studio import packing, thumbnails
from studio.dataset_files import (
    OWN,
    Files,
    caption_file,
    caption_version,
    check_image,
    dataset_names,
    find,
    image_parts,
    images_of,
    known_images,
    new_name,
    place_of,
    read_file,
    texts_of,
    version_of,
)
from studio.folder import Studio, open_file, to_trash
from studio.replies import Problem, is_shown, read_json, reply, send_file
from studio.tasks import Task
from trainer.data import (
    CAPTION_SUFFIXES,
    Checked,
    Finding,
    Purpose,
    Unusable,
    check_examples,
    cover,
    crop,
    examine,
    nearest_bucket,
    probe,
    stem_of,
    suffix_of,
)
from trainer.settings import TrainingInputs

HEAD = 64  # bytes of files that are not used, to recognize their kind
DEFAULT_CAPTION: str = TrainingInputs.model_fields["default_caption"].default
TOKEN: str = TrainingInputs.model_fields["placeholder_token"].default
MULTIPLE = 16  # `Base.size_multiple` where no base model is named


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
    images, known = images_of(files), known_images(root)
    changed = max((each.st_mtime for each in files.values()), default=root.stat().st_mtime)
    good = [n for n, f in images.items() if not isinstance(known.get(version_of(n, f)), str)]
    return {
        "name": root.name,
        "images": len(images),
        "captions": sum(caption_file(name, files) in files for name in images),
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
    if studio.tasks.running("archive", root.name):
        raise Problem(409, "an archive is being added", None, "wait until it is done")
    return reply({"trash": to_trash(studio, root)})


# ---- One dataset ---------------------------------------------------------------------------------


def _one(request: Request) -> Response:
    studio: Studio = request.app.state.studio
    root = place_of(studio, request.path_params["dataset"])
    asked = request.query_params
    size, base = None, asked.get("base")
    if base or asked.get("resolution"):
        try:
            known = find_base(base) if base else None
            multiple = known.size_multiple if known else MULTIPLE
            default = known.training_resolution if known else 0
            size = int(asked.get("resolution") or default), multiple
            nearest_bucket(1, 1, *size)
        except (UnknownBase, ValueError, OverflowError) as error:
            raise Problem(400, str(error), "resolution") from None
    with studio.writing:  # all captions from before or from after a change
        files = find(root)
        texts = texts_of(root, files)
        thumbnails.prune(root, images_of(files))
    rows, problems = described(root, files, texts, asked.get("token") or TOKEN, size)
    _check_unknown(studio, root, images_of(files))
    return reply({"name": root.name, "images": rows, "problems": problems})


def described(
    root: Path, files: Files, texts: dict[str, bytes], token: str, size: tuple[int, int] | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of all images, and the problems of the dataset.

    size: resolution and the base's `size_multiple`, for buckets; or None.
    """
    images, known = images_of(files), known_images(root)
    checked = {
        name: known.get(version_of(name, facts)) or _from_header(root, name)
        for name, facts in images.items()
    }
    contents = {n: texts[n] if n in texts else _head(root, n, n in images) for n in files}

    def check_images(names: Collection[str]) -> dict[str, Checked | str]:
        others = {name: _from_header(root, name) for name in names if name not in checked}
        return checked | others  # images by their content, which the page does not show

    found = examine(contents, DEFAULT_CAPTION, token, check_images=check_images)
    all_found = [("problem", each) for each in found.problems]
    all_found += [("warning", each) for each in found.warnings if each.level >= logging.WARNING]
    purpose = Purpose((token,), *(size or (None, MULTIPLE)))
    all_found += [
        ("warning" if each.level >= logging.WARNING else "suggestion", each)
        for each in check_examples(found.examples, purpose)
    ]
    marks, problems = _beside(all_found, list(images))

    captions = {each.name: each for each in found.examples}
    rows = []
    for name, facts in images.items():
        file = caption_file(name, files)
        text = texts.get(file)
        shown = "" if text is None else _text_of(text)
        if not shown.strip() and (other := found.captions.get(name)) and other.file != file:
            shown = other.text  # of another file, or of a table
        default = not shown.strip()
        used = checked[name]
        width, height = (0, 0) if isinstance(used, str) else (used.width, used.height)
        bucket = _bucket(width, height, *size) if size and width else None
        rows.append(
            {
                "name": name,
                "width": width,
                "height": height,
                "bytes": facts.st_size,
                "version": version_of(name, facts),
                "caption": DEFAULT_CAPTION if default else shown,
                "caption_version": caption_version(text),
                "default_caption": default,
                "marks": marks[name],
                "bucket": bucket,
                "trained": name in captions,
            }
        )
    return rows, problems


def _beside(
    findings: list[tuple[str, Finding]], images: list[str]
) -> tuple[dict[str, list[dict[str, str]]], list[dict[str, Any]]]:
    """Marks by image, and the problems of the whole; each with the images of its captions.

    A suggestion is about the whole: images with one background have no mark each.
    """
    by_stem = defaultdict(list)
    for name in images:
        by_stem[stem_of(name)].append(name)
    known, marks = set(images), defaultdict[str, list[dict[str, str]]](list)
    problems: list[dict[str, Any]] = []
    for kind, finding in findings:
        about = [
            image
            for name in finding.names
            for image in ([name] if name in known else by_stem[stem_of(name)] * _is_text(name))
        ]
        for image in dict.fromkeys(about if kind != "suggestion" else ()):
            marks[image].append({"kind": kind, "text": finding.beside or finding.text})
        if not about or kind != "warning":
            image_of_it = about[0] if about and kind == "problem" else None
            problems.append({"kind": kind, "text": finding.text, "image": image_of_it})
    return marks, problems


def _bucket(width: int, height: int, resolution: int, multiple: int) -> dict[str, Any]:
    bucket = nearest_bucket(width, height, resolution, multiple)
    left, top, right, bottom = box = crop(width, height, bucket)
    return {
        "width": bucket.width,
        "height": bucket.height,
        "crop": [round(each) for each in box],
        "cut": round(1 - (right - left) * (bottom - top) / (width * height), 4),
        "upscaled": round(max(1.0, cover(width, height, bucket)), 3),
    }


def _from_header(root: Path, name: str) -> Checked | str:
    """Size of an image that was not decoded yet."""
    try:
        with open(open_file(root, name.split("/")), "rb") as file:
            head = file.read(1 << 18)
            # In these formats, sizes and EXIF are at the beginning; others are opened as a whole.
            if format_of(head) not in ("JPEG", "PNG"):
                head += file.read()
            probe(head)
            with open_image(head) as image:
                return Checked(*upright_size(image), False, False)
    except Exception as error:  # Pillow may raise any exception on malformed images
        return str(error)


def _head(root: Path, name: str, image: bool) -> bytes:
    return b"" if image else read_file(root, name, HEAD)


def _is_text(name: str) -> bool:
    return suffix_of(name) in CAPTION_SUFFIXES


def _text_of(content: bytes) -> str:
    from trainer.encodings import decode

    try:
        return decode(content)[0]
    except Unusable:
        return content.decode(errors="replace")  # `examine` says what is wrong


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
        name = "/".join(parts)
        gone, text = [root / name], caption_file(name, files)
        shared = any(stem_of(n) == stem_of(name) for n in images_of(files) if n != name)
        if text in files and not shared:
            gone.append(root / text)
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
