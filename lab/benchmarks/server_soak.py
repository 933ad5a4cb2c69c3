"""python -m lab.benchmarks.server_soak: a real Cog server under mixed, untrusted requests.

Images on several bases, of several sizes, with no, one or two LoRAs by path or by value; requests
that are refused; requests that are cancelled at a random moment: all in random order. Every image
is compared with that of an engine that has generated nothing else. What the server's processes hold
(memory, threads, open files) is compared after every request has come once, and at the end; its
folder of temporary files is looked into.

`make soak` runs it for a while. $MODEL_VAULT adds the bases that it holds.
"""

import argparse
import base64
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from inference.engine import Engine
from inference.inputs import GenerationInputs
from lab.benchmarks.soak import CPU, OTHER, SCALES, TURBO, write_loras

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
from cog_server import PREFER_ASYNC, CogServer, Webhooks, copy_of_the_code  # noqa: E402

Inputs = dict[str, Any]
PICTURES = "zeroprior-images-"  # folders of generated images, kept for an hour
REFUSED: tuple[Inputs, ...] = (
    {"width": 31},
    {"num_outputs": 9},
    {"output_format": "gif"},
    {"lora_weights": "/etc/passwd"},
    {"lora_weights": "loras/none.zip"},
    {"lora_weights": "loras/broken.zip"},
    {"lora_weights": "http://127.0.0.1/weights.zip"},
    {"replicate_weights": "data:application/zip;base64,UEsDBBQAAAA="},
    {"image": "data:image/png;base64,iVBORw0KGgo="},
    {"extra_lora_scale": 1.0},
    {"width": 64, "aspect_ratio": "1:1"},
    {"lora_weights": "loras/00.zip", "base_model": "qwen-image"},
)


@dataclass(frozen=True)
class Held:
    """What the server and its worker hold."""

    memory: float  # MB, resident
    threads: int
    files: int  # open ones


@dataclass
class Report:
    """What a soak found."""

    answers: Counter[str]  # drawn, refused, canceled, too late (done before it was cancelled)
    wrong: list[Inputs]  # requests whose images are not those of a fresh engine
    strange: list[str]  # answers that no such request should have
    early: Held  # when every distinct request has come once
    late: Held  # at the end
    left: list[str]  # temporary files other than images
    seconds: float


def drawable(loras: Sequence[Path], bases: Sequence[str], count: int, seed: int) -> list[Inputs]:
    """Different requests; the LoRAs are in `loras/` of the working folder."""
    chance = random.Random(seed)
    asks: list[Inputs] = []
    for number in range(count):
        ask: Inputs = {
            "prompt": f"a red circle, <word{chance.randrange(7)}>",
            "seed": number,
            "base_model": bases[number % len(bases)],
            "width": chance.choice((32, 48, 64, 96)),
            "height": chance.choice((32, 64)),
            "num_outputs": chance.choice((1, 1, 2)),
            "num_inference_steps": chance.choice((1, 2, 3)),
            "output_format": "png",
        }
        if ask["base_model"] in (TURBO, OTHER):
            files = chance.sample(loras, 2)
            if chance.random() < 0.7:
                ask |= {"replicate_weights": f"loras/{files[0].name}"}
                ask |= {"lora_scale": chance.choice(SCALES)}
            elif chance.random() < 0.5:
                content = base64.b64encode(files[0].read_bytes()).decode()
                ask |= {"lora_weights": f"data:application/zip;base64,{content}"}
            if chance.random() < 0.3:
                ask |= {"extra_lora": f"loras/{files[1].name}"}
        asks.append(ask)
    return asks


def fresh(ask: Inputs) -> list[bytes] | None:
    """The pixels that an engine with no past draws; None where it refuses."""
    try:
        files = Engine(CPU, torch.float32).predict(GenerationInputs(**ask), any_file=True)
    except ValueError:
        return None
    generated = [pixels(file.read_bytes()) for file in files]
    shutil.rmtree(files[0].parent)
    return generated


def pixels(content: bytes) -> bytes:
    with Image.open(io.BytesIO(content)) as image:
        return image.tobytes()


def held(server: CogServer) -> Held:
    """Read from /proc, over every process of the server's session."""
    memory = threads = files = 0
    page = os.sysconf("SC_PAGE_SIZE")
    for process in Path("/proc").iterdir():
        try:
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) != server.session:
                continue
            memory += int((process / "statm").read_text().split()[1]) * page
            threads += int(fields[17])
            files += len(list((process / "fd").iterdir()))
        except (OSError, IndexError):  # not a process, or gone meanwhile
            continue
    return Held(memory / 2**20, threads, files)


class Client:
    """Asks one server, and judges its answers."""

    def __init__(self, server: CogServer, hooks: Webhooks, wanted: Mapping[str, Any]) -> None:
        self.server, self.hooks, self.wanted = server, hooks, wanted
        self.answers: Counter[str] = Counter()
        self.wrong: list[Inputs] = []
        self.strange: list[str] = []

    def draw(self, ask: Inputs) -> None:
        """A request whose image is known."""
        self.server.wait_idle()
        answer = self.server.post("/predictions", {"input": ask}).json()
        self._judge(ask, answer)

    def refuse(self, ask: Inputs) -> None:
        """A request that must be refused, with a reason."""
        self.server.wait_idle()
        reply = self.server.post("/predictions", {"input": {"prompt": "a red circle"} | ask})
        said = reply.json()
        reason = said.get("detail") if reply.status_code == 422 else said.get("error")
        if not reason or said.get("status") == "succeeded":
            self.strange.append(f"{ask}: {said}"[:300])
        self.answers["refused"] += 1

    def cancel(self, ask: Inputs, after: float) -> None:
        """A request of many steps that is cancelled after so many seconds."""
        self.server.wait_idle()
        self.hooks.bodies.clear()
        longer = ask | {"num_inference_steps": 200}
        request = {"input": longer, "webhook": self.hooks.url}
        started = self.server.post("/predictions", request, PREFER_ASYNC).json()
        time.sleep(after)
        self.server.post(f"/predictions/{started['id']}/cancel")
        status = self.hooks.finished(60)["status"]
        if status not in ("canceled", "succeeded", "failed"):
            self.strange.append(f"cancelled: {status}")
        self.answers["canceled" if status == "canceled" else "too late"] += 1

    def _judge(self, ask: Inputs, answer: dict[str, Any]) -> None:
        wanted = self.wanted[json.dumps(ask)]
        if answer["status"] == "failed" and wanted is None:
            self.answers["refused"] += 1  # two LoRAs that bring the same word, or the like
            return
        if answer["status"] != "succeeded":
            self.strange.append(f"{ask}: {answer}"[:300])
            return
        urls = [url.split(",", 1)[1] for url in answer["output"]]
        if [pixels(base64.b64decode(url)) for url in urls] != wanted:
            self.wrong.append(ask)
        self.answers["drawn"] += 1


def soak(
    seconds: float, distinct: int, seed: int, folder: Path, bases: Sequence[str] = (TURBO, OTHER)
) -> Report:
    """Every distinct request once, then random ones for so long."""
    code, temporary = copy_of_the_code(folder), folder / "tmp"
    temporary.mkdir()
    (code / "loras").mkdir()
    loras = write_loras(code / "loras", 8, seed)[:-1]
    asks = drawable(loras, bases, distinct, seed)
    here = Path.cwd()
    os.chdir(code)  # where the requests' paths lead
    try:
        wanted = {json.dumps(ask): fresh(ask) for ask in asks}
    finally:
        os.chdir(here)
    env = {"BASE_MODEL": TURBO, "HF_HUB_OFFLINE": "1", "TMPDIR": str(temporary)}
    env |= {"ZEROPRIOR_FILES": str(code)}  # the requests name their LoRAs by path
    env |= {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    env |= {"ZEROPRIOR_FILES": str(code)}  # the requests name files in it
    chance, start = random.Random(seed), time.monotonic()
    with Webhooks() as hooks, CogServer("predict", env, code) as server:
        client = Client(server, hooks, wanted)
        for ask in asks:
            client.draw(ask)
        for ask in REFUSED:
            client.refuse(ask)
        client.cancel(asks[0], 0.3)
        early, end = held(server), time.monotonic() + seconds
        while time.monotonic() < end:
            kind = chance.random()
            if kind < 0.7:
                client.draw(chance.choice(asks))
            elif kind < 0.85:
                client.refuse(chance.choice(REFUSED))
            else:
                client.cancel(chance.choice(asks), chance.uniform(0, 1))
        client.draw(asks[0])
        late = held(server)
        left = [
            str(file.relative_to(temporary))
            for file in temporary.rglob("*")  # files: the running front has a folder for its own
            if file.is_file() and not file.relative_to(temporary).parts[0].startswith(PICTURES)
        ]
    taken = time.monotonic() - start
    return Report(client.answers, client.wrong, client.strange, early, late, left, taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--distinct", type=int, default=60, help="different pictures to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bases", nargs="+", default=[TURBO, OTHER])
    options = parser.parse_args()
    torch.set_num_threads(1)  # as the server has: with another number some pixels round otherwise
    with tempfile.TemporaryDirectory() as folder:
        found = soak(**vars(options), folder=Path(folder))
    answers = ", ".join(f"{count} {what}" for what, count in found.answers.items())
    print(f"{answers} in {found.seconds:.0f} s")
    print(f"{len(found.wrong)} unlike those of a fresh engine, {len(found.strange)} not understood")
    print(f"after the first round {found.early}\nat the end            {found.late}")
    print(f"temporary files left: {found.left or 'none'}")
    print(*found.strange, sep="\n")
    sys.exit(bool(found.wrong or found.strange or found.left))


if __name__ == "__main__":
    main()
