"""python -m lab.studio_screenshots: images of all screens of the page, for the docs.

Trains the demo's subject for a few steps on the miniature, in a temporary folder, and generates
with it. Needs Chromium (Debian's package, or $CHROMIUM) and playwright.
"""

import argparse
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "studio"
WIDTH, HEIGHT, PHONE = 1280, 860, 360
SECONDS = 300
SETTINGS = {
    "steps": 60,
    "batch_size": 2,
    "checkpoint_every": 20,
    "sample_every": 10,
    "base_model": "miniature-turbo",
}


class Client:
    """JSON requests to the studio's server."""

    def __init__(self, address: str) -> None:
        self.address = address

    def __call__(self, method: str, path: str, body: object = None) -> Any:
        request = urllib.request.Request(
            f"{self.address}api/{path}",
            None if body is None else json.dumps(body).encode(),
            {"X-Studio": "1", "Content-Type": "application/json"},
            method=method,
        )
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return json.load(answer)

    def wait(self, path: str, state: str = "done") -> None:
        """Until what the path names has the state."""
        for _ in range(SECONDS * 2):
            if self("GET", path)["state"] in (state, "failed"):
                return
            time.sleep(0.5)
        raise TimeoutError(f"{path} is not {state} after {SECONDS} s")


@contextmanager
def served(folder: Path) -> Iterator[Client]:
    """A server in the folder."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    words = [sys.executable, "-m", "studio", "--folder", str(folder), "--port", str(port)]
    environment = {**os.environ, "BASE_MODEL": "miniature-turbo"}
    with (folder / "server.txt").open("wb") as output:
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        client = Client(f"http://127.0.0.1:{port}/")
        for _ in range(200):
            try:
                client("GET", "status")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        yield client
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def filled(client: Client, folder: Path) -> str:
    """Puts a dataset, two runs and images into the studio. Returns the first run's id."""
    dataset = folder / "datasets/robot"
    dataset.mkdir(parents=True)
    with zipfile.ZipFile(ROOT / "demo/subject.zip") as archive:
        archive.extractall(dataset)
    ids = []
    for title, rank in (("robot", 16), ("robot, small", 4)):
        run = {
            "title": title,
            "settings": {**SETTINGS, "rank": rank},
            "datasets": [{"name": "robot", "token": "<zwx>"}],
            "start": "queue",
            "key": title,
        }
        ids.append(str(client("POST", "runs", run)["id"]))
    for each in ids:
        client.wait(f"runs/{each}")
    axes = [
        {"name": "scale", "values": [0.5, 0.8, 1]},
        {"name": "checkpoint", "values": [20, 40, "final"]},
    ]
    for prompt, more in (
        ("a photo of <zwx> at the sea", {"count": 4}),
        ("a photo of <zwx> in the desert", {"axes": axes}),
    ):
        images = {
            "prompt": prompt,
            "weights": [{"id": f"runs/{ids[0]}/final", "scale": 1}],
            "seed": 7,
            "width": 64,
            "height": 64,
            "when": "now",
            **more,
        }
        client.wait(f"images/{client('POST', 'images', images)['id']}")
    return ids[0]


def shot(page: "Page", address: str, place: str, file: Path) -> None:
    """One screen as webp."""
    page.goto("about:blank")
    page.goto(f"{address}#/{place}")
    page.wait_for_selector(".screen h1")
    if place.startswith("train"):
        page.wait_for_selector(".verdict", timeout=60_000)
    if place == "generate":  # a form that is filled in
        page.get_by_role("button", name="Use again").first.click()
    if place.startswith("weights/"):
        page.get_by_role("heading", name="Change by layer").wait_for()
    page.wait_for_timeout(1500)
    with Image.open(io.BytesIO(page.screenshot())) as image:
        image.convert("RGB").save(file, quality=80, method=6)


def main(words: Sequence[str] | None = None) -> None:
    """Makes the images."""
    parser = argparse.ArgumentParser(description="Make the images of the page for the docs.")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder for the images")
    output: Path = parser.parse_args(words).output
    output.mkdir(parents=True, exist_ok=True)
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as temporary, served(Path(temporary)) as client:
        run = filled(client, Path(temporary))
        both = [each["id"] for each in client("GET", "runs")["runs"]]
        places = {
            "datasets": "datasets/robot",
            "train": "train/robot",
            "runs": "runs",
            "run": f"runs/{run}",
            "compare": f"runs/compare/{'/'.join(both)}",
            "generate": "generate",
            "weights": "weights",
            "inspect": f"weights/{quote(f'runs/{run}/final', safe='')}",
        }
        with sync_playwright() as found:
            browser = found.chromium.launch(
                executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium")
            )
            for scheme in ("light", "dark"):
                page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
                page.emulate_media(color_scheme=scheme)
                for name, place in places.items():
                    shot(page, client.address, place, output / f"{name}-{scheme}.webp")
                page.close()
            phone = browser.new_page(viewport={"width": PHONE, "height": 740})
            shot(phone, client.address, "generate", output / "phone-light.webp")
            browser.close()
    total = sum(each.stat().st_size for each in output.glob("*.webp"))
    print(f"{len(list(output.glob('*.webp')))} images in {output}, {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
