"""The server before Cog's runtime: which files and addresses it opens, and what it lets out."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import requests
from cog_server import PREFER_ASYNC, CogServer, Webhooks, free_port
from local_web import LocalHost, page
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

# ---- Files and addresses -------------------------------------------------------------------------


def test_only_files_in_the_named_folder_are_read(server: CogServer, allowed: Path) -> None:
    report = ask(server, image=str(allowed / "a.bin"), images=[str(allowed / "a.bin")] * 2)
    assert content(report["output"][0]) == b"allowed|allowed|allowed"
    said = set()
    for path in (
        "/etc/passwd",
        "/no/such/file",
        "predict.py",
        "../x",
        f"{allowed}",
        f"{allowed}/.hidden",
        f"{allowed}/link",
        f"{allowed}/../allowed0",
        f"{allowed}/none",
        "~/.ssh/id_rsa",
        "/proc/self/environ",
        "a\0b",
        "x" * 5000,
    ):
        for inputs in ({"image": path}, {"images": [str(allowed / "a.bin"), path]}):
            (fault,) = refused(server, {"input": inputs})
            assert fault["loc"] == ["body", "input", *inputs]
            if path.isprintable() and len(path) < 200:
                said.add(fault["msg"].replace(path, "").partition(":")[2])
    assert len(said) == 1  # the same words, whether there is such a file or not


class Inside:
    """A listener on 127.0.0.1 that must never be contacted."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.contacted = 0
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.contacted += 1
            connection.close()


@contextmanager
def addresses_inside() -> Iterator[tuple[Inside, list[str]]]:
    inside = Inside()
    port = inside.port
    targets = [
        f"http://127.0.0.1:{port}/x",
        f"https://127.0.0.1:{port}/x",
        f"HTTP://127.0.0.1:{port}/x",
        f" http://127.0.0.1:{port}/x",
        f"https://localhost:{port}/x",
        f"https://2130706433:{port}/x",
        f"https://127.1:{port}/x",
        f"https://0x7f.0.0.1:{port}/x",
        f"https://[::ffff:127.0.0.1]:{port}/x",
        f"https://0.0.0.0:{port}/x",
        f"ftp://127.0.0.1:{port}/x",
        f"file://127.0.0.1:{port}/x",
        f"https://public.test.example@127.0.0.1:{port}/x",
        f"http:\\\\127.0.0.1:{port}\\x",
    ]

    def redirect(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Location", targets[int(handler.path[1:])])
        handler.end_headers()

    handler = page(redirect)
    handler.do_POST = handler.do_GET  # type: ignore[attr-defined]
    with LocalHost("redirect", handler) as host:
        by_redirect = [f"{host.url}/{number}" for number in range(len(targets))]
        yield inside, [*by_redirect[:5], *targets, *by_redirect[5:]]
    inside.socket.close()


@pytest.mark.parametrize("count", [9, pytest.param(100, marks=pytest.mark.slow)])
def test_no_input_and_no_webhook_reaches_the_servers_own_network(
    server: CogServer, count: int
) -> None:
    """Every input of the schema, whatever its type: directly, by name, and by redirect."""
    schemas = server.get("/openapi.json").json()["components"]["schemas"]
    names = schemas["Input"]["properties"]
    assert {"image", "images", "prompt", "token"} <= names.keys()
    with addresses_inside() as (inside, addresses):
        for address in addresses[:count]:
            bodies: list[dict[str, Any]] = [{"webhook": address, "input": {}}]
            for name, shape in names.items():
                if shape.get("type") in ("string", "array"):
                    value = [address] if shape["type"] == "array" else address
                    bodies.append({"input": {name: value}})
            for body in bodies:
                assert server.post(PREDICT, body, timeout=60).status_code in (200, 422)
        time.sleep(0.5)
        assert inside.contacted == 0


def test_no_webhook_of_a_customer_gets_the_operators_token(server: CogServer) -> None:
    with Webhooks() as hooks:
        server.post(PREDICT, {"input": {"prompt": "fail"}, "webhook": hooks.url}, PREFER_ASYNC)
        hooks.finished(20)
    assert hooks.headers and "the-operators-token" not in str(hooks.headers)


def test_a_file_on_the_web_is_fetched_and_removed(server: CogServer, temporary: Path) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "4")
        handler.end_headers()
        handler.wfile.write(b"here")

    with LocalHost("files", page(answer)) as host:
        report = ask(server, image=f"{host.url}/a.png?sig=1", images=[f"{host.url}/b"] * 2)
    assert content(report["output"][0]) == b"here|here|here"
    assert fetched_files(temporary) == []


def endless(slow: bool, asked: threading.Event) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        asked.set()
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(b"x" if slow else b"x" * 10_000)
            time.sleep(0.2 if slow else 0.01)

    return answer


@pytest.mark.parametrize("slow", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("by", ["cancel", "hanging up"])
def test_a_download_ends_with_its_request(
    server: CogServer, temporary: Path, slow: bool, by: str
) -> None:
    asked = threading.Event()
    with LocalHost("endless", page(endless(slow, asked))) as host, Webhooks() as hooks:
        inputs = {"image": f"{host.url}/x"}
        if by == "cancel":
            body = {"input": inputs, "webhook": hooks.url}
            assert server.put(f"{PREDICT}/slow", body, PREFER_ASYNC).status_code == 202
            assert asked.wait(10)
            assert server.health()["status"] == "BUSY"
            assert server.post(f"{PREDICT}/slow/cancel").status_code == 200
        else:
            with pytest.raises(requests.Timeout):
                server.post(PREDICT, {"input": inputs}, timeout=1)
        server.wait_idle(5)
        until(lambda: fetched_files(temporary) == [], 5)
        if by == "cancel":
            assert hooks.finished(5)["status"] == "canceled"
    assert ask(server)["status"] == "succeeded"


def test_a_download_that_fails_says_so_without_its_query(server: CogServer) -> None:
    with LocalHost("files", page(lambda handler: handler.send_error(404))) as host:
        with Webhooks() as hooks:
            address = f"{host.url}/gone.png?sig=s1gnature"
            report = ask(server, image=address)
            body = {"input": {"image": address}, "webhook": hooks.url}
            server.post(PREDICT, body, PREFER_ASYNC)
            last = hooks.finished(20)
    assert report["status"] == last["status"] == "failed"
    assert report["error"] == last["error"]
    assert re.match(r"image: https://files.test.example\S*/gone.png: .*404", report["error"])
    assert "s1gnature" not in json.dumps([report, last]) + server.log()


@pytest.mark.slow
def test_files_of_a_server_that_was_killed_are_removed_at_the_next_start(
    code: Path, tmp_path: Path
) -> None:
    asked = threading.Event()
    env = {"TMPDIR": str(tmp_path)}
    with LocalHost("endless", page(endless(False, asked))) as host:
        with CogServer("predict", env, code) as server:
            server.post(PREDICT, {"input": {"image": f"{host.url}/x"}}, PREFER_ASYNC)
            until(lambda: [file for each in fetched_files(tmp_path) for file in each.iterdir()])
            server.kill()
    with CogServer("predict", env, code):
        assert fetched_files(tmp_path) == []


# ---- What is said --------------------------------------------------------------------------------


def test_a_failure_is_one_line_that_begins_with_the_name_of_the_input(server: CogServer) -> None:
    report = run(server, prompt="fail", image="data:image/png;base64,AAAA")
    assert report["error"] == "image: is bad; - at predict.py; - and image"
    assert "begin fail in predict.py" in report["logs"]


@pytest.mark.parametrize(
    "url, said",
    [
        ("data:", "is not a data URL in base64"),
        ("data:text/html,<p>", "is not a data URL in base64"),
        ("data:http://127.0.0.1/x", "is not a data URL in base64"),
        ("data:image/png;base64,AAA", "cannot be read: it is damaged"),
    ],
)
def test_a_data_url_that_is_none_is_named(server: CogServer, url: str, said: str) -> None:
    error = ask(server, prompt="fail", image=url)["error"]
    assert error.startswith("image: ") and said in error


@pytest.mark.parametrize("url", ["DATA:image/png;base64,AAAA", "data:;base64,AA\nAA\n"])
def test_a_data_url_may_be_spelled_as_clients_do(
    server: CogServer, temporary: Path, url: str
) -> None:
    assert "image: is bad" in ask(server, prompt="fail", image=url)["error"]
    until(lambda: not fetched_files(temporary))


def test_a_key_in_an_error_of_a_library_is_nowhere(server: CogServer) -> None:
    report = run(server, prompt="leak", token="hf_s3cret/key")
    assert report["error"] == "RuntimeError: 401 for https://h.example/**********"
    assert "s3cret" not in json.dumps(report) + server.log()


def test_a_mistake_of_the_program_keeps_its_type(server: CogServer) -> None:
    assert run(server, prompt="stumble")["error"] == "KeyError: 'a mistake'"


@pytest.mark.parametrize("prompt", ["fail", "stumble", "warn"])
def test_tracebacks_and_paths_are_in_the_servers_log_only(
    server: CogServer, code: Path, prompt: str
) -> None:
    report = json.dumps(run(server, prompt=prompt, image="data:image/png;base64,AAAA"))
    assert "Traceback" not in report
    assert str(code) not in report and "/tmp" not in report
    assert not re.search(r"tmp[a-z0-9_]{8}", report)
    if prompt != "warn":
        assert f'File "{code}/predict.py"' in server.log()


def test_control_characters_and_queries_of_a_request_are_nowhere(server: CogServer) -> None:
    nasty = (
        "echo \x1b]0;title\x07 \x9b31m \u202e\rgone https://u:pw@h.example/x?sig=s1gnature\nERROR"
    )
    report = run(server, prompt=nasty)
    everything = report["error"] + report["logs"] + server.log()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", everything)
    assert "s1gnature" not in everything and "u:pw" not in everything
    assert "\nERROR" not in everything
    for body in ({"input": {nasty: 1}}, {"input": {"seed": nasty}}, {"webhook": nasty}):
        for fault in refused(server, body):
            assert not re.search("[\x00-\x1f\x7f-\x9f\u202e]", fault["msg"])
            assert "s1gnature" not in fault["msg"]


def test_the_health_shows_no_path(server: CogServer, code: Path) -> None:
    health = server.get("/health-check").text
    assert json.loads(health)["setup"]["logs"]
    assert str(code) not in health


# ---- Without the front, as in the Cog image ------------------------------------------------------


def test_in_the_bare_container_a_failure_is_one_line_without_paths(
    code: Path, tmp_path: Path
) -> None:
    port = free_port()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {"PORT": str(port), "COG_PREDICT_TYPE_STUB": "predict.py:Predictor", "PATH": path}
    command = [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1"]
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=code, env=os.environ | env, stdout=file, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: _status(url) == "READY", 30)
        body = {"input": {"prompt": "fail", "image": "data:image/png;base64,AAAA"}}
        error = requests.post(f"{url}{PREDICT}", json=body, timeout=30).json()["error"]
        assert error.endswith("RequestError: image: is bad; - at predict.py; - and image")
        until(lambda: "Traceback" in log.read_text())  # the worker's, which the runtime relays
    finally:
        process.terminate()
        process.wait(30)


def _status(url: str) -> str:
    try:
        return requests.get(f"{url}/health-check", timeout=5).json()["status"]
    except requests.ConnectionError:
        return "not listening"
