"""A dataset named robot: what tests send to it, and read of it."""

import io
import time
import zipfile
from typing import Any

from PIL import Image
from starlette.testclient import TestClient

from studio.folder import Studio


def picture(width: int = 64, height: int = 48, shade: int = 90) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (shade, 20, 200)).save(file, "PNG")
    return file.getvalue()


def put(robot: TestClient, name: str, content: bytes | None = None, query: str = "") -> Any:
    path = f"/api/datasets/robot/images/{name}{query}"
    return robot.put(path, content=picture() if content is None else content)


def caption(robot: TestClient, name: str, text: str, version: str = "*") -> Any:
    path = f"/api/datasets/robot/captions/{name}"
    return robot.put(path, content=text.encode(), headers={"If-Match": version})


def rows(robot: TestClient, query: str = "") -> dict[str, Any]:
    found = robot.get(f"/api/datasets/robot{query}").json()
    return {row["name"]: row for row in found["images"]}


def files(studio: Studio) -> list[str]:
    place = studio.datasets / "robot"
    return sorted(e.relative_to(place).as_posix() for e in place.rglob("*") if e.is_file())


def until_done(studio: Studio) -> dict[str, Any]:
    for _ in range(300):
        if all(each["state"] not in ("waiting", "running") for each in studio.tasks.shown()):
            break
        time.sleep(0.02)
    return studio.tasks.shown()[-1]


def packed(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()
