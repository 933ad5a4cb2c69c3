"""A real front, a real runtime and a real worker around a toy model that loads at once.

Its fixtures are imported by the tests that use them: one server for each file of tests.
"""

import base64
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cog_server import PREFER_ASYNC, CogServer, Webhooks
from root import ROOT

PREDICT = "/predictions"


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "code"
    shutil.copytree(ROOT / "tests" / "toy_model", folder)
    for package in ("serving", "inference", "adapters", "families"):
        shutil.copytree(
            ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    return folder


@pytest.fixture(scope="module")
def allowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder whose files requests may name."""
    folder = tmp_path_factory.mktemp("allowed")
    (folder / "a.bin").write_bytes(b"allowed")
    (folder / ".hidden").write_bytes(b"hidden")
    (folder / "link").symlink_to("/etc/passwd")
    return folder


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def server(code: Path, allowed: Path, temporary: Path) -> Iterator[CogServer]:
    env = {"ZEROPRIOR_FILES": str(allowed), "TMPDIR": str(temporary)}
    env["WEBHOOK_AUTH_TOKEN"] = "the-operators-token"
    with CogServer("predict", env, code) as running:
        yield running


def ask(server: CogServer, headers: dict[str, str] | None = None, **inputs: Any) -> dict[str, Any]:
    reply = server.post(PREDICT, {"input": inputs}, headers, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()


def refused(server: CogServer, body: dict[str, Any]) -> list[dict[str, Any]]:
    reply = server.post(PREDICT, body, timeout=60)
    assert reply.status_code == 422, reply.text
    return reply.json()["detail"]


def content(url: str) -> bytes:
    return base64.b64decode(url.partition(",")[2])


def until(true: Callable[[], Any], seconds: float = 10) -> Any:
    deadline = time.monotonic() + seconds
    while not (result := true()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert result
    return result


def fetched_files(temporary: Path) -> list[Path]:
    """What requests have left in the folder of files that the front fetches."""
    return [file for folder in temporary.glob("zeroprior-inputs-*") for file in folder.iterdir()]


def run(server: CogServer, **inputs: Any) -> dict[str, Any]:
    """The last webhook, which has the logs of a failed request, too."""
    with Webhooks() as hooks:
        body = {"input": inputs, "webhook": hooks.url}
        assert server.post(PREDICT, body, PREFER_ASYNC).status_code == 202
        return hooks.finished(20)
