"""A replica: an engine with one base model, and a bounded number of LoRAs."""

import asyncio
import io
import logging
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from ray import serve
from ray.serve import metrics

from adapters.cache import AdapterCache
from families.registry import default_base, find_base
from fleet.ask import Ask, Content, Event
from fleet.contents import Contents
from fleet.settings import FleetSettings
from inference.console import clean_for, of_a_library, texts
from inference.engine import Engine
from inference.fetch import DiskCache, Sources, default_cache
from inference.generation import Step
from inference.inputs import GenerationInputs
from serving.inputs import reason

PREVIEWS = 3  # of each image of a streamed request
STUCK = 900.0  # seconds without a step of a running request; then the replica is replaced
QUALITY = 80  # of a preview's JPEG
SECONDS = [0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]  # boundaries of the histograms


class Cancelled(Exception):
    """The client has gone; raised between two steps."""


@dataclass(frozen=True)
class GivenContents(Sources):
    """The sources of the running request, which the front has downloaded."""

    files: dict[str, Path] = field(default_factory=dict)
    configs: dict[str, Path | None] = field(default_factory=dict)

    def of(self, contents: Contents, weights: dict[str, Content], folder: Path) -> None:
        """Sets the files of a request; links in `folder` have their original names."""
        self.files.clear()
        self.configs.clear()
        for number, (source, each) in enumerate(weights.items()):
            link = folder / f"weights-{number}" / each.name
            link.parent.mkdir()
            link.symlink_to(contents.get(each.sha256))
            self.files[source] = link
            self.configs[source] = contents.get(each.config) if each.config else None

    def file(
        self, source: str | PathLike[str], token: str | None = None, any_file: bool = True
    ) -> Path:
        """The file of a source."""
        return Path(source) if isinstance(source, PathLike) else self.files[source]

    def config(self, source: str | PathLike[str], token: str | None = None) -> Path | None:
        """Its adapter_config.json."""
        return self.configs[str(source)]


class Held:
    """A LoRA of this replica; Ray Serve deletes it when another one needs its place."""

    def __init__(self, sha256: str, engine: Engine) -> None:
        self._sha256, self._engine = sha256, engine
        self.used = False

    def __del__(self) -> None:
        self._engine.forget(self._sha256)


class Generator:
    """Generates the images of one request at a time; others may wait here."""

    def __init__(self, settings: FleetSettings) -> None:
        name = settings.base_model
        self._sources = GivenContents()
        cache = DiskCache(default_cache().folder, settings.disk << 30)
        self._contents = Contents(cache, settings.store)
        only = default_base("generation") if name == "auto" else find_base(name)
        loras = AdapterCache(settings.lora_memory << 30)
        self._engine = Engine(sources=self._sources, only=only, adapters=loras)
        self._engine.warm_up()
        self._worker = ThreadPoolExecutor(1)
        self._log = _Lines(self._worker.submit(threading.get_ident).result())
        self._last_step = 0.0  # time of the running request's last step; 0: none is running
        self._broken = ""
        self._wanted = metrics.Counter("fleet_lora_requests", tag_keys=("result",))
        self._reading = metrics.Histogram(
            "fleet_lora_fetch_seconds", "Time to get a LoRA to this machine", SECONDS
        )
        self._swap = metrics.Histogram(
            "fleet_lora_swap_seconds", "Time to read and merge LoRAs before the first step", SECONDS
        )
        self._memory = metrics.Gauge("fleet_gpu_memory_bytes", "GPU memory of this process")
        self._images = metrics.Counter("fleet_images")

    async def fetch(self, sha256: str) -> Held:
        """A LoRA's file on this machine; called by Ray Serve if the replica does not hold it."""
        start = time.perf_counter()
        await asyncio.to_thread(self._contents.get, sha256)
        self._reading.observe(time.perf_counter() - start)
        return Held(sha256, self._engine)

    load: Callable[[str], Any]  # `fetch` with Ray Serve's bound and its routing: `deployment`

    async def generate(self, ask: Ask) -> AsyncIterator[Event]:
        """Events of a request; the last one has a `status`."""
        yield {}  # accepted: from here on the request is this replica's
        loop, events, ended = asyncio.get_running_loop(), asyncio.Queue[Event](), threading.Event()

        def watch(step: Step) -> None:
            self._last_step = time.monotonic()
            if ended.is_set():
                raise Cancelled
            if not ask.streamed:
                return
            event: Event = {"image": step.image, "done": step.done, "of": step.of}
            every = max(1, step.of // (PREVIEWS + 1))
            if step.done % every == 0 and step.done < step.of:
                event["preview"] = _jpeg(step)
            loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            for each in ask.weights.values():
                held = await self.load(each.sha256)
                self._wanted.inc(tags={"result": "hit" if held.used else "miss"})
                held.used = True
            work = loop.run_in_executor(self._worker, self._work, ask, watch, ended)
            work.add_done_callback(lambda _: events.put_nowait({}))
            while (event := await events.get()) or not work.done():
                yield event
            yield work.result()
        except OSError as error:
            yield {"status": "failed", "error": reason(error, ask.inputs), "logs": ""}
        finally:
            ended.set()

    def _work(self, ask: Ask, watch: Callable[[Step], None], ended: threading.Event) -> Event:
        """Generates, in the worker's thread."""
        if ended.is_set():
            return {"status": "failed", "error": "cancelled"}
        known = texts(ask.inputs)
        self._log.begin(known)
        self._last_step = start = time.monotonic()
        first: list[float] = []
        measured: dict[str, float] = {}

        def timed(step: Step) -> None:
            first.append(time.monotonic())
            watch(step)

        inputs: dict[str, Any] = dict(ask.inputs)
        with tempfile.TemporaryDirectory(prefix="zeroprior-fleet-") as place:
            folder = Path(place)
            try:
                self._sources.of(self._contents, ask.weights, folder)
                for name, files in ask.files.items():
                    paths = [_written(folder, name, number, *f) for number, f in enumerate(files)]
                    inputs[name] = paths if name == "reference_images" else paths[0]
                (folder / "images").mkdir()
                made = self._engine.predict(
                    GenerationInputs(**inputs),
                    measured.__setitem__,
                    output_dir=folder / "images",
                    watch=timed,
                )
                files = [(each.name, each.read_bytes()) for each in made]
                found: Event = {"status": "succeeded", "files": files}
                self._images.inc(len(files))
            except Exception as error:
                self._broken = _why_broken(error)
                found = {"status": "failed", "error": reason(error, inputs)}
            finally:
                self._last_step = 0.0
        if first and ask.weights:
            self._swap.observe(first[0] - start)
        if torch.cuda.is_available():
            self._memory.set(torch.cuda.memory_reserved())
        return found | {"logs": self._log.end(), "metrics": measured}

    def check_health(self) -> None:
        """Raises if this replica must be replaced. Called by Ray Serve."""
        if self._broken:
            raise RuntimeError(self._broken)
        if self._last_step and time.monotonic() - self._last_step > STUCK:
            raise RuntimeError(f"no step of a request for {STUCK:.0f} seconds")


def deployment(settings: FleetSettings) -> Any:
    """The Serve deployment of replicas with these settings."""

    class Replica(Generator):
        @serve.multiplexed(max_num_models_per_replica=settings.loras)
        async def load(self, sha256: str) -> Held:
            return await self.fetch(sha256)

    scaled: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.max_replicas:
        scaled = {
            "autoscaling_config": {
                "min_replicas": settings.replicas,
                "max_replicas": settings.max_replicas,
                "target_ongoing_requests": settings.ongoing,
            }
        }
    return serve.deployment(
        Replica,
        name="Generator",
        ray_actor_options={"num_cpus": 1, "num_gpus": settings.gpus},
        max_ongoing_requests=settings.ongoing,
        max_queued_requests=settings.queued,
        health_check_period_s=5,
        health_check_timeout_s=60,
        graceful_shutdown_timeout_s=60,
        **scaled,
    )


class _Lines(logging.Handler):
    """The log of the running request, for its client."""

    def __init__(self, thread: int) -> None:
        super().__init__(logging.INFO)
        self._thread, self._known, self._lines = thread, [""], [""]
        self.addFilter(lambda record: record.thread == thread and not of_a_library(record))
        logging.root.addHandler(self)
        logging.root.setLevel(logging.INFO)

    def begin(self, known: list[str]) -> None:
        self._known, self._lines = known, []

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        self._lines.append(f"{level}{clean_for(record.getMessage(), self._known)}\n")

    def end(self) -> str:
        return "".join(self._lines)


def _why_broken(error: Exception) -> str:
    """Why the process cannot go on after an error; empty if it can.

    After an error inside a CUDA kernel, every later call of CUDA in the process fails.
    """
    lost = isinstance(error, getattr(torch, "AcceleratorError", ()))
    return f"the GPU failed: {error}" if lost else ""


def _written(folder: Path, name: str, number: int, suffix: str, content: bytes) -> Path:
    path = folder / f"{name}-{number}{suffix}"
    path.write_bytes(content)
    return path


def _jpeg(step: Step) -> bytes:
    file = io.BytesIO()
    step.preview().convert("RGB").save(file, "JPEG", quality=QUALITY)
    return file.getvalue()
