"""Events of a run, and the commands it executes between two steps."""

import logging
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from families.out_of_memory import free_frames, is_out_of_memory
from trainer.events import Events
from trainer.inbox import Command, Inbox
from trainer.learning.distributed import processes
from trainer.learning.step_weights import write_weights_of_step
from trainer.run_files import SAVED

if TYPE_CHECKING:
    from trainer.learning.loop import Loop
    from trainer.learning.saving import Saver

log = logging.getLogger(__name__)

LOOK = 0.1  # seconds between two checks for commands while a run is paused


class Stopped(RuntimeError):
    """The run was ended by a command. It can be resumed from its checkpoint."""

    def __init__(self, message: str, freed: bool = False) -> None:
        super().__init__(message)
        self.freed = freed  # a pause that frees the memory


class Refused(Exception):
    """The reason why a command is not executed."""


Preview = Callable[["Loop", Command], None]


class Control:
    """The events and commands of one run. By default, none are written or read."""

    def __init__(self, events: Events | None = None, inbox: Inbox | None = None) -> None:
        self.events, self._inbox = events or Events(), inbox or Inbox()
        self._waiting: list[Command] = []  # taken, not yet executed
        self.begun, self.early = time.monotonic(), False  # early: ended before the last step
        self.why = ""  # early_stopping's reason
        self.planned = 0  # steps, if it ends early
        self.preview: Preview | None = None  # generates images; raises an error with the reason

    def phase(self, name: str, done: int | None = None, of: int | None = None) -> None:
        """Emits a phase before the first step. Raises `Stopped` on a stop command.

        Other commands wait for the first step.
        """
        self.events.phase(name, done, of)
        self._waiting += self._take()
        for command in self._waiting:
            if command.do == "stop" and not command.keep:
                self._waiting.remove(command)
                self.events.emit("stopping", step=0)
                self._answer(command)
                log.info("stopped before the first step")
                raise Stopped("stopped before the first step")

    def between_steps(self, loop: "Loop", saver: "Saver | None") -> None:
        """Executes the new commands. Raises `Stopped` if one ends the run."""
        for command in self._commands():
            self._do(command, loop, saver)

    def end_early(self, loop: "Loop", why: str) -> None:
        """Makes the current step the last one (`early_stopping`)."""
        self.early, self.why, self.planned = True, why, loop.settings.steps
        loop.history.read()  # so that the losses of all steps are in events
        loop.settings = loop.settings.replace(steps=loop.done)
        self.events.emit("stopping", step=loop.done, keep=True, why=why)
        log.info("%s", why)

    def end(self) -> None:
        """Refuses commands that came too late."""
        for command in self._commands():
            self._answer(command, "the run has ended")

    def _commands(self) -> Iterator[Command]:
        """The waiting commands in order, one at a time."""
        self._waiting += self._take()
        while self._waiting:
            yield self._waiting.pop(0)

    def _take(self) -> list[Command]:
        right = []
        for command, fault in self._inbox.take():
            if not fault and command.do != "save" and processes().num_processes > 1:
                fault = (
                    "a run of several processes cannot do this; end it with Ctrl-C or SIGTERM, "
                    "which save its state"
                )
            if fault:
                self._answer(command, fault)
            else:
                right.append(command)
        return right

    def _do(self, command: Command, loop: "Loop", saver: "Saver | None") -> None:
        try:
            if command.do == "save":
                self._save(loop, saver)
            elif command.do == "preview":
                self._preview(command, loop)
            elif command.do == "pause" and command.free:
                self._pause_and_end(command, loop, saver)
            elif command.do == "pause":
                with self.events.within_phase("paused"):
                    self._pause(command, loop, saver)
                return
            elif command.do == "stop" and not command.keep:
                self.events.emit("stopping", step=loop.done)
                self._answer(command)
                raise Stopped(f"stopped after {loop.done} steps")
            elif command.do == "stop":
                # One more step, so that everything due after the last step is done.
                last = min(loop.done + 1, loop.settings.steps)
                self.early, self.planned = last < loop.settings.steps, loop.settings.steps
                loop.settings = loop.settings.replace(steps=last)
                self.events.emit("stopping", step=loop.done, keep=True)
                log.info("stopping after step %d", last)
            else:
                raise Refused("the run is not paused")
        except Refused as refused:
            self._answer(command, str(refused))
        else:
            self._answer(command)

    def _save(self, loop: "Loop", saver: "Saver | None") -> None:
        try:
            assert saver is not None
            path = write_weights_of_step(loop, saver.folder.parent / SAVED)
        except Exception as error:
            log.warning("could not save the weights of step %d: %s", loop.done, error)
            raise Refused(f"the weights cannot be written: {error}") from error
        log.info("saved the weights of step %d as %s", loop.done, path)

    def _preview(self, command: Command, loop: "Loop") -> None:
        try:
            assert self.preview is not None
            with self.events.within_phase("previews"):
                self.preview(loop, command)
        except Exception as error:
            reason = "out of memory" if is_out_of_memory(error) else str(error)
            free_frames(error)
            log.warning("no preview at step %d: %s", loop.done, reason)
            raise Refused(f"no image was generated: {reason}") from None

    def _pause_and_end(self, command: Command, loop: "Loop", saver: "Saver | None") -> None:
        try:
            assert saver is not None
            saver.save(loop)
        except Exception as error:  # ending without one would lose steps
            raise Refused(f"no checkpoint can be written: {error}") from error
        self.events.emit("pausing", step=loop.done)
        self._answer(command)
        raise Stopped(f"paused after {loop.done} steps; its memory is free", freed=True)

    def _pause(self, asked: Command, loop: "Loop", saver: "Saver | None") -> None:
        """Waits between two steps until it is resumed; everything stays in memory."""
        self.events.emit("pausing", step=loop.done)
        self.events.emit("paused", step=loop.done, kept=True)
        self._answer(asked)
        log.info("paused after %d steps; the memory stays in use", loop.done)
        while True:
            command = next(self._commands(), None)
            if command is None:
                time.sleep(LOOK)
            elif command.do == "resume" or command.keep:
                break
            elif command.do == "pause" and not command.free:
                self._answer(command, "the run is paused already")
            else:
                self._do(command, loop, saver)
        self.events.emit("resumed", step=loop.done)
        log.info("resumed after %d steps", loop.done)
        if command.keep:
            self._do(command, loop, saver)
        else:
            self._answer(command)

    def _answer(self, command: Command, refused: str = "") -> None:
        facts = {"why": refused} if refused else {}
        accepted = not refused
        self.events.emit("command", id=command.key, do=command.do, accepted=accepted, **facts)
