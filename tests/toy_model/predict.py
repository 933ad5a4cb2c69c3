"""A model that loads at once and does what its prompt says, for tests of the server around it."""

import logging
import os
import tempfile
import time
from typing import List, Optional

from cog import BasePredictor, Input, Path, Secret

from serving.inputs import entry_point


class Predictor(BasePredictor):
    @entry_point
    def setup(self, weights: Optional[str] = None) -> None:
        if os.environ.get("BROKEN_SETUP"):
            raise OSError("there is no /secret/model")

    @entry_point
    def predict(
        self,
        prompt: str = Input(description="What to do.", default=""),
        image: Optional[Path] = Input(description="A file.", default=None),
        images: List[Path] = Input(description="Several files.", default=[]),
        token: Optional[Secret] = Input(description="A key.", default=None),
        seed: int = Input(description="A number.", default=0, ge=0),
    ) -> List[Path]:
        if prompt == "leak" and token is not None:
            raise RuntimeError(f"401 for https://h.example/{token.get_secret_value()}")
        if prompt == "type":
            raise ValueError(f"the seed is {seed!r}")
        return act(prompt, image, images)


def act(prompt: str, image: Optional[Path], images: List[Path]) -> List[Path]:
    log = logging.getLogger("toy")
    log.info("begin %s in %s", prompt, __file__)
    print("printed in", __file__)
    if prompt == "sleep":
        while True:
            time.sleep(0.01)
    if prompt == "deaf":  # to a cancellation
        while True:
            try:
                while True:
                    time.sleep(0.01)
            except BaseException:
                pass
    if prompt == "die":
        os.kill(os.getpid(), 9)
    if prompt == "fail":
        raise ValueError(f"{image}: is bad\n- at {__file__}\n- and {os.path.basename(str(image))}")
    if prompt == "stumble":
        raise KeyError("a mistake")
    if prompt == "warn":
        try:
            raise OSError(f"nothing at {__file__}")
        except OSError:
            log.warning("went wrong", exc_info=True)
    if prompt.startswith("echo"):
        log.info("%s", prompt)
        raise ValueError(f"{prompt} is not a prompt")
    output = Path(tempfile.mkdtemp()) / "output.bin"
    output.write_bytes(b"|".join(open(each, "rb").read() for each in [image, *images] if each))
    return [output]
