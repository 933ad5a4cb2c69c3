"""python -m lab.benchmarks: every suite that this machine can run, one table after another.

`make bench` is the same. Suites that compare with diffusers' training script need its path
(`--peer-script`); those for a GPU say what they would run where there is none. `--quick` takes few
rounds, to see that all of it works.
"""

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Suite:
    """One module of this room and its arguments."""

    module: str
    title: str
    quick: Sequence[str] = ()
    takes_peer: bool = False


SUITES = (
    Suite("training_step", "A training step beside the frozen base", ("--rounds", "3")),
    Suite("whole_run", "A training from start to archive", ("--steps", "5", "--rounds", "1"), True),
    Suite("swap", "Changing the LoRA, and generating with one", ("--repeats", "3")),
    Suite("growth", "Growth", ("--quick",)),
    Suite("go_fast", "What go_fast saves and costs", ("--images", "8")),
    Suite("gpu", "The published sizes on a GPU", ("--repeats", "2")),
)


def commands(quick: bool, peer: Mapping[str, str]) -> dict[str, list[str]]:
    """What is run for each suite, by its title."""
    made = {}
    for suite in SUITES:
        command = [sys.executable, "-m", f"lab.benchmarks.{suite.module}"]
        if quick:
            command += suite.quick
        if suite.takes_peer:
            command += [part for pair in peer.items() for part in pair]
        made[suite.title] = command
    return made


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peer-script", help="train_dreambooth_lora_z_image.py of diffusers")
    parser.add_argument("--peer-python", help="the Python that has torchvision, which it needs")
    given = parser.parse_args()
    options = {"--peer-script": given.peer_script, "--peer-python": given.peer_python}
    peer = {name: value for name, value in options.items() if value is not None}
    failed = []
    for title, command in commands(given.quick, peer).items():
        print(f"\n## {title}\n\n`{' '.join(['python', *command[1:]])}`\n", flush=True)
        if subprocess.run(command, check=False).returncode != 0:
            failed.append(title)
    if failed:
        raise SystemExit(f"error: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
