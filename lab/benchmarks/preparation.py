"""Time, memory and disk space for preparing a dataset: for `lab.benchmarks.growth`."""

import io
import logging
import re
import statistics
import time
import warnings
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from adapters.lora import Lora
from adapters.placeholder import Placeholder
from families.loading import load_family
from lab.benchmarks.training_step import RANK, RATE
from miniature.models import PIXELS, write_random
from trainer.data.dataset import read_dataset
from trainer.learning.features import Captions, encode_images
from trainer.learning.loop import Loop
from trainer.settings.fields import Settings, resolve
from trainer.settings.inputs import TrainingInputs

CPU = torch.device("cpu")
Result = TypeVar("Result")
Row = dict[str, str | float]  # by the columns' titles

_WHAT = ("captions", "pictures")
TIME = (
    *_WHAT,
    *("reading, s", "pictures, s", "captions, s"),
    *("together, s", "ms per picture", "a step then, ms"),
)
MEMORY = (
    *_WHAT,
    *("peak, MB", "own memory then, MB", "above the first, kB per picture"),
    *("file, kB each", "latents, kB each", "text, kB each"),
)

# The same text for all, which is read once; a file next to each image; and such files with the
# placeholder, whose features are made in the steps.
SAME, OWN, PLACEHOLDER = "one for all", "each its own", "each its own, with the placeholder"


def images(counts: Sequence[int], folder: Path) -> list[Row]:
    """The cost of preparing so many images, and of a step with them."""
    write_random(folder / "base", dtype=torch.float32)
    rows: list[Row] = []
    for captions in (SAME, OWN, PLACEHOLDER):
        first: Row = {}
        for wanted in counts:
            dataset = write_dataset(folder / "pictures.zip", wanted, captions)
            row = in_a_process(prepare, dataset, folder / "base", captions)
            first = first or row
            more, above = (
                float(row[x]) - float(first[x]) for x in ("pictures", "own memory then, MB")
            )
            row["above the first, kB per picture"] = 1e3 * above / more if more else ""
            rows.append(row)
    return rows


def write_dataset(path: Path, count: int, captions: str) -> Path:
    """Smooth random JPEGs of the miniature's size and, unless it is one for all, their captions."""
    draw = np.random.default_rng(0)
    subject = "TOK" if captions == PLACEHOLDER else "a cat"
    with zipfile.ZipFile(path, "w") as zipped:
        for number in range(count):
            coarse = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            picture = Image.fromarray(coarse).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)
            picture.save(encoded := io.BytesIO(), "JPEG")
            zipped.writestr(f"{number}.jpg", encoded.getvalue())
            if captions != SAME:
                zipped.writestr(f"{number}.txt", f"a photo of {subject} beside number {number}")
    return path


def prepare(dataset: Path, base: Path, captions: str) -> Row:
    """Reads and encodes a dataset as `trainer.run` does, then takes a few steps with it."""
    settings = plain_settings(
        dataset,
        base,
        RANK,
        1,
        resolution=PIXELS,
        default_caption="a photo of a cat",
        train_placeholder_token=captions == PLACEHOLDER,
    )
    family = load_family(settings.base, CPU, torch.float32)

    at = [time.process_time()]
    examples = read_dataset(settings.dataset, settings.default_caption, settings.subject)
    at.append(time.process_time())
    samples = encode_images(family, examples, settings)
    at.append(time.process_time())
    words = [Placeholder.create(t, family.text_width, 1e-5, 0) for t in settings.tokens]
    vectors = {each.token: each.vectors for each in words}
    texts = Captions(family, [each.caption for each in samples], vectors)
    at.append(time.process_time())
    peak, own = resident("VmHWM"), resident("RssAnon")

    lora = Lora(family.transformer, family.lora_targets(), RANK, 0)
    loop = Loop(family, settings, samples, texts, lora, words)
    steps = [seconds(partial(loop.step, number)) for number in range(9)]
    count, kept = len(examples), {each.caption for each in examples} - texts.trained
    held = {
        "file": sum(len(each.data) for each in examples),
        "latents": sum(each.mean_CHW.nbytes + each.std_CHW.nbytes for each in samples),
        "text": sum(each.nbytes for each in texts.features(sorted(kept))),
    }
    taken = [after - before for before, after in zip(at, at[1:], strict=False)]
    return {
        "captions": captions,
        "pictures": count,
        **dict(zip(TIME[2:5], taken, strict=True)),
        "together, s": sum(taken),
        "ms per picture": 1e3 * sum(taken) / count,
        "a step then, ms": 1e3 * statistics.median(steps[1:]),  # without what is loaded late
        **{f"{what}, kB each": size / count / 1e3 for what, size in held.items()},
        "peak, MB": peak / 1e6,
        "own memory then, MB": own / 1e6,
    }


def resident(kind: str) -> int:
    """Bytes that this process has resident: the most so far (VmHWM), or now outside of files
    (RssAnon)."""
    status = Path("/proc/self/status").read_text()  # getrusage counts the parent's, too
    found = re.search(rf"{kind}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) << 10


def plain_settings(dataset: str | Path, base: Path, rank: int, batch: int, **more: Any) -> Settings:
    """Settings under which every step is like the last."""
    return resolve(
        TrainingInputs(
            dataset=Path(dataset),
            base_model=str(base),
            rank=rank,
            batch_size=batch,
            learning_rate=RATE,
            steps=100_000,
            caption_dropout=0.0,
            seed=0,
            **{"train_placeholder_token": False} | more,
        )
    )


def in_a_process(work: Callable[..., Result], *given: Any) -> Result:
    """What it gives in a new process, whose memory is its own."""
    with ProcessPoolExecutor(1, get_context("spawn"), alone_and_quiet) as pool:
        return pool.submit(work, *given).result()


def alone_and_quiet() -> None:
    """One thread, and no lines but the tables."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)


def seconds(work: Callable[[], object]) -> float:
    """Of the processor."""
    start = time.process_time()
    work()
    return time.process_time() - start
