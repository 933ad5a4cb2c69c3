"""A dataset of 1,000 images, in a real server."""

import http.client
import io
import json
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from root import ROOT

COUNT = 1000
MOST_MEMORY = 150 << 20


@pytest.mark.slow
def test_1000_images_are_uploaded_and_shown_with_little_memory(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as file:
        words = ["--folder", str(tmp_path / "studio"), "--port", "0"]
        server = subprocess.Popen(
            [sys.executable, "-m", "studio", *words], cwd=ROOT, stdout=file, stderr=file
        )
    try:
        port = _port(log)
        noise = io.BytesIO()
        Image.effect_noise((800, 600), 80).convert("RGB").save(noise, "JPEG", quality=80)

        def ask(method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request(method, path, body, {"X-Studio": "1"})
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            return answer.status, json.loads(content)

        assert ask("POST", "/api/datasets", b'{"name": "many"}')[0] == 201

        def upload(number: int) -> int:
            path = f"/api/datasets/many/images/{number:04d}.jpg"
            return ask("PUT", path, noise.getvalue())[0]

        with ThreadPoolExecutor(8) as several:
            assert set(several.map(upload, range(COUNT))) == {201}
        start = time.perf_counter()
        _, found = ask("GET", "/api/datasets/many?base=z-image-turbo")
        seconds = time.perf_counter() - start
        assert len(found["images"]) == COUNT and seconds < 5  # 0.4 s on a machine that is idle
        assert all(row["bucket"] and row["width"] == 800 for row in found["images"])
        place = tmp_path / "studio/datasets/many/.studio"
        assert len(list((place / "thumbs").iterdir())) == COUNT
        assert list((place / "parts").iterdir()) == []
        status = Path(f"/proc/{server.pid}/status")
        if status.exists():
            (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())
            assert int(peak) << 10 < MOST_MEMORY
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0


def _port(log: Path) -> int:
    for _ in range(400):
        found = re.search(r"studio: http://127.0.0.1:(\d+)/", log.read_text())
        if found:
            break
        time.sleep(0.05)
    assert found is not None, log.read_text()
    for _ in range(200):  # it is printed before the server answers
        try:
            connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=10)
            connection.request("GET", "/api/datasets")
            connection.getresponse().read()
            break
        except OSError:
            time.sleep(0.05)
    return int(found[1])
