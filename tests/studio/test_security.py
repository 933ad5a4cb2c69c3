"""What the server refuses: other sites, other hosts, paths outside of its folder."""

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from root import ROOT
from starlette.testclient import TestClient

from studio.app import application
from studio.folder import Studio
from studio.guard import HEADERS, LOCAL

HERE = {"X-Studio": "1"}


@pytest.fixture
def page(tmp_path: Path) -> Iterator[TestClient]:
    with TestClient(application(Studio(tmp_path)), "http://127.0.0.1:8500") as client:
        client.post("/api/datasets", json={"name": "robot"}, headers=HERE)
        yield client


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:1", "[::1]:65535", "LOCALHOST:8500"])
def test_this_machine_is_a_host_with_any_port(page: TestClient, host: str) -> None:
    assert page.get("/api/datasets", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "127.0.0.1:80@evil", "", "[::2]", "::1"]
)
def test_another_host_is_refused(page: TestClient, host: str) -> None:
    assert page.get("/api/datasets", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-Studio": "0"},
        {"X-Studio": "1", "Origin": "http://evil.example"},
        {"X-Studio": "1", "Origin": "null"},
        {"X-Studio": "1", "Origin": "http://127.0.0.1:9999"},
        {"X-Studio": "1", "Origin": "https://127.0.0.1:8500"},
        {"X-Studio": "1", "Sec-Fetch-Site": "cross-site"},
        {"X-Studio": "1", "Sec-Fetch-Site": "same-site"},
        {"X-Studio": "1", "Sec-Fetch-Site": "none"},
    ],
)
def test_a_change_from_another_site_is_refused(
    page: TestClient, headers: dict[str, str], tmp_path: Path
) -> None:
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
        answer = page.request(method, "/api/datasets/robot", headers=headers, content=b"{}")
        assert answer.status_code == 403
        assert not any(name.startswith("access-control") for name in answer.headers)
    assert [each.name for each in (tmp_path / "datasets").iterdir()] == ["robot"]


def test_the_page_itself_may_change_things(page: TestClient) -> None:
    own = HERE | {"Origin": "http://127.0.0.1:8500", "Sec-Fetch-Site": "same-origin"}
    assert page.post("/api/datasets", json={"name": "own"}, headers=own).status_code == 201


def test_another_site_reads_nothing(page: TestClient) -> None:
    for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        assert page.get("/api/datasets", headers=headers).status_code == 403


def test_every_answer_has_the_security_headers(page: TestClient) -> None:
    for path in ("/api/datasets", "/api/nothing", "/api/datasets/%00"):
        answer = page.get(path)
        for name, value in HEADERS.items():
            assert answer.headers[name] == value
    assert page.get("/api/datasets").headers["cache-control"] == "no-store"


BAD = ["%00", "a%00.png", "..%2Fx.png", "%2E%2E", "..%5Cx.png", "a%0A.png", ".hidden.png"]


@pytest.mark.parametrize("name", [*BAD, "CON.png", "x" * 130 + ".png", "a%2F..%2Fb.png", "%80.png"])
def test_unsafe_names_are_refused(page: TestClient, tmp_path: Path, name: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    for path in (f"datasets/robot/images/{name}", f"datasets/{name}/images/a.png"):
        answer = page.put(f"/api/{path}", content=b"x", headers=HERE)
        assert answer.status_code in (400, 404, 422)
    for path in (f"datasets/robot/thumbs/{name}", f"weights/uploads/{name}/inspect"):
        assert page.get(f"/api/{path}").status_code in (400, 404)
    answer = page.put(f"/api/weights/{name}", content=b"x", headers=HERE)
    assert answer.status_code in (400, 404, 405, 415)
    assert sorted(p for p in tmp_path.rglob("*") if ".studio" not in p.parts) == before


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".x", "a\0", "nul", "x.zip", "a ", "é" * 61])
def test_unsafe_names_of_datasets_are_refused(page: TestClient, name: str) -> None:
    assert page.post("/api/datasets", json={"name": name}, headers=HERE).status_code == 400
    answer = page.patch("/api/datasets/robot", json={"name": name}, headers=HERE)
    assert answer.status_code == 400


def test_links_are_not_followed(page: TestClient, tmp_path: Path) -> None:
    secret = tmp_path.parent / "secret.png"
    secret.write_bytes(b"secret")
    place = tmp_path / "datasets/robot"
    (place / "link.png").symlink_to(secret)
    (place / "folder").symlink_to(tmp_path.parent)
    (tmp_path / "datasets/all").symlink_to(tmp_path.parent)
    os.mkfifo(place / "pipe.png")
    for path in ("robot/images/link.png", "robot/images/folder%2Fsecret.png", "all"):
        assert page.get(f"/api/datasets/{path}").status_code == 400
    assert page.get("/api/datasets/robot/images/pipe.png").status_code == 400
    assert page.get("/api/datasets/robot").json()["images"] == []
    assert [e["name"] for e in page.get("/api/datasets").json()["datasets"]] == ["robot"]
    answer = page.put("/api/datasets/robot/images/folder%2Fnew.png", content=b"x", headers=HERE)
    assert answer.status_code in (400, 422) and not (tmp_path.parent / "new.png").exists()
    assert secret.read_bytes() == b"secret"


def test_a_token_is_needed_where_one_is_set(tmp_path: Path) -> None:
    app = application(Studio(tmp_path), (*LOCAL, "gpu.example"), "secret-token")
    with TestClient(app, "http://gpu.example:8500", follow_redirects=False) as page:
        assert page.get("/api/datasets").status_code == 401
        assert page.get("/api/datasets?token=secret-token").status_code == 401
        assert page.get("/?token=wrong").status_code == 401
        answer = page.get("/?token=secret-token")
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie
        assert page.get("/api/datasets").status_code == 200


def start(folder: Path, *words: str) -> tuple[subprocess.Popen[bytes], str]:
    log = folder / "server.log"
    with log.open("wb") as file:
        command = [sys.executable, "-m", "studio", "--folder", str(folder), "--port", "0", *words]
        server = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
    for _ in range(400):
        found = re.search(r"studio: (\S+)", log.read_text())
        if found or server.poll() is not None:
            break
        time.sleep(0.05)
    return server, found[1] if found else log.read_text()


def test_a_real_server_is_local_has_a_lock_and_ends_with_an_open_stream(tmp_path: Path) -> None:
    server, address = start(tmp_path)
    try:
        port = int(address.rsplit(":")[-1].strip("/"))
        for _ in range(100):  # it accepts before it answers
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
                connection.request("GET", "/api/datasets")
                break
            except OSError:
                time.sleep(0.05)
        assert connection.getresponse().read() == b'{"datasets":[]}'
        second, said = start(tmp_path / "..", "--folder", str(tmp_path))
        assert second.wait() == 1 and f"already open at {address}" in said

        # A header of 5 GB and no body: answered at once.
        with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
            raw.sendall(
                b"PUT /api/weights/a.zip HTTP/1.1\r\nHost: localhost\r\nX-Studio: 1\r\n"
                b"Content-Length: 5368709120\r\n\r\n"
            )
            assert raw.recv(100).startswith(b"HTTP/1.1 413")
        # A body that breaks off leaves nothing.
        connection.request("POST", "/api/datasets", b'{"name": "a"}', HERE)
        connection.getresponse().read()
        with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
            raw.sendall(
                b"PUT /api/datasets/a/images/a.png HTTP/1.1\r\nHost: localhost\r\n"
                b"X-Studio: 1\r\nContent-Length: 100000\r\n\r\n" + bytes(5000)
            )
            parts = tmp_path / "datasets/a/.studio/parts"
            for _ in range(100):
                if parts.is_dir() and any(parts.iterdir()):
                    break
                time.sleep(0.05)
            assert any(parts.iterdir())
        for _ in range(100):
            if not any(parts.iterdir()):
                break
            time.sleep(0.05)
        assert not any(parts.iterdir()) and not (tmp_path / "datasets/a/a.png").exists()
        stream = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        stream.request("GET", "/api/events")
        assert stream.getresponse().read(1)  # and stays open
    finally:
        server.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert server.wait(15) == 0
        assert time.monotonic() - began < 8
    assert "Traceback" not in (tmp_path / "server.log").read_text()


def test_the_server_never_imports_pytorch(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from starlette.testclient import TestClient; "
        "from studio.app import application; from studio.folder import Studio; "
        f"client = TestClient(application(Studio(Path({str(tmp_path)!r}))), 'http://localhost'); "
        "client.post('/api/datasets', json={'name': 'a'}, headers={'X-Studio': '1'}); "
        "image = open('docs/images/demo.png', 'rb').read(); "
        "answer = client.put('/api/datasets/a/images/a.png', content=image, "
        "headers={'X-Studio': '1'}); assert answer.status_code == 201, answer.text; "
        "answer = client.get('/api/datasets/a?base=z-image-turbo'); "
        "assert answer.json()['images'][0]['bucket']; "
        "client.get('/api/weights'); "
        "print([name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
