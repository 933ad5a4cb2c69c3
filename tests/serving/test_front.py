"""The server before Cog's runtime: survives the death of its parts and refuses wrong requests."""

import asyncio
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import requests
from cog_server import PREFER_ASYNC, CogServer, Webhooks
from root import ROOT
from toy_server import (  # noqa: F401
    PREDICT,
    allowed,
    ask,
    code,
    content,
    fetched_files,
    refused,
    run,
    server,
    temporary,
    until,
)

from inference.fetch.download import Downloader
from serving.fetching import Folder
from serving.front import MAX_BODY, MOST_HELD, SMALL_BODY, Front
from serving.runs import Ask
from serving.validation import MOST_FAULTS

# ---- Supervision ---------------------------------------------------------------------------------


def test_after_the_death_of_the_worker_the_next_requests_succeed(server: CogServer) -> None:
    report = ask(server, prompt="die")
    assert report["status"] == "failed"
    assert "ended unexpectedly" in report["error"]
    between = server.post(PREDICT, {"input": {}})
    assert between.status_code == 503
    assert "ended unexpectedly" in between.json()["error"]
    assert int(between.headers["Retry-After"]) > 0
    until(lambda: server.health()["status"] == "READY", 60)
    assert ask(server)["status"] == "succeeded"


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["_run_worker", "serving.runtime"])
def test_an_idle_process_that_dies_is_replaced(server: CogServer, victim: str) -> None:
    before = server.processes()
    os.kill(next(pid for pid, command in before.items() if victim in command), signal.SIGKILL)
    until(lambda: len(server.processes().keys() - before.keys()) == 2, 60)
    until(lambda: server.health()["status"] == "READY", 60)
    assert ask(server)["status"] == "succeeded"


@pytest.mark.slow
def test_a_webhook_reports_the_death_of_the_worker(server: CogServer) -> None:
    with Webhooks() as hooks:
        body = {"input": {"prompt": "die"}, "webhook": hooks.url}
        assert server.post(PREDICT, body, PREFER_ASYNC).status_code == 202
        last = hooks.finished(30)
    assert last["status"] == "failed"
    assert "ended unexpectedly" in last["error"]
    until(lambda: server.health()["status"] == "READY", 60)


def test_the_death_of_the_front_ends_all_its_processes(code: Path) -> None:
    with CogServer("predict", cwd=code) as server:
        server.post(PREDICT, {"input": {"prompt": "sleep"}}, PREFER_ASYNC)
        assert len(server.processes()) == 3
        server.kill()
        until(lambda: not server.processes())


@pytest.mark.slow
def test_a_model_that_never_loads_ends_the_server(code: Path) -> None:
    command = [sys.executable, "-m", "serving", "predict", "--port", "0"]
    done = subprocess.run(
        command,
        cwd=code,
        env=os.environ | {"BROKEN_SETUP": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "there is no" in done.stdout
    assert "3 attempts failed" in done.stdout


@pytest.mark.slow
def test_sigterm_ends_everything(code: Path) -> None:
    with CogServer("predict", cwd=code) as server:
        server.post(PREDICT, {"input": {"prompt": "sleep"}}, PREFER_ASYNC)
        os.kill(server.session, signal.SIGTERM)
        assert server._process.wait(20) == 0
        assert server.processes() == {}


def test_the_front_does_not_load_pytorch() -> None:
    check = "import sys, serving.server; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_a_request_that_ignores_its_cancellation_is_ended_by_force(server: CogServer) -> None:
    before = server.worker()
    server.put(f"{PREDICT}/deaf", {"input": {"prompt": "deaf"}}, PREFER_ASYNC)
    time.sleep(0.5)
    server.post(f"{PREDICT}/deaf/cancel")
    time.sleep(2)
    assert server.health()["status"] == "BUSY"
    until(lambda: server.health()["status"] == "STARTING", 90)
    until(lambda: server.health()["status"] == "READY", 60)
    assert server.worker() != before
    assert ask(server)["status"] == "succeeded"


# ---- Requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, near", [("promt", "prompt"), ("sed", "seed"), ("img", "image")])
def test_an_unknown_input_is_refused_with_the_nearest_name(
    server: CogServer, name: str, near: str
) -> None:
    (fault,) = refused(server, {"input": {"prompt": "x", name: 1}})
    assert fault["loc"] == ["body", "input", name]
    assert name in fault["msg"] and repr(near) in fault["msg"]


def test_large_integers_have_all_their_digits(server: CogServer) -> None:
    (fault,) = refused(server, {"input": {"seed": 2**63}})
    assert "seed is 9223372036854775808" in fault["msg"]
    assert "9223372036854775807" in fault["msg"]


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b"null",
        b'{"input": []}',
        b'{"input": {"prompt": NaN}}',
        b'{"input": {"prompt": "\\ud800"}}',
        b'{"input": {}, "context": {"a": 1e999}}',
        b'{"input": {}, "context": ' + b"[" * 600 + b"]" * 600 + b"}",
        b'{"input": {"prompt": ' + b"[" * 900 + b"]" * 900 + b"}}",
        b'{"input": {"stpes": ' + b"9" * 30 + b"}}",
        b'{"id": 7}',
        b'{"id": "a\\u0000b"}',
        b'{"webhook": 7}',
        b'{"webhook_events_filter": ["everything"]}',
        b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=lambda body: body[:40].decode(),
)
def test_a_malformed_body_is_refused(server: CogServer, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    reply = requests.post(server.url + PREDICT, body, headers=headers, timeout=60)
    assert reply.status_code == 422
    assert reply.json()["detail"][0]["msg"]


def test_a_refusal_does_not_repeat_a_key(server: CogServer) -> None:
    for token in (["s3cret"], {"a": "s3cret"}):
        (fault,) = refused(server, {"input": {"token": token}})
        assert fault["loc"] == ["body", "input", "token"]
        assert fault["msg"].startswith("token: ") and "s3cret" not in str(fault)


def test_a_body_of_unknown_names_is_refused_in_little_time(server: CogServer) -> None:
    names = {f"{number}{'x' * 200}": number for number in range(50_000)}
    start = time.monotonic()
    faults = refused(server, {"input": names})
    assert len(faults) == MOST_FAULTS
    assert time.monotonic() - start < 5  # 40 s, if all of them are compared


@pytest.mark.parametrize("seed", [b"7.0", b"7e0"])
def test_a_whole_number_may_have_a_point(server: CogServer, seed: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    body = b'{"input": {"prompt": "type", "seed": ' + seed + b"}}"
    reply = requests.post(server.url + PREDICT, body, headers=headers, timeout=60)
    assert reply.json()["error"] == "the seed is 7"


@pytest.mark.slow
def test_bodies_that_arrive_slowly_do_not_fill_the_memory(code: Path) -> None:
    """Large ones beyond the limit are refused; small ones are not."""
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {MAX_BODY}\r\n\r\n"
    lines = []
    with CogServer("predict", cwd=code) as server:
        try:
            for _ in range(MOST_HELD // MAX_BODY):
                lines.append(socket.create_connection(("127.0.0.1", server.port), timeout=20))
                lines[-1].sendall(head.encode() + b" " * (MAX_BODY - 1))
            lines.append(socket.create_connection(("127.0.0.1", server.port), timeout=20))
            lines[-1].sendall(head.encode() + b" " * (2 * SMALL_BODY))
            answered, _, _ = select.select(lines, [], [], 20)  # whose bytes came last
            assert [b" 503 " in line.recv(1000) for line in answered] == [True]
            assert ask(server)["status"] == "succeeded"
            while lines:
                lines.pop().close()
            until(lambda: server.post(PREDICT, {"input": {"prompt": "x" * (2 << 20)}}).ok)
        finally:
            for line in lines:
                line.close()


def test_a_body_above_the_limit_is_refused_before_it_is_sent(server: CogServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as line:
        head = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        line.sendall(f"{head}Content-Length: {200 << 20}\r\n\r\n".encode())
        assert b" 413 " in line.recv(1000)


@pytest.mark.parametrize("method", ["get", "post"])
def test_a_customer_cannot_shut_the_server_down(server: CogServer, method: str) -> None:
    assert requests.request(method, f"{server.url}/shutdown", timeout=10).status_code == 404
    assert ask(server)["status"] == "succeeded"


def test_a_request_can_be_repeated_while_it_runs_and_shows_no_key(server: CogServer) -> None:
    body = {"input": {"prompt": "sleep", "token": "s3cret"}}
    assert server.put(f"{PREDICT}/a%2Fb c", body, PREFER_ASYNC).status_code == 202
    again = until(
        lambda: (reply := server.put(f"{PREDICT}/a%2Fb c", body)).json().get("logs") and reply
    )
    assert again.status_code == 202
    assert again.json()["status"] == "processing"
    assert "s3cret" not in again.text
    assert server.post(PREDICT, {"input": {}}).status_code == 409
    assert server.health()["status"] == "BUSY"
    assert server.post(f"{PREDICT}/other/cancel").status_code == 404
    assert server.post(f"{PREDICT}/a%2Fb c/cancel").status_code == 200
    server.wait_idle()
    assert server.post(f"{PREDICT}/a%2Fb c/cancel").status_code == 404


def test_of_two_equal_requests_at_once_the_second_is_told_the_state_of_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both are past the first look at what runs when the one of them starts."""
    document = json.loads((ROOT / "tests/golden/openapi_schema.json").read_text())
    supervisor: Any = SimpleNamespace(ready=True, health={}, reason="")
    front = Front("predict", document, supervisor, Folder(), "")
    front.downloader = Downloader(addresses=lambda *_: time.sleep(0.2) or ["93.184.215.14"])

    def start(ask: Ask) -> Any:
        run: Any = SimpleNamespace(ask=ask, shown=lambda _: {"id": ask.id})
        front._run = run
        return run

    async def ask_twice() -> list[int]:
        transport = httpx.ASGITransport(front.app())
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            body = {"input": {"prompt": "a"}, "webhook": "https://hooks.example/"}
            asked = [client.put(f"{PREDICT}/a", json=body, headers=PREFER_ASYNC) for _ in "12"]
            return [each.status_code for each in await asyncio.gather(*asked)]

    monkeypatch.setattr(front, "_start", start)
    try:
        assert asyncio.run(ask_twice()) == [202, 202]
    finally:
        front._folder.remove()


def test_hanging_up_cancels(server: CogServer) -> None:
    with pytest.raises(requests.Timeout):
        server.post(PREDICT, {"input": {"prompt": "sleep"}}, timeout=0.5)
    server.wait_idle(5)
    assert ask(server)["status"] == "succeeded"


@pytest.mark.slow
def test_fifty_requests_in_a_row_are_all_accepted(server: CogServer) -> None:
    assert all(ask(server)["status"] == "succeeded" for _ in range(50))
