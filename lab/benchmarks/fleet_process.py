"""A fleet of the miniature as a process, for benchmarks and tests."""

import base64
import json
import os
import re
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-fleet" / "bin" / "python"
START = 900.0  # seconds until the fleet must be ready, on a busy machine
END = 120.0  # seconds for a clean end
Json = dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """An answer over HTTP."""

    status: int
    headers: Message
    body: Json

    @property
    def files(self) -> list[bytes]:
        """The content of the images."""
        return [base64.b64decode(url.partition(",")[2]) for url in self.body.get("output") or ()]


@dataclass(frozen=True)
class Fleet:
    """A fleet that runs."""

    process: subprocess.Popen[str]
    url: str
    metrics_url: str

    def predict(self, inputs: Json) -> Reply:
        """The answer to a prediction."""
        return self.ask("POST", "/predictions", {"input": inputs})

    def ask(self, method: str, path: str, body: Json | None = None) -> Reply:
        """The answer to any request."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return Reply(answer.status, answer.headers, json.load(answer))
        except urllib.error.HTTPError as error:
            text = error.read()
            try:
                return Reply(error.code, error.headers, json.loads(text))
            except ValueError:
                return Reply(error.code, error.headers, {"error": text.decode()})

    def replicas(self) -> list[psutil.Process]:
        """The processes of the engines."""
        return self._processes("fleet:Generator", "#Generator#")

    def trainers(self) -> list[psutil.Process]:
        """The processes of running trainings: the job, and the trainer that it has started."""
        return self._processes("-m fleet.training_job", "from trainer.__main__")

    def cpu_seconds(self) -> float:
        """Processor time of all processes of the fleet so far."""
        return cpu_seconds(self.process.pid)

    def _processes(self, *texts: str) -> list[psutil.Process]:
        found = []
        for each in psutil.Process(self.process.pid).children(recursive=True):
            try:
                words = " ".join(each.cmdline())
            except psutil.Error:
                continue
            if any(text in words for text in texts) and not words.startswith("/bin/sh"):
                found.append(each)
        return found

    def metrics(self) -> dict[str, float]:
        """The sums of the fleet's own metrics, by name and `result`."""
        with urllib.request.urlopen(self.metrics_url, timeout=30) as answer:
            text = answer.read().decode()
        found: dict[str, float] = {}
        for line in text.splitlines():
            match = re.match(r"ray_(fleet_\w+)\{(.*)\} (\S+)$", line)
            if match is not None:
                result = re.search(r'result="(\w+)"', match[2])
                name = match[1] + (f" {result[1]}" if result else "")
                found[name] = found.get(name, 0.0) + float(match[3])
        return found


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and of those below it that run."""
    main = psutil.Process(pid)
    total = 0.0
    for each in [main, *main.children(recursive=True)]:
        with suppress(psutil.Error):
            times = each.cpu_times()
            total += times.user + times.system
    return total


@contextmanager
def fleet(
    port: int, options: Sequence[str] = (), variables: Mapping[str, str] | None = None
) -> Iterator[Fleet]:
    """Starts a fleet of miniature-turbo on this machine, and ends it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment |= variables or {}
    words = ["--base-model", "miniature-turbo", "--cpus", "2", "--port", str(port), *options]
    process = subprocess.Popen(
        [str(PYTHON), "-m", "fleet", *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        lines: list[str] = []
        late = threading.Timer(START, process.terminate)
        late.start()
        for line in process.stdout:
            lines.append(line)
            if line.startswith("Ctrl-C"):
                break
        else:
            raise RuntimeError(f"the fleet has ended:\n{''.join(lines[-30:])}")
        late.cancel()
        metrics = next(x.rpartition(":")[2].strip() for x in lines if x.startswith("metrics:"))
        yield Fleet(process, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics}")
    finally:
        process.terminate()
        process.communicate(timeout=END)
