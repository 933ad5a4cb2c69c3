"""python -m lab.benchmarks.soak: many requests in one engine; each gives what a fresh one does.

Requests with no, one or two LoRAs of several ranks, at several scales, with and without
placeholders, on two bases, and now and then a broken file, come in random order. Every image is
compared with that of an engine that has generated nothing else; at the end the base's weights are
compared with those at the beginning.
"""

import argparse
import hashlib
import random
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from adapters.archive import Archive, BrokenArchive, write_archive
from adapters.formats.factors import LoraMismatch
from adapters.placeholder import Placeholder
from families.loading import load_family
from families.registry import BASES
from inference.engine import Engine
from inference.inputs import APPLY_LORA
from inference.request import Request

TURBO, OTHER = "miniature-turbo", "miniature"
SCALES = (1.0, 0.5, -1.0, 1.7, 0.0)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ask:
    """A request with the weights it brings."""

    request: Request
    weights: Path | None
    extra: Path | None


@dataclass(frozen=True)
class Report:
    """What a soak found."""

    generated: int
    refused: int
    different: int  # images or refusals unlike those of a fresh engine
    base_unchanged: bool
    memory: tuple[float, float]  # MB of the process after the first fifth, and at the end
    seconds: float


def write_loras(folder: Path, count: int, seed: int) -> list[Path]:
    """LoRA files of ranks 1 to 8 over random layers; two of three with a word, one in ten for the
    other base, and one more that is broken."""
    rng = random.Random(seed)
    family = load_family(BASES[TURBO], CPU, torch.float32)
    targets = family.lora_targets()
    files = []
    for number in range(count):
        generator = torch.Generator().manual_seed(seed * 1000 + number)
        factors = {}
        for name in rng.sample(targets, rng.randint(1, len(targets))):
            rows, columns = family.transformer.get_submodule(name).weight.shape
            rank = 1 + number % 8
            down = torch.randn(rank, columns, generator=generator) / columns**0.5
            factors[name] = down, torch.randn(rows, rank, generator=generator) * 0.1
        words: tuple[Placeholder, ...] = ()
        if number % 3:
            row = torch.randn(1, family.text_width, generator=generator) * 0.05
            words = (Placeholder(f"<word{number % 7}>", row),)  # some share a word
        base = BASES[OTHER if number % 10 == 9 else TURBO]
        archive = Archive(factors, words, {"base_model": base.hub_id})
        files.append(write_archive(archive, folder / f"{number:02d}.zip"))
    broken = folder / "broken.zip"
    broken.write_bytes(files[0].read_bytes()[:-200])
    return [*files, broken]


def random_asks(loras: list[Path], count: int, seed: int) -> list[Ask]:
    """Different requests, of one or two steps at a small size."""
    rng = random.Random(seed)
    asks = []
    for number in range(count):
        brought = rng.choice((0, 1, 1, 2, 2))
        chosen = [*rng.sample(loras, brought), None, None]
        request = Request(
            prompt=f"a red circle, <word{rng.randrange(7)}> and <word{rng.randrange(7)}>",
            seed=number,
            width=32,
            height=32,
            num_inference_steps=rng.choice((1, 2)),
            lora_scale=rng.choice(SCALES),
            extra_lora_scale=rng.choice(SCALES),
            apply_lora=rng.choice(APPLY_LORA),
        )
        asks.append(Ask(request, chosen[0], chosen[1]))
    return asks


def answer(engine: Engine, ask: Ask) -> bytes | str:
    """The image's pixels, or why there is none."""
    try:
        first, second = (engine.read(each) if each else None for each in (ask.weights, ask.extra))
        return engine.generate(ask.request, first, extra=second)[0].tobytes()
    except (BrokenArchive, LoraMismatch) as error:
        return str(error)


def fingerprint(transformer: nn.Module) -> str:
    """SHA-256 of every weight."""
    whole = hashlib.sha256()
    for name, weight in transformer.state_dict().items():
        whole.update(name.encode() + weight.contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def memory() -> float:
    """MB that the process holds now; where the system does not say, the most it ever held."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def soak(requests: int, distinct: int, loras: int, seed: int, folder: Path) -> Report:
    """Draws `requests` random picks of `distinct` different requests in one engine."""
    asks = random_asks(write_loras(folder, loras, seed), distinct, seed)
    picks = [*range(distinct), *random.Random(seed).choices(range(distinct), k=requests)]
    picks = random.Random(seed + 1).sample(picks, len(picks))[:requests]
    plain = Ask(Request(prompt="a red circle", seed=1, width=32, height=32), None, None)

    engine = Engine(CPU, torch.float32)
    first = answer(engine, plain)
    original = fingerprint(load_family(BASES[TURBO], CPU, torch.float32).transformer)
    given: list[bytes | str] = []
    start, early = time.perf_counter(), 0.0
    for number, pick in enumerate(picks):
        given.append(answer(engine, asks[pick]))
        if number == requests // 5:
            early = memory()
    seconds, late = time.perf_counter() - start, memory()
    last = answer(engine, plain)
    assert engine._family is not None
    unchanged = fingerprint(engine._family.transformer) == original and last == first

    wanted = {pick: answer(Engine(CPU, torch.float32), asks[pick]) for pick in set(picks)}
    return Report(
        generated=sum(isinstance(each, bytes) for each in given),
        refused=sum(isinstance(each, str) for each in given),
        different=sum(each != wanted[pick] for each, pick in zip(given, picks, strict=True)),
        base_unchanged=unchanged,
        memory=(early, late),
        seconds=seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--distinct", type=int, default=250, help="different requests among them")
    parser.add_argument("--loras", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(**vars(options), folder=Path(folder))
    print(f"{found.generated} generated, {found.refused} refused in {found.seconds:.0f} s")
    print(f"{found.different} unlike those of a fresh engine")
    print(f"base {'unchanged' if found.base_unchanged else 'CHANGED'}")
    early, late = found.memory
    print(f"memory {early:.0f} MB after the first fifth, {late:.0f} MB at the end")


if __name__ == "__main__":
    main()
