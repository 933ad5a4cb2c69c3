"""Captions, edited in place; find and replace in all of them, which can be undone as a whole."""

import json
import secrets
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from studio.captioner import caption_writer_of
from studio.dataset_files import (
    OWN,
    append,
    caption_content,
    caption_file,
    caption_version,
    find,
    image_parts,
    images_of,
    place_of,
    read_file,
    texts_of,
    write_file,
)
from studio.dataset_rows import DEFAULT_CAPTION, TOKEN, Wanted, described
from studio.folder import Studio, entry_path, to_trash
from studio.replies import Problem, read_body, read_json, reply
from studio.substitution import Unclear, substituted
from trainer.data import MAX_CAPTION_BYTES, Unusable, stem_of, suffix_of
from trainer.encodings import decode

MAX_UNDO_BYTES = 256 << 20


async def _put(request: Request) -> Response:
    studio: Studio = request.app.state.studio
    root = place_of(studio, request.path_params["dataset"])
    name = request.path_params["name"]
    if suffix_of(name) == ".txt":  # a caption file, of an image whose suffix is not known
        name = "/".join(entry_path(name))
    else:
        name = "/".join(image_parts(name))
    expected = request.headers.get("if-match")
    if expected is None:
        raise Problem(400, "the header If-Match is missing")
    body = await read_body(request, MAX_CAPTION_BYTES)
    try:
        text = body.decode()
    except UnicodeDecodeError:
        raise Problem(400, "the caption is not UTF-8") from None
    if "\0" in text:
        raise Problem(400, "the caption contains a NUL character")
    asked = request.query_params
    wanted = Wanted(
        asked.get("token", TOKEN) or None,
        default_caption=asked.get("default_caption", DEFAULT_CAPTION),
    )
    return await run_in_threadpool(_save, studio, root, name, text, expected.strip('"'), wanted)


def _save(
    studio: Studio, root: Path, name: str, text: str, expected: str, wanted: Wanted
) -> Response:
    with studio.writing:
        files = find(root)
        images = images_of(root, files)
        if suffix_of(name) == ".txt":
            name = next((each for each in images if stem_of(each) == stem_of(name)), name)
        if name not in images:
            raise Problem(404, f"{name} belongs to no image; a caption is NAME.txt for NAME.jpg")
        file = caption_file(name, files)
        now = caption_content(root, file)
        if expected not in ("*", caption_version(now)):
            raise Problem(
                412,
                "the caption was changed elsewhere",
                mine=text,
                theirs=_decoded(now),
                caption_version=caption_version(now),
            )
        if text.strip():
            write_file(root, file, text.encode())
        elif now is not None:
            to_trash(studio, root / file)
        files = find(root)
        if text.strip():  # otherwise the caption may be that of any other file
            files = {each: facts for each, facts in files.items() if each in (name, file)}
        rows, _ = described(root, files, texts_of(root, files), wanted)
    row = next((each for each in rows if each["name"] == name), None)
    if row is None:
        raise Problem(404, f"{name} was removed")
    names = ("caption", "caption_version", "caption_source", "default_caption", "marks")
    return reply({each: row[each] for each in names})


def _decoded(content: bytes | None) -> str:
    if content is None:
        return ""
    try:
        return decode(content)[0]
    except Unusable:
        return content.decode(errors="replace")


# ---- Find and replace ----------------------------------------------------------------------------


def _is_text(text: str) -> bool:
    """Whether the text can be written to a file; JSON can contain half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


async def _replace(request: Request) -> Response:
    studio: Studio = request.app.state.studio
    root = place_of(studio, request.path_params["dataset"])
    asked = await read_json(request)
    find_, with_, names = asked.get("find"), asked.get("with", ""), asked.get("names")
    if not isinstance(find_, str) or not find_:
        raise Problem(422, "the text to find is empty", "find")
    if not isinstance(with_, str) or "\0" in with_ or not _is_text(with_):
        raise Problem(422, "the replacement is not a text", "with")
    if len(with_) > MAX_CAPTION_BYTES:
        raise Problem(422, "the replacement is longer than a caption may be", "with")
    if names is not None and not isinstance(names, list):
        raise Problem(422, "names is not a list", "names")
    return await run_in_threadpool(_replaced, studio, root, asked, find_, with_, names)


def _replaced(
    studio: Studio, root: Path, asked: dict[str, Any], find_: str, with_: str, names: Any
) -> Response:
    with studio.writing:
        files = find(root)
        before: dict[str, tuple[str, str]] = {}  # image and text by caption file
        for image in images_of(root, files):
            file = caption_file(image, files)
            if file in files and file not in before and (names is None or image in names):
                try:
                    content = read_file(root, file, MAX_CAPTION_BYTES + 1)
                    before[file] = image, decode(content)[0]
                except Unusable:
                    continue  # the page marks it
        texts = [text for _, text in before.values()]
        try:
            after = substituted(
                texts, find_, with_, bool(asked.get("regex")), bool(asked.get("word"))
            )
        except Unclear as error:
            raise Problem(422, str(error), "find") from None
        changes = [
            {"file": file, "image": image, "before": old, "after": new}
            for (file, (image, old)), new in zip(before.items(), after, strict=True)
            if new != old
        ]
        long = [e["image"] for e in changes if len(e["after"].encode()) > MAX_CAPTION_BYTES]
        if long:
            raise Problem(422, f"the caption of {long[0]} would be too long", "with")
        undo = None
        if changes and not asked.get("dry_run"):
            undo = secrets.token_hex(8)
            # First, so that a killed server leaves nothing that cannot be undone.
            append(root, "undo.jsonl", {"id": undo, "changes": changes}, sync=True)
            for each in changes:
                write_file(root, each["file"], each["after"].encode())
    shown = [{name: e[name] for name in ("image", "before", "after")} for e in changes]
    return reply({"changes": shown, "undo": undo})


async def _undo(request: Request) -> Response:
    studio: Studio = request.app.state.studio
    root = place_of(studio, request.path_params["dataset"])
    identity, writer = (await read_json(request)).get("undo"), caption_writer_of(studio)
    writer.check_idle(root.name)
    answer = await run_in_threadpool(_undone, studio, root, identity)
    writer.forget(identity)
    return answer


def _undone(studio: Studio, root: Path, identity: object) -> Response:
    with studio.writing:
        changes = _changes(root, identity)
        texts = {}
        for each in changes:
            texts[each["file"]] = _decoded(caption_content(root, each["file"]))
        # Some may have their old text still, if the server was killed in between.
        edited = [
            e["image"] for e in changes if texts[e["file"]] not in (e["before"] or "", e["after"])
        ]
        if edited:
            raise Problem(
                409,
                f"{len(edited)} captions were edited since, such as {edited[0]}",
                None,
                "edit them by hand",
            )
        for each in changes:
            if each["before"] is not None:
                write_file(root, each["file"], each["before"].encode())
            elif caption_content(root, each["file"]) is not None:
                (root / each["file"]).unlink()  # its text is in undo.jsonl
    return reply({"undone": len(changes)})


def _changes(root: Path, identity: object) -> list[dict[str, Any]]:
    """The changes with this id: of one line, or of a line for each caption that was written."""
    try:
        lines = read_file(root, f"{OWN}/undo.jsonl", MAX_UNDO_BYTES).splitlines()
    except Problem:
        lines = []
    found: list[dict[str, Any]] = []
    for line in lines:
        try:
            row = json.loads(line)
            if row["id"] == identity:
                found += row["changes"]
        except (ValueError, KeyError, TypeError):
            continue  # cut off by a power failure
    if not found:
        raise Problem(404, "there is nothing to undo")
    return found


ROUTES = [
    Route("/api/datasets/{dataset}/captions/{name:path}", _put, methods=["PUT"]),
    Route("/api/datasets/{dataset}/replace", _replace, methods=["POST"]),
    Route("/api/datasets/{dataset}/undo", _undo, methods=["POST"]),
]
