"""A real Cog server for tests: start it, talk to it, read its log, and be sure that it is gone.

with Webhooks() as hooks, CogServer("train", env={"BASE_MODEL": "miniature"}) as server:
    server.post("/trainings", {"input": {...}, "webhook": hooks.url}, PREFER_ASYNC)
    assert hooks.finished(timeout=300)["status"] == "succeeded"
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Literal

import requests
from local_web import LocalHost, authority_file
from root import ROOT

# The header that makes Cog answer 202 at once; without it, hanging up cancels the run.
PREFER_ASYNC = {"Prefer": "respond-async"}

Mode = Literal["predict", "train"]
Json = dict[str, Any]


def copy_of_the_code(folder: Path) -> Path:
    """A copy of the repository's code under `folder`, for a server whose files must not land here.

    Version control, caches and everything else that is hidden stays behind, and so do the tests and
    what earlier runs have written.
    """
    ignore = shutil.ignore_patterns(".*", "__pycache__", "tests", "outputs", "venv")
    return Path(shutil.copytree(ROOT, folder / "code", ignore=ignore))


class CogServer:
    """`python -m serving MODE` on a free port, ready when the `with` block begins.

    Requests may name files in the folders of `env["ZEROPRIOR_FILES"]`, and `local_web`'s hosts.

    `cwd` is the repository or a copy of its code, `env` is added to this process's environment.
    Raises AssertionError with the end of the server's log when it does not become ready.
    """

    def __init__(
        self,
        mode: Mode = "predict",
        env: dict[str, str] | None = None,
        cwd: Path = ROOT,
        ready_within: float = 180,
    ) -> None:
        self.mode: Mode = mode
        self.env = env or {}
        self.cwd = cwd
        self.ready_within = ready_within
        # Requests to this machine never belong into a proxy, whatever the environment says.
        self._session = requests.Session()
        self._session.trust_env = False

    def __enter__(self) -> "CogServer":
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder = tempfile.TemporaryDirectory(prefix="cog-server-")
        self._log_file = Path(self._folder.name) / "server.log"
        # `python -m serving`, for which the hosts of `local_web` are public.
        script = str(ROOT / "tests" / "local_web.py")
        command = [sys.executable, script, self.mode, "--port", str(self.port)]
        local = {"TEST_AUTHORITY": authority_file(), "NO_COLOR": "1"}
        with self._log_file.open("wb") as log:
            # A session of its own, by which everything that the server has started is found.
            self._process = subprocess.Popen(
                command,
                cwd=self.cwd,
                env=os.environ | local | self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_for("READY", while_in=("STARTING",), timeout=self.ready_within)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def post(
        self,
        path: str,
        json: Json | None = None,
        headers: dict[str, str] | None = None,
        timeout: float = 600,
    ) -> requests.Response:
        """POST a JSON body. Without PREFER_ASYNC the reply comes when the run is over."""
        return self._session.post(self.url + path, json=json, headers=headers, timeout=timeout)

    def put(
        self,
        path: str,
        json: Json | None = None,
        headers: dict[str, str] | None = None,
        timeout: float = 600,
    ) -> requests.Response:
        """PUT a JSON body. Repeated for a run that is still going, it gives its current state."""
        return self._session.put(self.url + path, json=json, headers=headers, timeout=timeout)

    def get(self, path: str, timeout: float = 30) -> requests.Response:
        return self._session.get(self.url + path, timeout=timeout)

    def health(self) -> Json:
        """The reply of /health-check; its `status` is READY, BUSY, STARTING or a failure."""
        return self.get("/health-check").json()

    def wait_idle(self, timeout: float = 60) -> None:
        """Wait until the server takes requests again: it frees its slot a moment after replying."""
        self._wait_for("READY", while_in=("BUSY",), timeout=timeout)

    @property
    def session(self) -> int:
        """The id of the session that the server and all it has started belong to."""
        return self._process.pid

    def log(self) -> str:
        """Everything the server and its worker have printed so far."""
        return self._log_file.read_text(encoding="utf-8", errors="replace")

    def stop(self) -> None:
        """End the server and everything it started. What it logged cannot be read afterwards."""
        # Whoever has not gone when the server has, or has not gone in time, is not asked again.
        self._signal_all(signal.SIGTERM)
        try:
            self._process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            pass
        self.kill()
        self._session.close()
        self._folder.cleanup()

    def kill(self) -> None:
        """Kill the server itself, as the kernel does; its runtime and its worker end with it."""
        self._signal_all(signal.SIGKILL)
        self._process.wait()

    def processes(self) -> dict[int, str]:
        """The command lines of the server and of all it has started, by process id."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                fields = (process / "stat").read_text().rpartition(")")[2].split()
                command = (process / "cmdline").read_bytes()
            except OSError:
                continue  # gone meanwhile
            if int(fields[3]) == self.session and fields[0] != "Z":
                found[int(process.name)] = command.replace(b"\0", b" ").decode()
        return found

    def worker(self) -> int:
        """The process id of the worker, which holds the model."""
        return next(pid for pid, command in self.processes().items() if "_run_worker" in command)

    def _signal_all(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            pass

    def _wait_for(self, wanted: str, while_in: tuple[str, ...], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        status = "not listening"
        while time.monotonic() < deadline:
            if (code := self._process.poll()) is not None:
                raise self._failure(f"exited with code {code}")
            try:
                status = self.health()["status"]
            except requests.ConnectionError:
                pass
            else:
                if status == wanted:
                    return
                if status not in while_in:
                    raise self._failure(f"is {status}, not {wanted}")
            time.sleep(0.1)
        raise self._failure(f"is {status}, not {wanted}, after {timeout:.0f} seconds")

    def _failure(self, what: str) -> AssertionError:
        tail = "\n".join(self.log().splitlines()[-40:])
        return AssertionError(f"the Cog server ({self.mode}) {what}; the end of its log:\n{tail}")


class Webhooks:
    """A receiver of Cog's webhooks on this machine: put `url` into a request as `webhook`."""

    def __init__(self) -> None:
        self.bodies: list[Json] = []
        self.headers: list[dict[str, str]] = []  # of each body
        self._arrived = threading.Condition()

    def __enter__(self) -> "Webhooks":
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with receiver._arrived:
                    receiver.headers.append(dict(self.headers))
                    receiver.bodies.append(body)
                    receiver._arrived.notify_all()
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                """Say nothing: the test's output is for the test."""

        self._host = LocalHost("hooks", Handler)
        self._host.__enter__()
        self.url = f"{self._host.url}/"
        return self

    def __exit__(self, *exception: object) -> None:
        self._host.__exit__()

    def finished(self, timeout: float = 300) -> Json:
        """The body that reports the end of a run. Raises AssertionError if none comes in time."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._last() is not None, timeout)
            last = self._last()
        assert last, f"no run ended within {timeout:.0f} seconds; the webhooks were {self.bodies}"
        return last

    def _last(self) -> Json | None:
        over = ("succeeded", "failed", "canceled")
        return next((body for body in reversed(self.bodies) if body["status"] in over), None)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
