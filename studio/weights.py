"""Weights: results, checkpoints, uploads; list, inspect, download, upload."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from adapters.files import bounded_json
from studio.folder import Studio, checked_name, entry_name, open_file, to_trash
from studio.replies import Problem, reply, send_file
from studio.uploads import MAX_ARCHIVE_BYTES, received
from studio.weights_use import uses
from trainer.run_files import CHECKPOINTS, SAVED, STEP_WEIGHTS, WEIGHTS, files_by_step

LORA = "lora/lora_weights.safetensors"
SUFFIXES = (".zip", ".tar", ".safetensors")
MAX_META_BYTES, MAX_VALUES = 16 << 20, 200_000
READ_SECONDS = 300
VERDICTS = {"good": "passed", "doubtful": "warnings", "broken": "failed"}
_KINDS = {"checkpoint": CHECKPOINTS, "saved": SAVED}
_STEP = re.compile(r"(checkpoint|saved)-(\d{6,})", re.ASCII)
_reading = threading.Lock()  # one process at a time: each imports PyTorch
_read: dict[tuple[str, int, int], dict[str, Any]] = {}


class Place(NamedTuple):
    """A file of weights: where it is, and what it is."""

    id: str
    root: Path
    parts: list[str]
    kind: str  # final, checkpoint, saved, upload
    run: str | None
    step: int | None

    @property
    def path(self) -> Path:
        return self.root.joinpath(*self.parts)


def place_of(studio: Studio, identity: str) -> Place:
    """The file of an id. Raises `Problem` (400, 404) before anything is opened."""
    parts = identity.split("/")
    if len(parts) == 2 and parts[0] == "uploads":
        name = [entry_name(parts[1])]
        return Place(identity, studio.weights, name, "upload", None, None)
    if len(parts) == 3 and parts[0] == "runs":
        run, step = entry_name(parts[1]), _STEP.fullmatch(parts[2])
        if step is not None:
            file = [run, _KINDS[step[1]], f"step-{step[2]}.zip"]
            return Place(identity, studio.outputs, file, step[1], run, int(step[2]))
        if parts[2] == "final":
            return Place(identity, studio.outputs, [run, WEIGHTS], "final", run, None)
    raise Problem(404, f"there are no weights {identity[:120]}")


# ---- The list ------------------------------------------------------------------------------------


def _list(request: Request) -> Response:
    studio: Studio = request.app.state.studio
    rows = [row for place in _places(studio) if (row := _row(place)) is not None]
    return reply({"weights": sorted(rows, key=lambda row: -row["created"])})


def _places(studio: Studio) -> Iterator[Place]:
    for run in sorted(studio.outputs.iterdir()) if studio.outputs.is_dir() else ():
        if run.is_symlink() or not run.is_dir() or run == studio.images:
            continue
        if (run / WEIGHTS).is_file():
            yield Place(f"runs/{run.name}/final", studio.outputs, [run.name, WEIGHTS], "final",
                        run.name, None)  # fmt: skip
        for kind, folder in _KINDS.items():
            for step, file in files_by_step(run / folder, STEP_WEIGHTS):
                parts = [run.name, folder, file.name]
                identity = f"runs/{run.name}/{kind}-{step:06d}"
                yield Place(identity, studio.outputs, parts, kind, run.name, step)
    for file in sorted(studio.weights.iterdir()) if studio.weights.is_dir() else ():
        if file.suffix.lower() in SUFFIXES and not file.name.startswith("."):
            yield Place(f"uploads/{file.name}", studio.weights, [file.name], "upload", None, None)


def _row(place: Place) -> dict[str, Any] | None:
    try:
        fd = open_file(place.root, place.parts)
    except (Problem, OSError):
        return None  # removed meanwhile, or a link
    with open(fd, "rb") as file:
        facts = os.fstat(fd)
        meta = _meta(str(place.path), facts.st_mtime_ns, facts.st_size)
        del file
    tokens = meta.get("placeholder_tokens") or [meta.get("placeholder_token")]
    names = [each["token"] if isinstance(each, dict) else each for each in tokens]
    return {
        "id": place.id,
        "name": place.run or place.parts[-1],
        "run": place.run,
        "step": place.step,
        "base_model": meta.get("base_model"),
        "tokens": [each for each in names if isinstance(each, str)],
        "rank": meta.get("rank"),
        "bytes": facts.st_size,
        "created": facts.st_mtime,
        "checked": VERDICTS.get(str(meta.get("result"))),
        "kind": place.kind,
    }


def base_model(studio: Studio, identity: str) -> str | None:
    """The base model that weights name; None if they name none. Raises `Problem` (400, 404)."""
    name = (_row(place_of(studio, identity)) or {}).get("base_model")
    return name if isinstance(name, str) else None


@lru_cache(maxsize=2000)
def _meta(path: str, changed: int, size: int) -> dict[str, Any]:
    """What a file says of itself, without its tensors; empty if it says nothing."""
    try:
        with open(path, "rb") as file:
            found = _zip_meta(file) if zipfile.is_zipfile(file) else _header(file)
    except (OSError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile):
        return {}
    kept = ("placeholder_tokens", "placeholder_token", "base_model", "rank", "result")
    return {name: found[name] for name in kept if name in found} if isinstance(found, dict) else {}


def _zip_meta(file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as zipped, zipped.open("meta.json") as member:
        return bounded_json.loads(member.read(MAX_META_BYTES), MAX_VALUES)


def _header(file: BinaryIO) -> Any:
    file.seek(0)
    size = int.from_bytes(file.read(8), "little")
    if size > MAX_META_BYTES:
        return {}
    header = bounded_json.loads(file.read(size), 20 * MAX_VALUES)
    facts = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    return {name.removeprefix("zeroprior."): value for name, value in facts.items()}


# ---- One -----------------------------------------------------------------------------------------


def _inspect(request: Request) -> Response:
    place = place_of(request.app.state.studio, request.path_params["id"])
    row = _row(place)
    if row is None:
        raise Problem(404, f"there are no weights {place.id}")
    found = read(place.path)
    row |= {"tokens": found["tokens"], "base_model": found["base_model"], "rank": found["rank"]}
    facts = {name: found[name] for name in ("modules", "layers", "settings", "hashes")}
    return reply({**row, **facts, "use": uses(row)})


def read(path: Path) -> dict[str, Any]:
    """Reads and checks a file as generation does, in another process. Raises `Problem` (422)."""
    facts = path.stat()
    key = (str(path), facts.st_mtime_ns, facts.st_size)
    with _reading:
        if key not in _read:
            answer = _answer(path)
            if "error" in answer:
                raise Problem(422, answer["error"])
            if len(_read) > 100:
                _read.clear()
            _read[key] = answer
        return _read[key]


def _answer(path: Path) -> dict[str, Any]:
    """The answer of `studio.weights_reader`."""
    done = subprocess.run(
        [sys.executable, "-m", "studio.weights_reader", str(path)],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=READ_SECONDS,
    )
    try:
        return dict(json.loads(done.stdout))
    except ValueError:
        raise Problem(500, "the weights could not be read") from None


def _download(request: Request) -> Response:
    place = place_of(request.app.state.studio, request.path_params["id"])
    fd = open_file(place.root, place.parts)
    stem = f"{place.run or Path(place.parts[-1]).stem}{f'-{place.step}' if place.step else ''}"
    kind = request.query_params.get("as", "zip")
    if kind == "zip":
        return send_file(fd, stem + place.path.suffix, save=True)
    with open(fd, "rb") as file:
        if not zipfile.is_zipfile(file):
            if kind == "lora":
                return send_file(open_file(place.root, place.parts), f"{stem}.safetensors")
            raise Problem(404, "these weights have no token")
        with zipfile.ZipFile(file) as zipped:
            names = zipped.namelist()
            wanted = LORA
            if kind == "token":
                embeddings = [name for name in names if name.startswith("embeddings/")]
                wanted, stem = (embeddings or [""])[0], _token_name(place)
            if kind not in ("lora", "token") or wanted not in names:
                raise Problem(404, f"these weights have no {kind[:20]}")
            size = zipped.getinfo(wanted).file_size
    name = f"{stem}.safetensors"
    headers = {
        "Content-Length": str(size),
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}",
        "Cache-Control": "no-cache",
    }
    content = _member(open(open_file(place.root, place.parts), "rb"), wanted)
    return StreamingResponse(content, headers=headers, media_type="application/octet-stream")


def _member(file: BinaryIO, name: str) -> Iterator[bytes]:
    with file, zipfile.ZipFile(file) as zipped, zipped.open(name) as member:
        while chunk := member.read(1 << 18):
            yield chunk


def _token_name(place: Place) -> str:
    tokens = (_row(place) or {}).get("tokens") or ["token"]
    return re.sub(r"[^A-Za-z0-9_-]", "", tokens[0]) or "token"


async def _upload(request: Request) -> Response:
    studio: Studio = request.app.state.studio
    name = checked_name(request.path_params["name"])
    if not name.lower().endswith(SUFFIXES):
        raise Problem(415, f"{name}: only .zip, .tar and .safetensors are supported", "name")
    if os.path.lexists(studio.weights / name):
        raise Problem(409, f"there are weights {name} already", "name", "choose another name")
    folder = studio.weights / ".parts"
    folder.mkdir(exist_ok=True)
    async with received(request, folder, MAX_ARCHIVE_BYTES) as part:
        checked = part.with_suffix("") / name  # errors name it
        checked.parent.mkdir()
        part.rename(checked)
        try:
            await run_in_threadpool(read, checked)
            os.link(checked, studio.weights / name)  # never replaces another
        except FileExistsError:
            raise Problem(409, f"there are weights {name} already", "name") from None
        finally:
            shutil.rmtree(checked.parent, ignore_errors=True)
    return reply(_row(place_of(studio, f"uploads/{name}")), 201)


def _delete(request: Request) -> Response:
    studio: Studio = request.app.state.studio
    place = place_of(studio, request.path_params["id"])
    if place.kind != "upload":
        raise Problem(409, "these weights belong to a run; delete the run")
    os.close(open_file(place.root, place.parts))
    return reply({"trash": to_trash(studio, place.path)})


ROUTES = [
    Route("/api/weights", _list),
    Route("/api/weights/{id:path}/inspect", _inspect),
    Route("/api/weights/{id:path}/download", _download),
    Route("/api/weights/{name}", _upload, methods=["PUT"]),
    Route("/api/weights/{id:path}", _delete, methods=["DELETE"]),
]
