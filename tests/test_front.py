"""The server before Cog's runtime: what one request does not do to the others or to the server.

A real front, a real runtime and a real worker, around a toy model that loads at once.
"""

import base64
import json
import os
import re
import shutil
import signal
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
from cog_server import PREFER_ASYNC, ROOT, CogServer, Webhooks
from local_web import LocalHost, page

PREDICT = "/predictions"


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "code"
    shutil.copytree(ROOT / "tests" / "toy_model", folder)
    for package in ("serving", "inference", "adapters"):
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


def test_hanging_up_cancels(server: CogServer) -> None:
    with pytest.raises(requests.Timeout):
        server.post(PREDICT, {"input": {"prompt": "sleep"}}, timeout=0.5)
    server.wait_idle(5)
    assert ask(server)["status"] == "succeeded"


@pytest.mark.slow
def test_fifty_requests_in_a_row_are_all_accepted(server: CogServer) -> None:
    assert all(ask(server)["status"] == "succeeded" for _ in range(50))


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


def run(server: CogServer, **inputs: Any) -> dict[str, Any]:
    """The last webhook, which has the logs of a failed request, too."""
    with Webhooks() as hooks:
        body = {"input": inputs, "webhook": hooks.url}
        assert server.post(PREDICT, body, PREFER_ASYNC).status_code == 202
        return hooks.finished(20)


def test_a_failure_is_one_line_that_begins_with_the_name_of_the_input(server: CogServer) -> None:
    report = run(server, prompt="fail", image="data:image/png;base64,AAAA")
    assert report["error"] == "image: is bad; - at predict.py; - and image"
    assert "begin fail in predict.py" in report["logs"]


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


def test_in_the_bare_container_a_failure_is_one_line_without_paths(code: Path) -> None:
    port = _free_port()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {"PORT": str(port), "COG_PREDICT_TYPE_STUB": "predict.py:Predictor", "PATH": path}
    command = [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1"]
    process = subprocess.Popen(
        command, cwd=code, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: _status(url) == "READY", 30)
        body = {"input": {"prompt": "fail", "image": "data:image/png;base64,AAAA"}}
        error = requests.post(f"{url}{PREDICT}", json=body, timeout=30).json()["error"]
    finally:
        process.terminate()
        log = process.communicate(timeout=30)[0].decode()
    assert error.endswith("RequestError: image: is bad; - at predict.py; - and image")
    assert "Traceback" in log


def _status(url: str) -> str:
    try:
        return requests.get(f"{url}/health-check", timeout=5).json()["status"]
    except requests.ConnectionError:
        return "not listening"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
