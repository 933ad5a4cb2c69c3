"""Saves the state of a run: at intervals, after the last step, and when it is stopped.

So that a full disk cannot destroy the result, disk space for one checkpoint and for weights.zip is
reserved before the first step. If the disk is full later, the reserved space is used.
"""

import errno
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from torch import Tensor

from adapters.files.atomic import FULL
from trainer.learning.checkpoint import Checkpoint, is_finite, latest, tensors_of, write_checkpoint
from trainer.learning.optimizers import fresh_state
from trainer.learning.resume import exactness, identity
from trainer.learning.step_weights import (
    file_facts,
    write_step_weights,
    write_weights_of_step,
)
from trainer.run_files import SAVED

if TYPE_CHECKING:
    from trainer.learning.loop import Loop

log = logging.getLogger(__name__)

PARTS = 10  # checkpoints of a run by default, without `checkpoint_every`
SECONDS = 600.0  # longest time between checkpoints by default
_TRIES = 3  # attempts to save a run that is stopped again meanwhile


class Diverged(RuntimeError):
    """The loss or the weights are not finite, or the loss has exploded."""


class Reserve:
    """Reserved disk space, until it is released or the process ends.

    It is an unnamed temporary file, so that it cannot be left over.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self._file: IO[bytes] | None = None

    def take(self) -> None:
        """Reserves the space. Raises OSError if the disk has less."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self.folder).free < self.size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder))
        file = tempfile.TemporaryFile(dir=self.folder)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, self.size)
        except OSError as error:
            file.close()
            if error.errno in FULL:
                raise
            return  # the file system cannot reserve space
        self._file = file

    def release(self) -> None:
        """Frees the space."""
        if self._file is not None:
            self._file.close()
            self._file = None


class Saver:
    """Writes the state of one run into a folder of checkpoints.

    Only finite states are written. `newest` is the last checkpoint of this run.
    """

    def __init__(
        self, folder: Path, weights: Path | None = None, step_weights: bool = False
    ) -> None:
        """`weights` is the path of the weights.zip to reserve space for.

        With `step_weights`, usable weights are written next to every checkpoint.
        """
        self.folder, self.weights, self.step_weights = folder, weights, step_weights
        self.newest: Path | None = None
        self._step = -1  # of `newest`
        self._time = time.monotonic()  # of the last attempt
        self._reserves: list[Reserve] = []

    def begin(self, loop: "Loop") -> None:
        """Reserves the space for a checkpoint and the weights.

        Raises OSError with the number of bytes if the disk has less.
        """
        self._time = time.monotonic()
        reserves = [Reserve(self.folder, checkpoint_bytes(loop))]
        if self.weights is not None:
            reserves.append(Reserve(self.weights.parent, weights_bytes(loop)))
        for reserve in reserves:
            try:
                reserve.take()
            except OSError as error:
                self.release()
                if error.errno not in FULL:
                    raise
                needed = sum(each.size for each in reserves)
                reason = (
                    f"not enough disk space: a checkpoint and the weights take {needed:,} bytes; "
                    "free some, or set output_dir to a folder on another disk"
                )
                raise OSError(error.errno, reason, str(reserve.folder)) from error
            self._reserves.append(reserve)
        self._check_space(loop)

    def _check_space(self, loop: "Loop") -> None:
        """Raises OSError if the disk has too little space for the weights of `weights_every`."""
        every, count = loop.settings.weights_every, loop.settings.weights_saved(loop.done)
        needed, free = count * weights_bytes(loop), shutil.disk_usage(self.folder).free
        if needed > free:
            self.release()
            reason = (
                f"not enough disk space: weights_every {every} saves {count} times "
                f"{weights_bytes(loop) / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free beside a "
                "checkpoint and the result; raise it, or set output_dir to a folder on another disk"
            )
            raise OSError(errno.ENOSPC, reason, str(self.folder))

    def with_reserve(self, write: Callable[[], Path]) -> Path:
        """Calls `write`. If the disk is full, frees the reserved space and calls it again."""
        try:
            return write()
        except OSError as error:
            if error.errno not in FULL or not self._reserves:
                raise
            self.release()
            return write()

    def release(self) -> None:
        """Frees the reserved space."""
        while self._reserves:
            self._reserves.pop().release()

    def after_step(self, loop: "Loop") -> None:
        """Saves the state if a checkpoint is due, and weights if they are. A failed write is only
        a warning.

        Raises `Diverged` if the state is not finite, before a good checkpoint is replaced.
        """
        every = loop.settings.weights_every
        if every and loop.done % every == 0 and loop.done < loop.settings.steps:
            with loop.events.within_phase("checkpoints"):
                self._save_weights(loop)
        if not self._due(loop.done, loop.settings.steps, loop.settings.checkpoint_every):
            return
        self._time = time.monotonic()
        with loop.events.within_phase("checkpoints"):
            state = self._state(loop)
            try:
                self._write(state, loop, spare=False)
            except Exception as error:
                log.warning(
                    "no checkpoint at step %d: %s. The run continues%s",
                    *(loop.done, error, f"; the last one is {self.newest}" if self.newest else ""),
                )

    def _save_weights(self, loop: "Loop") -> None:
        if not loop.finite():
            raise Diverged(f"the trained weights contain NaN or infinity at step {loop.done}")
        try:
            write_weights_of_step(loop, self.folder.parent / SAVED)
        except Exception as error:
            log.warning("no weights of step %d: %s. The run continues", loop.done, error)

    def finish(self, loop: "Loop") -> None:
        """Saves the state after the last step, independent of `checkpoint_every`."""
        try:
            self.save(loop)
        except Diverged:
            raise
        except Exception as error:  # the weights may still fit
            log.warning("no checkpoint of the last step: %s", error)

    def save(self, loop: "Loop") -> None:
        """Saves the state now, unless its checkpoint is there. Raises what went wrong."""
        if self._step != loop.done:
            self._write(self._state(loop), loop, spare=True)

    def stopped(self, loop: "Loop") -> None:
        """Saves the state of a run that ends with an error. Never raises."""
        for _ in range(_TRIES):
            try:
                self.save(loop)
                log.info("stopped after %d steps; to resume: %s", loop.done, self.newest)
            except Exception as error:  # the error that stopped the run is more important
                log.warning(
                    "stopped after %d steps, and no checkpoint of that step could be written: %s. "
                    "The last one is %s",
                    *(loop.done, error, self.newest),
                )
            except BaseException:  # cancelled again during saving
                continue
            return

    def _due(self, done: int, steps: int, every: int | None) -> bool:
        if every is None:
            tenth = max(1, -(-steps // PARTS))
            return done % tenth == 0 or time.monotonic() - self._time >= SECONDS
        return every > 0 and done % every == 0

    def _state(self, loop: "Loop") -> Checkpoint:
        """The checked state, on the CPU. Raises `Diverged`."""
        state = state_of(loop)
        trained = (state.parameters, state.optimizers, state.averages)
        if not all(is_finite(each) for each in tensors_of(trained)):
            raise Diverged(f"the trained weights contain NaN or infinity at step {loop.done}")
        return state

    def _write(self, state: Checkpoint, loop: "Loop", spare: bool) -> None:
        """`spare`: whether to use the reserved space even if it cannot be reserved again."""
        try:
            self.newest = write_checkpoint(state, self.folder)
        except OSError as error:
            reserve = next(iter(self._reserves), None)
            # Removing an earlier checkpoint frees space for a new reserve.
            if error.errno not in FULL or reserve is None or not (spare or latest(self.folder)):
                raise
            reserve.release()
            self.newest = write_checkpoint(state, self.folder, keep=1)
            try:  # before anything is logged, since the log and the events need room, too
                reserve.take()
            except OSError as full:
                log.warning("the disk is full, and no space can be reserved: %s", full)
            log.warning("the disk is full; only one checkpoint is kept, %s", self.newest)
        self._step = state.step
        loop.events.emit("checkpoint", **file_facts(state.step, self.newest))
        if self.step_weights:
            write_step_weights(loop, self.folder)


def state_of(loop: "Loop") -> Checkpoint:
    """The state of the run, on the CPU."""
    averages = [] if loop.ema is None else loop.ema.shadow_params
    return Checkpoint(
        step=loop.done,
        identity=identity_of(loop),
        parameters=_on_the_cpu(loop.named),
        optimizers=_on_the_cpu({k: each.state_dict() for k, each in loop.optimizers.items()}),
        history=loop.history.plain(),
        averages=_on_the_cpu(dict(zip(loop.named, averages, strict=False))),
        averaged_steps=0 if loop.ema is None else loop.ema.optimization_step,
        best={} if loop.best is None else loop.best.plain(),
        subject_weights={} if loop.preservation is None else loop.preservation.subject_weights,
    )


def identity_of(loop: "Loop") -> dict[str, Any]:
    """The identity of the run in its checkpoints."""
    settings = loop.settings
    if loop.control.planned:  # ended early; a run that is resumed has the same plan
        settings = settings.replace(steps=loop.control.planned)
    return identity(settings) | {"settings": exactness(settings), "data": loop.data}


def _on_the_cpu(value: Any) -> Any:
    """A state with its tensors in CPU memory, without copying those that are."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {name: _on_the_cpu(each) for name, each in value.items()}
    return [_on_the_cpu(each) for each in value] if isinstance(value, (list, tuple)) else value


def checkpoint_bytes(loop: "Loop") -> int:
    """The size of a checkpoint of this run, rounded up."""
    groups = {"lora": loop.lora_parameters, "placeholder": loop.rows}
    groups |= {} if loop.full is None else {"transformer": loop.full.parameters()}
    copies = 1 + (loop.ema is not None) + loop.settings.keep_best
    copies += loop.preservation is not None  # `subject_weights`
    total = 0
    for name, parameters in groups.items():
        for each in parameters:
            state = fresh_state(loop.optimizer_kinds[name], tuple(each.shape))["state"]
            total += sum(value.nbytes for value in tensors_of(state))
            total += each.nbytes * copies
    facts = json.dumps(identity_of(loop), ensure_ascii=False).encode()
    per_step, per_parameter = 100, 2000  # bytes of the header
    header = len(facts) + per_step * loop.settings.steps + per_parameter * len(loop.parameters)
    return total + 2 * header + 65_536


def weights_bytes(loop: "Loop") -> int:
    """The size of weights.zip, or of the folder of a full training, rounded up."""
    model = 0
    if loop.full is not None:
        model = sum(each.nbytes + 400 for each in loop.full.transformer.parameters())
    # bfloat16; the norms of DoRA, of one column, are float32
    lora = sum(each.numel() * (2 + 2 * (each.shape[1] == 1)) + 400 for each in loop.lora_parameters)
    rows = sum(each.nbytes for each in loop.rows)
    texts = {sample.name: sample.caption for sample in loop.samples}
    captions = sum(len(text.encode()) + len(name.encode()) for name, text in texts.items())
    return model + lora + rows + 2 * captions + 100 * len(texts) + 65_536
