"""Fuzzes with coverage: `python -m lab.fuzz [NAME] [libFuzzer options]`; `make fuzz` runs all.

Each harness is a process of its own, which atheris needs. Inputs that reach new code are kept in
outputs/fuzz/NAME and are where the next run begins; an input that is a finding is written beside
them as crash-, timeout- or oom-*. `python -m lab.fuzz NAME FILE` repeats one.
"""

import argparse
import hashlib
import logging
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

try:
    import atheris
except ImportError:
    sys.exit("atheris is missing: make fuzz installs it, or pip install atheris==3.0.0")

from lab.fuzz import NAMES

ROOT = Path(__file__).resolve().parents[2]
INSTRUMENTED = [
    *("trainer", "adapters", "families", "inference.heif", "inference.image_limits"),
    *("inference.image_decoding", "inference.color_profiles"),
    *("zipfile", "tarfile", "gzip", "csv", "json", "yaml", "PIL"),
]


def main() -> None:
    """Runs one harness here, or each of them for a while."""
    parser = argparse.ArgumentParser(prog="python -m lab.fuzz", description=__doc__)
    parser.add_argument("name", nargs="?", choices=NAMES)
    parser.add_argument("--seconds", type=int, default=600, help="of each harness")
    arguments, others = parser.parse_known_args()
    if arguments.name is None:
        failed = [name for name in NAMES if _apart(name, arguments.seconds)]
        sys.exit(f"findings in {', '.join(failed)}" if failed else 0)

    corpus = ROOT / "outputs" / "fuzz" / arguments.name
    corpus.mkdir(parents=True, exist_ok=True)
    harness = _harness(arguments.name)
    for seed in harness.seeds():
        (corpus / hashlib.sha1(seed).hexdigest()).write_bytes(seed)
    given = [each for each in others if Path(each).is_file()]
    options = [
        *(f"-max_total_time={arguments.seconds}", "-max_len=65536", "-timeout=30"),
        *("-rss_limit_mb=4096", "-print_final_stats=1", f"-artifact_prefix={corpus.parent}/"),
    ]
    logging.disable(logging.WARNING)  # else one for each of a million inputs
    warnings.simplefilter("ignore")
    places = [] if given else [str(corpus)]
    atheris.Setup([sys.argv[0], *options, *others, *places], lambda data: _quiet(harness.run, data))
    atheris.Fuzz()


def _harness(name: str) -> Any:
    with atheris.instrument_imports(include=INSTRUMENTED, enable_loader_override=False):
        from PIL import Image

        from lab.fuzz.harnesses import HARNESSES

        Image.init()  # the formats' own modules, which would come later
    return HARNESSES[name]


def _quiet(run, data: bytes) -> None:  # type: ignore[no-untyped-def]
    run(data)  # libFuzzer takes None alone


def _apart(name: str, seconds: int) -> int:
    """Runs a harness in a separate process, says how it went, and gives its exit status."""
    log = ROOT / "outputs" / "fuzz" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "lab.fuzz", name, "--seconds", str(seconds)]
    with log.open("w") as file:
        status = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file).returncode
    said = dict(re.findall(r"stat::(\w+):\s+(\d+)", log.read_text(errors="replace")))
    tried, kept = (
        int(said.get(f"{each}", 0)) for each in ("number_of_executed_units", "new_units_added")
    )
    outcome = f"a finding, see {log}" if status else "no finding"
    print(f"{name:8} {tried:9,} inputs, {kept:5,} of them reached new code: {outcome}", flush=True)
    return status


if __name__ == "__main__":
    main()
