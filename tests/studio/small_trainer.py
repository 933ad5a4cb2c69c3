"""python small_trainer.py FOLDER: a trainer without a model, for tests of what is around it.

It takes the run's lock, writes events and executes commands as `trainer` does, in a tenth of a
second; a checkpoint is an empty file. `steps` and `seconds` per step are in run.json.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import small_gpu

from trainer.events import Events
from trainer.inbox import Inbox
from trainer.lock import Lock, claim_handed_down
from trainer.run_files import checkpoints_in, record_of


def process_facts() -> dict[str, object]:
    stat = Path("/proc/self/stat").read_text()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {"pid": os.getpid(), "boot": boot, "start": int(stat.rpartition(")")[2].split()[19])}


def main(folder: Path) -> None:
    claim_handed_down()
    lock = Lock.take(folder)
    small_gpu.own("run", folder.name)
    events, inbox = Events(folder), Inbox(folder)
    for command, _ in inbox.take():
        events.emit("command", id=command.key, do=command.do, accepted=False, why="too late")
    used = record_of(folder)["settings"]["used"]
    steps, seconds = used["steps"], used["placeholder_learning_rate"]
    events.emit("started", **process_facts())
    if used["rank"] == 13:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # is left behind
    if used["rank"] == 14:  # does not listen
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    found = checkpoints_in(folder / "checkpoints")
    step = int(found[-1].stem[5:]) if found else 0
    if step:
        events.emit("resumed", step=step)
    events.phase("training")

    def save() -> None:
        path = folder / "checkpoints" / f"step-{step:06d}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
        events.emit("checkpoint", step=step, file=f"checkpoints/{path.name}", bytes=0)

    paused = False
    while step < steps:
        time.sleep(seconds)
        if not paused:
            step += 1
            if step % 10 == 0:
                save()
            events.emit("steps", **{"from": step}, loss=[1 / step], seconds=seconds)
        for command, _ in inbox.take():
            if command.do == "pause" and command.free:
                time.sleep(0.5 * (used["rank"] == 16))  # a checkpoint that takes long
                save()
                events.emit("pausing", step=step)
            events.emit("command", id=command.key, do=command.do, accepted=True)
            if command.do == "preview":
                path = folder / "generated" / f"step-{step:06d}-{len(command.key)}.png"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(b"image")
                facts = {"id": command.key, "prompt": command.prompt, "seed": command.seed}
                facts |= {"width": 64, "height": 48, "steps": 8, "guidance_scale": 1.0}
                facts |= {"negative_prompt": "", "lora_scale": 0.75}
                events.emit("generated", step=step, file=f"generated/{path.name}", **facts)
            if command.do == "pause" and not command.free:
                events.emit("paused", step=step, kept=True)
                paused = True
            elif command.do == "resume":
                events.emit("resumed", step=step)
                paused = False
            elif command.do in ("stop", "pause"):
                if command.do == "stop":
                    save()
                ended = "stopped" if command.do == "stop" else "paused"
                events.emit(ended, step=step, kept=False)
                return
    save()
    (folder / "weights.zip").write_bytes(b"")
    events.emit("done", step=steps)
    events.close()
    if used["rank"] == 15:
        time.sleep(600)  # does not end
    lock.release()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
