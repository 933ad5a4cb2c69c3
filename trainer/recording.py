"""Records a run in its folder: start and end, warnings, and the log."""

import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

import torch

from families.device import device_name
from families.family import Family
from families.gpu_lock import own_gpu
from families.loading import default_device
from families.tokens import ids_wanted
from inference.console import clean, log_to_file
from trainer.data import Example
from trainer.events import Events
from trainer.inbox import Inbox
from trainer.learning import Control, Stopped
from trainer.outputs import Run
from trainer.result import TrainingRecord, Verdict, versions
from trainer.settings import Secret, Secrets, Settings, hidden, high_rates

log = logging.getLogger(__name__)

OURS = ("trainer", "inference", "adapters", "families")  # packages whose warnings become events


@contextmanager
def recorded(run: Run, settings: Settings, secrets: Secrets) -> Iterator[Control]:
    """Within the context, the run writes events and executes commands. Emits how it ended."""
    if not run.holds_lock:
        yield Control()
        return
    events, inbox = run.events, Inbox(run.folder)
    keys = secrets.hf_token, secrets.wandb_api_key
    handler = _Warnings(events, keys)
    for command, _ in inbox.take():  # for an earlier process
        why = "the process it was sent to has ended"
        events.emit("command", id=command.key, do=command.do, accepted=False, why=why)
    events.emit(
        "started",
        **_process(),
        device=device_name(default_device()),
        base=settings.base.name,
        versions=versions(),
    )
    logging.getLogger().addHandler(handler)
    gpu = own_gpu("run", run.folder.name)
    control = Control(events, inbox)
    log_file: AbstractContextManager[None] = nullcontext()
    if run.log is not None and not secrets.from_request:  # a request's log is only in its answer
        log_file = log_to_file(run.log, lambda text: hidden(text, *keys))
    try:
        with log_file:
            yield control
    except Stopped as stopped:
        end = {"kept": False} if stopped.freed else {"why": "by a command"}
        events.emit("paused" if stopped.freed else "stopped", step=events.step, **end)
        raise
    except Exception as error:
        where = type(error).__name__
        events.emit("error", step=events.step, text=hidden(str(error), *keys), where=where)
        raise
    except BaseException as error:  # Ctrl-C, SIGTERM, a cancelled request
        why = f"ended by {type(error).__name__}"
        events.emit("stopped", step=events.step, why=why)
        raise
    finally:
        control.end()
        logging.getLogger().removeHandler(handler)
        if gpu is not None:
            gpu.release()


def introduce(settings: Settings, examples: Sequence[Example], family: Family) -> None:
    """Logs what the run is going to do."""
    log.info(
        "training on %s: %d images, %s, %d steps of %d, seed %d",
        *(settings.base.hub_id, len(examples), settings.subject_text),
        *(settings.steps, settings.batch_size, settings.seed),
    )
    for warning in high_rates(settings):
        log.warning("%s", warning)
    if settings.log_prompt_ids or ids_wanted():
        rows = {token: torch.zeros(1, 1) for token in settings.tokens}
        log.info("template around every prompt: %r", family.prompts.template)
        for caption in dict.fromkeys(text for example in examples for text in example.captions):
            log.info("prompt: %r\n%s", caption, family.tokenize(caption, rows).explain())


def emit_done(
    control: Control, verdict: Verdict, files: Sequence[Path], record: TrainingRecord
) -> None:
    """Emits the last event of a run that has written its weights."""
    control.events.emit(
        "done",
        step=record.settings.steps,
        early=control.early,
        **({"why": control.why} if control.why else {}),
        **({"shipped": record.curves.shipped} if record.curves.shipped is not None else {}),
        result=verdict.result,
        files=[each.name for each in files],
        seconds=round(time.monotonic() - control.begun, 1),
        phases=control.events.seconds(),
        peak_gpu_bytes=record.timings.peak_gpu_bytes,
    )


class _Warnings(logging.Handler):
    """Emits our packages' warnings as events."""

    def __init__(self, events: Events, keys: Sequence[Secret | None]) -> None:
        super().__init__(logging.WARNING)
        self._events, self._keys = events, keys
        self._busy = False

    def emit(self, record: logging.LogRecord) -> None:
        # Busy: a warning about events.jsonl itself.
        if self._busy or record.name.split(".")[0] not in OURS:
            return
        self._busy = True
        try:
            text = clean(hidden(record.getMessage(), *self._keys))
            self._events.emit("warning", text=text, where=record.name)
        except Exception:
            self.handleError(record)
        finally:
            self._busy = False


def _process() -> dict[str, object]:
    """Identifies this process; a later one with the same pid differs."""
    facts: dict[str, object] = {"pid": os.getpid(), "host": socket.gethostname()}
    with suppress(OSError, IndexError):  # only on Linux
        facts["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        stat = Path("/proc/self/stat").read_text()
        facts["start"] = int(stat.rpartition(")")[2].split()[19])  # ticks after the boot
    return facts
