"""python -m lab.benchmarks.memory_of_trainings: memory of a process after one training and ten.

Trains on several bases in turn, as a server does, and prints the resident memory after each; on a
GPU its memory as well. Ends with 1 if the last is more than 5 % above the first. $MODEL_VAULT names
other models; `--threads` runs each training in the next of several threads, as Cog's server does.
"""

import argparse
import logging
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import torch

from demo.subject import SCENES
from lab.benchmarks.soak import memory
from trainer.run import train_from_inputs
from trainer.settings import TrainingInputs

MOST = 1.05  # memory after the last training, of that after the first


def training(base: str, steps: int, number: int) -> None:
    """A short training with a preview and all checks."""
    train_from_inputs(
        TrainingInputs(
            dataset=SCENES.resolve(),
            base_model=base,
            steps=steps,
            seed=number,
            checkpoint_every=steps,
            sample_prompts="a photo of <zwx>",
            sample_every=steps,
        ),
        served=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trainings", type=int, default=10)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--bases", nargs="+", default=["miniature-turbo", "miniature"])
    parser.add_argument("--threads", type=int, default=5)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    pools = [ThreadPoolExecutor(1) for _ in range(options.threads)]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for number in range(options.trainings):
            base = options.bases[number % len(options.bases)]
            pool = pools[number % len(pools)]
            pool.submit(training, base, options.steps, number).result()
            found.append(memory())
            gpu = (
                f"  GPU {torch.cuda.memory_reserved() >> 20} MB"
                if torch.cuda.is_available()
                else ""
            )
            print(f"{number + 1:3}  {base:20} {found[-1]:6.0f} MB{gpu}", flush=True)
    growth = found[-1] / found[0]
    print(f"{growth - 1:+.1%} after {len(found)} trainings, of the memory after the first")
    sys.exit(growth > MOST)


if __name__ == "__main__":
    main()
