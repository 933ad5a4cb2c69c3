"""A studio of the tests: its folder, a server in a process of its own, and a client."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from root import ROOT
from starlette.testclient import TestClient

from studio.app import application
from studio.folder import Studio
from studio.jobs import forget
from trainer.events import read_events
from trainer.lock import Lock

HERE = Path(__file__).parent
DATASET = "shapes"
# A run of a second on the included miniature.
SHORT = {
    "base_model": "miniature-turbo",
    "resolution": "64",
    "rank": 2,
    "steps": 6,
    "seed": 5,
    "batch_size": 1,
    "sample_prompts": "",
    "preserve": "off",
    "validation_every": 0,
    "checkpoint_every": 2,
}


def with_dataset(folder: Path, name: str = DATASET, most: int = 6) -> Path:
    """Adds a dataset of a few images to a studio's folder."""
    place = folder / "datasets" / name
    place.mkdir(parents=True)
    with zipfile.ZipFile(ROOT / "demo" / "subject.zip") as archive:
        stems = sorted({Path(each).stem for each in archive.namelist()})[:most]
        for member in archive.namelist():
            if Path(member).stem in stems:
                (place / Path(member).name).write_bytes(archive.read(member))
    return folder


class Answer(Exception):
    """An answer with an error."""

    def __init__(self, status: int, content: dict[str, Any]) -> None:
        super().__init__(f"{status}: {content}")
        self.status, self.content = status, content


def program(small: bool) -> list[str]:
    """Python's arguments that start the studio. `small`: without models, but their processes."""
    if not small:
        return ["-m", "studio"]
    trainer = str(HERE / "small_trainer.py")
    code = "import small_gpu\nfor each in small_gpu.replaced(): setattr(*each)\n"
    code += f"from studio import processes; processes.TRAINER = ({trainer!r},)\n"
    return ["-c", code + "from studio.__main__ import main; main()"]


class Server:
    """`python -m studio` in a folder; `kill` is kill -9. `small`: its trainer has no model."""

    def __init__(self, folder: Path, small: bool = False) -> None:
        self.folder, self._program = folder, program(small)
        self.start()

    def start(self) -> None:
        here = str(ROOT), str(HERE), os.environ.get("PYTHONPATH")
        path = os.pathsep.join(filter(None, here))
        with (self.folder / "server.txt").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self._program, "--folder", str(self.folder), "--port", "0"],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": path},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        lock = self.folder / "studio.lock"

        def address() -> str | None:
            try:
                facts = json.loads(lock.read_text())
            except (OSError, ValueError):
                return None
            return facts["address"] if facts["pid"] == self.process.pid else None

        self.address = until(address)
        until(lambda: self.answers())

    def answers(self) -> bool:
        try:
            return bool(self.get("/api/queue"))
        except OSError:
            return False

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """Ends the server and every run."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.kill()
        from studio.processes import members

        for pids in [p for name, p in members().items() if name.startswith(str(self.folder))]:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)

    def get(self, path: str) -> Any:
        return self._ask("GET", path)

    def post(self, path: str, **content: Any) -> Any:
        return self._ask("POST", path, content)

    def _ask(self, method: str, path: str, content: Any = None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(
            self.address.rstrip("/") + path, data, {"X-Studio": "1"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise Answer(error.code, json.loads(error.read() or b"{}")) from None

    def new(self, key: str, **changes: Any) -> str:
        """Queues a short run; returns its id."""
        settings = SHORT | changes
        datasets = [{"name": DATASET, "token": "<zwx>"}]
        start = settings.pop("start", "queue")
        body = {"settings": settings, "datasets": datasets, "key": key, "start": start}
        return str(self.post("/api/runs", **body)["id"])

    def state(self, run: str) -> str:
        return str(self.get(f"/api/runs/{run}")["state"])

    def held(self, run: str) -> bool:
        return Lock.is_held(self.folder / "outputs" / run)


def until(call: Callable[[], Any], seconds: float = 60.0) -> Any:
    """What the call returns as soon as it is true."""
    end = time.monotonic() + seconds
    while not (found := call()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
    return found


class Page:
    """A client of a server in this process, with its work in the background."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.start()

    def start(self, resume: bool = False) -> None:
        app = application(Studio(self.folder, resume=resume))
        address, headers = "http://127.0.0.1:8500", {"X-Studio": "1"}
        self.client = TestClient(app, base_url=address, headers=headers)
        self.client.__enter__()

    def end(self) -> None:
        self.client.__exit__(None, None, None)
        forget(Studio(self.folder))  # what the server has in memory

    def new(self, key: str = "", expect: int = 201, **changes: Any) -> Any:
        body: dict[str, Any] = {"datasets": [{"name": DATASET, "token": "<zwx>"}], "start": "queue"}
        body |= {name: changes.pop(name) for name in ("datasets", "start") if name in changes}
        settings = SHORT | {"placeholder_learning_rate": 0.02, "steps": 2} | changes
        body |= {"settings": settings, "key": key or os.urandom(4).hex()}
        answer = self.client.post("/api/runs", json=body)
        assert answer.status_code == expect, answer.text
        return answer.json()["id"] if expect == 201 else answer.json()

    def do(self, run: str, do: str, key: str = "", expect: int = 202, **more: Any) -> Any:
        body = {"do": do, "key": key or os.urandom(4).hex(), **more}
        answer = self.client.post(f"/api/runs/{run}/commands", json=body)
        assert answer.status_code == expect, answer.text
        return answer.json()

    def run(self, run: str) -> Any:
        return self.client.get(f"/api/runs/{run}").json()

    def becomes(self, run: str, state: str, seconds: float = 20) -> Any:
        until(lambda: self.run(run)["state"] == state, seconds)
        return self.run(run)

    def events(self, run: str, kind: str) -> list[dict[str, Any]]:
        found = read_events(self.folder / "outputs" / run)
        return [each for each in found if each["type"] == kind]
