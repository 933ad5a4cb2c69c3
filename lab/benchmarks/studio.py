"""python -m lab.benchmarks.studio: what the page costs and how fast it is, in one table.

Starts the server in a temporary folder with a dataset of 500 images, and Chromium. A run is
written as a trainer writes it, two events a second. Needs Chromium and playwright, as the page's
tests do; other programs on the machine disturb the times.
"""

import os
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

from lab.studio_screenshots import served
from trainer.events import Events

IMAGES, EVENTS = 500, 60
STEPS, SWITCHES = 10_000, 10
SCREENS = ("datasets", "datasets/many", "train", "runs", "runs/long", "generate", "weights")
PAINTED = """(rows) => new Promise((done) => {
    const look = () => document.querySelectorAll(rows).length
        ? requestAnimationFrame(() => done(performance.now())) : requestAnimationFrame(look);
    look();
})"""
SEEN = """(step) => ({ seen: new Promise((done) => {
    const main = document.querySelector("main");
    const look = () => main.innerText.replaceAll(",", "").includes(step)
        ? done(Date.now()) : requestAnimationFrame(look);
    look();
}) })"""


SWITCHED = """async (name) => {
    const frame = () => new Promise(requestAnimationFrame);
    const found = [...document.querySelectorAll(".segmented button")];
    let before = await frame(), longest = 0;
    found.find((each) => each.textContent === name).click();
    for (let number = 0; number < 20; number += 1) {
        const now = await frame();
        longest = Math.max(longest, now - before);
        before = now;
    }
    return longest;
}"""


def process_of(port: str) -> int:
    """The pid of the server."""
    for each in Path("/proc").iterdir():
        if each.name.isdecimal() and f"--port\0{port}\0".encode() in _read(each / "cmdline"):
            return int(each.name)
    raise LookupError(f"no server at port {port}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def processor_seconds(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def settle(pid: int) -> None:
    """Waits until the server has made all thumbnails."""
    while True:
        before = processor_seconds(pid)
        time.sleep(2)
        if processor_seconds(pid) - before < 0.05:
            return


def megabytes(pid: int) -> float:
    """Resident memory of a process."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1000


def fill(folder: Path) -> None:
    """A dataset with images and captions."""
    dataset = folder / "datasets/many"
    dataset.mkdir(parents=True)
    for number in range(IMAGES):
        color = number % 256, (7 * number) % 256, (13 * number) % 256
        Image.new("RGB", (1024, 768), color).save(dataset / f"{number:03d}.jpg")
        (dataset / f"{number:03d}.txt").write_text(f"a photo of TOK, number {number}")


def switched(page: Any, folder: Path, address: str) -> str:
    """Switches the scale of a long run's loss: the longest frame, median of all switches."""
    run = folder / "outputs/long"
    run.mkdir(parents=True)
    log = Events(run)
    log.emit("started")
    for step in range(1, STEPS, 10):
        log.emit("steps", **{"from": step}, loss=[0.5 + 0.001 * (step % 97)] * 10, seconds=0.5)
    page.goto(f"{address}#/runs/long")
    page.wait_for_selector(".plot canvas")
    time.sleep(1)
    found = [page.evaluate(SWITCHED, ("Log", "Linear")[n % 2]) for n in range(SWITCHES)]
    return f"{statistics.median(found):.0f} ms"


def transferred(browser: Any, address: str) -> str:
    """Bytes of all files of the page, as they are sent to one that visits all screens."""
    page, weight = browser.new_page(), {"bytes": 0}
    page.on("response", lambda answer: _add(weight, answer))
    for screen in SCREENS:
        page.goto(f"{address}#/{screen}")
        page.wait_for_selector(f".screen.{screen.partition('/')[0]} h1", state="attached")
        time.sleep(1)
    page.close()
    return f"{weight['bytes'] / 1000:.0f} kB"


def measured(folder: Path) -> list[tuple[str, str]]:
    """The rows of the table."""
    from playwright.sync_api import sync_playwright

    start = time.perf_counter()
    with served(folder) as client, sync_playwright() as found:
        rows = [("server: start to first answer", f"{time.perf_counter() - start:.2f} s")]
        pid = process_of(client.address.rsplit(":", 1)[1].strip("/"))
        browser = found.chromium.launch(
            executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium")
        )
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        weight = {"bytes": 0}
        page.on("response", lambda answer: _add(weight, answer))
        times = []
        for _ in range(6):  # the first looks at each image once
            page.goto("about:blank")
            weight["bytes"] = 0
            page.goto(f"{client.address}#/datasets/many")
            times.append(page.evaluate(PAINTED, ".caption"))
        first, rest = times[0] / 1000, statistics.median(times[1:]) / 1000
        rows.append(
            (f"{IMAGES} images to first rows: new, seen before", f"{first:.2f}, {rest:.2f} s")
        )
        rows.append(("files of that screen", f"{weight['bytes'] / 1000:.0f} kB"))
        rows.append(
            (
                f"{STEPS:,} steps, switched to log or linear: longest frame",
                switched(page, folder, client.address),
            )
        )
        rows.append(("all files of the page", transferred(browser, client.address)))
        rows.append((f"server: memory with {IMAGES} images", f"{megabytes(pid):.0f} MB"))

        run = folder / "outputs/one"
        run.mkdir(parents=True)
        log = Events(run)
        log.emit("started")
        page.goto(f"{client.address}#/runs/one")
        settle(pid)
        begun, before = time.perf_counter(), processor_seconds(pid)
        delays = []
        for number in range(1, EVENTS + 1):
            seen = page.evaluate_handle(SEEN, str(7000 + number))
            now = time.time()
            log.emit("steps", **{"from": 7000 + number}, loss=[0.5], seconds=0.5)
            delays.append(seen.evaluate("(each) => each.seen") / 1000 - now)
            time.sleep(max(0.0, 0.5 - (time.time() - now)))
        seconds = time.perf_counter() - begun
        share = (processor_seconds(pid) - before) / seconds
        delays.sort()
        worst = delays[int(0.95 * len(delays))]
        rows.append(
            ("event to page: median, 95 %", f"{delays[len(delays) // 2]:.2f}, {worst:.2f} s")
        )
        rows.append(("server: share of one core while a page watches a run", f"{share:.1%}"))
        browser.close()
    return rows


def _add(weight: dict[str, int], answer: Any) -> None:
    if re.search(r"\.(?:js|css|svg)$|/$", answer.url):
        weight["bytes"] += int(answer.headers.get("content-length", 0))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fill(folder)
        for what, value in measured(folder):
            print(f"| {what} | {value} |")


if __name__ == "__main__":
    main()
