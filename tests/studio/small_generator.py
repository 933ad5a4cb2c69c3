"""A generator without a model, for tests of what is around it; `slow` in a prompt takes a while."""

import os
import time
from pathlib import Path
from typing import Any

from studio.worker import Pipe


def main() -> None:
    cancelled: set[str] = set()

    def at_once(request: dict[str, Any]) -> bool:
        if request["do"] == "cancel":
            cancelled.add(request["job"])
        return bool(request["do"] == "cancel")

    pipe = Pipe(at_once)
    for request in pipe.requests():
        state = "done"
        for image in request["images"]:
            prompt = image["settings"]["prompt"]
            if "crash" in prompt and image["number"] == 2:
                os.kill(os.getpid(), 9)
            time.sleep(0.2 if "slow" in prompt else 0.01)
            if request["job"] in cancelled:
                state = "canceled"
                break
            Path(image["file"]).write_bytes(b"image")
            facts = {"settings": image["settings"], "seconds": 0.01}
            pipe.write(number=image["number"], base_model="zeroprior/miniature-turbo", **facts)
        pipe.write(answer={"state": state})


if __name__ == "__main__":
    main()
