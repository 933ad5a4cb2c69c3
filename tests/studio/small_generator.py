"""A generator without a model, for tests of what is around it; `slow` in a prompt takes a while."""

import os
import time
from pathlib import Path
from typing import Any

import small_gpu
from PIL import Image

from adapters.files.atomic import atomic_file
from studio.generator_process import main


def generate(image: dict[str, Any]) -> dict[str, Any]:
    small_gpu.own("generator", "studio")
    prompt = image["settings"]["prompt"]
    if "crash" in prompt and image["number"] == 2:
        os.kill(os.getpid(), 9)
    time.sleep(0.2 if "slow" in prompt else 0.01)
    with atomic_file(Path(image["file"])) as file:
        if image["inputs"]:
            with Image.open(image["inputs"]["reference_images"][-1]) as last:
                size = image["request"]["width"], image["request"]["height"]
                last.resize(size).save(file, format="png")
        else:
            file.write(b"image")
    model = "zeroprior/miniature-turbo"
    return {"settings": image["settings"], "seconds": 0.01, "base_model": model}


if __name__ == "__main__":
    main(generate)
