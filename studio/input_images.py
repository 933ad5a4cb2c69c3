"""Images that others are generated from: reference images, the start image, its mask.

input_images/8c4f…          each content once, named by its hash, so that the settings of an old
                            image name the same input
input_images/8c4f….webp     its thumbnail
"""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from adapters.files.atomic import atomic_file
from adapters.files.containers import printable
from inference.image_decoding import BrokenImage, decoded, open_image
from inference.inputs import MOST_REFERENCES
from inference.request import REFERENCES
from studio.dataset_files import own_folder
from studio.folder import Studio, open_file
from studio.replies import Problem, reply, send_file
from studio.thumbnails import SIDE
from studio.uploads import received
from trainer.data import MAX_MEMBER_BYTES

NAMES = (REFERENCES, "image", "mask")  # the inputs
_ID = re.compile(r"[0-9a-f]{32}", re.ASCII)


def named(body: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a request that name images: ids by the input's name, without empty ones.

    Raises `Problem` 400 or 422.
    """
    references = body.get(REFERENCES) or []
    if not isinstance(references, list):
        raise Problem(400, f"{REFERENCES} must be a list of ids", REFERENCES)
    if len(references) > MOST_REFERENCES:
        text = f"{len(references)} reference images; no model takes more than {MOST_REFERENCES}"
        raise Problem(422, text, REFERENCES)
    found = {name: body.get(name) for name in NAMES} | {REFERENCES: references}
    return {name: each for name, each in found.items() if each}


def files(studio: Studio, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The files of these inputs, as paths. Raises `Problem` 404."""
    return {
        name: [_file(studio, name, one) for one in each]
        if isinstance(each, list)
        else _file(studio, name, each)
        for name, each in inputs.items()
    }


def _file(studio: Studio, name: str, identity: object) -> str:
    path = studio.input_images / str(identity)
    if not _ID.fullmatch(str(identity)) or path.is_symlink() or not path.is_file():
        text = f"{name}: an image is no longer in {studio.input_images.name}/"
        raise Problem(404, text, name, "remove it here, and add it again")
    return str(path)


def opened(paths: Mapping[str, Any]) -> dict[str, Any]:
    """The images of `files`, to check a request with: of reference images only the size is read,
    which does not decode them; the others are as generation reads them."""
    return {
        name: [open_image(Path(one).read_bytes()) for one in each]
        if isinstance(each, list)
        else decoded(Path(each).read_bytes(), name)
        for name, each in paths.items()
    }


async def _upload(request: Request) -> Response:
    """PUT /api/input_images/NAME: keeps the image in the body; the name is for messages only."""
    studio: Studio = request.app.state.studio
    name = printable(request.path_params["name"])
    folder = await run_in_threadpool(own_folder, studio.input_images, "parts")
    async with received(request, folder, MAX_MEMBER_BYTES) as part:
        return reply({"id": await run_in_threadpool(_stored, studio, part, name)}, 201)


def _stored(studio: Studio, part: Path, name: str) -> str:
    data = part.read_bytes()
    try:
        image = decoded(data, name)
    except BrokenImage as error:
        raise Problem(422, str(error)) from None
    identity = hashlib.sha256(data).hexdigest()[:32]
    path = studio.input_images / identity
    image.thumbnail((SIDE, SIDE))
    with atomic_file(path.with_suffix(".webp")) as file:
        image.save(file, "WEBP", quality=80)
    os.replace(part, path)
    return identity


def _thumbnail(request: Request) -> Response:
    studio: Studio = request.app.state.studio
    name = Path(_file(studio, "image", request.path_params["id"])).name + ".webp"
    caching = {"Cache-Control": "private, max-age=31536000, immutable"}
    return send_file(open_file(studio.input_images, [name]), name, caching)


ROUTES = [
    Route("/api/input_images/{name}", _upload, methods=["PUT"]),
    Route("/api/input_images/{id}", _thumbnail),
]
