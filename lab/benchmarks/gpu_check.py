"""python -m lab.benchmarks.gpu_check: what only a GPU reaches, in one run of a few minutes.

Needs no network and no downloads: base models get random weights, at the published sizes or with
fewer blocks. Each part runs in a process of its own, so that a crash, a hang or a full memory ends
one part only. The most important parts run first. Each has seconds of its own: it may also use what
the parts before it did not need, and is stopped before it takes the time of those after it. Prints
a table for docs/benchmarks.md and writes it as JSON after every part. A failed row makes the exit
code 1.

--quick takes at most 4 minutes on an H100, --full (the default) at most 10. Without a GPU it lists
what it would run; --cpu runs all of it on the CPU with tiny models, which shows that the script
works and measures nothing.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lab.benchmarks.gpu_check_parts import PARTS, chosen
from lab.benchmarks.gpu_check_rows import FAILED, MEASURED, MODELS, Check, Row
from lab.benchmarks.machine import machine

LEAST = 5.0  # seconds that a part needs to be worth starting
HEAD = "| part | what | state | measured | planned | note |\n| --- | --- | --- | --- | --- | --- |"


def run(check: Check, seconds: float) -> Iterator[Row]:
    """The rows of all parts, each in its own process; a part that fails is a failed row."""
    ends, reserved = time.monotonic() + seconds, chosen(check)
    per_second = seconds / sum(reserved.values())
    later = sum(reserved.values())
    for name, its_seconds in reserved.items():
        later -= its_seconds
        limit = ends - time.monotonic() - later * per_second
        if limit < LEAST:
            yield Row(name, "not run", FAILED, note=f"no time is left of {seconds:.0f} s")
            continue
        yield from run_part(name, check, limit)


def run_part(name: str, check: Check, seconds: float) -> Iterator[Row]:
    """The rows of one part, and why it ended if it did not finish."""
    rows, began = check.folder / f"{name}.jsonl", time.monotonic()
    command = [sys.executable, "-m", "lab.benchmarks.gpu_check", "--part", name]
    command += ["--folder", str(check.folder), *check.flags]
    why = ""
    with (check.folder / f"{name}.log").open("wb") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            if child.wait(seconds) != 0:
                why = f"exit code {child.returncode}: {_last_line(Path(log.name))}"
        except subprocess.TimeoutExpired:
            why = f"stopped after {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # and the compiler's workers
            child.wait()
            for models in check.folder.glob(f"{MODELS}*"):
                shutil.rmtree(models, ignore_errors=True)  # up to 20 GB
    if rows.is_file():
        for line in rows.read_text(encoding="utf-8").splitlines():
            yield Row(**json.loads(line))
    if why:
        yield Row(name, "did not finish", FAILED, note=why)
    yield Row(name, "in all", MEASURED, time.monotonic() - began, "s")


def run_here(name: str, check: Check) -> None:
    """Runs one part in this process and writes its rows, one by one."""
    with (check.folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for row in PARTS[name].run(check):
            file.write(json.dumps(vars(row)) + "\n")
            file.flush()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.benchmarks.gpu_check", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="at most 4 minutes on an H100")
    size.add_argument("--full", action="store_true", help="at most 10 minutes; the default")
    parser.add_argument("--cpu", "--tiny", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--json", default="gpu_check.json", help="where the table is written")
    parser.add_argument("--only", nargs="*", choices=PARTS, help="some of the parts")
    parser.add_argument("--seconds", type=float, help="time for all parts together")
    parser.add_argument("--logs", type=Path, help="a folder for the logs of the parts")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    there = torch.cuda.is_available() and not given.cpu
    if given.part:
        device = torch.device("cpu" if given.cpu else "cuda")
        run_here(given.part, Check(device, given.quick, given.folder))
        return
    if not there and not given.cpu:
        print("no GPU here; with one, this would run")
        for name in chosen(Check(torch.device("cuda"), given.quick, Path())):
            print(f"  {name}: {PARTS[name].title}")
        return
    with tempfile.TemporaryDirectory() as folder:
        device = torch.device("cuda" if there else "cpu")
        check = Check(device, given.quick, Path(folder), tuple(given.only or ()))
        print(f"{machine()}\n{HEAD}", flush=True)
        rows = []
        for row in run(check, given.seconds or sum(chosen(check).values())):
            rows.append(row)
            print(f"| {' | '.join(row.cells())} |", flush=True)
            _write(Path(given.json), given.quick, rows)
        if given.logs is not None:
            given.logs.mkdir(parents=True, exist_ok=True)
            for log in check.folder.glob("*.log"):
                (given.logs / log.name).write_bytes(log.read_bytes())
    failed = [f"{row.part}: {row.what}" for row in rows if row.state == FAILED]
    if failed:
        sys.exit(f"error: failed: {'; '.join(failed)}")


def _write(file: Path, quick: bool, rows: list[Row]) -> None:
    """Writes the table so far, so that it is there if this is stopped."""
    result: dict[str, Any] = {"machine": machine(), "date": time.strftime("%Y-%m-%d")}
    result |= {"quick": quick, "rows": [vars(row) for row in rows]}
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the part's process is ended too
    main()
