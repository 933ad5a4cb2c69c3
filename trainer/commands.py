"""Commands to a run: pause, resume, stop, save, preview. Does not import PyTorch.

Each takes the run's folder or its name in `outputs/`, and raises `CommandRefused` with the reason
and the commands that are possible.
"""

import argparse
import difflib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainer.events import read_events
from trainer.inbox import Command, put
from trainer.outputs import OUTPUTS
from trainer.run_files import CHECKPOINTS, checkpoints_in, listed, record_of
from trainer.settings import Settings, TrainingInputs, resolve
from trainer.state import RunState, run_state

PATIENCE = 2.0  # seconds to wait for the run's answer; a step may take longer
SHOWN = 5  # runs in the message if one is not found


class CommandRefused(ValueError):
    """The command is not possible. The message says why and what is."""


def pause(name: str | Path, free: bool = False) -> str:
    """Pauses a run between two steps. Returns the new state as text.

    With `free`, the run writes a checkpoint and ends its process, which frees its memory.
    """
    return _give(name, Command("pause", free=free))


def stop(name: str | Path, keep: bool = False) -> str:
    """Stops a run with a checkpoint; with `keep`, after one more step with weights and report."""
    return _give(name, Command("stop", keep=keep))


def save(name: str | Path) -> str:
    """Saves the current weights to `saved/step-NNNNNN.zip`; the run continues.

    A full training saves the folder `saved/step-NNNNNN`, as large as the model.
    """
    return _give(name, Command("save"))


def preview(name: str | Path, prompt: str | None = None, seed: int | None = None) -> str:
    """Generates the preview images now; with a prompt, one image of it in `generated/`."""
    return _give(name, Command("preview", prompt=prompt, seed=seed))


def resume(name: str | Path) -> str | Settings:
    """Resumes a run. Returns the new state as text if its paused process continues.

    If a new process is needed, returns the settings of run.json with the newest checkpoint; of a
    queued run, the settings with which it begins.
    """
    folder, state = _find(name)
    if state.state == "paused":
        return _give(folder, Command("resume"))
    _check_allowed(folder, state, "resume")
    return settings_of(folder) if state.state == "queued" else settings_to_resume(folder)


def settings_to_resume(folder: Path) -> Settings:
    """The settings of a run, for resuming it in the same folder."""
    if not checkpoints_in(folder / CHECKPOINTS):
        raise CommandRefused(f"{folder} has no checkpoint to resume from; start the run again")
    return settings_of(folder, resume_from=folder / CHECKPOINTS)


def settings_of(folder: Path, **changes: Any) -> Settings:
    """The settings in run.json, for a run in the same folder."""
    facts = record_of(folder)
    try:
        given, used = facts["settings"]["given"], facts["settings"]["used"]
        inputs: dict[str, Any] = {**given, "dataset": facts["dataset"]["path"]}
        if inputs.get("base_model", "auto") == "auto":  # it could choose another one now
            inputs["base_model"] = used["base"]
        if inputs.get("controls"):
            inputs["controls"] = used["controls"]  # absolute, as the dataset
    except (KeyError, TypeError) as error:
        raise CommandRefused(
            f"{folder}/run.json does not contain the run's settings; "
            f"train with resume_from: {folder / CHECKPOINTS}"
        ) from error
    inputs |= {"output_dir": folder, **changes}
    try:
        return resolve(TrainingInputs(**inputs))
    except ValueError as error:
        raise CommandRefused(f"{folder}/run.json: {error}") from error


_CALLS: dict[str, tuple[Callable[..., str | Settings], str]] = {
    "pause": (pause, "Pause a run between two steps; its memory stays in use."),
    "resume": (resume, "Resume a run that was paused, stopped or killed, or that failed."),
    "stop": (stop, "Write a checkpoint and stop a run."),
    "save": (save, "Write the current weights to saved/step-NNNNNN.zip; the run continues."),
    "preview": (preview, "Generate the preview images now; the run continues."),
}


def command_parser() -> argparse.ArgumentParser:
    """The command line of `pause RUN` and the like."""
    parser = argparse.ArgumentParser(prog="zeroprior")
    commands = parser.add_subparsers(dest="do", required=True, metavar="COMMAND")
    for name, (_, text) in _CALLS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("name", metavar="RUN", help="its folder, or its name in outputs/")
        if name == "pause":
            text = "free the memory: write a checkpoint, end the process"
            command.add_argument("--free", action="store_true", help=text)
        if name == "stop":
            text = "also write weights.zip, checks and report"
            command.add_argument("--keep", action="store_true", help=text)
        if name == "preview":
            text = "one image of this prompt, in generated/, instead of the preview images"
            command.add_argument("--prompt", help=text)
            command.add_argument("--seed", type=int, help="of that image; default: the run's")
    return parser


def command_line(arguments: Sequence[str]) -> Settings | None:
    """Executes `pause RUN` and the like, and prints the result.

    Returns settings if a run is to be resumed in this process.
    """
    given = vars(command_parser().parse_args(arguments))
    call, _ = _CALLS[given.pop("do")]
    done = call(**given)
    if isinstance(done, Settings):
        return done
    print(done)
    return None


def _find(name: str | Path) -> tuple[Path, RunState]:
    """The folder of a run and its state."""
    for folder in (OUTPUTS / name, Path(name)):
        state = run_state(folder)
        if state is not None:
            return folder.resolve() if folder.is_symlink() else folder, state
    known = [each.name for each in listed(OUTPUTS) if not each.is_symlink() and run_state(each)]
    near = difflib.get_close_matches(str(name), known, 1, cutoff=0.4)
    hint = f"the newest are: {', '.join(reversed(known[-SHOWN:]))}" if known else "it is empty"
    if near:
        hint = f"did you mean {near[0]}?"
    raise CommandRefused(f"there is no run {name} in {OUTPUTS}/; {hint}")


def _check_allowed(folder: Path, state: RunState, do: str) -> None:
    if do not in state.allowed:
        can = f"possible now: {', '.join(state.allowed) or 'nothing'}"
        raise CommandRefused(f"cannot {do} {folder.name}, which is {state}; {can}")


def _give(name: str | Path, command: Command) -> str:
    """Sends a command and waits up to `PATIENCE` for the answer."""
    folder, state = _find(name)
    _check_allowed(folder, state, command.do)
    put(folder, command)
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        for event in read_events(folder):
            if event["type"] == "command" and event.get("id") == command.key:
                if not event.get("accepted"):
                    raise CommandRefused(f"{folder.name}: {event.get('why')}")
                return f"{folder.name}: {_became(folder, command)}"
        time.sleep(0.05)
    return f"{folder.name}: will {command.do} after the current step or preview"


def _became(folder: Path, command: Command) -> str:
    if command.do == "preview":
        found = [each for each in read_events(folder) if each["type"] in ("preview", "generated")]
        return f"generated {folder / str(found[-1]['file'])}"
    if command.do == "save":
        saved = [each for each in read_events(folder) if each["type"] == "saved"]
        return f"saved {folder / str(saved[-1]['file'])}"
    return str(run_state(folder))
