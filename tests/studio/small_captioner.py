"""A captioner without a model: all else is real. `$SMALL_CAPTIONER` is a folder.

With a file named `slow` in it, an answer takes a while.
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import small_gpu

from families import gpu_lock
from families.captioners import Answer, Question
from studio.captioner_process import main
from trainer.captions import captioning
from trainer.captions.log import Log
from trainer.captions.writing import Wishes, Writer


class Scripted:
    """Answers as a model with trained weights may; wrong about dark images."""

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        folder = Path(os.environ["SMALL_CAPTIONER"])
        if (folder / "slow").exists():
            time.sleep(0.2)
        return [Answer(self._text(each), True) for each in questions]

    def _text(self, question: Question) -> str:
        if "features:" in question.text:
            return "kind: robot\nfeatures: red, round head"
        red, green, _ = question.images[0].resize((1, 1)).getpixel((0, 0))
        if green < 50:
            return "The red robot stands on a wooden table, beside a small blue cup."
        return f"TOK stands at the sea near {red} lamps and {green} birds, seen from afar"


def scripted(
    log: Log, wishes: Wishes, name: str, load: object, progress: Callable[[int, int], Any]
) -> Writer:
    return Writer(log, wishes, name, lambda: (Scripted(), 1), progress)


if __name__ == "__main__":
    gpu_lock.own_gpu = small_gpu.own  # type: ignore[assignment]
    captioning.Writer = scripted  # type: ignore[assignment, misc]
    main()
