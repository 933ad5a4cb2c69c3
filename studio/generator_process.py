"""python -m studio.generator_process: generates the images of jobs, with one model in memory.

It has the GPU's lock until its end, and ends when there was nothing to do for ten minutes.
"""

import json
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from studio.worker import Pipe

IDLE = 600.0  # seconds


class Cancelled(Exception):
    """The job was cancelled between two images."""


def main(generate: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> None:
    """Answers requests until the input ends, or until nothing was asked for a while.

    generate: writes one image of a job, and returns what the server is told of it.
    """
    cancelled: set[str] = set()

    def at_once(request: dict[str, Any]) -> bool:
        if request["do"] == "cancel":
            cancelled.add(request["job"])
        return bool(request["do"] == "cancel")

    pipe = Pipe(at_once)
    for request in pipe.requests(IDLE):
        try:
            for image in request["images"]:
                if request["job"] in cancelled:
                    raise Cancelled
                begun = time.perf_counter()
                facts = (generate or _generate)(image)
                pipe.write(number=image["number"], **facts)
                print(f"{image['file']}: {time.perf_counter() - begun:.2f} s", file=sys.stderr)
            pipe.write(answer={"state": "done"})
        except Cancelled:
            pipe.write(answer={"state": "canceled"})
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            text = str(error) or type(error).__name__
            pipe.write(answer={"state": "failed", "error": text})


@cache
def _engine() -> Any:
    """The engine of `inference`; the GPU is locked before it is used."""
    from families.gpu_lock import own_gpu

    own_gpu("generator", "studio")
    from inference.engine import Engine

    return Engine()


def _generate(image: dict[str, Any]) -> dict[str, Any]:
    """Generates one image, and writes it with its settings: in the file, and beside it."""
    from adapters.files.atomic import atomic_file
    from inference.image_metadata import JSON, TEXT, options
    from inference.images import read_image
    from inference.request import Request

    engine = _engine()
    archives = [engine.read(Path(path)) for path in image["weights"]]
    first, extra = (*archives, None, None)[:2]
    inputs: dict[str, Any] = {
        name: [read_image(one, name) for one in each]
        if isinstance(each, list)
        else read_image(each, name)
        for name, each in image.get("inputs", {}).items()
    }
    begun = time.perf_counter()
    [made] = engine.generate(
        Request(**image["request"], **inputs), first, image["base_model"], extra
    )
    texts = {name: made.info[name] for name in (TEXT, JSON)}
    path = Path(image["file"])
    with atomic_file(path) as file:
        made.save(file, format="png", **options(texts, "png"))
    used = json.loads(texts[JSON])
    facts = {
        "seconds": round(time.perf_counter() - begun, 3),
        "settings": {**image["settings"], "used": used},
    }
    with atomic_file(path.with_suffix(".json")) as file:
        file.write(json.dumps(facts["settings"], indent=1).encode(errors="backslashreplace"))
    return {**facts, "base_model": used["base_model"]}


if __name__ == "__main__":
    main()
