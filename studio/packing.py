"""A dataset as a zip, made while it is sent: without a temporary file."""

import io
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from studio.dataset_files import find, place_of
from studio.folder import open_file
from studio.replies import Problem


def _zip(request: Request) -> Response:
    root = place_of(request.app.state.studio, request.path_params["dataset"])
    name = quote(f"{root.name}.zip", safe="")
    headers = {"Content-Disposition": f"attachment; filename=dataset.zip; filename*=UTF-8''{name}"}
    return StreamingResponse(_zipped(root), headers=headers, media_type="application/zip")


class _Pipe(io.RawIOBase):
    """Keeps what is written until it is taken."""

    def __init__(self) -> None:
        self.waiting = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self.waiting += data
        return len(data)

    def take(self) -> bytes:
        taken, self.waiting = bytes(self.waiting), bytearray()
        return taken


def _zipped(root: Path) -> Iterator[bytes]:
    pipe = _Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_STORED) as zipped:  # type: ignore[arg-type]
        for name in find(root):
            try:
                fd = open_file(root, name.split("/"))
            except Problem:
                continue  # removed meanwhile
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            with open(fd, "rb") as file, zipped.open(info, "w", force_zip64=True) as member:
                while chunk := file.read(1 << 18):
                    member.write(chunk)
                    yield pipe.take()
            yield pipe.take()
    yield pipe.take()


ROUTES = [Route("/api/datasets/{dataset}/zip", _zip)]
