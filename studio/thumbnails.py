"""Thumbnails: WebP, at most 320 pixels a side, made at upload or at the first look.

Images in formats that browsers do not show have a larger one, too.
"""

import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from PIL import Image
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from inference.image_decoding import open_image, upright_srgb
from studio.dataset_files import OWN, image_parts, own_folder, place_of, version_of
from studio.folder import Studio, folder_fd, open_file
from studio.replies import Problem, send_file
from trainer.data import Unusable, probe

SIDE = 320  # pixels
LARGE = 2048  # pixels, of a format that browsers do not show
_DECODERS = threading.Semaphore(2)  # each may hold a large photo


def make(root: Path, name: str, facts: os.stat_result, side: int = SIDE) -> Path:
    """The file of an image's thumbnail, made if it is missing. Raises `Problem` (422)."""
    path = own_folder(root, "thumbs") / _name(name, facts, side)
    if path.is_file():
        return path
    with _DECODERS, open(open_file(root, name.split("/")), "rb") as file:
        try:
            data = file.read()
            probe(data)  # bounds the pixels before they are decoded
            with open_image(data) as image:
                image.draft("RGB" if image.mode == "RGB" else None, (side, side))
                small, _ = upright_srgb(image)
        except Unusable as error:
            raise Problem(422, f"{name} {error}") from None
        except Exception as error:  # Pillow may raise any exception on malformed images
            raise Problem(422, f"{name} is damaged ({error})") from None
        small.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=2)
    part = own_folder(root, "parts") / f"{path.stem}-{threading.get_ident()}.webp"
    try:
        small.save(part, "WEBP", quality=80, method=2)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _name(name: str, facts: os.stat_result, side: int) -> str:
    return f"{version_of(name, facts)}{'' if side == SIDE else f'-{side}'}.webp"


def prune(root: Path, images: Mapping[str, os.stat_result]) -> None:
    """Removes the thumbnails of images that were replaced or removed, and unfinished ones."""
    kept = {_name(*each, side) for each in images.items() for side in (SIDE, LARGE)}
    with suppress(Problem, OSError), folder_fd(root, [OWN, "thumbs"]) as folder:
        for name in set(os.listdir(folder)) - kept:
            os.unlink(name, dir_fd=folder)


def _get(request: Request) -> Response:
    studio: Studio = request.app.state.studio
    root = place_of(studio, request.path_params["dataset"])
    name = "/".join(image_parts(request.path_params["name"]))
    fd = open_file(root, name.split("/"))
    try:
        facts = os.fstat(fd)
    finally:
        os.close(fd)
    path = make(root, name, facts)
    fixed = request.query_params.get("v") == version_of(name, facts)
    caching = "private, max-age=31536000, immutable" if fixed else "no-cache"
    found = open_file(root, [OWN, "thumbs", path.name])
    return send_file(found, path.name, {"Cache-Control": caching})


ROUTES = [Route("/api/datasets/{dataset}/thumbs/{name:path}", _get)]
