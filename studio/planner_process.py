"""python -m studio.planner_process: plans of runs and numbers of tokens, with PyTorch on the CPU.

What a plan depends on is counted once; other changes of the settings use it again.
"""

import os
import sys
import traceback
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from studio.worker import Pipe

Call = Callable[[dict[str, Any]], dict[str, Any]]


def main() -> None:
    """Answers requests until the input ends."""
    pipe = Pipe()
    import torch

    torch.set_num_threads(1)
    from trainer.memory import Plans  # takes seconds, so before the first request

    calls: dict[str, Call] = {"plan": partial(_plan, Plans()), "tokens": tokens}
    for request in pipe.requests():
        try:
            pipe.write(answer=calls[request["do"]](request))
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            reason = str(error) or type(error).__name__
            pipe.write(answer={"error": reason, "kind": type(error).__name__})


def _plan(plans: Any, request: dict[str, Any]) -> dict[str, Any]:
    from trainer.settings import TrainingInputs, for_pairs, high_rates, resolve

    settings, controls = resolve(TrainingInputs(**request["settings"])), request["controls"]
    settings = for_pairs(settings, controls) if controls else settings
    settings = settings.for_images(request["images"])
    found: dict[str, Any] = plans.plan(settings)
    lines = high_rates(settings)
    return {**found, "steps": settings.steps, "warnings": [{"text": line} for line in lines]}


def tokens(request: dict[str, Any]) -> dict[str, Any]:
    """The number of tokens of each text, and the first words that are cut off from it.

    Null if the tokenizer is not on this machine.
    """
    import torch

    from families.registry import find_base
    from families.repository import is_on_disk
    from families.text_limit import cut

    base = find_base(request["base"])
    if not is_on_disk(base):
        nothing = [None] * len(request["texts"])
        return {"tokens": nothing, "lost": nothing, "most": None}
    family, token = _family(base.name), request.get("token")
    vectors = {token: torch.zeros(1, 1)} if token else {}
    counts, lost = [], []
    for text in request["texts"]:
        read = family.tokenize(text, vectors)
        # The template before the text does not count.
        counts.append(len(read.ids) - family.text_limit(read) + family.max_text_tokens)
        found = cut(family, text, vectors)
        lost.append(None if found is None else found.first_lost())
    return {"tokens": counts, "lost": lost, "most": family.max_text_tokens}


@lru_cache(4)
def _family(name: str) -> Any:
    from families.loading import load_family
    from families.registry import find_base

    return load_family(find_base(name))  # its weights are not loaded


if __name__ == "__main__":
    main()
