"""python -m studio.captioner_process: captions of a dataset, by a model that sees images.

The server saves them: it knows what was edited meanwhile, and keeps what is needed to undo all. The
process has the GPU's lock until its end, and the server ends it after each dataset.
"""

import logging
import sys
import traceback
from pathlib import Path
from typing import Any

from studio.worker import Pipe


def main() -> None:
    """Answers requests until the input ends."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pipe = Pipe()
    for request in pipe.requests():
        try:
            pipe.write(answer=_write(request, pipe))
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            pipe.write(answer={"error": str(error) or type(error).__name__})


def _write(request: dict[str, Any], pipe: Pipe) -> dict[str, Any]:
    """Writes captions; returns what the page says of them. Raises what the command prints."""
    from families.gpu_lock import own_gpu
    from families.registry import find_base
    from trainer.captions import STYLE_SET, SUBJECT_SET, Wishes, caption_dataset

    folder = Path(request["folder"])
    own_gpu("captioner", f"the captions of {folder.name}")
    wishes = Wishes(
        STYLE_SET if request["style"] else SUBJECT_SET,
        request["kind"],
        tuple(request["avoid"]),
        overwrite=request["all"],
    )
    _, found = caption_dataset(
        folder,
        find_base(request["base"]),
        wishes,
        request["model"],
        progress=lambda done, of: pipe.write(done=done, of=of),
        save=lambda image, caption: pipe.write(image=image, caption=caption),
    )
    return {
        "marked": len(found.marked),
        "subject": not request["style"],
        "avoided": list(found.identity.avoid),
    }


if __name__ == "__main__":
    main()
