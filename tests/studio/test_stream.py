"""The stream of events: nothing is lost or sent twice, also if the server is killed."""

import http.client
import json
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from pages import Server

from studio.stream import lines_after
from trainer.events import Events


def test_lines_are_read_in_parts_and_a_line_that_is_being_written_waits(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"n":1}\n\n{"n":2}\n{"n"')
    assert list(lines_after(path, 0)) == [(8, b'{"n":1}'), (9, b""), (17, b'{"n":2}')]
    assert list(lines_after(path, 9)) == [(17, b'{"n":2}')]
    assert list(lines_after(path, 17)) == []
    assert [line for _, line in lines_after(path, 999)] == [b'{"n":1}', b"", b'{"n":2}']
    assert list(lines_after(tmp_path / "none", 0)) == []


class Reader:
    """Reads a stream as a browser does: after an error, again behind the last id."""

    def __init__(self, server: Server, run: str) -> None:
        self.lines: list[dict[str, Any]] = []
        self.statuses: list[dict[str, Any]] = []
        self.last, self.ended = "0", False
        self._server, self._run = server, run
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while not self.ended:
            try:
                self._read_once()
            except (OSError, http.client.HTTPException):
                time.sleep(0.1)

    def _read_once(self) -> None:
        place = urlsplit(self._server.address)
        connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=5)
        connection.request(
            "GET", f"/api/events?run={self._run}", headers={"Last-Event-ID": self.last}
        )
        answer = connection.getresponse()
        kind = identity = ""
        while line := answer.readline():
            name, _, value = line.decode().rstrip("\n").partition(": ")
            if name == "event":
                kind = value
            elif name == "id":
                identity = value
            elif name == "data" and kind == "run":
                self.lines.append(json.loads(value))
                self.last = identity
            elif name == "data":
                assert not identity, "a snapshot has an id"
                self.statuses.append(json.loads(value))
            elif not name:
                kind = identity = ""


@pytest.mark.slow
def test_600_events_are_read_once_each_although_the_server_is_killed_five_times(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "outputs" / "one"
    folder.mkdir(parents=True)
    log = Events(folder)
    log.emit("started")
    server = Server(tmp_path)
    try:
        reader = Reader(server, "one")
        for number in range(600):
            log.emit("steps", **{"from": number + 1}, loss=[0.5], seconds=0.05)
            time.sleep(0.02)
            if number % 100 == 50 and number < 550:
                server.kill()
                server.start()
        end = time.monotonic() + 10
        while len(reader.lines) < 601 and time.monotonic() < end:
            time.sleep(0.05)
        reader.ended = True
        assert [each["n"] for each in reader.lines] == [*range(1, 602)]
        assert reader.statuses[-1]["runs"][0]["step"] > 500
    finally:
        server.stop()


@pytest.mark.slow
def test_an_event_reaches_the_page_soon(tmp_path: Path) -> None:
    folder = tmp_path / "outputs" / "one"
    folder.mkdir(parents=True)
    log = Events(folder)
    log.emit("started")
    server = Server(tmp_path)
    try:
        reader = Reader(server, "one")
        while not reader.lines:
            time.sleep(0.01)
        assert reader.statuses, "the snapshot comes first"
        begun = time.monotonic()
        log.emit("steps", **{"from": 1}, loss=[0.5], seconds=0.05)
        while len(reader.lines) < 2:
            time.sleep(0.01)
        assert time.monotonic() - begun < 3  # 0.2 s on an idle machine
        reader.ended = True
    finally:
        server.stop()
