"""python -m lab.benchmarks.fleet: several engines behind Ray Serve, on this machine's CPU.

Needs .venv-fleet (`make fleet`). Two replicas of the miniature against two plain engines; more
LoRAs than the replicas hold; a replica that is killed; random requests, byte for byte against
`predict`.
"""

import argparse
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.benchmarks.fleet_process import Fleet, Json, Reply, cpu_seconds, fleet

ZIPF = 1.0  # exponent: request rate of the n-th LoRA is proportional to 1 / n^ZIPF
SCRAPE = 12.0  # seconds until Ray's metrics are up to date


# ---- Against plain engines -----------------------------------------------------------------------

_ENGINE: Any = None


def _start_engine() -> None:
    import torch

    from inference.engine import Engine

    global _ENGINE
    torch.set_num_threads(1)
    _ENGINE = Engine()
    _ENGINE.warm_up()


def _plain(inputs: Json) -> list[bytes]:
    from inference.inputs import GenerationInputs

    with tempfile.TemporaryDirectory() as folder:
        made = _ENGINE.predict(GenerationInputs(**inputs), output_dir=Path(folder))
        return [each.read_bytes() for each in made]


@contextmanager
def _engines(count: int) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, _start_engine) as pool:
        list(pool.map(_plain, [{"prompt": "a circle", "seed": n} for n in range(2 * count)]))
        yield pool


def _all(served: Fleet, asks: Sequence[Json], concurrency: int) -> list[Reply]:
    with ThreadPoolExecutor(concurrency) as clients:
        return list(clients.map(served.predict, asks))


@dataclass(frozen=True)
class Rate:
    """The fleet against plain engines, for requests of one length."""

    steps: int
    seconds: float  # processor time of a request of a plain engine
    wall: float  # rate of the fleet / rate of the plain engines
    processor: float  # the same by processor time, with that of Ray and of the clients


def throughput(served: Fleet, rounds: int, seconds: float) -> list[Rate]:
    """Rates for short, middle and long requests.

    Others may use this machine: both run in turns, and processor time is measured too.
    """
    found = []
    with _engines(2) as pool:
        for steps in (8, 50, 200):
            one = {"prompt": "a red circle", "num_inference_steps": steps, "output_format": "png"}
            each = _measured(pool, served, [one | {"seed": seed} for seed in range(8)])[0] / 4
            count = max(8, 2 * round(seconds / each))
            asks = [one | {"seed": seed} for seed in range(count)]
            runs = [_measured(pool, served, asks) for _ in range(rounds)]
            wall = statistics.median(plain / ours for plain, ours, _, _ in runs)
            processor = statistics.median(plain / ours for _, _, plain, ours in runs)
            alone = statistics.median(plain for _, _, plain, _ in runs) / count
            found.append(Rate(steps, alone, wall, processor))
    return found


def _measured(
    pool: ProcessPoolExecutor, served: Fleet, asks: Sequence[Json]
) -> tuple[float, float, float, float]:
    """Seconds of the plain engines and of the fleet, and their processor times."""

    def timed(call: Callable[[], object], processor: Callable[[], float]) -> tuple[float, float]:
        begin, start = processor(), time.perf_counter()
        call()
        return time.perf_counter() - start, processor() - begin

    here = os.getpid()
    plain = timed(
        lambda: list(pool.map(_plain, asks)), lambda: cpu_seconds(here) - served.cpu_seconds()
    )
    ours = timed(lambda: _all(served, asks, 4), lambda: served.cpu_seconds() + sum(os.times()[:2]))
    return plain[0], ours[0], plain[1], ours[1]


# ---- LoRAs that do not fit -----------------------------------------------------------------------


def best_hits(requests: Sequence[int], room: int) -> int:
    """Hits of the best possible cache, which knows the future (Belady)."""
    upcoming: dict[int, list[int]] = {}
    for place, each in reversed(list(enumerate(requests))):
        upcoming.setdefault(each, []).append(place)
    held: set[int] = set()
    hits = 0
    for each in requests:
        upcoming[each].pop()
        if each in held:
            hits += 1
            continue
        held.add(each)
        if len(held) > room:
            held.remove(max(held, key=lambda x: upcoming[x][-1] if upcoming[x] else len(requests)))
    return hits


def zipf(count: int, requests: int, seed: int) -> list[int]:
    """Numbers of LoRAs, the first ones more often."""
    rates = [1 / (number + 1) ** ZIPF for number in range(count)]
    return random.Random(seed).choices(range(count), rates, k=requests)


def cache(
    served: Fleet, loras: Sequence[Path], requests: int, room: int, concurrency: int
) -> tuple[float, float]:
    """The share of hits, and that of the best possible."""
    picks = zipf(len(loras), requests, seed=1)
    before = served.metrics()
    asks = [
        {
            "prompt": "a circle",
            "seed": n,
            "num_inference_steps": 2,
            "replicate_weights": str(loras[p]),
        }
        for n, p in enumerate(picks)
    ]
    replies = _all(served, asks, concurrency)
    assert all(each.body.get("status") == "succeeded" for each in replies), replies[0].body
    time.sleep(SCRAPE)
    after = served.metrics()
    hits, misses = (
        after.get(name, 0.0) - before.get(name, 0.0)
        for name in ("fleet_lora_requests_total hit", "fleet_lora_requests_total miss")
    )
    assert hits + misses >= requests, (hits, misses)
    return hits / (hits + misses), best_hits(picks, room) / requests


# ---- A killed replica ----------------------------------------------------------------------------


def kill(served: Fleet, requests: int, clients: int = 4) -> tuple[int, int]:
    """How many requests of how many are lost when a replica is killed while it generates."""
    asks = [
        {"prompt": "a blue square", "seed": seed, "num_inference_steps": 100}
        for seed in range(requests)
    ]
    with ThreadPoolExecutor(clients) as threads:
        replies = [threads.submit(served.predict, each) for each in asks]
        while sum(each.done() for each in replies) < requests // 4:
            time.sleep(0.05)
        served.replicas()[0].kill()
        states = [each.result().body.get("status") for each in replies]
    return sum(each != "succeeded" for each in states), requests


# ---- Byte for byte -------------------------------------------------------------------------------


def random_inputs(loras: Sequence[Path], count: int, seed: int) -> list[Json]:
    """Requests as in `lab.benchmarks.soak`, as JSON; also such that are refused."""
    from lab.benchmarks.soak import random_asks

    rng, asked = random.Random(seed), []
    for each in random_asks(list(loras), count, seed):
        inputs = each.request.model_dump(exclude_defaults=True, exclude_none=True, mode="json")
        inputs["output_format"] = rng.choice(("webp", "png", "jpg"))
        for name, path in (("replicate_weights", each.weights), ("extra_lora", each.extra)):
            if path is not None:
                inputs[name] = str(path)
        if each.extra is None:
            inputs.pop("extra_lora_scale", None)
        asked.append(inputs)
    return asked


def equality(served: Fleet, loras: Sequence[Path], requests: int) -> tuple[int, int, int]:
    """Images, refusals, and answers that differ from those of one engine."""
    import torch

    from inference.engine import Engine
    from inference.inputs import GenerationInputs
    from serving.inputs import reason

    torch.set_num_threads(1)
    asks = random_inputs(loras, requests, seed=3)
    replies = _all(served, asks, 4)
    engine, different, refused = Engine(), 0, 0
    for inputs, reply in zip(asks, replies, strict=True):
        try:
            with tempfile.TemporaryDirectory() as folder:
                made = engine.predict(GenerationInputs(**inputs), output_dir=Path(folder))
                expected: Any = [each.read_bytes() for each in made]
            given: Any = reply.files
        except ValueError as error:
            expected, given = reason(error, inputs), reply.body.get("error")
            refused += 1
        if expected != given:
            different += 1
            print(f"different: {inputs}\n  {str(expected)[:300]}\n  {str(reply.body)[:300]}")
    return requests - refused, refused, different


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.benchmarks.fleet", description=__doc__)
    parser.add_argument("--parts", default="throughput,cache,kill,equality")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="of one round of throughput")
    parser.add_argument("--requests", type=int, default=1000, help="of cache and of equality")
    parser.add_argument("--ongoing", type=int, default=4)
    parser.add_argument("--concurrency", type=int, default=4, help="clients at once, for cache")
    parser.add_argument("--port", type=int, default=8321)
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from lab.benchmarks.soak import write_loras

    print("| what | found | target |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        os.environ["ZEROPRIOR_FILES"] = name
        os.environ["XDG_CACHE_HOME"] = f"{name}/.cache"
        # One in ten is for another base model, which a fleet of one base refuses.
        files = write_loras(Path(name), 60, seed=5)
        loras = [each for number, each in enumerate(files[:-1]) if number % 10 != 9][:50]
        parts = given.parts.split(",")
        options = ["--replicas", "2", "--loras", "20", "--ongoing", str(given.ongoing)]
        with fleet(given.port, options) as served:
            for part in parts:
                if part == "throughput":
                    for each in throughput(served, given.rounds, given.seconds):
                        what = f"rate of 2 replicas / 2 engines, requests of {each.steps} steps"
                        facts = f"{each.wall:.2f}; by processor time {each.processor:.2f}"
                        print(f"| {what} ({each.seconds:.2f} s) | {facts} | 0.85 |", flush=True)
                if part == "cache":
                    share, best = cache(served, loras, given.requests, 40, given.concurrency)
                    what = f"LoRA hits, {len(loras)} LoRAs, 2 x 20 held, Zipf {ZIPF}"
                    facts = f"{share:.3f} of {best:.3f}: {share / best:.2f}"
                    print(f"| {what} | {facts} | 0.90 |", flush=True)
                if part == "kill":
                    lost, count = kill(served, 60)
                    print(
                        f"| requests lost when a replica is killed | {lost} of {count} | 0 |",
                        flush=True,
                    )
                if part == "equality":
                    some = [*loras[:20], files[-1]]
                    made, refused, different = equality(served, some, given.requests)
                    what = f"answers unlike `predict`: {made} images, {refused} refusals"
                    print(f"| {what} | {different} | 0 |", flush=True)


if __name__ == "__main__":
    main()
